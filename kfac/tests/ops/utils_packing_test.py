"""Packing tensors into vectors loses nothing that has to travel, and nothing more."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops.utils import packing
from kfac.python.ops.utils.packing import Layout, Spec

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("layout", (Layout.SYMMETRIC, Layout.LOWER))
def test_a_triangle_is_packed_without_gaps_and_unpacked_exactly(n, layout):
    matrix = RANDOM.normal(size=(n, n))
    matrix = np.tril(matrix) if layout is Layout.LOWER else matrix + matrix.T
    packed = packing.pack_triangle(tf.constant(matrix)).numpy()
    np.testing.assert_array_equal(np.sort(packed), np.sort(matrix[np.tril_indices(n)]))
    restored = packing.unpack_triangle(tf.constant(packed), n, layout)
    np.testing.assert_array_equal(restored, matrix)


def test_the_upper_triangle_does_not_matter():
    matrix = RANDOM.normal(size=(5, 5))
    matrix[np.triu_indices(5, 1)] = np.nan
    restored = packing.unpack_triangle(
        packing.pack_triangle(tf.constant(matrix)), 5, Layout.SYMMETRIC
    )
    expected = np.tril(matrix) + np.tril(matrix, -1).T
    np.testing.assert_array_equal(restored, expected)


def test_an_infinite_entry_stays_where_it_is():
    matrix = np.eye(4)
    matrix[2, 1] = matrix[1, 2] = np.inf
    restored = packing.unpack_triangle(
        packing.pack_triangle(tf.constant(matrix)), 4, Layout.SYMMETRIC
    )
    np.testing.assert_array_equal(restored, matrix)


SPECS = [
    Spec((3, 3), tf.float64, Layout.SYMMETRIC),
    Spec((2, 4), tf.float32),
    Spec((), tf.float64),
    Spec((2, 2), tf.float64, Layout.LOWER),
    Spec((0, 4), tf.float32),
]


def test_tensors_travel_in_one_vector_per_dtype():
    symmetric = np.array([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]])
    lower = np.array([[7.0, 0], [8, 9]])
    tensors = [
        symmetric,
        np.arange(8, dtype=np.float32).reshape(2, 4),
        np.array(10.0),
        lower,
        np.zeros((0, 4), np.float32),
    ]
    pack = packing.Packing(SPECS)
    vectors = pack.pack([tf.constant(t) for t in tensors])
    assert pack.sizes == {tf.float64: 6 + 1 + 3, tf.float32: 8}
    assert [v.shape for v in vectors] == [[10], [8]]
    for restored, tensor in zip(pack.unpack(vectors), tensors, strict=True):
        np.testing.assert_array_equal(restored, tensor)
        assert restored.shape == tensor.shape


def test_what_is_missing_is_zeros():
    vectors = packing.Packing(SPECS).pack([None] * len(SPECS))
    assert [v.numpy().tolist() for v in vectors] == [[0.0] * 10, [0.0] * 8]


def test_a_matrix_of_another_shape_is_refused():
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        packing.Packing(SPECS[:1]).pack([tf.eye(4, dtype=tf.float64)])


def test_packing_compiles_with_static_shapes():
    @tf.function(jit_compile=True)
    def there_and_back(matrix, vector):
        pack = packing.Packing([SPECS[0], Spec((2,), tf.float64)])
        return pack.unpack(pack.pack([matrix, vector]))

    matrix = tf.constant(np.diag([1.0, 2.0, 3.0]))
    restored = there_and_back(matrix, tf.constant([4.0, 5.0], tf.float64))
    np.testing.assert_array_equal(restored[0], matrix)


def test_the_size_of_a_spec_counts_what_travels():
    variable = tf.Variable(np.zeros((4, 4), np.float32))
    assert Spec.of(variable).num_bytes == 64
    assert Spec.of(variable, Layout.SYMMETRIC).num_bytes == 40
