"""Mini-batch statistics against slow, explicit loops."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config
from kfac.python.ops import fisher_factors as ff
from kfac.python.ops.fisher_factors import statistics
from kfac.tests.ops import fisher_factor_cases as cases

tf1 = tf.compat.v1


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as new_graph:
        yield new_graph


def evaluate(tensor, feed=None):
    with tf1.Session() as session:
        return session.run(tensor, feed)


def randn(*shape, seed=0):
    return np.random.RandomState(seed).randn(*shape)


def dynamic(array, shape=None):
    """A placeholder of unknown sizes (or of this static shape) and its feed."""
    holder = tf1.placeholder(array.dtype, shape or [None] * array.ndim)
    return holder, {holder: array}


def test_compute_cov_is_the_mean_outer_product_and_exactly_symmetric():
    x = randn(7, 5).astype(np.float32)
    cov = evaluate(ff.compute_cov(tf.constant(x)))
    assert cov.dtype == np.float32
    np.testing.assert_array_equal(cov, cov.T)
    np.testing.assert_allclose(cov, cases.mean_outer(x), rtol=1e-5, atol=1e-6)


def test_compute_cov_takes_a_right_factor_a_normalizer_and_a_dynamic_batch():
    x, y = randn(4, 2), randn(4, 3, seed=1)
    holder, feed = dynamic(x, [None, 2])
    np.testing.assert_allclose(
        evaluate(ff.compute_cov(holder), feed), cases.mean_outer(x)
    )
    np.testing.assert_allclose(
        evaluate(ff.compute_cov(tf.constant(x), tf.constant(y), normalizer=3)),
        x.T @ y / 3,
    )


def test_append_homog_appends_a_one_or_the_value_to_the_last_axis():
    x = randn(2, 3, 4)
    holder, feed = dynamic(x)
    ones = evaluate(ff.append_homog(holder), feed)
    np.testing.assert_array_equal(ones, np.concatenate([x, np.ones((2, 3, 1))], -1))
    value = evaluate(ff.append_homog(tf.constant(x[0, 0]), homog_value=tf.constant(2)))
    np.testing.assert_array_equal(value, [*x[0, 0], 2.0])
    # A Python number must not pass through float32.
    assert evaluate(ff.append_homog(tf.constant(x), homog_value=0.1))[0, 0, -1] == 0.1
    with pytest.raises(ValueError, match="known rank"):
        ff.append_homog(tf1.placeholder(tf.float32))


@pytest.mark.parametrize("has_bias", [False, True])
def test_moments_with_bias_equal_those_of_rows_with_ones_appended(has_bias):
    x = randn(6, 3)
    rows = cases.with_ones(x, has_bias)
    moment, diagonal = evaluate(
        [
            statistics.second_moment(tf.constant(x), has_bias),
            statistics.second_moment_diagonal(tf.constant(x), has_bias),
        ]
    )
    np.testing.assert_allclose(moment, cases.mean_outer(rows), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(diagonal, np.diag(moment), rtol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
def test_frequencies_of_ids_count_foreign_ids_in_the_batch_only(compiled):
    ids = tf.constant([0, 2, 2, 5, -1, 1, 2, 4], tf.int64)

    def count():
        return statistics.one_hot_frequencies(ids, 4, tf.float64, has_bias=True)

    result = evaluate(tf.function(count, jit_compile=True)() if compiled else count())
    np.testing.assert_array_equal(result, [1 / 8, 1 / 8, 3 / 8, 0, 1])


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("uses", [1, 2, 4])
def test_shifted_moment_pairs_each_use_with_the_one_before(uses, has_bias):
    data = randn(uses, 3, 2)
    rows = cases.with_ones(data, has_bias)
    size = rows.shape[-1]
    expected = np.zeros((size, size))
    for t, b in itertools.product(range(uses - 1), range(3)):
        expected += np.outer(rows[t + 1, b], rows[t, b]) / (uses * 3)
    for tensor, feed in ((tf.constant(data), None), dynamic(data, [None, None, 2])):
        result = evaluate(statistics.shifted_cross_moment(tensor, has_bias), feed)
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-14)


def test_shifted_moments_keep_the_block_toeplitz_matrix_semi_definite():
    # What dividing by `uses` instead of `uses - 1` is for.
    rng = np.random.RandomState(0)
    for _ in range(5):
        data = rng.randn(4, 1, 2)
        zero = cases.mean_outer(data.reshape(-1, 2))
        one = evaluate(statistics.shifted_cross_moment(tf.constant(data)))
        toeplitz = np.block([[zero, one.T], [one, zero]])
        assert np.linalg.eigvalsh(toeplitz).min() > -1e-12


def test_folded_and_canonical_data_hold_the_same_uses():
    data = randn(3, 2, 4)
    folded = data.reshape(6, 4)
    holder, feed = dynamic(folded, [None, 4])
    canonical = statistics.to_canonical(holder, 3)
    np.testing.assert_array_equal(evaluate(canonical, feed), data)
    assert statistics.to_canonical(tf.constant(data), 3).shape == (3, 2, 4)
    np.testing.assert_array_equal(
        evaluate(statistics.fold_uses(canonical), feed), folded
    )


@pytest.mark.parametrize(
    "shape, num_uses, message",
    [
        ((6, 4), None, "num_uses = None"),
        ((6, 4), 4, "do not divide"),
        ((3, 2, 4), 2, "have 3 uses"),
        ((6,), 3, r"expected \[uses, batch, features\]"),
    ],
)
def test_data_that_are_not_canonical_are_refused(shape, num_uses, message):
    with pytest.raises(ValueError, match=message):
        statistics.to_canonical(tf.zeros(shape), num_uses)


def test_batch_size_of_several_uses_is_static_where_it_can_be():
    assert statistics.num_cases(tf.zeros([6, 4]), 3) == 2
    assert statistics.num_cases(tf.zeros([3, 2, 4]), None) == 2
    assert statistics.num_cases(tf.zeros([3, 2], tf.int32), 3, feature_rank=0) == 2
    holder, feed = dynamic(np.zeros((3, 2, 4)))
    assert evaluate(statistics.num_cases(holder, 3), feed) == 2
    with pytest.raises(TypeError, match="num_uses must be an int"):
        statistics.num_cases(tf.zeros([6, 4]), None)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("chunk_elements", [1, 70, 1 << 24])
def test_squared_example_gradients_do_not_depend_on_the_chunks(
    monkeypatch, chunk_elements, groups
):
    # 24 or 48 entries per case: chunks of 1, of 1 or 2, and of all 5 cases.
    monkeypatch.setattr(statistics, "MAX_CHUNK_ELEMENTS", chunk_elements)
    offsets, channels, outputs = 3, 4, 4
    inputs, grads = randn(5, 2, offsets * channels), randn(5, 2, outputs, seed=1)
    expected = np.zeros((offsets, channels // groups, outputs))
    for b, k, c, o in itertools.product(
        range(5), range(offsets), range(channels // groups), range(outputs)
    ):
        group = o // (outputs // groups)
        channel = k * channels + group * (channels // groups) + c
        expected[k, c, o] += (inputs[b, :, channel] @ grads[b, :, o]) ** 2
    expected = expected.reshape(-1, outputs)
    static = tf.constant(inputs), tf.constant(grads)
    inputs_in, feed = dynamic(inputs, [None, None, 12])
    grads_in, more = dynamic(grads, [None, None, 4])
    for pair, feeds in ((static, None), ((inputs_in, grads_in), feed | more)):
        result = statistics.sum_of_squared_example_gradients(
            *pair, groups=groups, offsets=offsets
        )
        np.testing.assert_allclose(evaluate(result, feeds), expected, rtol=1e-12)


def test_chunks_of_a_dynamic_batch_are_no_larger_than_the_batch(monkeypatch):
    # Else a small batch would be padded to the size of a chunk.
    seen = []

    def function(x):
        seen.append(x)
        return tf.reduce_sum(x, axis=0)

    holder, feed = dynamic(randn(5, 3), [None, 3])
    total = statistics.sum_over_chunks(function, (holder,), 3)
    result, first = evaluate([total, seen[0]], feed)
    assert len(first) == 5
    np.testing.assert_allclose(result, randn(5, 3).sum(0), rtol=1e-12)


def test_one_hot_frequencies_are_the_diagonal_of_the_one_hot_second_moment():
    ids = np.random.RandomState(0).randint(5, size=20)
    moment = cases.mean_outer(np.eye(5)[ids])
    np.testing.assert_allclose(moment, np.diag(np.diag(moment)))  # Nothing is lost.
    result = evaluate(statistics.one_hot_frequencies(tf.constant(ids), 5, tf.float32))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, np.diag(moment), rtol=1e-6)


# --- sub-sampling ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5, 9])
def test_random_gather_takes_distinct_rows_in_random_order(count):
    rows = np.arange(15).reshape(5, 3)
    tf1.set_random_seed(1)
    holder, feed = dynamic(rows, [None, 3])
    static = ff._random_tensor_gather(tf.constant(rows), count)
    assert static.shape.as_list() == [min(count, 5), 3]
    dynamic_rows = ff._random_tensor_gather(holder, tf.constant(count))
    orders = set()
    with tf1.Session() as session:
        for _ in range(20):
            for result in session.run([static, dynamic_rows], feed):
                firsts = result[:, 0] // 3
                assert len(set(firsts)) == len(firsts) == min(count, 5)
                np.testing.assert_array_equal(result, rows[firsts])
                orders.add(tuple(firsts))
    # 40 draws of at least 20 possible orders all alike: probability below 20^-39.
    assert len(orders) > 1


def test_random_gather_draws_every_row_equally_often():
    tf1.set_random_seed(1)
    draw = ff._random_tensor_gather(tf.range(4), 2)
    counts = np.zeros(4)
    with tf1.Session() as session:
        for _ in range(400):
            counts[session.run(draw)] += 1
    # Each row is in half of the draws: 200, with standard deviation 10.
    np.testing.assert_allclose(counts, 200, atol=50)


@pytest.mark.parametrize("rows, kept", [(6, 6), (7, 7), (8, 7), (20, 7)])
def test_patches_are_subsampled_to_a_multiple_of_their_width(rows, kept):
    patches = randn(rows, 3)
    holder, feed = dynamic(patches, [None, 3])
    with config.override(max_num_patches_per_dimension=2.2):  # ceil(2.2 * 3) = 7
        static = ff._subsample_patches(tf.constant(patches))
        run_time = ff._subsample_patches(holder)
    assert static.shape.as_list() == [kept, 3]
    result = evaluate(run_time, feed)
    assert len(result) == len(np.unique(result, axis=0)) == kept


def test_the_absolute_cap_on_patches_wins():
    with config.override(max_num_patches=4):
        assert ff._subsample_patches(tf.zeros([50, 3])).shape.as_list() == [4, 3]
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        ff._subsample_patches(tf.zeros([5, 3, 2]))
