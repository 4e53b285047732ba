"""What the programs for `tf.distribute` share: flags, data by step, the whole run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import flags, logging

from kfac.examples import datasets, reporting
from kfac.python.keras import distributed, optimizers
from kfac.python.keras.distributed import strategies

FLAGS = flags.FLAGS
flags.DEFINE_enum("strategy", "none", strategies.KINDS, "How work is distributed.")
flags.DEFINE_integer(
    "num_replicas", None, "Devices of --strategy=mirrored; logical ones on a CPU."
)
flags.DEFINE_string("tpu", None, "Name or address of the TPU, or 'local'.")
flags.DEFINE_float("collective_timeout", 120.0, "Seconds that workers wait for others.")
flags.DEFINE_bool(
    "share_work", True, "Share inversions and preconditioning out over replicas."
)
flags.DEFINE_string("checkpoint_dir", None, "Where training goes on after a restart.")
flags.DEFINE_integer("checkpoint_every", 20, "Steps between checkpoints.")
flags.DEFINE_integer("eval_every", 20, "Steps between evaluations.")
flags.DEFINE_integer("train_steps", 100, "Steps in all.")
flags.DEFINE_integer("batch_size", 512, "Cases in a step, over all replicas.")
flags.DEFINE_list("hidden_widths", [], "Widths of the hidden layers.")
flags.DEFINE_float("damping", None, "Damping at the start, instead of a tuned one.")
flags.DEFINE_float("cov_batch_fraction", 1.0, "Part of the batch for statistics.")
flags.DEFINE_integer("seed", 0, "Seed of initialisation, batches and samples.")
flags.DEFINE_enum("dataset", "mnist", datasets.DATASETS, "Data set.")
flags.DEFINE_string("data_dir", None, "Folder with the full data (idx or npz files).")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
      title: of the table.
      make_model: seeded Keras model of the hidden widths; called under the strategy.
      loss: Keras loss, a mean over the batch.
      arrays: data set -> `(x, y)` of training and of testing.
      scores: name -> function of `(y, outputs)` with a number for each case.
      hidden_widths: if the flag does not say.
      damping: likewise.
    """

    title: str
    make_model: Callable[[Sequence[int]], Any]
    loss: Any
    arrays: Callable[[datasets.ImageData], tuple[tuple, tuple]]
    scores: Mapping[str, Callable]
    hidden_widths: Sequence[int]
    damping: float


