import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac.python.ops.rules import levenberg_marquardt

OMEGA = 0.5
NAN, INF = math.nan, math.inf
FINITE = st.floats(-1e3, 1e3)


def adapt(before, after, predicted, damping=1.0, floor=0.0, dtype=tf.float64, **kwargs):
    damping, rho = levenberg_marquardt.adapt(
        tf.constant(damping, dtype), before, after, predicted, OMEGA, floor, **kwargs
    )
    return damping.numpy(), rho.numpy()


@pytest.mark.parametrize(
    "before, after, predicted, factor",
    [
        (1.0, 0.0, -1.0, OMEGA),  # Ratio 1: the model is right.
        (1.0, 0.5, -1.0, 1.0),  # Ratio 0.5.
        (1.0, 0.9, -1.0, 1 / OMEGA),  # Ratio 0.1: far too optimistic.
        (1.0, 1.5, -1.0, 1 / OMEGA),  # The loss grew against the prediction.
        (1.0, 0.5, 1.0, OMEGA),  # It fell although growth was predicted.
        (1.0, 2.0, 1.0, 1 / OMEGA),  # It grew as predicted: still not welcome.
        (1.0, 1.0, -1.0, 1 / OMEGA),  # Nothing happened, but was predicted.
        (1.0, 1.0, 0.0, 1.0),  # Nothing happened, as predicted.
    ],
)
def test_the_damping_follows_the_reduction_ratio(before, after, predicted, factor):
    assert adapt(before, after, predicted)[0] == factor


@pytest.mark.parametrize("after", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_increases_the_damping(after):
    assert adapt(1.0, after, -1.0)[0] == 1 / OMEGA


@pytest.mark.parametrize(
    "before, predicted", [(NAN, -1.0), (2.0, NAN)], ids=["no loss", "no prediction"]
)
def test_an_undefined_comparison_changes_nothing(before, predicted):
    assert adapt(before, 1.0, predicted)[0] == 1.0


def test_growth_counts_even_without_a_prediction():
    assert adapt(1.0, 2.0, NAN)[0] == 1 / OMEGA


def test_rho_is_the_actual_over_the_predicted_change():
    assert adapt(3.0, 2.5, -2.0)[1] == 0.25


@given(before=FINITE, after=FINITE, predicted=FINITE)
@settings(max_examples=60, deadline=None)
def test_the_damping_never_shrinks_when_the_loss_grew(before, after, predicted):
    damping, _ = adapt(before, after, predicted)
    assert damping in (OMEGA, 1.0, 1 / OMEGA)
    if after > before:
        assert damping == 1 / OMEGA


@given(ratios=st.tuples(FINITE, FINITE), predicted=st.floats(-10, -0.1))
@settings(max_examples=60, deadline=None)
def test_a_better_ratio_never_gives_a_larger_damping(ratios, predicted):
    worse, better = sorted(ratios)
    damping_of = [
        adapt(0.0, ratio * predicted, predicted)[0] for ratio in (worse, better)
    ]
    assert damping_of[1] <= damping_of[0]


@given(before=FINITE, after=FINITE, predicted=FINITE, floor=st.floats(0, 10))
@settings(max_examples=40, deadline=None)
def test_the_damping_never_falls_below_its_floor(before, after, predicted, floor):
    assert adapt(before, after, predicted, floor=floor)[0] >= floor


def test_the_thresholds_are_the_callers():
    kwargs = {"decrease_threshold": 0.4, "increase_threshold": 0.05}
    assert adapt(1.0, 0.5, -1.0, **kwargs)[0] == OMEGA
    assert adapt(1.0, 0.9, -1.0, **kwargs)[0] == 1.0


def test_a_decay_per_step_becomes_a_decay_per_adaptation():
    np.testing.assert_allclose(
        levenberg_marquardt.decay_per_adaptation(0.95, 5), 0.95**5, rtol=1e-15
    )


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
def test_everything_is_computed_in_the_dampings_dtype(dtype):
    damping, rho = levenberg_marquardt.adapt(
        tf.constant(1.0, dtype),
        tf.constant(1.0, tf.float32),
        tf.constant(0.0, tf.float64),
        -1.0,
        OMEGA,
        1e-8,
    )
    assert damping.dtype == rho.dtype == dtype
