"""Trains a dense classifier of digits on several replicas.

    python -m kfac.examples.classifier_mnist_tpu_strategy \\
        --strategy=mirrored --num_replicas=2

    python -m kfac.examples.launch_local --num_workers=2 -- \\
        python -m kfac.examples.classifier_mnist_tpu_strategy --strategy=multi_worker

See `autoencoder_mnist_tpu_strategy` for the other strategies.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf
from absl import app

from kfac.examples import datasets, strategy_training


def make_model(widths: Sequence[int]) -> keras.Model:
    """784 inputs, rectified linear units, 10 logits."""
    keras.utils.set_random_seed(strategy_training.FLAGS.seed)
    layers = [keras.layers.Dense(width, activation="relu") for width in widths]
    return keras.Sequential([keras.Input([784]), *layers, keras.layers.Dense(10)])


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Cross-entropy of every case."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def is_right(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Whether the digit was recognised, for every case."""
    return tf.equal(tf.argmax(logits, axis=-1, output_type=labels.dtype), labels)


def _arrays(data: datasets.ImageData) -> tuple[tuple, tuple]:
    flat = data.flat()
    return (flat.x_train, flat.y_train), (flat.x_test, flat.y_test)


def main(argv: list[str]) -> None:
    """Trains, prints progress and a table."""
    del argv
    strategy_training.run(
        strategy_training.Task(
            "MNIST classifier",
            make_model,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            _arrays,
            {"entropy": cross_entropy, "accuracy": is_right},
            hidden_widths=(128, 64),
            damping=1.0,
        )
    )


if __name__ == "__main__":
    app.run(main)
