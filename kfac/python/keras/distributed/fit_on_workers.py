"""A model whose `fit` runs under `MultiWorkerMirroredStrategy`.

Keras 3.15's own does not, with any optimizer, for two reasons.  A model that was
created under a strategy's scope reduces its first batch to build itself, and that
reduction does not know the form of a batch on one of several workers.  And the scalars
that a training step returns are averaged over workers along an axis they do not have.
`FitOnWorkers` is created outside of the scope, and returns scalars with an axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf


class FitOnWorkers(keras.Model):
    """Wraps a model; what it computes and trains is the model itself.

        with strategy.scope():
            inner = keras.Sequential([keras.Input([784]), keras.layers.Dense(10)])
        model = FitOnWorkers(inner)  # Outside of the scope.
        with strategy.scope():
            optimizer = Kfac(learning_rate=0.05, damping=0.01, model=model)
            model.compile(optimizer=optimizer, loss="mse")
            model.fit(dataset, epochs=5)

    Save and load `model.inner`.

    Args:
      inner: the model, created under the strategy's scope.

    Raises:
      ValueError: this object is created under a strategy's scope, or wraps no model.
    """

    # For Kfac: the steps below minimise the compiled loss.
    keeps_loss = True

    def __init__(self, inner: keras.Model, **kwargs: Any):
        if tf.distribute.has_strategy():
            raise ValueError(
                "Create FitOnWorkers outside of strategy.scope(), and only the model "
                "inside of it; compile and fit under the scope again."
            )
        if not isinstance(inner, keras.Model):
            raise ValueError(
                f"FitOnWorkers wraps a Keras model; got {type(inner).__name__}."
            )
        super().__init__(**kwargs)
        self.inner = inner
        self.built = inner.built

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The inner model's outputs."""
        return self.inner(inputs, training=training)

    @property
    def input(self) -> Any:
        """The inner model's symbolic inputs."""
        return self.inner.input

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Keras' step."""
        return _with_axis(super().train_step(data))

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Keras' step."""
        return _with_axis(super().test_step(data))


def _with_axis(scalars: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {name: tf.reshape(value, [1]) for name, value in scalars.items()}
