"""Dictionaries and sets that know tensors and variables by identity."""

import collections

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops.layer_collection import LayerParametersDict
from kfac.python.ops.layer_collection.parameters_dict import (
    FactorDict,
    IdentityDict,
    UseCounts,
    same_variables,
    variable_set,
)
from kfac.tests import graph_kinds


def _in_every_kind(check):
    """Runs `check(x, y, z)` on three equal variables in each kind of graph."""

    @pytest.mark.parametrize("kind", (*graph_kinds.FAST, graph_kinds.V1_ON))
    def test(kind):
        def build():
            check(*(graph_kinds.variable([1.0, 2.0], name) for name in "xyz"))
            return tf.constant(0)

        graph_kinds.Run(kind, build)()

    test.__name__ = check.__name__
    test.__doc__ = check.__doc__
    return test


@_in_every_kind
def test_keys_are_equal_by_identity_not_by_value(x, y, z):
    d = LayerParametersDict()
    d[x] = "x"
    d[(y, z)] = "yz"
    assert d[x] == "x"
    assert d[[y, z]] == "yz"
    assert [y, z] in d
    assert y not in d
    assert (z, y) not in d
    with pytest.raises(KeyError):
        d[y]
    assert list(d)[0] is x
    assert all(a is b for a, b in zip(list(d)[1], (y, z), strict=True))
    assert list(d.values()) == ["x", "yz"]
    assert [value for _, value in d.items()] == ["x", "yz"]
    assert isinstance(d, collections.OrderedDict)


@_in_every_kind
def test_an_overlapping_key_is_refused_and_nothing_inserted(x, y, z):
    d = LayerParametersDict()
    d[(x, y)] = 1
    for key in ((x, y), [x, y], x, (y, z), (y, x)):
        with pytest.raises(ValueError, match="already present"):
            d[key] = 2
        assert len(d) == 1
        assert d[(x, y)] == 1
    d[z] = 3
    assert len(d) == 2


@_in_every_kind
def test_deleting_any_key_frees_its_tensors(x, y, z):
    d = LayerParametersDict()
    d[(x, y)] = 1
    d[z] = 2
    del d[[x, y]]
    d[x] = 3
    assert d.pop(z) == 2
    d[(y, z)] = 4
    assert d.popitem()[1] == 4
    d[y] = 5
    d.clear()
    d[(x, y, z)] = 6
    assert list(d.values()) == [6]
    with pytest.raises(KeyError):
        del d[x]


@_in_every_kind
def test_every_dict_method_takes_list_keys(x, y, z):
    d = LayerParametersDict({})
    assert d.setdefault([x, y], 1) == 1
    assert d.setdefault((x, y), 2) == 1
    assert d.get([x, y]) == 1
    assert d.get([y, x], "none") == "none"
    assert d.pop([z, z], None) is None
    with pytest.raises(KeyError):
        d.pop([z])
    d[z] = 2
    d.move_to_end([x, y])
    assert list(d.values()) == [2, 1]
    assert next(iter(d)) is z
    assert next(reversed(d))[0] is x
    key, value = d.popitem(last=False)
    assert key is z
    assert value == 2
    assert d.pop([x, y]) == 1
    assert not d
    with pytest.raises(KeyError):
        d.popitem()


@_in_every_kind
def test_a_copy_is_independent_and_still_checks(x, y, z):
    d = LayerParametersDict()
    d[(x, y)] = 1
    copy = d.copy()
    assert isinstance(copy, LayerParametersDict)
    assert copy == d
    copy[z] = 2
    assert z not in d
    assert copy != d
    with pytest.raises(ValueError, match="already present"):
        copy[x] = 3
    assert LayerParametersDict(d.items()) == d
    assert "LayerParametersDict([(" in repr(d)


@_in_every_kind
def test_equality_ignores_order_only_for_unordered_mappings(x, y, z):
    first, second = IdentityDict(), IdentityDict()
    first[x], first[y] = 1, 2
    second[y], second[x] = 2, 1
    assert first != second
    second.move_to_end(y)
    assert first == second
    assert first != {}
    assert first != [(x, 1), (y, 2)]
    second[z] = 3
    assert first != second


def test_a_layer_parameters_dict_equals_a_plain_dict_with_the_same_entries():
    with tf.Graph().as_default():  # Where variables can be keys of a plain dict.
        x, y = tf.constant(1.0), tf.constant(1.0)
        d = LayerParametersDict()
        d[x] = 1
        assert d == {x: 1}
        assert d != {y: 1}


@_in_every_kind
def test_use_counts_are_zero_without_an_entry(x, y, z):
    counts = UseCounts()
    assert counts[x] == 0
    assert counts.get(x) == 0
    assert len(counts) == 0
    counts[x] += 2
    assert counts[x] == 2
    assert list(counts.items())[0][1] == 2
    assert y not in counts


@_in_every_kind
def test_factor_keys_look_inside_nested_tuples(x, y, z):
    d = FactorDict()
    d[(dict, (((x, y),), 3, "SAME"))] = 1
    assert (dict, (((x, y),), 3, "SAME")) in d
    assert (dict, (((x, z),), 3, "SAME")) not in d
    assert (dict, (((x, y),), 3, "SAME", None)) not in d
    assert (list, (((x, y),), 3, "SAME")) not in d


@pytest.mark.parametrize("bad", [[1], {}, np.zeros(2)], ids=["list", "dict", "array"])
def test_a_factor_key_with_unhashable_arguments_is_a_type_error(bad):
    with pytest.raises(TypeError, match="cannot be hashed"):
        FactorDict()[dict, (bad,)] = 1


@_in_every_kind
def test_a_variable_set_goes_by_identity_and_ignores_order(x, y, z):
    first, second = variable_set([x, y]), variable_set((y, x))
    assert first == second
    assert hash(first) == hash(second)
    assert first != variable_set([x, z])
    assert {first: 1}[second] == 1
    assert len(first & variable_set([x, z])) == 1
    assert first.isdisjoint(variable_set([z]))
    assert x in first
    assert z not in first
    assert same_variables(first, [y, x])
    assert not same_variables(first, [y])


def test_a_variable_set_is_a_frozenset_in_v1_graphs():
    with tf.Graph().as_default():
        x = graph_kinds.variable([1.0], "x")
        assert variable_set([x]) == frozenset([x])
        assert isinstance(variable_set([x]), frozenset)
