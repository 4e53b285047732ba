"""Compares SGD, Adam and the natural-gradient family on a small MNIST classifier.

    python -m kfac.examples.natural_gradient_mnist --data_dir=... --plot=curves.png

All methods train the same 784-128-64-10 network from the same start on the same
batches. Without `--data_dir` (or `--download`) it is the embedded sample of 6,000
images, which is over in a minute and says less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import kfac
from kfac.examples import classification, datasets, program, reporting, training

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)

DEFAULTS = {
    "hidden_widths": ["128", "64"],
    "batch_size": 2000,
    "train_steps": 600,
    "eval_every": 10,
    "eval_size": 2000,
}
# Common flags that would do nothing here.
WITHOUT = (*program.OPTIMIZER_FLAGS, "learning_rate", "damping")

Optimizer = keras.optimizers.Optimizer


def _second_order(name: str, **fixed: Any) -> Callable[[keras.Model, int], Optimizer]:
    def make(model, seed):
        cls = getattr(kfac.keras.optimizers, name)
        return cls(
            model=model,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            seed=seed,
            **fixed,
        )

    return make


_KFAC = dict(
    damping=0.1,
    norm_constraint=0.1,
    cov_update_every=10,
    invert_every=50,
)
# The best of the sweep in docs/natural_gradient.md.
METHODS: Mapping[str, Callable[[keras.Model, int], Optimizer]] = {
    "sgd": lambda model, seed: keras.optimizers.SGD(0.2, momentum=0.9, nesterov=True),
    "adam": lambda model, seed: keras.optimizers.Adam(1e-2),
    "natural_empirical": _second_order(
        "NaturalGradient",
        curvature="empirical_fisher",
        learning_rate=0.2,
        damping=0.2,
        norm_constraint=2e-3,
        cg_iterations=5,
    ),
    "natural_fisher": _second_order(
        "NaturalGradient",
        learning_rate=0.2,
        damping=0.1,
        norm_constraint=1e-2,
        cg_iterations=5,
    ),
    "kfac": _second_order("Kfac", learning_rate=0.1, **_KFAC),
    "ekfac": _second_order(
        "Kfac",
        learning_rate=0.05,
        fisher_approx={"kfac_class_Dense": "ekfac"},
        **_KFAC,
    ),
    "fishleg": _second_order("FishLeg", learning_rate=0.1, damping=0.1),
}
flags.DEFINE_list("methods", list(METHODS), "What to compare, in this order.")
flags.DEFINE_integer(
    "num_seeds",
    1,
    "Trainings a method, with --seed and the seeds after it.",
    lower_bound=1,
)


def make_model(hidden_widths: Sequence[int], seed: int) -> keras.Model:
    """Dense ReLU network from 784 pixels to 10 logits; equal for equal seeds."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input([784]),
            *(keras.layers.Dense(width, activation="relu") for width in hidden_widths),
            keras.layers.Dense(classification.CLASSES),
        ]
    )


def make_run(
    method: str, model: keras.Model, data: datasets.ImageData, seed: int, eval_size: int
) -> training.Run:
    """One method at work on a model."""
    optimizer = METHODS[method](model, seed)
    variables = model.trainable_variables
    shows_batch = hasattr(optimizer, "show_batch")
    signature = [tf.TensorSpec([None, 784]), tf.TensorSpec([None], tf.int32)]
    optimizer.build(variables)

    def loss_and_accuracy(images, labels):
        logits = model(images, training=False)
        entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        accuracy = classification.accuracy(logits, labels)
        return tf.reduce_mean(entropies), accuracy

    @tf.function(input_signature=signature, autograph=False)
    def step(images, labels):
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(entropies)
        if shows_batch:
            optimizer.show_batch(images, labels)
        optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}

    scores = tf.function(loss_and_accuracy, input_signature=signature, autograph=False)
    parts = [
        tuple(map(tf.constant, part))
        for part in (
            (data.x_train[:eval_size], data.y_train[:eval_size]),
            (data.x_test, data.y_test),
        )
    ]
    _compile(step, data, [*model.variables, *optimizer.variables])
    return training.Run(
        step,
        lambda: classification.measurements(*(scores(*part) for part in parts)),
    )


