"""The convolutional network of `convnet`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from kfac.examples import classification, layers


class ConvNet(tf.Module):
    """Blocks of 3x3 convolution, rectifier and pooling by 2, then a dense layer."""

    def __init__(self, filters: Sequence[int], seed: int = 0):
        super().__init__(name="convnet")
        rng = np.random.default_rng(seed)
        channels = [1, *filters]
        self.convolutions = [
            layers.Conv2d(rng, 3, c_in, c_out, name=f"convolution_{i}")
            for i, (c_in, c_out) in enumerate(
                zip(channels[:-1], channels[1:], strict=True)
            )
        ]
        side = 28
        for _ in filters:
            side = -(-side // 2)
        self.features = side * side * channels[-1]
        self.logits = layers.Dense(
            rng, self.features, classification.CLASSES, name="logits"
        )

    def __call__(self, images: tf.Tensor) -> tuple[tf.Tensor, list[layers.Call]]:
        activations, calls = images[..., tf.newaxis], []
        for convolution in self.convolutions:
            activations = tf.nn.relu(convolution(activations, calls))
            activations = tf.nn.max_pool2d(activations, 2, 2, "SAME")
        features = tf.reshape(activations, [-1, self.features])
        return self.logits(features, calls), calls
