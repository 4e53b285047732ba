"""How good is each approximation of the Fisher matrix? Measured on a small network.

    python -m kfac.examples.fisher_quality --plot=fisher.png

Trains a dense tanh network on digits of 7 x 7 pixels, so small that the exact Fisher
block of every layer can be formed, and compares it with what this library makes of it:
K-FAC, EKFAC, the diagonal; and with the empirical Fisher matrix. The error of K-FAC is
split as in section 3.1 of the K-FAC paper, see `exact_fisher`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import app, flags

import kfac
from kfac.examples import dense_network, exact_fisher, program, reporting
from kfac.python.ops import curvature_operator, estimator

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)

DEFAULTS = {
    "hidden_widths": ["20", "20"],
    "train_steps": 300,
    "batch_size": 250,
    "learning_rate": 3e-3,
    "eval_size": 1000,
    "damping": 1e-2,
}
# Common flags that would do nothing here.
WITHOUT = (*program.OPTIMIZER_FLAGS, "eval_every", "results")
SIDE = 7
CLASSES = 10
# Of a matrix in the picture, along each side.
PIXELS = 105
# Name in the table -> approximation of registrations.
APPROXIMATIONS = {"K-FAC": "kron", "EKFAC": "ekfac", "diagonal": "diagonal"}


@dataclasses.dataclass(frozen=True)
class Quality:
    """One approximation of one layer's block, against the exact one.

    Attributes:
      layer: its name.
      approximation: its name.
      error: relative Frobenius error of the matrix.
      inverse_error: the same of the damped inverse, as the optimizers use it.
      exact_damping_error: the same of `(matrix + damping I)^-1`; another number for
        K-FAC only, which splits the damping between its factors.
      matrix: the undamped matrix.
    """

    layer: str
    approximation: str
    error: float
    inverse_error: float
    exact_damping_error: float
    matrix: np.ndarray


def pooled(images: np.ndarray) -> np.ndarray:
    """Images `[n, 28, 28]` as means over 4 x 4 pixels, `[n, 49]`."""
    cells = images.reshape(len(images), SIDE, 28 // SIDE, SIDE, 28 // SIDE)
    return cells.mean(axis=(2, 4)).reshape(len(images), -1)


def layer_statistics(
    network: dense_network.Network, images: np.ndarray, labels: np.ndarray
) -> tuple[list[exact_fisher.LayerStatistics], list[exact_fisher.LayerStatistics]]:
    """Per layer the statistics of the Fisher and of the empirical Fisher matrix."""

    @tf.function(autograph=False)
    def capture(x):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            logits, calls = network(x)
        jacobians = [
            tape.batch_jacobian(
                logits, call.outputs, unconnected_gradients=tf.UnconnectedGradients.ZERO
            )
            for call in calls[:-1]
        ]
        return logits, [call.inputs for call in calls], jacobians

    logits, inputs, jacobians = capture(tf.constant(images))
    logits = logits.numpy().astype(np.float64)
    jacobians = [j.numpy().astype(np.float64) for j in jacobians]
    jacobians.append(np.broadcast_to(np.eye(CLASSES), [len(images), CLASSES, CLASSES]))
    ones = np.ones([len(images), 1])
    inputs = [np.hstack([a.numpy().astype(np.float64), ones]) for a in inputs]

    def statistics(moments):
        return [
            exact_fisher.LayerStatistics(a, exact_fisher.pulled_back(moments, j))
            for a, j in zip(inputs, jacobians, strict=True)
        ]

    return (
        statistics(exact_fisher.logit_moments(logits)),
        statistics(exact_fisher.actual_moments(logits, labels)),
    )


def approximate_blocks(
    network: dense_network.Network,
    images: np.ndarray,
    approximation: str,
    damping: float,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per layer the library's block and its damped inverse, of exact statistics."""
    store = kfac.state.VariableStore()
    made = {}

    @tf.function(autograph=False)
    def update(x):
        with store.as_default():
            logits, calls = network(x)
            collection = kfac.LayerCollection()
            collection.register_softmax_cross_entropy_loss(logits)
            for call in calls:
                collection.register_fully_connected(
                    call.params, call.inputs, call.outputs, approx=approximation
                )
            made["estimator"] = estimator.make_fisher_estimator(
                variables=list(network.trainable_variables),
                cov_ema_decay=0.0,
                damping=damping,
                layer_collection=collection,
                estimation_mode="exact",
            )
            covs, invs = made["estimator"].make_vars_and_create_op_thunks()
            for thunks in (covs, invs, covs):  # EKFAC measures in the basis it has.
                with tf.control_dependencies([thunk() for thunk in thunks]):
                    pass

    update(tf.constant(images))
    bare, damped = (
        curvature_operator.curvature_operator(made["estimator"], damped=damped)
        for damped in (False, True)
    )
    return [
        (
            matrix.to_dense().numpy().astype(np.float64),
            np.linalg.inv(block.to_dense().numpy().astype(np.float64)),
        )
        for matrix, block in zip(bare.operators, damped.operators, strict=True)
    ]


