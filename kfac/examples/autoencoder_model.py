"""The deep MNIST autoencoder of Hinton and Salakhutdinov (Science, 2006).

784-1000-500-250-30-250-500-1000-784, tanh units, a linear code, Bernoulli outputs: the
benchmark of Martens (ICML 2010) and of the K-FAC paper (arXiv 1503.05671, section 13).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """What registering a dense layer takes: parameters, input, pre-activation."""

    params: tuple[tf.Variable, tf.Variable]
    inputs: tf.Tensor
    outputs: tf.Tensor


class Autoencoder(tf.Module):
    """Dense autoencoder with Glorot initialisation."""

    def __init__(self, widths: Sequence[int] = WIDTHS, seed: int = 0):
        super().__init__(name="autoencoder")
        rng = np.random.default_rng(seed)
        self.layers = []
        for i, (fan_in, fan_out) in enumerate(
            zip(widths[:-1], widths[1:], strict=True)
        ):
            weights = tf.Variable(
                _glorot_uniform(rng, fan_in, fan_out), name=f"layer_{i}/weights"
            )
            biases = tf.Variable(tf.zeros([fan_out]), name=f"layer_{i}/biases")
            self.layers.append((weights, biases))
        self.code_layer = len(self.layers) // 2 - 1

    def __call__(self, images: tf.Tensor) -> tuple[tf.Tensor, list[LayerCall]]:
        """Maps images `[batch, 784]` to logits `[batch, 784]` and the layers' calls."""
        activations, calls = images, []
        for i, (weights, biases) in enumerate(self.layers):
            pre_activations = tf.matmul(activations, weights) + biases
            calls.append(LayerCall((weights, biases), activations, pre_activations))
            linear = i in (self.code_layer, len(self.layers) - 1)
            activations = pre_activations if linear else tf.tanh(pre_activations)
        return activations, calls

    def l2_penalty(self) -> tf.Tensor:
        """Half the squared norm of all parameters."""
        return tf.add_n([tf.nn.l2_loss(v) for pair in self.layers for v in pair])


def cross_entropy(logits: tf.Tensor, images: tf.Tensor) -> tf.Tensor:
    """Bernoulli cross-entropy, summed over pixels, averaged over the batch."""
    values = tf.nn.sigmoid_cross_entropy_with_logits(labels=images, logits=logits)
    return tf.reduce_mean(tf.reduce_sum(values, axis=1))


def squared_error(logits: tf.Tensor, images: tf.Tensor) -> tf.Tensor:
    """Squared reconstruction error, summed over pixels, averaged over the batch."""
    return tf.reduce_mean(tf.reduce_sum((tf.sigmoid(logits) - images) ** 2, axis=1))


def _glorot_uniform(rng: np.random.Generator, fan_in: int, fan_out: int) -> np.ndarray:
    """Glorot and Bengio (AISTATS 2010), equation 16."""
    bound = np.sqrt(6.0 / (fan_in + fan_out))
    return rng.uniform(-bound, bound, (fan_in, fan_out)).astype(np.float32)
