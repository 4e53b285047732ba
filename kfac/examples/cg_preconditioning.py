"""Counts the CG iterations of a natural gradient, without and with K-FAC's help.

    python -m kfac.examples.cg_preconditioning --plot=cg.png

Solves `(F + damping I) x = g` on one batch of a briefly trained 784-128-64-10 network,
F its exact Fisher matrix in products, preconditioned by nothing, by the diagonal, and
by the inverses of K-FAC and EKFAC with the same damping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import flags

import kfac
from kfac.examples import dense_network, program, reporting
from kfac.python.ops import estimator, natural_gradient, utils

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)
flags.DEFINE_list("dampings", ["0.1", "0.01", "0.001"], "Dampings to compare.")
flags.DEFINE_float("tolerance", 0.1, "Relative residual that counts as solved.")

DEFAULTS = {
    "hidden_widths": ["128", "64"],
    "train_steps": 100,
    "batch_size": 500,
    "learning_rate": 3e-3,
}
# Common flags that would do nothing here.
WITHOUT = (*program.OPTIMIZER_FLAGS, "damping", "eval_every", "eval_size", "results")
# Name -> approximation of the layers, where one is needed.
PRECONDITIONERS = {"none": None, "diagonal": None, "K-FAC": "kron", "EKFAC": "ekfac"}
ITERATIONS = (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 45, 64, 90, 128)


class Outcome(NamedTuple):
    """What CG arrived at.

    Attributes:
      iterations: how many it took.
      residual: relative residual.
      decrease: of `1/2 x' (F + damping I) x - g' x` below its value 0 at zero.
    """

    iterations: int
    residual: float
    decrease: float


# `solve(damping, max_iterations, tolerance)`
Solve = Callable[[float, int, float], Outcome]


def make_solver(
    network: dense_network.Network,
    images: np.ndarray,
    labels: np.ndarray,
    preconditioner: str,
) -> Solve:
    """CG for the natural gradient of the mean loss on one batch.

    Args:
      network: the network.
      images: `[cases, pixels]`.
      labels: `[cases]`.
      preconditioner: one of `PRECONDITIONERS`.
    """
    store = kfac.state.VariableStore()
    variables = list(network.trainable_variables)

    @tf.function(autograph=False)
    def solve(x, y, damping, max_iterations, tolerance):
        with store.as_default():
            logits, calls = network(x)
            collection = kfac.LayerCollection()
            collection.register_softmax_cross_entropy_loss(logits, targets=y, seed=1)
            for call in calls:
                collection.register_fully_connected(
                    call.params,
                    call.inputs,
                    call.outputs,
                    approx=PRECONDITIONERS[preconditioner],
                )
            curvature = natural_gradient.DampedCurvature(
                collection, variables, damping=damping, num_cases=len(images)
            )
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)
            )
            gradients = tf.gradients(loss, variables)
            solution = curvature.solve(
                gradients,
                preconditioner=_preconditioner(
                    preconditioner, curvature, collection, variables, damping
                ),
                max_iterations=max_iterations,
                tolerance=tolerance,
            )
            image = curvature.multiply(solution.x)
            decrease = utils.ip(solution.x, gradients) - utils.ip(solution.x, image) / 2
            return solution.iterations, solution.residual, decrease

    def run(damping, max_iterations, tolerance):
        iterations, *numbers = solve(
            tf.constant(images),
            tf.constant(labels),
            tf.constant(damping, tf.float32),
            tf.constant(max_iterations),
            tf.constant(tolerance, tf.float32),
        )
        return Outcome(int(iterations), *map(float, numbers))

    return run


def _preconditioner(
    name: str,
    curvature: natural_gradient.DampedCurvature,
    collection: kfac.LayerCollection,
    variables: Sequence[tf.Variable],
    damping: tf.Tensor,
) -> natural_gradient.Preconditioner | None:
    """The preconditioner, with statistics of the collection's batch."""
    if name == "none":
        return None
    if name == "diagonal":
        diagonal = curvature.estimate_diagonal(32, tf.constant([1, 2]))
        return natural_gradient.diagonal_preconditioner(diagonal, damping)
    blocks = estimator.make_fisher_estimator(
        variables=variables,
        cov_ema_decay=0.0,
        damping=damping,
        layer_collection=collection,
        estimation_mode="exact",
    )
    covs, invs = blocks.make_vars_and_create_op_thunks()
    # A function runs its side effects in order; EKFAC measures in the basis it has.
    for thunks in (covs, invs, covs):
        for thunk in thunks:
            thunk()
    return natural_gradient.estimator_preconditioner(blocks, variables)


def plot(curves: Mapping[tuple[str, float], Sequence[float]], path: str) -> None:
    """Writes a PNG with a panel for each damping.

    Args:
      curves: preconditioner and damping -> decrease of the quadratic after each of
        `ITERATIONS`.
      path: of the PNG; missing folders are made.
    """
    import matplotlib  # The [examples] extra.

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dampings = list(dict.fromkeys(damping for _, damping in curves))
    figure, axes = pyplot.subplots(
        1, len(dampings), figsize=(4 * len(dampings), 3.6), squeeze=False, sharey=True
    )
    for axis, damping in zip(axes[0], dampings, strict=True):
        best = max(max(curves[name, damping]) for name in PRECONDITIONERS)
        for name in PRECONDITIONERS:
            missing = 1 - np.array(curves[name, damping]) / best
            axis.plot(ITERATIONS[: len(missing)], missing, label=name)
        axis.set(xscale="log", yscale="log", xlabel="iterations")
        axis.set_ylim(1e-4, 1)
        axis.set_title(f"damping {damping:g}")
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("share of the decrease still missing")
    axes[0, 0].legend(title="preconditioner")
    figure.tight_layout()
    reporting.save_figure(figure, path)


def main(argv: list[str]) -> None:
    """Trains, solves, prints a table, writes the plot."""
    del argv
    data = program.load_data().flat()
    network = dense_network.Network([784, *program.hidden_widths(), 10], FLAGS.seed)
    dense_network.train(
        network,
        data.x_train,
        data.y_train,
        num_steps=FLAGS.train_steps,
        batch_size=FLAGS.batch_size,
        learning_rate=FLAGS.learning_rate,
        seed=FLAGS.seed,
    )
    batch = (data.x_train[: FLAGS.batch_size], data.y_train[: FLAGS.batch_size])
    dampings = [float(damping) for damping in FLAGS.dampings]
    rows, curves = [], {}
    for name in PRECONDITIONERS:
        solve = make_solver(network, *batch, name)
        counts = []
        for damping in dampings:
            outcome = solve(damping, ITERATIONS[-1], FLAGS.tolerance)
            reached = outcome.residual <= FLAGS.tolerance
            counts.append(f"{'' if reached else '> '}{outcome.iterations}")
            if FLAGS.plot:
                curves[name, damping] = [
                    solve(damping, count, 0.0).decrease for count in ITERATIONS
                ]
        rows.append([name, *counts])
    reporting.print_table(
        f"CG iterations to a relative residual of {FLAGS.tolerance:g}",
        ["preconditioner", *(f"damping {damping:g}" for damping in dampings)],
        rows,
    )
    if FLAGS.plot:
        plot(curves, FLAGS.plot)


if __name__ == "__main__":
    program.start(main, DEFAULTS, WITHOUT)
