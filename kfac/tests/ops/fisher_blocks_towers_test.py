"""How registered data reach the factors, what is refused, sparse gradients."""

import types

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config, deferred, fisher_factors, layer_collection, utils
from kfac.python.ops import fisher_blocks as fb
from kfac.tests import graph_kinds
from kfac.tests.ops import fisher_blocks_cases as cases

tf1 = tf.compat.v1


@pytest.fixture(autouse=True)
def _graph():
    with tf.Graph().as_default():
        yield


class SingleUse(fb.InputOutputMultiTower):
    pass


class MultiUse(fb.InputOutputMultiTowerMultiUse):
    pass


def _tensors(count, shape=(2, 3)):
    return tuple(tf.zeros(shape) for _ in range(count))


def _same(actual, expected):
    """Identical members in equally nested tuples."""
    if isinstance(expected, tuple):
        assert isinstance(actual, tuple) and len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            _same(a, e)
    elif isinstance(expected, utils.PartitionedTensor):
        assert actual == expected
    else:
        assert actual is expected


def test_towers_are_kept_in_order_and_cannot_be_replaced():
    block = SingleUse()
    x, y = _tensors(2), _tensors(2)
    for pair in zip(x, y, strict=True):
        assert block.register_additional_tower(*pair) is None
    assert block.num_registered_towers == 2
    _same(tuple(block._inputs), x)
    _same(block.tensors_to_compute_grads(), y)
    for name in ("_inputs", "_outputs"):
        with pytest.raises(AttributeError):
            setattr(block, name, [])


def test_towers_with_missing_outputs_are_noticed():
    block = SingleUse()
    block._inputs.append(tf.zeros([1]))
    with pytest.raises(AssertionError, match="1 inputs but 0 outputs"):
        _ = block.num_registered_towers


def test_constructor_arguments_go_to_the_next_class():
    class Next:
        def __init__(self, a, b=None):
            self.received = a, b

    class Block(fb.InputOutputMultiTowerMultiUse, Next):
        pass

    block = Block(7, 1, b=2)
    assert block._num_uses == 7
    assert block.received == (1, 2)


def test_separate_towers_stay_separate():
    block = SingleUse()
    x, y = _tensors(2), _tensors(2)
    for pair in zip(x, y, strict=True):
        block.register_additional_tower(*pair)
    grads = [_tensors(2), _tensors(2)]
    inputs, processed = block._process_data(grads)
    _same(inputs, x)
    _same(processed, tuple(grads))


def test_concatenated_towers_become_one_partitioned_tensor():
    block = SingleUse()
    x, y = _tensors(2), _tensors(2)
    for pair in zip(x, y, strict=True):
        block.register_additional_tower(*pair)
    grads = [_tensors(2), _tensors(2)]
    with config.override(tower_strategy="concat"):
        inputs, processed = block._process_data(grads)
    _same(inputs, (utils.PartitionedTensor(x),))
    _same(processed, tuple((utils.PartitionedTensor(g),) for g in grads))


@pytest.mark.parametrize("cls", (SingleUse, MultiUse))
def test_an_unknown_tower_strategy_is_refused(cls):
    block = cls()
    block.register_additional_tower(_tensors(1), _tensors(1))
    with config.override(tower_strategy="together"):
        with pytest.raises(ValueError, match="'concat' or 'separate'"):
            block._process_data([(_tensors(1),)])


def _multi_use(num_uses, listed_inputs, listed_grads, towers=2, uses=3):
    block = MultiUse(num_uses)
    inputs, grads = [], []
    for _ in range(towers):
        x = _tensors(uses) if listed_inputs else tf.zeros([2 * uses, 3])
        inputs.append(x)
        grads.append(_tensors(uses) if listed_grads else tf.zeros([2 * uses, 3]))
        block.register_additional_tower(list(x) if listed_inputs else x, x)
    return block, inputs, grads


def test_lists_over_uses_become_partitioned_tensors():
    block, inputs, grads = _multi_use(None, True, True)
    processed_inputs, processed_grads = block._process_data([grads])
    assert block._num_uses == 3
    _same(processed_inputs, tuple(utils.PartitionedTensor(t) for t in inputs))
    _same(processed_grads, (tuple(utils.PartitionedTensor(t) for t in grads),))


def test_concatenated_lists_over_uses_are_use_major():
    block, inputs, grads = _multi_use(None, True, True)
    with config.override(tower_strategy="concat"):
        processed_inputs, processed_grads = block._process_data([grads])

    def use_major(towers):
        return utils.PartitionedTensor(
            tuple(tower[use] for use in range(3) for tower in towers)
        )

    _same(processed_inputs, (use_major(inputs),))
    _same(processed_grads, ((use_major(grads),),))


