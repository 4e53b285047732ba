import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac.python.ops.rules import momentum, scalars

SHAPES = ((3, 2), (4,), ())


def vectors(seed, dtype="float64"):
    rng = np.random.default_rng(seed)
    return [tf.constant(rng.normal(size=shape), dtype) for shape in SHAPES]


@given(decay=st.floats(0, 2), coefficient=st.floats(-3, 3))
@settings(max_examples=20, deadline=None)
def test_a_velocity_is_the_decayed_old_one_plus_the_scaled_vector(decay, coefficient):
    v, x = vectors(1), vectors(2)
    for new, old, added in zip(
        momentum.accumulate(v, x, decay, coefficient), v, x, strict=True
    ):
        np.testing.assert_allclose(
            new, decay * old.numpy() + coefficient * added.numpy(), rtol=1e-12
        )


def test_constant_gradients_accumulate_to_a_geometric_series():
    g = vectors(3)
    v = [tf.zeros_like(t) for t in g]
    for _ in range(200):
        v = momentum.accumulate(v, g, 0.9)
    # No (1 - decay) factor: the limit is g / (1 - decay), reached up to 0.9^200.
    for velocity, gradient in zip(v, g, strict=True):
        np.testing.assert_allclose(velocity, gradient.numpy() / (1 - 0.9), rtol=1e-8)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_velocities_keep_their_dtype_whatever_the_scalars_are(dtype):
    v, x = vectors(1, dtype), vectors(2, dtype)
    new = momentum.accumulate(v, x, tf.constant(0.5, "float64"), np.float32(2))
    assert [t.dtype for t in new] == [tf.as_dtype(dtype)] * len(SHAPES)


def test_sparse_vectors_count_as_the_dense_ones_they_stand_for():
    sparse = tf.IndexedSlices(
        tf.constant([[1.0, 2.0], [10.0, 20.0]]),
        tf.constant([2, 2]),
        tf.constant([3, 2]),
    )
    (new,) = momentum.accumulate([tf.ones([3, 2])], [sparse], 0.5)
    np.testing.assert_allclose(new, [[0.5, 0.5], [0.5, 0.5], [11.5, 22.5]])


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError):
        momentum.accumulate(vectors(1), vectors(2)[:2], 0.9)


def test_the_previous_update_is_the_negative_velocity():
    v = vectors(4)
    for update, velocity in zip(momentum.previous_updates(v), v, strict=True):
        np.testing.assert_array_equal(update, -velocity.numpy())


def test_weight_decay_adds_a_multiple_of_the_parameters():
    r, theta = vectors(5), vectors(6)
    for new, update, parameter in zip(
        momentum.add_weight_decay(r, theta, 0.3), r, theta, strict=True
    ):
        np.testing.assert_allclose(
            new, update.numpy() + 0.3 * parameter.numpy(), rtol=1e-14
        )


def test_nothing_is_propagated_through_decayed_parameters():
    theta = tf.constant([1.0, 2.0])
    with tf.GradientTape() as tape:
        tape.watch(theta)
        (decayed,) = momentum.add_weight_decay([theta * 0], [theta], 0.3)
    np.testing.assert_array_equal(tape.gradient(decayed, theta), [0.0, 0.0])


@pytest.mark.parametrize(
    "value", [0.1, np.float64(0.1), np.array(0.1)], ids=["float", "scalar", "array"]
)
def test_numbers_do_not_lose_digits_on_their_way_to_float64(value):
    assert scalars.cast(value, tf.float64).numpy() == 0.1


def test_tensors_and_variables_are_cast():
    for value in (tf.constant(3, tf.int32), tf.Variable(3.0)):
        result = scalars.cast(value, tf.float64)
        assert result.dtype == tf.float64
        assert result.numpy() == 3.0
