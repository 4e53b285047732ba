"""Short trainings whose end states were recorded with the TF1 package `kfac` 0.2.4.

Every case is deterministic (statistics from the real targets, or exact ones), so the
parameters after six steps depend on the formulas alone.  `reference_test` runs the
cases with this library and compares.  To record them again, with the TF1 package
installed without its dependencies in a folder of its own:

    python kfac/tests/conformance/reference_cases.py FOLDER reference_steps.json

(The file is run as a program there and must not import anything of this library.)
"""

from __future__ import annotations

import json
import sys

import numpy as np
import tensorflow as tf

tf1 = tf.compat.v1

STEPS = 6
_BASE = {
    "learning_rate": 0.1,
    "damping": 0.1,
    "estimation_mode": "empirical",
    "invert_every": 2,
    "cov_update_every": 1,
    "cov_ema_decay": 0.9,
}
_QMODEL = {"learning_rate": None, "momentum": None, "momentum_type": "qmodel"}
_ADAPTED = {"adapt_damping": True, "damping_adaptation_interval": 2}

# Name -> network, whether the scanner registers it, options beyond `_BASE`.
CASES = {
    "dense": ("dense", False, {}),
    "dense, scanned": ("dense", True, {}),
    "dense, exact": ("dense", False, {"estimation_mode": "exact"}),
    "dense, weight decay": ("dense", False, {"use_weight_decay": True}),
    "dense, regular, clipped": (
        "dense",
        False,
        {"momentum_type": "regular", "norm_constraint": 1e-3},
    ),
    "dense, qmodel": ("dense", False, {**_QMODEL, "batch_size": 16}),
    "dense, qmodel_fixedmu": (
        "dense",
        False,
        {
            **_QMODEL,
            "momentum_type": "qmodel_fixedmu",
            "momentum": 0.5,
            "batch_size": 16,
        },
    ),
    "dense, qmodel, adapted": (
        "dense",
        False,
        {**_QMODEL, **_ADAPTED, "batch_size": 16},
    ),
    "dense, adapted": ("dense", False, _ADAPTED),
    "convolution": ("convolution", False, {}),
    "convolution, scanned": ("convolution", True, {}),
    "convolution, exact": ("convolution", False, {"estimation_mode": "exact"}),
    "recurrent, kron_indep": ("kron_indep", False, {}),
    "recurrent, kron_series_2": ("kron_series_2", False, {}),
}


class _Arrays:
    """Reproducible numbers, drawn one array after the other."""

    def __init__(self, seed: int):
        self._rng = np.random.RandomState(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * self._rng.randn(*shape)).astype(np.float32)

    def classes(self, count: int, classes: int) -> np.ndarray:
        return self._rng.randint(0, classes, count).astype(np.int32)


def _variable(name: str, value: np.ndarray) -> tf.Variable:
    return tf1.get_variable(name, initializer=value, use_resource=True)


def _dense(collection):
    """Two dense layers, softmax cross-entropy; the loss and how to register."""
    arrays = _Arrays(1)
    w1, b1 = _variable("w1", arrays.normal(6, 5, scale=0.4)), np.zeros(5, np.float32)
    w2, b2 = _variable("w2", arrays.normal(5, 4, scale=0.4)), np.zeros(4, np.float32)
    b1, b2 = _variable("b1", b1), _variable("b2", b2)
    x = tf.constant(arrays.normal(16, 6))
    targets = tf.constant(arrays.classes(16, 4))

    def forward():
        pre_activations = tf.matmul(x, w1) + b1
        hidden = tf.tanh(pre_activations)
        return pre_activations, hidden, tf.matmul(hidden, w2) + b2

    def loss_of(logits):
        return tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(
                labels=targets, logits=logits
            )
        )

    pre_activations, hidden, logits = forward()
    collection.register_softmax_cross_entropy_loss(logits, targets=targets)

    def register():
        collection.register_fully_connected((w1, b1), x, pre_activations)
        collection.register_fully_connected((w2, b2), hidden, logits)

    return loss_of(logits), lambda _: loss_of(forward()[-1]), register, 16


def _convolution(collection):
    """A strided convolution and a dense layer, squared error."""
    arrays = _Arrays(2)
    kernel = _variable("kernel", arrays.normal(3, 3, 2, 3, scale=0.3))
    bias = _variable("bias", np.zeros(3, np.float32))
    w = _variable("w", arrays.normal(27, 2, scale=0.3))
    x = tf.constant(arrays.normal(8, 5, 5, 2))
    targets = tf.constant(arrays.normal(8, 2))
    pre_activations = tf.nn.conv2d(x, kernel, [1, 2, 2, 1], "SAME") + bias
    hidden = tf.reshape(tf.tanh(pre_activations), [8, 27])
    outputs = tf.matmul(hidden, w)
    collection.register_squared_error_loss(outputs, targets=targets)

    def register():
        collection.register_conv2d(
            (kernel, bias), [1, 2, 2, 1], "SAME", x, pre_activations
        )
        collection.register_fully_connected(w, hidden, outputs)

    loss = tf.reduce_mean(tf.reduce_sum((outputs - targets) ** 2, 1))
    return loss, None, register, 8


def _recurrent(collection, approximation):
    """Five uses of one recurrent matrix and an output layer, squared error."""
    arrays = _Arrays(3)
    w = _variable("w", arrays.normal(8, 4, scale=0.4))
    w_out = _variable("w_out", arrays.normal(4, 2, scale=0.4))
    state = tf.zeros([8, 4])
    inputs, outputs = [], []
    for _ in range(5):
        inputs.append(tf.concat([tf.constant(arrays.normal(8, 4)), state], 1))
        outputs.append(tf.matmul(inputs[-1], w))
        state = tf.tanh(outputs[-1])
    prediction = tf.matmul(state, w_out)
    targets = tf.constant(arrays.normal(8, 2))
    collection.register_squared_error_loss(prediction, targets=targets)

    def register():
        collection.register_fully_connected_multi(
            w, inputs, outputs, approx=approximation
        )
        collection.register_fully_connected(w_out, state, prediction)

    loss = tf.reduce_mean(tf.reduce_sum((prediction - targets) ** 2, 1))
    return loss, None, register, 8


def run(package, name: str) -> dict[str, list]:
    """Parameters by name, and the damping, after the case's steps with a package."""
    network, scanned, options = CASES[name]
    with tf.Graph().as_default():
        collection = package.LayerCollection()
        if network == "dense":
            loss, loss_fn, register, batch = _dense(collection)
        elif network == "convolution":
            loss, loss_fn, register, batch = _convolution(collection)
        else:
            loss, loss_fn, register, batch = _recurrent(collection, network)
        if scanned:
            collection.auto_register_layers(batch_size=batch)
        else:
            register()
        options = {**_BASE, **options}
        if options.get("adapt_damping"):
            options |= {"loss": loss, "loss_fn": loss_fn, "train_batch": tf.constant(0)}
        optimizer = package.PeriodicInvCovUpdateKfacOpt(
            layer_collection=collection, **options
        )
        train_op = optimizer.minimize(loss)
        variables = {v.name: v for v in tf1.trainable_variables()}
        damping = optimizer.damping
        with tf1.Session() as session:
            session.run(tf1.global_variables_initializer())
            for _ in range(STEPS):
                session.run(train_op)
            values = {k: v.tolist() for k, v in session.run(variables).items()}
            return {**values, "damping": float(session.run(damping))}


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    tf1.disable_v2_behavior()
    import kfac

    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump({name: run(kfac, name) for name in CASES}, file)
