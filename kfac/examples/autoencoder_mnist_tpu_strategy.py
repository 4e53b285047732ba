"""Trains the deep MNIST autoencoder on several replicas.

    python -m kfac.examples.autoencoder_mnist_tpu_strategy \\
        --strategy=mirrored --num_replicas=2

The same program runs on one device, on the GPUs of a machine, on several machines
(`--strategy=multi_worker`, started by `kfac.examples.launch_local` or by a cluster that
sets TF_CONFIG) and on a TPU (`--strategy=tpu --tpu=NAME`).
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf
from absl import app

from kfac.examples import autoencoder_model, datasets, strategy_training


def make_model(widths: Sequence[int]) -> keras.Model:
    """784, `widths`, 784 units; tanh, but for the middle layer and the logits."""
    keras.utils.set_random_seed(strategy_training.FLAGS.seed)
    model = keras.Sequential([keras.Input([784])])
    for i, width in enumerate(widths):
        is_code = i == len(widths) // 2
        model.add(keras.layers.Dense(width, activation=None if is_code else "tanh"))
    model.add(keras.layers.Dense(784))
    return model


def cross_entropy(images: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Bernoulli cross-entropy of every case, summed over pixels."""
    entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels=images, logits=logits)
    return tf.reduce_sum(entropy, axis=-1)


def squared_error(images: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Squared error of every case, summed over pixels."""
    return tf.reduce_sum(tf.square(tf.sigmoid(logits) - images), axis=-1)


def _arrays(data: datasets.ImageData) -> tuple[tuple, tuple]:
    flat = data.flat()
    return (flat.x_train, flat.x_train), (flat.x_test, flat.x_test)


def main(argv: list[str]) -> None:
    """Trains, prints progress and a table."""
    del argv
    strategy_training.run(
        strategy_training.Task(
            "MNIST autoencoder",
            make_model,
            keras.losses.BinaryCrossentropy(from_logits=True),
            _arrays,
            {"entropy": cross_entropy, "error": squared_error},
            hidden_widths=autoencoder_model.WIDTHS[1:-1],
            damping=150.0 / 784,  # Keras' loss is a mean over pixels.
        )
    )


if __name__ == "__main__":
    app.run(main)
