"""Classifies digits by reading them row by row: a recurrent network with K-FAC or Adam.

    python -m kfac.examples.rnn_mnist --optimizer=kfac,adam --approx=kron_series_2

The cell's parameters are used at 28 time steps. `--approx` says how K-FAC models their
curvature (Martens, Ba, Johnson, "Kronecker-factored curvature approximations for
recurrent neural networks", ICLR 2018): independent steps, or a chain of them.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from absl import flags

from kfac.examples import classification, layers, program

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)
flags.adopt_module_key_flags(classification)
flags.DEFINE_enum(
    "approx",
    "kron_series_2",
    ["kron_series_2", "kron_series_1", "kron_indep"],
    "How the curvature of the recurrent cell is approximated.",
)
flags.DEFINE_integer("state_size", 100, "Units of the recurrent cell.")

DEFAULTS = {"batch_size": 500, "train_steps": 150, "cov_update_every": 5}
LEARNING_RATES = {"adam": 3e-3, "sgd": 1e-2}


class RecurrentClassifier(tf.Module):
    """A tanh cell over the rows of an image, and a dense layer on its last state."""

    def __init__(self, state_size: int, seed: int = 0):
        super().__init__(name="rnn")
        rng = np.random.default_rng(seed)
        self.state_size = state_size
        self.cell = layers.Dense(rng, 28 + state_size, state_size, name="cell")
        self.logits = layers.Dense(rng, state_size, classification.CLASSES, "logits")

    def __call__(self, images: tf.Tensor) -> tuple[tf.Tensor, list[layers.Call]]:
        state = tf.zeros([tf.shape(images)[0], self.state_size])
        inputs, outputs = [], []
        for row in tf.unstack(images, axis=1):
            inputs.append(tf.concat([row, state], axis=1))
            outputs.append(self.cell.affine(inputs[-1]))
            state = tf.tanh(outputs[-1])
        calls = [layers.SharedDenseCall(self.cell.params, inputs, outputs)]
        return self.logits(state, calls), calls


def main(argv: list[str]) -> None:
    """Trains with every optimizer asked for, prints a table, writes the plot."""
    del argv
    classification.run_program(
        "Recurrent classifier, MNIST by rows",
        lambda: RecurrentClassifier(FLAGS.state_size, FLAGS.seed),
        LEARNING_RATES,
        shared_dense_approx=FLAGS.approx,
    )


if __name__ == "__main__":
    program.start(main, DEFAULTS, without=["hidden_widths"])
