"""A dense tanh classifier, for examples that look at curvature rather than train."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from kfac.examples import datasets, layers, training


class Network(tf.Module):
    """Dense tanh network with logits as outputs; layers are layer_1, layer_2, ..."""

    def __init__(self, widths: Sequence[int], seed: int = 0):
        super().__init__(name="network")
        rng = np.random.default_rng(seed)
        self.layers = [
            layers.Dense(rng, d_in, d_out, name=f"layer_{i + 1}")
            for i, (d_in, d_out) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        ]

    def __call__(self, images: tf.Tensor) -> tuple[tf.Tensor, list[layers.Call]]:
        """Maps images `[batch, pixels]` to logits and the layers' calls."""
        activations, calls = images, []
        for layer in self.layers:
            pre_activations = layer(activations, calls)
            activations = tf.tanh(pre_activations)
        return pre_activations, calls


def train(
    network: Network,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
) -> float:
    """Trains with Adam; returns the last mini-batch loss, NaN without any step."""

    def loss_fn(x, y):
        logits, _ = network(x)
        return tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)
        )

    step = training.first_order_step(
        "adam",
        learning_rate,
        loss_fn,
        network.trainable_variables,
        [tf.TensorSpec([None, images.shape[1]]), tf.TensorSpec([None], tf.int32)],
    )
    loss = float("nan")
    batches = datasets.batches(len(images), batch_size, seed)
    for _, rows in zip(range(num_steps), batches, strict=False):
        loss = float(step(tf.constant(images[rows]), tf.constant(labels[rows]))["loss"])
    return loss
