"""Layers of the example models, which note what registering them with K-FAC takes."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
import tensorflow as tf


class Call(Protocol):
    """One layer's part in a forward pass."""

    def register(self, collection: Any) -> None:
        """Registers the layer with a `kfac.LayerCollection`."""


@dataclasses.dataclass(frozen=True)
class DenseCall:
    """A dense layer: inputs `[batch, d_in]`, pre-activations `[batch, d_out]`."""

    params: tuple[tf.Variable, tf.Variable]
    inputs: tf.Tensor
    outputs: tf.Tensor

    def register(self, collection: Any) -> None:
        collection.register_fully_connected(self.params, self.inputs, self.outputs)


@dataclasses.dataclass(frozen=True)
class SharedDenseCall:
    """A dense layer used several times: lists over uses of inputs and outputs."""

    params: tuple[tf.Variable, tf.Variable]
    inputs: list[tf.Tensor]
    outputs: list[tf.Tensor]

    def register(self, collection: Any) -> None:
        collection.register_fully_connected_multi(
            self.params, self.inputs, self.outputs
        )


@dataclasses.dataclass(frozen=True)
class Conv2dCall:
    """A convolution with stride 1 and padding "SAME", channels last."""

    params: tuple[tf.Variable, tf.Variable]
    inputs: tf.Tensor
    outputs: tf.Tensor

    def register(self, collection: Any) -> None:
        collection.register_conv2d(
            self.params, [1, 1, 1, 1], "SAME", self.inputs, self.outputs
        )


class Dense(tf.Module):
    """Affine map with Glorot initialisation."""

    def __init__(self, rng: np.random.Generator, d_in: int, d_out: int, name: str):
        super().__init__(name=name)
        self.weights = tf.Variable(
            glorot_uniform(rng, (d_in, d_out)), name=f"{name}/weights"
        )
        self.biases = tf.Variable(tf.zeros([d_out]), name=f"{name}/biases")

    @property
    def params(self) -> tuple[tf.Variable, tf.Variable]:
        return self.weights, self.biases

    def affine(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.matmul(inputs, self.weights) + self.biases

    def __call__(self, inputs: tf.Tensor, calls: list[Call]) -> tf.Tensor:
        """Pre-activations; the call is appended to `calls`."""
        outputs = self.affine(inputs)
        calls.append(DenseCall(self.params, inputs, outputs))
        return outputs


class Conv2d(tf.Module):
    """Convolution with bias, stride 1 and padding "SAME"; Glorot initialisation."""

    def __init__(
        self,
        rng: np.random.Generator,
        kernel_size: int,
        channels_in: int,
        channels_out: int,
        name: str,
    ):
        super().__init__(name=name)
        shape = (kernel_size, kernel_size, channels_in, channels_out)
        self.filters = tf.Variable(glorot_uniform(rng, shape), name=f"{name}/filters")
        self.biases = tf.Variable(tf.zeros([channels_out]), name=f"{name}/biases")

    def __call__(self, inputs: tf.Tensor, calls: list[Call]) -> tf.Tensor:
        """Pre-activations; the call is appended to `calls`."""
        outputs = tf.nn.conv2d(inputs, self.filters, 1, "SAME") + self.biases
        calls.append(Conv2dCall((self.filters, self.biases), inputs, outputs))
        return outputs


def glorot_uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Glorot and Bengio (AISTATS 2010), equation 16; float32.

    Leading axes of `shape` (of filters) count for both fans.
    """
    receptive_field = int(np.prod(shape[:-2]))
    bound = np.sqrt(6.0 / (receptive_field * (shape[-2] + shape[-1])))
    return rng.uniform(-bound, bound, shape).astype(np.float32)
