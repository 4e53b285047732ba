"""Tiny models, data and optimizers for the tests of `kfac.keras`."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from kfac.python.keras.optimizers import Kfac

FEATURES, CLASSES, CASES = 5, 3, 48


def data(seed=0, cases=CASES):
    """Inputs and classes that a linear model can mostly tell."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(cases, FEATURES)).astype(np.float32)
    scores = x @ np.random.default_rng(1).normal(size=(FEATURES, CLASSES))
    return x, scores.argmax(axis=1)


def sequential(activation=None, hidden=6):
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(hidden, activation="tanh"),
            layers.Dense(CLASSES, activation=activation),
        ]
    )


def functional(activation=None):
    inputs = keras.Input((FEATURES,))
    hidden = layers.Dense(6, activation="relu")(inputs)
    hidden = layers.LayerNormalization()(hidden)
    return keras.Model(inputs, layers.Dense(CLASSES, activation=activation)(hidden))


@keras.saving.register_keras_serializable(package="kfac_tests")
class Subclassed(keras.Model):
    def __init__(self, activation=None, **kwargs):
        super().__init__(**kwargs)
        self.activation = activation
        self.first = layers.Dense(6, activation="gelu")
        self.second = layers.Dense(CLASSES, activation=activation)

    def call(self, x, training=False):
        return self.second(self.first(x))

    def get_config(self):
        return {**super().get_config(), "activation": self.activation}


def nested(activation=None):
    inner = keras.Sequential([keras.Input((FEATURES,)), layers.Dense(6)], name="inner")
    outer = [inner, layers.ReLU(), layers.Dense(CLASSES, activation=activation)]
    return keras.Sequential([keras.Input((FEATURES,)), *outer])


class Module(tf.Module):
    """A model that is not Keras'."""

    def __init__(self, activation=None):
        super().__init__()
        rng = np.random.default_rng(2)
        self.activation = keras.activations.get(activation)
        self.hidden = tf.Variable(rng.normal(size=(FEATURES, 6)), dtype=tf.float32)
        self.bias = tf.Variable(tf.zeros(6))
        self.out = tf.Variable(rng.normal(size=(6, CLASSES)) / 3, dtype=tf.float32)

    def __call__(self, x):
        hidden = tf.tanh(tf.matmul(x, self.hidden) + self.bias)
        return self.activation(tf.matmul(hidden, self.out))


def sparse_logits():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make(model, loss=None, compiled=None, **kwargs):
    """A `Kfac` for the model, which is compiled with it."""
    kwargs = {"learning_rate": 0.1, "damping": 0.1, "seed": 1, **kwargs}
    if kwargs.get("adaptive"):
        kwargs["learning_rate"] = None
    optimizer = Kfac(model=model, **kwargs)
    loss = sparse_logits() if loss is None else loss
    model.compile(optimizer=optimizer, loss=loss, **(compiled or {}))
    return optimizer


def losses_of_fit(model, x, y, epochs=3, batch_size=CASES, **kwargs):
    """Training loss of every epoch."""
    history = model.fit(
        x,
        y,
        epochs=epochs,
        batch_size=batch_size,
        verbose=0,
        shuffle=False,
        **kwargs,
    )
    return history.history["loss"]


def weights(model):
    return [v.numpy() for v in model.trainable_variables]


@contextlib.contextmanager
def dtype_policy(name):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
