"""Trains a Keras model with `fit`, by K-FAC, Adam and SGD with equal seconds.

    python -m kfac.examples.keras_convnet --train_seconds=60 --plot=curves.png
    python -m kfac.examples.keras_convnet --model=transformer --train_seconds=60

Learning rates are the best of a small sweep, `--sweep_seconds` repeats it: each
optimizer tries every rate of its grid for that long, and the one with the least
training loss is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
from absl import flags

import kfac
from kfac.examples import (
    classification,
    datasets,
    keras_models,
    program,
    reporting,
)

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)
flags.adopt_module_key_flags(classification)
flags.DEFINE_enum("model", "convnet", list(keras_models.MODELS), "What is trained.")
flags.DEFINE_float(
    "sweep_seconds", None, "Try every learning rate for that long first."
)
flags.DEFINE_bool("show_curvature", False, "Print K-FAC's spectra and phase times.")

DEFAULTS = {
    "optimizer": list(program.OPTIMIZERS),
    "batch_size": 256,
    "eval_every": 20,
    "eval_size": 2000,
    "damping": 1e-2,
    "cov_update_every": 10,
    "kfac_learning_rate": None,
    "norm_constraint": 1e-2,
    "invert_every": 100,
    "train_steps": None,
    "train_seconds": 30.0,
}
# Common flags that would do nothing here.
WITHOUT = ("hidden_widths", "l2_reg", "auto_register_layers", "device")
# The best of sweeps with 400 updates for each rate, by model.
LEARNING_RATES = {
    "convnet": {"kfac": 0.01, "adam": 1e-2, "sgd": 0.1},
    "transformer": {"kfac": 0.01, "adam": 3e-3, "sgd": 0.03},
}
GRIDS = {
    "kfac": (1e-3, 3e-3, 1e-2, 3e-2),
    "adam": (1e-3, 3e-3, 1e-2, 3e-2),
    "sgd": (0.01, 0.03, 0.1, 0.3),
}


def make_optimizer(
    name: str, learning_rate: float, model: keras.Model
) -> keras.optimizers.Optimizer:
    """K-FAC as the flags say, Adam, or SGD with Nesterov momentum of 0.9."""
    if name == "adam":
        return keras.optimizers.Adam(learning_rate)
    if name == "sgd":
        return keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True)
    shared = {
        "damping": FLAGS.damping,
        "cov_update_every": FLAGS.cov_update_every,
        "cov_batch_fraction": FLAGS.cov_batch_fraction,
        "seed": FLAGS.seed,
        "model": model,
    }
    if FLAGS.adaptive:
        fraction = FLAGS.qmodel_batch_fraction
        return kfac.keras.optimizers.Kfac(
            adaptive=True, qmodel_batch_fraction=fraction, **shared
        )
    return kfac.keras.optimizers.Kfac(
        learning_rate=learning_rate,
        momentum=FLAGS.momentum,
        norm_constraint=FLAGS.norm_constraint,
        invert_every=FLAGS.invert_every,
        **shared,
    )


class Measure(keras.callbacks.Callback):
    """Evaluates now and then with the clock stopped; ends training in time.

    The clock starts after the first update: tracing it takes seconds, once.

    Args:
      history: gets the measurements.
      data: images to evaluate.
      seconds: of training.
      steps: of training; None for no limit.
    """

    def __init__(
        self,
        history: reporting.History,
        data: datasets.ImageData,
        seconds: float | None,
        steps: int | None,
    ):
        super().__init__()
        self._history = history
        self._data = data
        self._seconds = seconds
        self._steps = steps
        self._update = 0
        self._clock = reporting.TrainingClock()
        self._start_up = reporting.TrainingClock()
        self._progress = reporting.Progress(history.name, steps, seconds)

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._evaluate()
        self._progress.__enter__()
        self._start_up.__enter__()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._update += 1
        if self._update == 1:
            self._start_up.__exit__(None, None, None)
            self._clock.__enter__()
        self._progress.update(self._update, self._clock.seconds, logs or {})
        in_time = self._seconds is None or self._clock.seconds < self._seconds
        if not in_time or self._update == self._steps:
            self.model.stop_training = True
        elif self._update % FLAGS.eval_every == 0:
            self._clock.__exit__(None, None, None)
            self._evaluate()
            self._clock.__enter__()

    def on_train_end(self, logs: dict | None = None) -> None:
        self._clock.__exit__(None, None, None)
        self._progress.__exit__(None, None, None)
        self._evaluate()

    def _evaluate(self) -> None:
        data, count = self._data, FLAGS.eval_size
        scores = [
            self.model.evaluate(x, y, batch_size=1000, verbose=0)
            for x, y in (
                (data.x_train[:count], data.y_train[:count]),
                (data.x_test, data.y_test),
            )
        ]
        measured = classification.measurements(*scores)
        measured["start_up"] = self._start_up.seconds
        self._history.record(self._update, self._clock.seconds, measured)


def train(
    name: str, learning_rate: float, data: datasets.ImageData, seconds: float | None
) -> reporting.History:
    """One run of `fit`, from equal initial weights and on equal batches."""
    keras.utils.set_random_seed(FLAGS.seed)
    model = keras_models.MODELS[FLAGS.model]()
    model.compile(
        optimizer=make_optimizer(name, learning_rate, model),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = reporting.History(name)
    callbacks = [Measure(history, data, seconds, FLAGS.train_steps)]
    monitor = None
    if name == "kfac" and FLAGS.show_curvature:
        monitor = kfac.keras.callbacks.CurvatureMonitor()
        callbacks.insert(0, monitor)
    model.fit(
        data.x_train,
        data.y_train,
        batch_size=FLAGS.batch_size,
        epochs=10**6,  # The callback ends it.
        verbose=0,
        callbacks=callbacks,
    )
    if monitor is not None:
        print(monitor.table())
    return history


def best_learning_rate(
    name: str, train_at: Callable[[float], reporting.History]
) -> float:
    """The rate of the grid that reaches the least training loss; prints them all."""
    losses = {}
    for rate in GRIDS[name]:
        loss = train_at(rate).metrics["train_loss"][-1]
        losses[rate] = loss if math.isfinite(loss) else math.inf
    reporting.print_table(
        f"{name}: learning rates",
        ["learning rate", "training loss"],
        [[f"{rate:g}", loss] for rate, loss in losses.items()],
    )
    return min(losses, key=losses.get)


def main(argv: list[str]) -> None:
    """Trains with every optimizer asked for, prints a table, writes the plot."""
    del argv
    data = program.load_data()
    histories = []
    for name in program.optimizers():
        given = FLAGS.kfac_learning_rate if name == "kfac" else FLAGS.learning_rate
        rate = given or LEARNING_RATES[FLAGS.model][name]
        if FLAGS.sweep_seconds:
            rate = best_learning_rate(
                name, lambda r, name=name: train(name, r, data, FLAGS.sweep_seconds)
            )
        histories.append(train(name, rate, data, FLAGS.train_seconds))
    program.report(
        f"Keras {FLAGS.model}, {FLAGS.dataset}",
        histories,
        columns={
            "start_up": "start-up s",
            "train_loss": "training loss",
            "test_loss": "test loss",
            "test_accuracy": "test accuracy %",
        },
        curves={"train_loss": "training loss", "test_error": "test error, %"},
    )


if __name__ == "__main__":
    program.start(main, DEFAULTS, WITHOUT)
