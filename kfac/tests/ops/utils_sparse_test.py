import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import utils
from kfac.tests import graph_kinds

RNG = np.random.RandomState(0)
INDICES = np.array([3, 0, 3])  # Row 3 twice: it means the sum.
VALUES = RNG.randn(3, 2)


def _slices(dense_shape=(5, 2)):
    shape = None if dense_shape is None else tf.constant(dense_shape, tf.int64)
    return tf.IndexedSlices(tf.constant(VALUES), tf.constant(INDICES), shape)


def _dense():
    dense = np.zeros((5, 2))
    np.add.at(dense, INDICES, VALUES)
    return dense


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_sparse_products_are_the_dense_ones(kind):
    matrix, diagonal = RNG.randn(2, 4), RNG.randn(5)

    def build():
        right = utils.matmul_sparse_dense(_slices(), tf.constant(matrix))
        transposed = utils.matmul_sparse_dense(
            _slices(), tf.constant(matrix.T), transpose_b=True
        )
        left = utils.matmul_diag_sparse(tf.constant(diagonal), _slices())
        for product in (right, transposed, left):
            assert isinstance(product, tf.IndexedSlices)
        return [tf.convert_to_tensor(p) for p in (right, transposed, left)]

    right, transposed, left = graph_kinds.Run(kind, build)()
    np.testing.assert_allclose(right, _dense() @ matrix, rtol=1e-12)
    np.testing.assert_allclose(transposed, _dense() @ matrix, rtol=1e-12)
    np.testing.assert_allclose(left, diagonal[:, None] * _dense(), rtol=1e-12)


def test_indices_are_kept_and_the_dense_shape_follows():
    slices = _slices()
    product = utils.matmul_sparse_dense(slices, tf.zeros([2, 4], tf.float64))
    assert product.indices is slices.indices
    assert product.dense_shape.numpy().tolist() == [5, 4]
    scaled = utils.matmul_diag_sparse(tf.zeros([5], tf.float64), slices)
    assert scaled.indices is slices.indices
    assert scaled.dense_shape is slices.dense_shape


def test_an_unknown_dense_shape_stays_unknown():
    slices = _slices(dense_shape=None)
    matrix, diagonal = tf.zeros([2, 4], tf.float64), tf.zeros([5], tf.float64)
    assert utils.matmul_sparse_dense(slices, matrix).dense_shape is None
    assert utils.matmul_diag_sparse(diagonal, slices).dense_shape is None


def test_operands_of_another_rank_are_refused():
    vectors = tf.IndexedSlices(tf.zeros([3]), tf.constant([0, 1, 2]))
    matrix, vector = tf.zeros([2, 2], tf.float64), tf.zeros([5], tf.float64)
    with pytest.raises(ValueError, match="values"):
        utils.matmul_sparse_dense(vectors, matrix)
    with pytest.raises(ValueError, match="values"):
        utils.matmul_diag_sparse(tf.zeros([3]), vectors)
    with pytest.raises(ValueError, match="matrix"):
        utils.matmul_sparse_dense(_slices(), vector)
    with pytest.raises(ValueError, match="vector"):
        utils.matmul_diag_sparse(matrix, _slices())


def test_the_transpose_of_a_row_sparse_matrix_is_refused():
    with pytest.raises(ValueError, match="transpose_a"):
        utils.matmul_sparse_dense(_slices(), tf.zeros([3, 3]), transpose_a=True)
