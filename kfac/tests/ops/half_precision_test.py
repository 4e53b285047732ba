"""Layers that compute in half precision, with variables in single precision."""

import numpy as np
import pytest
import tensorflow as tf

import kfac
from kfac.python.ops import deferred
from kfac.tests import graph_kinds

BATCH = 32
HALF = [tf.float16, tf.bfloat16]


def images():
    return np.random.default_rng(0).normal(size=[BATCH, 4, 4, 2]).astype(np.float32)


def network(x, dtype, float32_variables):
    """A convolution and a dense layer; the loss and what is registered."""
    kernel, bias, weights = float32_variables
    labels = tf.cast(tf.reduce_mean(x, axis=[1, 2, 3]) > 0, tf.int32)
    hidden = tf.nn.conv2d(tf.cast(x, dtype), tf.cast(kernel, dtype), 1, "VALID")
    hidden = tf.tanh(tf.nn.bias_add(hidden, tf.cast(bias, dtype)))
    hidden = tf.reshape(hidden, [-1, 27])
    logits = tf.cast(tf.matmul(hidden, tf.cast(weights, dtype)), tf.float32)
    collection = kfac.LayerCollection()
    collection.register_softmax_cross_entropy_loss(logits, targets=labels)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    return collection, tf.reduce_mean(loss)


def variables():
    rng = np.random.default_rng(1)
    return [
        graph_kinds.variable(rng.normal(size=shape) / 3, name, np.float32)
        for shape, name in [([2, 2, 2, 3], "kernel"), ([3], "bias"), ([27, 2], "w")]
    ]


@pytest.mark.parametrize("kind", graph_kinds.FAST)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_statistics_are_taken_in_single_precision(kind, dtype, fraction):
    def build(dtype=dtype):
        x = tf.compat.v1.placeholder_with_default(images(), [BATCH, 4, 4, 2])
        params = variables()
        collection, _ = network(x, dtype, params)
        collection.auto_register_layers(params)
        assert len(collection.get_blocks()) == 2
        est = kfac.estimator.FisherEstimatorRoundRobin(
            variables=params,
            cov_ema_decay=0.5,
            damping=0.1,
            layer_collection=collection,
            estimation_mode="empirical",
            cov_batch_fraction=fraction,
        )
        updates, _ = est.make_vars_and_create_op_thunks()
        assert {factor._dtype for factor in est.factors} == {tf.float32}
        with tf.control_dependencies([thunk() for thunk in updates]):
            return [tf.identity(factor.cov) for factor in est.factors]

    half = graph_kinds.Run(kind, build)()
    single = graph_kinds.Run(kind, lambda: build(tf.float32))()
    for first, second in zip(half, single, strict=True):
        # bfloat16 has 8 bits of mantissa, products of two such numbers are summed.
        np.testing.assert_allclose(first, second, atol=0.03 * np.abs(second).max())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_network_in_mixed_precision_is_trained(dtype):
    def build():
        x = tf.constant(images())
        params = variables()
        collection, loss = network(x, dtype, params)
        collection.auto_register_layers(params)
        optimizer = kfac.PeriodicInvCovUpdateKfacOpt(
            learning_rate=0.1,
            damping=0.05,
            layer_collection=collection,
            var_list=params,
            invert_every=1,
        )
        with tf.control_dependencies([loss]):
            step = optimizer.minimize(loss)
        with tf.control_dependencies([step]):
            return tf.identity(loss)

    run = graph_kinds.Run(graph_kinds.FUNCTION, build)
    losses = [run() for _ in range(8)]
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]


def test_casts_are_shared_and_leave_other_dtypes_alone():
    with tf.Graph().as_default():
        cast = deferred.AtLeastFloat32()
        half, double = tf.zeros([2], tf.float16), tf.zeros([2], tf.float64)
        assert cast(double) is double
        assert cast(half) is cast(half)
        assert cast(half) is not cast(tf.zeros([2], tf.float16))
        assert cast(half).dtype == tf.float32
        assert tf.convert_to_tensor(cast(half)).dtype == tf.float32