@pytest.mark.parametrize("strategy", ("separate", "concat"))
def test_single_tensors_over_uses_are_passed_on(strategy):
    block, inputs, grads = _multi_use(3, False, False)
    with config.override(tower_strategy=strategy):
        processed_inputs, processed_grads = block._process_data([list(grads)])
    _same(processed_inputs, tuple(inputs))
    _same(processed_grads, (tuple(grads),))


@pytest.mark.parametrize(
    ("listed_inputs", "listed_grads"), [(True, False), (False, True)]
)
def test_one_side_in_list_format_tells_the_number_of_uses(listed_inputs, listed_grads):
    block, _, grads = _multi_use(None, listed_inputs, listed_grads)
    block._process_data([grads])
    assert block._num_uses == 3


def test_inconsistent_numbers_of_uses_are_refused():
    block, _, grads = _multi_use(4, True, True)
    with pytest.raises(ValueError, match="num_uses is 4, but the inputs have 3"):
        block._process_data([grads])
    block, _, grads = _multi_use(4, False, True)
    with pytest.raises(ValueError, match="num_uses is 4, but the outputs have 3"):
        block._process_data([grads])
    block, _, grads = _multi_use(None, True, True)
    block.register_additional_tower(_tensors(2), _tensors(2))
    with pytest.raises(ValueError, match=r"inputs of all towers.*\[3, 3, 2\]"):
        block._process_data([grads])
    block, _, grads = _multi_use(None, False, True)
    with pytest.raises(ValueError, match="outputs of all towers"):
        block._process_data([grads, [grads[0], _tensors(2)]])
    block, _, grads = _multi_use(None, False, False)
    with pytest.raises(ValueError, match="num_uses is unknown"):
        block._process_data([grads])


def test_the_sub_batch_map_sees_every_tensor_of_a_list():
    block = fb.FullyConnectedMultiIndepFB(layer_collection.LayerCollection())
    block.register_additional_tower(_tensors(3), _tensors(3))
    seen = []
    block.use_sub_batch(lambda t: seen.append(t) or t, lambda n: n)
    block._process_data([(_tensors(3),)])
    _same(tuple(seen), tuple(block._inputs[0]))


def test_dense_factors_refuse_integer_ids():
    case = cases.case("embedding")
    block, grads = cases.register(case, layer_collection.LayerCollection())
    dense = fb.FullyConnectedKFACBasicFB(layer_collection.LayerCollection())
    dense.register_additional_tower(block._inputs[0], block._outputs[0])
    with pytest.raises(ValueError, match="one-hot"):
        dense.instantiate_factors(grads, 0.1)


def test_layers_fed_by_the_same_tensor_share_the_input_factor():
    collection = layer_collection.LayerCollection()
    inputs = tf.zeros([4, 3])
    blocks = []
    for width, has_bias in ((2, True), (5, True), (2, False)):
        block = fb.FullyConnectedKFACBasicFB(collection, has_bias=has_bias)
        outputs = tf.zeros([4, width])
        block.register_additional_tower(inputs, outputs)
        block.instantiate_factors(((outputs,),), 0.1)
        blocks.append(block)
    first, second, without_bias = blocks
    assert first.input_factor is second.input_factor
    assert first.input_factor is not without_bias.input_factor
    assert first.output_factor is not second.output_factor
    expected = (first.input_factor, first.output_factor)
    assert collection.get_factors()[:2] == expected  # Input factors come first.


def test_stand_alone_blocks_ask_for_factors_by_class_and_arguments_alone():
    """Stand-ins for a collection need not know names."""
    requests = []

    def make_or_get_factor(cls, args):
        requests.append(cls)
        return cls(*args)

    collection = types.SimpleNamespace(make_or_get_factor=make_or_get_factor)
    block, grads = cases.register(cases.case("dense kron"), collection)
    block.instantiate_factors(grads, 0.1)
    assert requests == [fisher_factors.FullyConnectedKroneckerFactor] * 2


class TestGenericBlocks:
    def test_add_up_the_batch_sizes(self):
        block = fb.NaiveFullFB(layer_collection.LayerCollection(), tf.zeros([2]))
        assert not hasattr(block, "_inputs") and not hasattr(block, "_outputs")
        for batch_size in (3, 4.0, tf.constant(5)):
            block.register_additional_tower(batch_size)
        assert block.num_registered_towers == 3
        assert block._batch_sizes[:2] == [3, 4.0]
        assert block._batch_size.shape == ()
        with tf1.Session() as session:
            assert session.run(block._batch_size) == 12

    def test_differentiate_with_respect_to_the_parameters(self):
        for params in (tf.zeros([2]), (tf.zeros([2]), tf.zeros([3]))):
            block = fb.NaiveFullFB(layer_collection.LayerCollection(), params)
            assert block.tensors_to_compute_grads() is params

    def test_share_a_factor_when_everything_is_the_same(self):
        collection = layer_collection.LayerCollection()
        gradient = tf.zeros([2])
        for _ in range(2):
            block = fb.NaiveDiagonalFB(collection, gradient)
            block.register_additional_tower(4)
            block.instantiate_factors((gradient,), 0.1)
        assert len(collection.get_factors()) == 1

    def test_accept_a_flat_vector(self):
        case = cases.case("naive full")
        with tf.Graph().as_default():
            block, grads = cases.register(case, layer_collection.LayerCollection())
            done = cases.update(block, grads)
            vector = case.vector()
            with tf.control_dependencies([done]):
                flat = block.multiply(tf.constant(cases.flat(vector)))
                parts = block.multiply([tf.constant(v) for v in vector])
            with tf1.Session() as session:
                session.run(tf1.global_variables_initializer())
                flat, parts = session.run([flat, parts])
        np.testing.assert_allclose(flat, cases.flat(parts), rtol=1e-14)