def _compile(
    step: training.Step, data: datasets.ImageData, variables: Sequence[keras.Variable]
) -> None:
    """Runs a step and takes it back, so that the clock tells what updates cost."""
    before = [keras.ops.convert_to_numpy(variable) for variable in variables]
    step(tf.constant(data.x_train[:100]), tf.constant(data.y_train[:100]))
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)


def seconds_to(history: reporting.History, accuracy: float) -> float | None:
    """Training seconds until the test accuracy was first reached, in percent."""
    for seconds, value in zip(
        history.seconds, history.metrics["test_accuracy"], strict=True
    ):
        if value >= accuracy:
            return seconds
    return None


def compare(
    methods: Sequence[str],
    data: datasets.ImageData,
    make_batches: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]],
    *,
    hidden_widths: Sequence[int],
    num_steps: int,
    eval_every: int,
    eval_size: int = 2000,
    seed: int = 0,
) -> list[reporting.History]:
    """Trains one network with every method, on the same batches."""
    histories = []
    for method in methods:
        model = make_model(hidden_widths, seed)
        run = make_run(method, model, data, seed, eval_size)
        histories.append(
            training.train(
                method,
                run,
                make_batches(),
                train_steps=num_steps,
                train_seconds=None,
                eval_every=eval_every,
            )
        )
    return histories


def table_rows(trainings: Sequence[Sequence[reporting.History]]) -> list[list[str]]:
    """Per method: updates, seconds, loss, test accuracy, seconds to SGD's accuracy.

    Args:
      trainings: for every seed the history of each method. Figures are means over the
        seeds; seconds and accuracies with the least and the largest in brackets.
    """
    rows = []
    for histories in zip(*trainings, strict=True):
        to_sgd = [
            _seconds_to_sgd(history, others)
            for history, others in zip(histories, trainings, strict=True)
        ]
        losses = [h.metrics["train_loss"][-1] for h in histories]
        accuracies = [h.metrics["test_accuracy"][-1] for h in histories]
        rows.append(
            [
                histories[0].name,
                str(histories[0].updates[-1]),
                _spread([h.seconds[-1] for h in histories], 1),
                f"{np.mean(losses):.4f}",
                _spread(accuracies, 2),
                _spread(to_sgd, 1),
            ]
        )
    return rows


def _seconds_to_sgd(
    history: reporting.History, others: Sequence[reporting.History]
) -> float | None:
    sgd = next((h for h in others if h.name == "sgd"), None)
    return sgd and seconds_to(history, sgd.metrics["test_accuracy"][-1])


def _spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and range; "-" if one of the values is missing."""
    if None in values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main(argv: list[str]) -> None:
    """Trains with every method, prints a table, writes the plot."""
    del argv
    unknown = sorted(set(FLAGS.methods) - set(METHODS))
    if unknown:
        raise app.UsageError(
            f"--methods: unknown {unknown}; expected {sorted(METHODS)}."
        )
    data = program.load_data().flat()
    trainings = [
        compare(
            FLAGS.methods,
            data,
            lambda seed=seed: classification.batches(data, FLAGS.batch_size, seed),
            hidden_widths=program.hidden_widths(),
            num_steps=FLAGS.train_steps,
            eval_every=FLAGS.eval_every,
            eval_size=FLAGS.eval_size,
            seed=seed,
        )
        for seed in range(FLAGS.seed, FLAGS.seed + FLAGS.num_seeds)
    ]
    many = FLAGS.num_seeds > 1
    reporting.print_table(
        "MNIST, after training"
        + many * f": mean (least-largest) of {FLAGS.num_seeds} seeds",
        [
            "method",
            "updates",
            "seconds",
            "training loss",
            "test accuracy %",
            "s to SGD's",
        ],
        table_rows(trainings),
    )
    if FLAGS.plot:
        reporting.plot(
            trainings[0],
            FLAGS.plot,
            "784-128-64-10 on MNIST",
            {"train_loss": "training loss", "test_error": "test error, %"},
        )
    if FLAGS.results:
        reporting.write_json([h for each in trainings for h in each], FLAGS.results)


if __name__ == "__main__":
    program.start(main, DEFAULTS, WITHOUT)
