import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac.python.ops.rules import norm_constraint

POSITIVE = st.floats(1e-6, 1e6)


@given(squared_norm=POSITIVE, learning_rate=POSITIVE, bound=POSITIVE)
@settings(max_examples=50, deadline=None)
def test_the_bound_is_attained_exactly_where_it_binds(
    squared_norm, learning_rate, bound
):
    kappa = norm_constraint.clip_coefficient(
        tf.constant(squared_norm, tf.float64), learning_rate, bound
    ).numpy()
    clipped = (kappa * learning_rate) ** 2 * squared_norm
    if learning_rate**2 * squared_norm <= bound:
        assert kappa == 1.0
    else:
        np.testing.assert_allclose(clipped, bound, rtol=1e-12)


def test_a_step_clipped_in_the_metric_of_its_curvature_has_the_bounded_length():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(5, 5))
    curvature = root @ root.T + 0.1 * np.eye(5)
    gradient = rng.normal(size=5)
    step = np.linalg.solve(curvature, gradient)
    kappa = norm_constraint.clip_coefficient(
        tf.constant(gradient @ step), learning_rate=2.0, bound=1e-3
    ).numpy()
    move = 2.0 * kappa * step
    np.testing.assert_allclose(move @ curvature @ move, 1e-3, rtol=1e-10)


@pytest.mark.parametrize("squared_norm", [0.0, -1e-9])
def test_a_step_of_no_length_is_left_alone(squared_norm):
    kappa = norm_constraint.clip_coefficient(tf.constant(squared_norm), 0.1, 1e-3)
    assert kappa.numpy() == 1.0


def test_a_zero_learning_rate_is_left_alone():
    assert norm_constraint.clip_coefficient(tf.constant(4.0), 0.0, 1e-3).numpy() == 1.0


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
def test_the_coefficient_has_the_norms_dtype(dtype):
    kappa = norm_constraint.clip_coefficient(
        tf.constant(4.0, dtype), tf.constant(1.0, tf.float32), tf.Variable(1.0)
    )
    assert kappa.dtype == dtype
    assert kappa.numpy() == 0.5