def _slices(rows, width, depth):
    """Sparse gradient with a repeated row, and the dense one."""
    values = np.random.RandomState(0).normal(size=(len(rows), width))
    dense = np.zeros((depth, width))
    np.add.at(dense, rows, values)
    sparse = tf.IndexedSlices(
        tf.constant(values), tf.constant(rows), tf.constant([depth, width])
    )
    return sparse, dense


@pytest.mark.parametrize("name", ("embedding", "embedding, independent uses"))
def test_sparse_gradients_of_embeddings_stay_sparse_and_give_the_dense_product(name):
    case = cases.case(name)

    def build():
        block, grads = cases.register(case, layer_collection.LayerCollection())
        done = cases.update(block, grads, exps=(-1,), cholesky=True)
        sparse, dense = _slices([4, 1, 4], 2, 5)
        with tf.control_dependencies([done]):
            results = []
            for multiply in (
                block.multiply,
                block.multiply_inverse,
                block.multiply_cholesky,
                lambda v: block.multiply_cholesky_inverse(v, transpose=True),
            ):
                product = multiply(sparse)
                assert isinstance(product, tf.IndexedSlices)
                results.append(
                    (tf.convert_to_tensor(product), multiply(tf.constant(dense)))
                )
            return results

    for sparse, dense in graph_kinds.Run(graph_kinds.V1_ON, build)():
        np.testing.assert_allclose(sparse, dense, rtol=1e-12, atol=1e-14)


def test_sparse_gradients_with_a_dense_input_factor_are_refused():
    collection = layer_collection.LayerCollection()
    block = fb.FullyConnectedKFACBasicFB(collection)
    outputs = tf.zeros([4, 2], tf.float64)
    block.register_additional_tower(tf.zeros([4, 5], tf.float64), outputs)
    cases.update(block, ((outputs,),))
    with pytest.raises(NotImplementedError):
        block.multiply(_slices([1], 2, 5)[0])


@pytest.mark.parametrize("cls", (fb.NaiveDiagonalFB, fb.NaiveFullFB))
def test_generic_blocks_make_sparse_gradients_dense(cls):
    def build():
        block = cls(layer_collection.LayerCollection(), tf.zeros([5, 2]))
        block.register_additional_tower(4)
        gradient = tf.constant(np.random.RandomState(1).normal(size=(5, 2)))
        done = cases.update(block, (gradient,))
        sparse, dense = _slices([4, 1, 4], 2, 5)
        with tf.control_dependencies([done]):
            return block.multiply(sparse), block.multiply(tf.constant(dense))

    sparse, dense = graph_kinds.Run(graph_kinds.V1_ON, build)()
    np.testing.assert_allclose(sparse, dense, rtol=1e-13)


def test_a_group_of_one_parameter_is_served_like_the_parameter():
    case = cases.case("dense kron of weights of rank 3")
    block, grads = cases.register(case, layer_collection.LayerCollection())
    cases.update(block, grads)
    vector = tf.constant(case.vector()[0])
    (result,) = block.multiply([vector])
    assert result.shape == vector.shape


def test_maybe_tuple_converts_lists_only():
    assert fb.maybe_tuple([1, 2]) == (1, 2)
    for value in ((1, 2), None, "ab", 3):
        assert fb.maybe_tuple(value) is value


def test_ids_of_a_float64_layer_give_float64_statistics():
    case = cases.case("embedding")
    block, grads = cases.register(case, layer_collection.LayerCollection())
    block.instantiate_factors(grads, 0.1)
    assert block.input_factor._dtype == tf.float64
    single = deferred.DeferredTensor(
        lambda: tf.zeros([4], tf.int64), [4], tf.int64, "ids", one_hot_depth=5
    )
    block = case.make(layer_collection.LayerCollection())
    outputs = tf.zeros([4, 2], tf.float32)
    block.register_additional_tower(single, outputs)
    block.instantiate_factors(((outputs,),), 0.1)
    assert block.input_factor._dtype == tf.float32