def shuffled_batches(
    arrays: Sequence[np.ndarray], batch_size: int, seed: int
) -> Callable[[int], tf.data.Dataset]:
    """Endless batches, as a function of the first step; each epoch in a new order.

    The order is computed from the seed and the position alone, so that a process that
    starts again in the middle sees what it would have seen.
    """
    count = len(arrays[0])
    tensors = [tf.constant(array) for array in arrays]

    def row(position: tf.Tensor) -> tf.Tensor:
        epoch = tf.cast(position // count, tf.int32)
        return tf.random.experimental.index_shuffle(
            position % count, tf.stack([seed, epoch]), tf.cast(count - 1, tf.int64)
        )

    def batch(rows: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return tuple(tf.gather(tensor, rows) for tensor in tensors)

    def batches(first: int) -> tf.data.Dataset:
        rows = tf.data.Dataset.counter(first * batch_size).map(row)
        return rows.batch(batch_size, drop_remainder=True).map(batch)

    return batches


def run(task: Task) -> dict[str, float]:
    """Trains by the flags; returns the last measurements."""
    tf.get_logger().setLevel("ERROR")  # It tells of every collective.
    logging.set_verbosity(logging.ERROR)
    # Before anything else of TensorFlow, which configures devices.
    strategy = distributed.make_strategy(
        FLAGS.strategy, FLAGS.num_replicas, FLAGS.tpu, FLAGS.collective_timeout
    )
    data = datasets.load(FLAGS.dataset, FLAGS.data_dir)
    train, test = task.arrays(data)
    replicas = strategy.num_replicas_in_sync
    shares = FLAGS.share_work and replicas > 1
    with strategy.scope():
        widths = [int(width) for width in FLAGS.hidden_widths] or task.hidden_widths
        model = task.make_model(widths)
        optimizer = optimizers.Kfac(
            damping=FLAGS.damping or task.damping,
            adaptive=True,
            model=model,
            loss=task.loss,
            seed=FLAGS.seed,
            cov_batch_fraction=FLAGS.cov_batch_fraction,
            placement_strategy="replica_round_robin" if shares else None,
        )
    loop = distributed.DistributedLoop(strategy, model, optimizer, FLAGS.checkpoint_dir)
    _say_what_begins(strategy, loop, data)
    test_batches = tf.data.Dataset.from_tensor_slices(test).batch(1000)

    def evaluate() -> dict[str, float]:
        scores = loop.evaluate(test_batches, task.scores)
        return {f"test_{name}": value for name, value in scores.items()}

    try:
        scalars = loop.run(
            shuffled_batches(train, FLAGS.batch_size, FLAGS.seed),
            FLAGS.train_steps,
            checkpoint_every=FLAGS.checkpoint_every if FLAGS.checkpoint_dir else None,
            evaluate=evaluate,
            evaluate_every=FLAGS.eval_every,
            report=_report,
        )
    except distributed.PeerLostError as error:
        sys.exit(f"PeerLostError: {error}")  # Where it happened says nothing.
    taken = int(loop.step.numpy())
    if strategies.is_multi_worker(strategy):
        norm = np.sqrt(sum(np.sum(np.square(w)) for w in model.get_weights()))
        _say(f"{_name(strategy)}: {taken} steps, norm of the parameters {norm:.6f}")
    if strategies.is_chief(strategy):
        names = ["loss", *(f"test_{name}" for name in task.scores)]
        reporting.print_table(
            f"{task.title}, {FLAGS.strategy}, {replicas} replica(s)",
            ["steps", *names],
            [[str(taken), *(scalars.get(name, "") for name in names)]],
        )
        if FLAGS.checkpoint_dir:
            _say(
                f"Checkpoints: {FLAGS.checkpoint_dir}. To go on, run this again with "
                f"--train_steps above {taken}."
            )
    loop.wait_for_all()
    return scalars


def _say_what_begins(
    strategy: tf.distribute.Strategy,
    loop: distributed.DistributedLoop,
    data: datasets.ImageData,
) -> None:
    is_chief = strategies.is_chief(strategy)
    if strategies.is_multi_worker(strategy):
        role = ", as the chief: it reports and saves" if is_chief else ""
        _say(f"{_name(strategy)} takes part{role}")
    if not is_chief:
        return
    replicas, taken = strategy.num_replicas_in_sync, int(loop.step.numpy())
    _say(f"Data: {data.description}")
    _say(
        f"{replicas} replica(s) share the {FLAGS.batch_size} cases of a step; losses "
        "are means over all of them"
    )
    if FLAGS.checkpoint_dir:
        where = f"{FLAGS.checkpoint_dir}, every {FLAGS.checkpoint_every} steps"
        _say(f"Checkpoints: {where}")
    else:
        _say(
            "No checkpoints: give --checkpoint_dir to be able to go on after a failure"
        )
    if taken >= FLAGS.train_steps:
        _say(
            f"{taken} steps were taken before: give more by --train_steps, or another "
            "--checkpoint_dir"
        )
        return
    if taken:
        _say(f"Going on from step {taken}")
    _say("Building the first step, which takes some seconds")


def _name(strategy: tf.distribute.Strategy) -> str:
    resolver = strategy.cluster_resolver
    workers = resolver.cluster_spec().num_tasks("worker")
    return f"{resolver.task_type} {resolver.task_id} of {workers}"


def _say(line: str) -> None:
    print(line, flush=True)


def _report(step: int, scalars: Mapping[str, float]) -> None:
    shown = [
        f"{name} {value:.4g}"
        for name, value in scalars.items()
        if name in ("loss", "damping", "learning_rate") or name.startswith("test_")
    ]
    print(f"step {step:4d}  " + "  ".join(shown), flush=True)
