"""A step of Kfac is the same step of the graph API's optimizer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops.kfac_utils.periodic_inv_cov_update_kfac_opt import (
    PeriodicInvCovUpdateKfacOpt,
)
from kfac.python.ops.layer_collection import LayerCollection
from kfac.tests.keras import keras_cases as cases

tf1 = tf.compat.v1
SEED, STEPS = 11, 4


def steps_by_keras(x, y, **kwargs):
    """Weights before and after `STEPS` steps in float64."""
    with cases.dtype_policy("float64"):
        keras.utils.set_random_seed(4)
        model = cases.sequential()
        start = cases.weights(model)
        optimizer = cases.make(model, seed=SEED, dtype="float64", **kwargs)
        for _ in range(STEPS):
            model.train_on_batch(x, y)
    return start, cases.weights(model), optimizer


def steps_by_graph(x, y, start, **kwargs):
    """The same steps in a v1 graph; returns weights and the last metrics."""
    with tf.Graph().as_default():
        w1, b1, w2, b2 = [tf.Variable(v, use_resource=True) for v in start]
        step = tf1.train.create_global_step()

        def logits():
            return tf.matmul(tf.tanh(tf.matmul(x, w1) + b1), w2) + b2

        def loss(batch=None):
            del batch
            return tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits())
            )

        collection = LayerCollection()
        seed = tf.cast(tf.stack([SEED, step]), tf.int32)
        collection.register_categorical_predictive_distribution(logits(), seed=seed)
        collection.auto_register_layers(tf1.trainable_variables(), len(y))
        if kwargs.get("adapt_damping"):
            kwargs |= {"loss_fn": loss, "train_batch": 0}
        optimizer = PeriodicInvCovUpdateKfacOpt(
            layer_collection=collection,
            batch_size=len(y),
            dtype="float64",
            **kwargs,
        )
        train = optimizer.minimize(loss(), global_step=step)
        with tf1.Session() as session:
            session.run(tf1.global_variables_initializer())
            for _ in range(STEPS):
                session.run(train)
            return session.run([w1, b1, w2, b2]), session.run(optimizer.damping)


EVERY_STEP = {"cov_update_every": 1, "invert_every": 1}


@pytest.mark.parametrize(
    ("by_keras", "by_graph"),
    [
        ({"learning_rate": 0.3, "damping": 0.05}, {}),
        ({"learning_rate": 0.3, "damping": 0.05, "norm_constraint": 1e-3}, {}),
        (
            {
                "learning_rate": 0.3,
                "damping": 0.05,
                "momentum_type": "regular",
                "use_weight_decay": True,
                "cov_ema_decay": 0.8,
            },
            {},
        ),
        (
            {"adaptive": True, "damping": 1.0, "damping_adaptation_interval": 1},
            {
                "adaptive": None,
                "learning_rate": None,
                "momentum": None,
                "momentum_type": "qmodel",
                "adapt_damping": True,
            },
        ),
    ],
    ids=["adam", "norm constraint", "regular", "adaptive"],
)
def test_steps_equal_those_of_the_graph_api(by_keras, by_graph):
    x, y = cases.data()
    x = x.astype(np.float64)
    y = y.astype(np.int32)
    start, by_fit, optimizer = steps_by_keras(x, y, **EVERY_STEP, **by_keras)
    arguments = {**EVERY_STEP, **by_keras, **by_graph}
    arguments.pop("adaptive", None)
    by_session, damping = steps_by_graph(x, y, start, **arguments)
    for before, one, other in zip(start, by_fit, by_session, strict=True):
        # Hyper-parameters of Keras' optimizer are float32; Keras computes the loss in
        # float32, too, which enters the damping. A wrong factor would be off by 1.
        np.testing.assert_allclose(one - before, other - before, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(float(optimizer.damping), damping, rtol=1e-6)
