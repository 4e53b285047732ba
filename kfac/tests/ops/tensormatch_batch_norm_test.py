"""Batch normalisation is a scale and shift of the normalised data."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import estimator
from kfac.python.ops.tensormatch import graph_search as gs
from kfac.tests import graph_kinds
from kfac.tests.ops import tensormatch_cases as cases
from kfac.tests.ops.tensormatch_cases import (
    BATCH,
    assert_generic,
    blocks,
    collection_of,
    data,
    scan,
    variable,
)

tf1 = tf.compat.v1
FULL = "ScaleAndShiftFullFB"
EPSILON = 1e-3


def unfused(x, s, t, training):
    axes = list(range(x.shape.rank - 1))
    mean, variance = tf.nn.moments(x, axes) if training else moving_statistics(x)
    return tf.nn.batch_normalization(x, mean, variance, t, s, EPSILON)


def fused(x, s, t, training):
    mean, variance = (None, None) if training else moving_statistics(x)
    y, _, _ = tf1.nn.fused_batch_norm(
        x, s, t, mean, variance, epsilon=EPSILON, is_training=training
    )
    return y


def moving_statistics(x):
    channels, dtype = x.shape.as_list()[-1], x.dtype.as_numpy_dtype
    return (
        graph_kinds.variable(np.linspace(-0.5, 0.5, channels), "mean", dtype, False),
        graph_kinds.variable(np.linspace(0.5, 2.0, channels), "var", dtype, False),
    )


FORMULAS = {"unfused": unfused, "fused": fused}


def normalized(x, training):
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes) if training else np.linspace(-0.5, 0.5, x.shape[-1])
    variance = x.var(axes) if training else np.linspace(0.5, 2.0, x.shape[-1])
    return (x - mean) / np.sqrt(variance + EPSILON)


def expected_statistics(x, y, training):
    """Mean over cases of the outer product of `(scale, shift)` gradients.

    The loss of a case is `|y - target|^2`; `target` is 0 for empirical statistics.
    """
    grads = 2 * y
    locations = tuple(range(1, x.ndim - 1))
    of_scale = (grads * normalized(x, training)).sum(locations)
    per_case = np.concatenate([of_scale, grads.sum(locations)], axis=1)
    return per_case.T @ per_case / len(x)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("formula", FORMULAS)
def test_its_statistics_are_those_of_the_gradients_of_the_cases(
    kind, formula, training
):
    dtype = np.float64 if formula == "unfused" else np.float32  # The fused one's only.
    value = np.random.default_rng(0).normal(size=[BATCH, 2, 2, 3]).astype(dtype)

    def build():
        x = tf1.placeholder_with_default(value, [BATCH, 2, 2, 3])
        s = graph_kinds.variable(np.array([0.5, 1.0, -2.0], dtype), "s")
        t = graph_kinds.variable(np.array([0.1, 0.2, 0.3], dtype), "t")
        y = FORMULAS[formula](x, s, t, training)
        flat = tf.reshape(y, [BATCH, 12])
        collection = collection_of()
        collection.register_squared_error_loss(flat, targets=tf.zeros_like(flat))
        gs.register_layers(collection, [s, t])
        assert blocks(collection) == {"s,t": FULL}
        est = estimator.FisherEstimatorRoundRobin(
            variables=[s, t],
            cov_ema_decay=0.5,
            damping=0.1,
            layer_collection=collection,
            estimation_mode="empirical",
        )
        updates, _ = est.make_vars_and_create_op_thunks()
        with tf.control_dependencies([thunk() for thunk in updates]):
            return tf.identity(collection.get_factors()[0].cov), tf.identity(y)

    run = graph_kinds.Run(kind, build)
    cov, y = run()
    tolerance = 1e-10 if dtype is np.float64 else 1e-4  # Rounding of the statistics.
    expected = expected_statistics(value.astype(np.float64), y, training)
    np.testing.assert_allclose(
        cov, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


@pytest.mark.parametrize("formula", FORMULAS)
def test_parts_of_it_may_be_of_interest(formula):
    with tf.Graph().as_default():
        x, s, t = data(None, 2, 2, 3), variable("s", 3), variable("t", 3)
        y = FORMULAS[formula](x, s, t, True)
        collection = scan(y, [s])
        assert blocks(collection) == {"s": FULL}
        cases.check_uses(collection, [s])
        assert_generic(y, [t], "shift")
        both = scan(y, [s, t])
        cases.check_uses(both, [s, t])


def test_a_scale_that_is_computed_leaves_the_offset_generic():
    with tf.Graph().as_default():
        x, s, t = data(None, 3), variable("s", 3), variable("t", 3)
        mean, variance = tf.nn.moments(x, [0])
        y = tf.nn.batch_normalization(x, mean, variance, t, tf.exp(s), EPSILON)
        collection = scan(y, [t], batch_size=BATCH)
        assert blocks(collection) == {"t": cases.GENERIC}
        assert "batch normalisation" in cases.reason(collection, t)


def test_channels_first_are_generic():
    with tf.Graph().as_default():
        x, s, t = data(None, 3, 2, 2), variable("s", 3), variable("t", 3)
        y, _, _ = tf1.nn.fused_batch_norm(x, s, t, is_training=True, data_format="NCHW")
        assert_generic(y, [s, t], "channels first")


def test_a_normalisation_that_is_used_twice_is_generic():
    with tf.Graph().as_default():
        s, t = variable("s", 3), variable("t", 3)
        y = [fused(data(None, 2, 2, 3, seed=i), s, t, True) for i in range(2)]
        assert_generic(tf.concat(y, 1), [s, t], "2 tensors")