def measure(
    network: dense_network.Network,
    images: np.ndarray,
    labels: np.ndarray,
    damping: float,
) -> tuple[list[Quality], list[tuple[str, float, float, float]]]:
    """Compares all approximations of all layers.

    Args:
      network: the network.
      images: cases that the matrices are means over, `[n, 49]`.
      labels: `[n]`.
      damping: multiple of the identity added for the inverses.

    Returns:
      Qualities, layer by layer, the exact matrix first; and per layer its name and the
      Frobenius norms of K-FAC's error and of its third-order and fourth-order terms,
      relative to that of the exact matrix.
    """
    model, empirical = layer_statistics(network, images, labels)
    library = {
        name: approximate_blocks(network, images, approximation, damping)
        for name, approximation in APPROXIMATIONS.items()
    }
    qualities, terms = [], []
    for i, statistics in enumerate(model):
        layer = network.layers[i].name
        exact = statistics.exact()
        inverse = exact_fisher.damped_inverse(exact, damping)
        empirical_matrix = empirical[i].exact()
        candidates = {"exact": (exact, inverse)}
        candidates |= {name: blocks[i] for name, blocks in library.items()}
        candidates["empirical"] = (
            empirical_matrix,
            exact_fisher.damped_inverse(empirical_matrix, damping),
        )
        qualities += [
            Quality(
                layer,
                name,
                exact_fisher.relative_error(matrix, exact),
                exact_fisher.relative_error(inverted, inverse),
                exact_fisher.relative_error(
                    exact_fisher.damped_inverse(matrix, damping), inverse
                ),
                matrix,
            )
            for name, (matrix, inverted) in candidates.items()
        ]
        norm = np.linalg.norm(exact)
        parts = (
            statistics.exact() - statistics.kronecker(),
            statistics.third_order(),
            statistics.fourth_order(),
        )
        terms.append((layer, *(float(np.linalg.norm(part) / norm) for part in parts)))
    return qualities, terms


def draw(qualities: Sequence[Quality], path: str) -> None:
    """Writes a PNG: a row for each layer, absolute values of the matrices."""
    import matplotlib  # The [examples] extra.

    matplotlib.use("Agg")
    from matplotlib import colors, pyplot

    names = list(dict.fromkeys(q.layer for q in qualities))
    columns = list(dict.fromkeys(q.approximation for q in qualities))
    figure, axes = pyplot.subplots(
        len(names),
        len(columns),
        figsize=(2.6 * len(columns) + 0.6, 2.7 * len(names) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for quality in qualities:
        row, column = names.index(quality.layer), columns.index(quality.approximation)
        exact = next(q.matrix for q in qualities if q.layer == quality.layer)
        axis = axes[row, column]
        # A root makes small entries visible; the scale is that of the exact matrix.
        norm = colors.PowerNorm(0.3, vmin=0, vmax=np.abs(exact).max())
        size = len(exact)
        image = axis.imshow(
            coarsened(quality.matrix, PIXELS),
            cmap="inferno",
            norm=norm,
            extent=(0, size, size, 0),
            interpolation="nearest",
        )
        axis.set_xticks([])
        axis.set_yticks([])
        title = quality.approximation
        if title != "exact":
            title += f", error {quality.error:.2f}"
        axis.set_title(title, fontsize=10)
        if column == 0:
            axis.set_ylabel(f"{quality.layer}, {size:,} parameters")
        if column + 1 == len(columns):
            top = np.floor(np.log10(norm.vmax))
            figure.colorbar(
                image,
                ax=axes[row, :].tolist(),
                pad=0.01,
                aspect=30,
                ticks=[0, *10.0 ** np.arange(top - 2, top + 1)],
                format="%g",
            )
    figure.suptitle(
        "Fisher block of each layer, parameters by parameters: absolute values, and "
        "relative error"
    )
    reporting.save_figure(figure, path)


def coarsened(matrix: np.ndarray, most: int) -> np.ndarray:
    """The largest absolute values of square cells, `[n, n]` with n at most `most`.

    Nothing gets lost between pixels, not even a diagonal.
    """
    cell = -(-len(matrix) // most)
    cells = -(-len(matrix) // cell)
    padding = cells * cell - len(matrix)
    padded = np.pad(np.abs(matrix), (0, padding))
    return padded.reshape(cells, cell, cells, cell).max(axis=(1, 3))


def main(argv: list[str]) -> None:
    """Trains, measures, prints both tables, draws the matrices."""
    del argv
    if FLAGS.damping == 0:
        raise app.UsageError("--damping: the inverses of singular matrices need one.")
    data = program.load_data()
    images = pooled(data.x_train)
    network = dense_network.Network(
        [SIDE**2, *program.hidden_widths(), CLASSES], FLAGS.seed
    )
    loss = dense_network.train(
        network,
        images,
        data.y_train,
        num_steps=FLAGS.train_steps,
        batch_size=FLAGS.batch_size,
        learning_rate=FLAGS.learning_rate,
        seed=FLAGS.seed,
    )
    if FLAGS.train_steps:
        print(f"Trained for {FLAGS.train_steps} updates, mini-batch loss {loss:.3f}")
    rows = slice(FLAGS.eval_size)
    qualities, terms = measure(network, images[rows], data.y_train[rows], FLAGS.damping)
    reporting.print_table(
        f"Relative Frobenius errors; damping {FLAGS.damping:g}",
        ["layer", "approximation", "matrix", "inverse", "inverse, exact damping"],
        [
            [
                q.layer,
                q.approximation,
                q.error,
                q.inverse_error,
                q.exact_damping_error,
            ]
            for q in qualities
            if q.approximation != "exact"
        ],
    )
    reporting.print_table(
        "Where K-FAC's error comes from, relative to the exact matrix",
        ["layer", "error", "third-order cumulants", "fourth-order cumulants"],
        terms,
    )
    if FLAGS.plot:
        draw(qualities, FLAGS.plot)


if __name__ == "__main__":
    program.start(main, DEFAULTS, WITHOUT)
