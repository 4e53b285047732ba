"""When a registration makes a layer, and when another tower of one."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import layer_collection as lc_lib
from kfac.tests.ops.layer_collection_cases import (
    BATCH,
    CASES,
    EMBEDDING,
    data,
    groups,
    register,
    unchanged,
    variable,
)

tf1 = tf.compat.v1
ALL_METHODS = sorted(CASES)


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as g:
        yield g


@pytest.fixture
def lc(graph):
    return lc_lib.LayerCollection()


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("reuse", [False, None, tf1.AUTO_REUSE, "VARIABLE_SCOPE"])
def test_an_unknown_group_is_inserted_unless_reuse_is_true(lc, method, reuse):
    case = CASES[method]
    arguments = case.arguments()
    register(lc, method, arguments, reuse=reuse)
    assert len(lc.fisher_blocks) == len(groups(arguments))
    block = lc.fisher_blocks[groups(arguments)[-1]]
    assert type(block) is case.block
    assert block.num_registered_towers == 1
    for variable_ in tf.nest.flatten(groups(arguments)):
        assert lc._vars_to_uses[variable_] == case.uses


@pytest.mark.parametrize("method", ALL_METHODS)
def test_reuse_of_an_unknown_group_is_an_error(lc, method):
    with unchanged(lc), pytest.raises(ValueError, match="reuse is set"):
        register(lc, method, CASES[method].arguments(), reuse=True)


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("reuse", [False, None, "VARIABLE_SCOPE"])
def test_a_known_group_without_reuse_is_an_error(lc, method, reuse):
    arguments = CASES[method].arguments()
    register(lc, method, arguments)
    with unchanged(lc), pytest.raises(ValueError, match="already in LayerCollection"):
        register(lc, method, arguments, reuse=reuse)


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("reuse", [True, tf1.AUTO_REUSE])
def test_a_known_group_with_reuse_gets_another_tower(lc, method, reuse):
    case = CASES[method]
    arguments = case.arguments()
    register(lc, method, arguments)
    blocks = lc.get_blocks()
    register(lc, method, arguments, reuse=reuse)
    assert all(a is b for a, b in zip(lc.get_blocks(), blocks, strict=True))
    assert {block.num_registered_towers for block in blocks} == {2}
    for variable_ in tf.nest.flatten(groups(arguments)):
        assert lc._vars_to_uses[variable_] == 2 * case.uses


@pytest.mark.parametrize("method", [m for m in ALL_METHODS if CASES[m].another_approx])
@pytest.mark.parametrize("reuse", [True, tf1.AUTO_REUSE])
def test_another_class_of_block_cannot_be_a_tower(lc, method, reuse):
    arguments = CASES[method].arguments()
    if method == "register_generic":
        arguments["params"] = variable([2], "q")
    register(lc, method, arguments)
    with unchanged(lc), pytest.raises(ValueError, match="another tower"):
        approx = CASES[method].another_approx
        register(lc, method, arguments, approx=approx, reuse=reuse)


@pytest.mark.parametrize("method", [m for m in ALL_METHODS if CASES[m].another_option])
def test_another_configuration_cannot_be_a_tower(lc, method):
    case = CASES[method]
    arguments = case.arguments()
    register(lc, method, arguments)
    with unchanged(lc), pytest.raises(ValueError, match="another tower"):
        register(lc, method, arguments, reuse=True, **case.another_option())


def test_spellings_of_the_same_configuration_are_the_same(lc):
    arguments = CASES["register_conv2d"].arguments()
    mask = np.ones([3, 3, 2])
    register(lc, "register_conv2d", arguments, patch_mask=mask)
    same = dict(padding="same", dilations=[1, 1, 1, 1], strides=(1, 1, 1, 1))
    register(
        lc, "register_conv2d", arguments, reuse=True, patch_mask=mask.copy(), **same
    )
    with unchanged(lc), pytest.raises(ValueError, match="patch_mask"):
        register(lc, "register_conv2d", arguments, reuse=True, patch_mask=0 * mask)
    with unchanged(lc), pytest.raises(ValueError, match="patch_mask"):
        register(lc, "register_conv2d", arguments, reuse=True)


def test_towers_must_agree_on_integer_ids(lc):
    arguments = EMBEDDING.arguments()
    register(lc, "register_fully_connected", arguments)
    with unchanged(lc), pytest.raises(ValueError, match="dense_inputs"):
        lc.register_fully_connected(
            arguments["params"], data(7), data(2), approx="kron_in_diag", reuse=True
        )


@pytest.mark.parametrize("scope_reuse", [False, tf1.AUTO_REUSE, True])
def test_by_default_the_ambient_variable_scope_decides(lc, scope_reuse):
    arguments = CASES["register_fully_connected"].arguments()
    with tf1.variable_scope("outer", reuse=scope_reuse):
        if scope_reuse is True:
            with pytest.raises(ValueError, match="reuse is set"):
                register(lc, "register_fully_connected", arguments)
        else:
            register(lc, "register_fully_connected", arguments)
            assert len(lc.fisher_blocks) == 1


@pytest.mark.parametrize("reuse", ["maybe", 1, "variable_scope"])
def test_any_other_value_of_reuse_is_refused(lc, reuse):
    arguments = CASES["register_fully_connected"].arguments()
    with unchanged(lc), pytest.raises(ValueError, match="duplicate"):
        register(lc, "register_fully_connected", arguments, reuse=reuse)


@pytest.mark.parametrize("other", ["subset", "superset", "overlap", "permuted"])
def test_a_variable_is_in_one_group_only(lc, other):
    w, b, c = variable([2, 2], "w"), variable([2], "b"), variable([2], "c")
    first = w if other == "superset" else (w, b)
    second = {"subset": b, "superset": (w, b), "overlap": (b, c), "permuted": (b, w)}
    lc.register_generic(first, BATCH, approx="full")
    for reuse in (False, tf1.AUTO_REUSE):
        with unchanged(lc), pytest.raises(ValueError, match="was already registered"):
            lc.register_generic(second[other], BATCH, approx="full", reuse=reuse)


def test_register_block_works_on_a_plain_dict_of_anything(lc):
    x, y = variable([1], "x"), variable([1], "y")
    lc.fisher_blocks = {x: "one", (y,): "two"}
    assert lc._register_block(x, "other", reuse=True) == "one"
    with pytest.raises(ValueError, match="already in LayerCollection"):
        lc._register_block(x, "other", reuse=False)
    with pytest.raises(ValueError, match="was already registered"):
        lc._register_block([x, y], "other", reuse=False)
    with pytest.raises(ValueError, match="another tower"):
        lc._register_block(x, 3, reuse=True)
    z = variable([1], "z")
    assert lc._register_block(z, "three") == "three"
    assert lc.registered_variables[-1] is z
    assert lc.get_blocks() == ("one", "two", "three")
