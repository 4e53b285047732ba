"""The deep MNIST autoencoder of Hinton and Salakhutdinov (Science, 2006).

784-1000-500-250-30-250-500-1000-784, tanh units, a linear code, Bernoulli outputs: the
benchmark of Martens (ICML 2010) and of the K-FAC paper (arXiv 1503.05671, section 13).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from kfac.examples import layers

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


class Autoencoder(tf.Module):
    """Dense autoencoder with Glorot initialisation; the code is the middle layer."""

    def __init__(self, widths: Sequence[int] = WIDTHS, seed: int = 0):
        super().__init__(name="autoencoder")
        rng = np.random.default_rng(seed)
        self.layers = [
            layers.Dense(rng, d_in, d_out, name=f"layer_{i}")
            for i, (d_in, d_out) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        ]
        self.code_layer = len(self.layers) // 2 - 1

    def __call__(self, images: tf.Tensor) -> tuple[tf.Tensor, list[layers.Call]]:
        """Maps images `[batch, 784]` to logits `[batch, 784]` and the layers' calls."""
        activations, calls = images, []
        for i, layer in enumerate(self.layers):
            pre_activations = layer(activations, calls)
            linear = i in (self.code_layer, len(self.layers) - 1)
            activations = pre_activations if linear else tf.tanh(pre_activations)
        return activations, calls

    def l2_penalty(self) -> tf.Tensor:
        """Half the squared norm of all parameters."""
        return tf.add_n([tf.nn.l2_loss(v) for v in self.trainable_variables])


def cross_entropy(logits: tf.Tensor, images: tf.Tensor) -> tf.Tensor:
    """Bernoulli cross-entropy, summed over pixels, averaged over the batch."""
    values = tf.nn.sigmoid_cross_entropy_with_logits(labels=images, logits=logits)
    return tf.reduce_mean(tf.reduce_sum(values, axis=1))


def squared_error(logits: tf.Tensor, images: tf.Tensor) -> tf.Tensor:
    """Squared reconstruction error, summed over pixels, averaged over the batch."""
    return tf.reduce_mean(tf.reduce_sum((tf.sigmoid(logits) - images) ** 2, axis=1))
