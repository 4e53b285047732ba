import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import deferred, errors, utils
from kfac.tests import graph_kinds

FEW = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)


def test_ensure_sequence_and_as_list_wrap_only_single_objects():
    for sequence in ([1, 2], (1, 2), [], ()):
        assert utils.ensure_sequence(sequence) is sequence
        assert utils._as_list(sequence) is sequence
    assert utils.ensure_sequence("ab") == ("ab",)
    assert utils._as_list(None) == [None]


def test_cls_name_is_the_name_of_the_objects_class():
    assert utils.cls_name(utils.SequenceDict()) == "SequenceDict"


@FEW
@hypothesis.given(st.dictionaries(st.integers(), st.text()))
def test_sequence_dict_holds_what_a_dict_holds(entries):
    for source in (entries, list(entries.items())):
        held = utils.SequenceDict(source)
        assert held.items() == list(entries.items())
        assert held[list(entries)] == list(entries.values())
        assert all(held[key] == value for key, value in entries.items())


def test_sequence_dict_reads_nested_sequences_as_nested_lists():
    held = utils.SequenceDict({"a": 1, "b": 2, "c": 3})
    assert held["a", ["b", ("c",)]] == [1, [2, [3]]]


def test_sequence_dict_writes_sequences_pairwise():
    held = utils.SequenceDict()
    held["a", "b"] = (1, 2)
    held["c"] = (3, 4)
    held[["d", ("e", "f")]] = [5, (6, 7)]
    expected = [("a", 1), ("b", 2), ("c", (3, 4)), ("d", 5), ("e", 6), ("f", 7)]
    assert held.items() == expected


def test_sequence_dict_refuses_sequences_of_unequal_length():
    held = utils.SequenceDict()
    with pytest.raises(ValueError, match="2 keys .* 3 values"):
        held["a", "b"] = (1, 2, 3)
    assert held.items() == []


def test_sequence_dict_raises_key_error_for_a_missing_key():
    held = utils.SequenceDict({"a": 1})
    for key in ("b", ("a", "b"), ["b"]):
        with pytest.raises(KeyError):
            held[key]


def test_sequence_dict_takes_variables_as_keys_by_identity():
    # Eager variables have no hash, and compare elementwise.
    a, b = tf.Variable([1.0, 1.0]), tf.Variable([1.0, 1.0])
    held = utils.SequenceDict([(a, "a"), (b, "b")])
    assert held[a, b] == ["a", "b"]
    assert [key is v for (key, _), v in zip(held.items(), (a, b), strict=True)] == [
        True,
        True,
    ]
    with pytest.raises(KeyError):
        held[tf.Variable([1.0, 1.0])]


def _deferred(shape, name="d", **kwargs):
    return deferred.DeferredTensor(
        lambda: tf.zeros(shape), shape, tf.float32, name, **kwargs
    )


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
def test_partitioned_tensor_converts_to_the_concatenation(kind):
    parts = [np.arange(6.0).reshape(3, 2), np.ones((1, 2)), np.zeros((2, 2))]

    def build():
        tensors = [tf.constant(part) for part in parts[:2]]
        tensors.append(
            deferred.DeferredTensor(
                lambda: tf.constant(parts[2]), [2, 2], tf.float64, "last"
            )
        )
        joined = utils.PartitionedTensor(tensors)
        assert joined.shape.as_list() == joined.get_shape().as_list() == [6, 2]
        assert joined.dtype == tf.float64
        assert utils.get_shape(joined) == (6, 2)
        return (
            tf.convert_to_tensor(joined),
            joined.as_tensor(tf.float64),
            joined[1:4, 0],
            tf.reduce_sum(joined),
            tf.shape(joined),
        )

    whole = np.concatenate(parts)
    converted, as_tensor, part, total, shape = graph_kinds.Run(kind, build)()
    np.testing.assert_array_equal(converted, whole)
    np.testing.assert_array_equal(as_tensor, whole)
    np.testing.assert_array_equal(part, whole[1:4, 0])
    np.testing.assert_allclose(total, whole.sum())
    np.testing.assert_array_equal(shape, [6, 2])


def test_partitioned_tensor_makes_no_op_until_it_is_used():
    with tf.Graph().as_default() as graph:
        tensors = [tf.zeros([2, 3]), tf.zeros([4, 3])]
        before = len(graph.get_operations())
        joined = utils.PartitionedTensor(tensors)
        _ = joined.shape, joined.dtype, joined.device, hash(joined), str(joined)
        assert len(graph.get_operations()) == before


def test_partitioned_tensor_of_an_unknown_batch_has_an_unknown_batch():
    with tf.Graph().as_default():
        tensors = [tf.zeros([2, 3]), tf.compat.v1.placeholder(tf.float32, [None, 3])]
        assert utils.PartitionedTensor(tensors).shape.as_list() == [None, 3]


def test_partitioned_tensors_are_equal_iff_their_members_are_the_same_objects():
    a, b, c = (_deferred([2, 3]) for _ in range(3))
    joined = utils.PartitionedTensor([a, b])
    twin = utils.PartitionedTensor((a, b))
    assert joined == twin
    assert not joined != twin
    assert hash(joined) == hash(twin)
    assert {joined: 1}[twin] == 1
    for other in ([b, a], [a], [a, b, c], [a, c]):
        assert joined != utils.PartitionedTensor(other)
    assert joined != [a, b]


def test_partitioned_tensor_keeps_the_sequence_given():
    tensors = [_deferred([2, 3])]
    assert utils.PartitionedTensor(tensors).tensors is tensors


@pytest.mark.parametrize("tensors", [[], ()])
def test_partitioned_tensor_refuses_no_tensors(tensors):
    with pytest.raises(ValueError, match="at least one"):
        utils.PartitionedTensor(tensors)


def test_partitioned_tensor_refuses_members_that_disagree():
    with tf.Graph().as_default():
        float32 = tf.zeros([2, 3])
        with pytest.raises(ValueError, match="float32.*float64"):
            utils.PartitionedTensor([float32, tf.zeros([2, 3], tf.float64)])
        with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
            utils.PartitionedTensor([float32, tf.zeros([2, 4])])
    with pytest.raises(ValueError, match="one_hot_depth"):
        utils.PartitionedTensor([_deferred([2], one_hot_depth=5), _deferred([2])])


def test_partitioned_tensor_forwards_the_members_one_hot_depth():
    plain, ids = _deferred([2]), _deferred([2], one_hot_depth=5)
    assert utils.PartitionedTensor([plain, plain]).one_hot_depth is None
    assert utils.PartitionedTensor([ids, ids]).one_hot_depth == 5


def test_partitioned_tensor_has_a_device_iff_the_members_share_it():
    on_0, on_1 = _deferred([2], device="/cpu:0"), _deferred([2], device="/cpu:1")
    assert utils.PartitionedTensor([on_0, on_0]).device == "/cpu:0"
    assert utils.PartitionedTensor([on_0, on_1]).device is None


def test_partitioned_tensor_refuses_to_convert_to_another_dtype_or_a_reference():
    joined = utils.PartitionedTensor([_deferred([2])])
    for arguments in ({"dtype": tf.float64}, {"as_ref": True}):
        with pytest.raises(AssertionError) as caught:
            joined.as_tensor(**arguments)
        assert isinstance(caught.value, errors.ArgumentError)


def test_partitioned_tensor_says_what_it_holds():
    joined = utils.PartitionedTensor([_deferred([2, 3], "first"), _deferred([4, 3])])
    assert str(joined).startswith(
        "PartitionedTensor([first, ...], dtype=float32, shape="
    )
