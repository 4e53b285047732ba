"""Trains a small dense classifier of digits with K-FAC, Adam or SGD.

    python -m kfac.examples.classifier_mnist --optimizer=kfac,adam,sgd

K-FAC has a fixed damping here, with a learning rate and a bound on the step's length;
`--adaptive` lets it find damping, learning rate and momentum by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import flags

from kfac.examples import classification, layers, program

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)
flags.adopt_module_key_flags(classification)

DEFAULTS = {
    "hidden_widths": [256, 128],
    "batch_size": 500,
    "train_steps": 100,
    "kfac_learning_rate": 0.03,
    "norm_constraint": 1e-2,
}
LEARNING_RATES = {"adam": 1e-2, "sgd": 0.3}


class Classifier(tf.Module):
    """Dense layers of rectified linear units."""

    def __init__(self, hidden_widths: Sequence[int], seed: int = 0):
        super().__init__(name="classifier")
        rng = np.random.default_rng(seed)
        widths = [784, *hidden_widths, classification.CLASSES]
        self.layers = [
            layers.Dense(rng, d_in, d_out, name=f"layer_{i}")
            for i, (d_in, d_out) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        ]

    def __call__(self, images: tf.Tensor) -> tuple[tf.Tensor, list[layers.Call]]:
        activations, calls = tf.reshape(images, [-1, 784]), []
        for layer in self.layers[:-1]:
            activations = tf.nn.relu(layer(activations, calls))
        return self.layers[-1](activations, calls), calls


def main(argv: list[str]) -> None:
    """Trains with every optimizer asked for, prints a table, writes the plot."""
    del argv
    widths = program.hidden_widths()
    classification.run_program(
        "Dense classifier, MNIST",
        lambda: Classifier(widths, FLAGS.seed),
        LEARNING_RATES,
    )


if __name__ == "__main__":
    program.start(main, DEFAULTS)
