"""The graph API takes Keras' variables wherever it takes a list of variables."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import kfac
from kfac.python.ops.utils import subgraph
from kfac.tests import graph_kinds

BATCH = 16


@pytest.fixture
def model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)]
    )


def loss_and_collection(model):
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=[BATCH, 4]), tf.float32)
    labels = tf.constant(rng.integers(3, size=BATCH), tf.int32)
    logits = model(x)
    collection = kfac.LayerCollection()
    collection.register_softmax_cross_entropy_loss(logits, targets=labels)
    collection.auto_register_layers(model.trainable_variables)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    return tf.reduce_mean(loss), collection


def test_an_optimizer_is_made_for_the_variables_of_a_model(model):
    def build():
        loss, collection = loss_and_collection(model)
        optimizer = kfac.PeriodicInvCovUpdateKfacOpt(
            learning_rate=0.1,
            damping=0.1,
            layer_collection=collection,
            var_list=model.trainable_variables,
        )
        optimizer.check_var_list(model.trainable_variables)
        with pytest.raises(ValueError, match="Missing"):
            optimizer.check_var_list(model.trainable_variables[1:])
        with tf.control_dependencies([loss]):
            step = optimizer.minimize(loss, var_list=model.trainable_variables)
        with tf.control_dependencies([step]):
            return tf.identity(loss)

    run = graph_kinds.Run(graph_kinds.FUNCTION, build)
    losses = [run() for _ in range(5)]
    assert losses[-1] < losses[0]


def test_an_estimator_is_made_for_the_variables_of_a_model(model):
    def build():
        _, collection = loss_and_collection(model)
        est = kfac.estimator.FisherEstimatorRoundRobin(
            variables=model.trainable_variables,
            cov_ema_decay=0.9,
            damping=0.1,
            layer_collection=collection,
        )
        est.make_vars_and_create_op_thunks()
        assert all(isinstance(v, tf.Variable) for v in est.variables)
        return tf.constant(len(est.factors))

    assert graph_kinds.Run(graph_kinds.FUNCTION, build)() == 4


def test_only_wrapped_variables_are_unwrapped(model):
    wrapped = model.trainable_variables[0]
    assert subgraph.without_wrapper(wrapped) is wrapped.value
    for other in (wrapped.value, tf.constant(1.0), "v", None):
        assert subgraph.without_wrapper(other) is other
