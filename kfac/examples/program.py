"""Command line of the examples: common flags, a run an optimizer, table and plot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf
from absl import app, flags

from kfac.examples import datasets, reporting, training

OPTIMIZERS = ("kfac", "adam", "sgd")
# What only programs use that run one of these after the other, by `train_each`.
OPTIMIZER_FLAGS = (
    "optimizer",
    "train_seconds",
    "l2_reg",
    "cov_batch_fraction",
    "qmodel_batch_fraction",
    "cov_update_every",
    "invert_every",
    "auto_register_layers",
    "device",
)

FLAGS = flags.FLAGS
flags.DEFINE_list("optimizer", ["kfac"], f"One or more of {', '.join(OPTIMIZERS)}.")
flags.DEFINE_enum("dataset", "mnist", datasets.DATASETS, "Data set.")
flags.DEFINE_string("data_dir", None, "Folder with the full data (idx or npz files).")
flags.DEFINE_bool("download", False, "Fetch the full data set with keras.datasets.")
flags.DEFINE_integer("seed", 0, "Seed of initialisation, batches and samples.")
flags.DEFINE_integer("train_steps", 300, "Updates an optimizer.", lower_bound=0)
flags.DEFINE_float(
    "train_seconds",
    None,
    "Training seconds an optimizer; with it, a limit of updates only if one is given.",
)
flags.DEFINE_integer(
    "batch_size", 1024, "Batch size, or the first one of a schedule.", lower_bound=1
)
flags.DEFINE_list("hidden_widths", [], "Widths of the hidden dense layers.")
flags.DEFINE_float("l2_reg", 0.0, "Coefficient of half the squared parameter norm.")
flags.DEFINE_float("learning_rate", None, "Of Adam or SGD, instead of a tuned one.")
flags.DEFINE_float(
    "damping", 1e-2, "Damping of K-FAC; where adapted, at the start.", lower_bound=0.0
)
flags.DEFINE_float("cov_batch_fraction", 1.0, "Part of the batch for statistics.")
flags.DEFINE_float("qmodel_batch_fraction", 1.0, "Part for the quadratic model.")
flags.DEFINE_integer("cov_update_every", 1, "Updates between statistics.")
flags.DEFINE_integer("invert_every", 5, "Updates between inversions.")
flags.DEFINE_bool("auto_register_layers", False, "Let the scanner find the layers.")
flags.DEFINE_string("device", None, "For instance /cpu:0 or /gpu:0.")
flags.DEFINE_integer("eval_every", 10, "Updates between evaluations.", lower_bound=1)
flags.DEFINE_integer(
    "eval_size", 10000, "Training images in an evaluation.", lower_bound=1
)
flags.DEFINE_string("plot", None, "Where to write a PNG of the training curves.")
flags.DEFINE_string("results", None, "Where to write the measurements, as JSON.")


def start(
    main: Callable[[list[str]], None],
    defaults: Mapping[str, object],
    without: Iterable[str] = (),
) -> None:
    """Runs a program.

    Args:
      main: of the program.
      defaults: flag -> default, where it differs from the common one.
      without: common flags that would do nothing here. They are refused, like any
        unknown flag.
    """
    for name in without:
        delattr(FLAGS, name)
    for name, value in defaults.items():
        FLAGS.set_default(name, value)
    app.run(main)


def load_data() -> datasets.ImageData:
    """The data set asked for; prints what it is."""
    data = datasets.load(FLAGS.dataset, FLAGS.data_dir, FLAGS.download)
    print(f"Data: {data.description}; batch size {FLAGS.batch_size}")
    return data


def hidden_widths() -> list[int]:
    """`--hidden_widths` as numbers.

    Raises:
      app.UsageError: they are not positive integers.
    """
    try:
        widths = [int(width) for width in FLAGS.hidden_widths]
    except ValueError as error:
        raise app.UsageError(f"--hidden_widths: {error}; expected integers.") from None
    if min(widths, default=1) < 1:
        raise app.UsageError(f"--hidden_widths: {widths}; expected positive integers.")
    return widths


def optimizers() -> list[str]:
    """`--optimizer`.

    Raises:
      app.UsageError: unknown optimizer.
    """
    unknown = sorted(set(FLAGS.optimizer) - set(OPTIMIZERS))
    if unknown:
        raise app.UsageError(f"--optimizer: unknown {unknown}; expected {OPTIMIZERS}.")
    return FLAGS.optimizer


def train_each(
    make_run: Callable[[str], training.Run],
    make_batches: Callable[[], Iterator[Sequence[np.ndarray]]] = (
        lambda: itertools.repeat(())
    ),
) -> list[reporting.History]:
    """One run for each of `--optimizer`, from equal seeds and on equal batches.

    Args:
      make_run: of the optimizer's name.
      make_batches: endless batches of a run; by default none are fed.

    Raises:
      app.UsageError: unknown optimizer.
    """
    steps, seconds = FLAGS.train_steps, FLAGS.train_seconds
    if seconds is not None and FLAGS["train_steps"].using_default_value:
        steps = None
    histories = []
    for name in optimizers():
        tf.random.set_seed(FLAGS.seed)
        with tf.device(FLAGS.device):
            run = make_run(name)
            try:
                history = training.train(
                    name,
                    run,
                    make_batches(),
                    train_steps=steps,
                    train_seconds=seconds,
                    eval_every=FLAGS.eval_every,
                )
            finally:
                run.close()
        histories.append(history)
    return histories


def report(
    title: str,
    histories: Sequence[reporting.History],
    columns: Mapping[str, str],
    curves: Mapping[str, str],
) -> None:
    """Prints the table of last measurements; writes `--plot` and `--results`, if given.

    Args:
      title: of both.
      histories: the runs.
      columns: metric -> column of the table.
      curves: metric -> label of a panel of the plot.
    """
    rows = [
        [h.name, str(h.updates[-1]), f"{h.seconds[-1]:.1f}"]
        + [h.metrics[key][-1] for key in columns]
        for h in histories
    ]
    reporting.print_table(
        f"{title}, after training",
        ["optimizer", "updates", "seconds", *columns.values()],
        rows,
    )
    if FLAGS.results:
        reporting.write_json(histories, FLAGS.results)
    if FLAGS.plot:
        reporting.plot(histories, FLAGS.plot, title, curves)
