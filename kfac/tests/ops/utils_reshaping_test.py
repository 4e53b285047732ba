import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import utils
from kfac.tests import graph_kinds

FEW = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, max_side=3)


@FEW
@hypothesis.given(st.lists(SHAPES, min_size=1, max_size=3), st.booleans())
def test_column_to_tensors_inverts_tensors_to_column(shapes, as_tuple):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    tensors = [tf.constant(array, tf.float64) for array in arrays]
    template = tuple(tensors) if as_tuple else tensors
    column = utils.tensors_to_column(template)
    flat = np.concatenate([np.ravel(array) for array in arrays])
    np.testing.assert_array_equal(column, flat[:, None])
    back = utils.column_to_tensors(template, column)
    assert isinstance(back, tuple)
    for array, tensor in zip(arrays, back, strict=True):
        np.testing.assert_array_equal(tensor, array)


def test_single_tensor_becomes_a_column_and_back():
    array = np.arange(6.0).reshape(2, 3)
    column = utils.tensors_to_column(tf.constant(array))
    np.testing.assert_array_equal(column, array.reshape(6, 1))
    np.testing.assert_array_equal(
        utils.column_to_tensors(tf.constant(array), column), array
    )


@FEW
@hypothesis.given(hnp.array_shapes(min_dims=1, max_dims=4, max_side=3), st.booleans())
def test_layer_params_to_mat2d_puts_the_bias_in_the_last_row(shape, has_bias):
    rng = np.random.RandomState(0)
    weights, bias = rng.randn(*shape), rng.randn(shape[-1])
    flat = weights.reshape(-1, shape[-1])
    if not has_bias:
        matrix = utils.layer_params_to_mat2d(tf.constant(weights))
        np.testing.assert_array_equal(matrix, flat)
        back = utils.mat2d_to_layer_params(tf.constant(weights), matrix)
        np.testing.assert_array_equal(back, weights)
        return
    params = (tf.constant(weights), tf.constant(bias))
    matrix = utils.layer_params_to_mat2d(params)
    np.testing.assert_array_equal(matrix, np.vstack([flat, bias]))
    back = utils.mat2d_to_layer_params(params, matrix)
    assert isinstance(back, tuple)
    np.testing.assert_array_equal(back[0], weights)
    np.testing.assert_array_equal(back[1], bias)


def test_sparse_gradients_pass_unchanged_and_stay_sparse():
    sparse = tf.IndexedSlices(tf.ones([1, 2]), tf.constant([3]), tf.constant([5, 2]))
    assert utils.layer_params_to_mat2d(sparse) is sparse
    assert utils.mat2d_to_layer_params(sparse, sparse) is sparse
    with pytest.raises(TypeError, match="IndexedSlices"):
        utils.mat2d_to_layer_params(sparse, tf.zeros([5, 2]))


@FEW
@hypothesis.given(*[hnp.array_shapes(min_dims=2, max_dims=2, max_side=4)] * 2)
def test_kronecker_product_is_numpys(shape1, shape2):
    rng = np.random.RandomState(0)
    a, b = rng.randn(*shape1), rng.randn(*shape2)
    product = utils.kronecker_product(tf.constant(a), tf.constant(b))
    np.testing.assert_allclose(product, np.kron(a, b), rtol=1e-14)


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_get_shape_gives_ints_where_it_can_and_scalar_tensors_elsewhere(kind):
    def build():
        rows = tf.reshape(tf.where([True, False, True]), [-1])  # Of dynamic length.
        dynamic = tf.gather(tf.zeros([3, 4]), rows)
        shape = utils.get_shape(dynamic)
        assert isinstance(shape, tuple)
        assert type(shape[1]) is int and shape[1] == 4
        assert shape[0].dtype == tf.int32 and shape[0].shape.rank == 0
        assert utils.get_shape(tf.zeros([2, 3])) == (2, 3)
        joined = utils.get_shape(utils.PartitionedTensor([dynamic, dynamic]))
        return shape[0], joined[0]

    assert graph_kinds.Run(kind, build)() == (2, 4)


def test_get_shape_refuses_an_unknown_rank():
    with tf.Graph().as_default():
        with pytest.raises(ValueError, match="unknown rank"):
            utils.get_shape(tf.compat.v1.placeholder(tf.float32))
