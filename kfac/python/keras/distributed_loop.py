"""A training loop for replicas and workers: progress, checkpoints, evaluation.

Keras' `fit` does not run under `MultiWorkerMirroredStrategy`; this does, and under
every other strategy, with the same results:

    strategy = strategies.make_strategy("multi_worker")
    with strategy.scope():
        model = ...
        optimizer = kfac.keras.optimizers.Kfac(
            learning_rate=0.05, damping=0.01, model=model, loss="mse")
    loop = DistributedLoop(strategy, model, optimizer, directory="checkpoints")
    loop.run(dataset, steps=1000, checkpoint_every=100)

**Data.** `dataset` gives the batches of all replicas together; each takes its part.
It must be repeated often enough, and give the same batches in every process that
iterates it: after a restart as many are skipped as steps were taken.  Where skipping
is slow, `dataset` may be a function that gives the batches from a step on.

**Failure.** A collective cannot go on without a member.  If a worker dies, hangs or is
cut off, all others end with `PeerLostError`; start all again, for instance by
`kfac.examples.launch_local`.  `run` then goes on from the last checkpoint, and ends
with the parameters, to the bit, of a run without failure.  The number of replicas may
be another one, though the last digits then differ.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from kfac.python.keras import strategies
from kfac.python.ops import utils

Scalars = Mapping[str, float]
_LOST = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
)
_EXIT_CODE = 75  # EX_TEMPFAIL: try again.


class PeerLostError(RuntimeError):
    """Another worker did not take part in a collective."""


class DistributedLoop:
    """Trains a model whose optimizer has `step(x, y, sample_weight)`.

    Attributes:
      step: int64 variable, the number of steps taken.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        model: Any,
        optimizer: Any,
        directory: str | os.PathLike | None = None,
        keep: int = 3,
        patience: float = 1800.0,
    ):
        """Makes all state and restores the last checkpoint, if there is one.

        Args:
          strategy: under whose scope model and optimizer were made.
          model: a built model.
          optimizer: `Kfac`, or what else has such a `step`.
          directory: where checkpoints are kept, the same for all workers; None keeps
            none.
          keep: number of checkpoints that are kept.
          patience: seconds without a completed step after which the process is ended,
            with a message, whatever it waits for.

        Raises:
          ValueError: the model has no variables yet.
        """
        if not model.trainable_variables:
            raise ValueError(
                "DistributedLoop needs a built model: give it an Input, or call "
                "model.build(input_shape) under strategy.scope()."
            )
        self._strategy = strategy
        self._model = model
        self._optimizer = optimizer
        self._patience = patience
        self._is_chief = strategies.is_chief(strategy)
        with strategy.scope():
            self.step = tf.Variable(0, dtype=tf.int64, name="step", trainable=False)
            optimizer.build_for(model)
        self._train = tf.function(self._train_step, autograph=False)
        self._evaluators: dict[tuple, Callable] = {}
        self._rendezvous = tf.function(
            lambda: strategy.reduce("SUM", strategy.run(lambda: 1.0), axis=None)
        )
        self._manager: tf.train.CheckpointManager | None = None
        if directory is not None:
            self._open(pathlib.Path(directory), keep)

    # ------------------------------------------------------------ training

    def run(
        self,
        dataset: tf.data.Dataset | Callable[[int], tf.data.Dataset],
        steps: int,
        checkpoint_every: int | None = None,
        evaluate: Callable[[], Scalars] | None = None,
        evaluate_every: int | None = None,
        report: Callable[[int, Scalars], None] | None = None,
        report_every: int = 10,
    ) -> Scalars:
        """Trains until `steps` steps have been taken, those before a restart included.

        Args:
          dataset: batches `(x, y)` or `(x, y, sample_weight)` of all replicas, or a
            function of the number of steps taken that gives those to come.
          steps: how many steps in all.
          checkpoint_every: steps between checkpoints; there is one at the end, too.
          evaluate: measures the model; called by every worker.
          evaluate_every: steps between evaluations; by default one at the end.
          report: gets the number of steps and scalars, on the chief only; prints a
            line by default.
          report_every: steps between reports.

        Returns:
          The scalars of the last step, and of the last evaluation.

        Raises:
          PeerLostError: another worker did not take part.
          ValueError: the data ended before the last step.
        """
        report = report or _print_report
        scalars: dict[str, float] = {}
        with _Watchdog(self._patience, self._where) as watchdog:
            try:
                batches = self._batches(dataset)
                for step in range(int(self.step.numpy()), steps):
                    values = self._train(batches)
                    self.step.assign_add(1)
                    watchdog.pat()
                    done, last = step + 1, step + 1 == steps
                    due = last or done % report_every == 0
                    if due:
                        scalars |= self._as_floats(values)
                    if evaluate and (last or _is_due(done, evaluate_every)):
                        scalars |= evaluate()
                        due = True
                    if due and self._is_chief:
                        report(done, dict(scalars))
                    if last or _is_due(done, checkpoint_every):
                        self.save()
                    watchdog.pat()
                self._meet()
            except tf.errors.OutOfRangeError:
                raise ValueError(
                    f"The data ended {self._where()} of {steps}; repeat the data set."
                ) from None
            except _LOST as error:
                if not strategies.is_multi_worker(self._strategy):
                    raise
                raise PeerLostError(
                    f"{self._where()}: another worker died, hung or was cut off, and a "
                    "collective waited for it in vain. Start all workers again; "
                    f"training goes on from {self._last_checkpoint()}. TensorFlow "
                    f"says: {_first_lines(error)}"
                ) from error
        return scalars

    def _batches(self, dataset: Any) -> Any:
        taken = int(self.step.numpy())
        rest = dataset(taken) if callable(dataset) else dataset.skip(taken)
        return iter(self._distributed(rest))

    def _distributed(self, dataset: tf.data.Dataset) -> Any:
        options = tf.data.Options()
        # Every worker reads everything and keeps its part of each batch.
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.DATA
        )
        options.deterministic = True
        return self._strategy.experimental_distribute_dataset(
            dataset.with_options(options)
        )

    def _train_step(self, batches: Any) -> dict[str, tf.Tensor]:
        def step(batch):
            values = dict(self._optimizer.step(*batch))
            # The loss is each replica's own; the rest is the same on all of them.
            cases = tf.cast(tf.shape(tf.nest.flatten(batch[0])[0])[0], tf.float32)
            loss = tf.cast(values.pop("loss"), tf.float32)
            sums = tf.stack([tf.where(cases > 0, cases * loss, 0.0), cases])
            total, count = tf.unstack(utils.all_sum(sums, "progress"))
            return {"loss": total / count, **values}

        # Drawn here, so that one trace serves batches of all sizes.
        values = self._strategy.run(step, args=(batches.get_next(),))
        first = lambda value: self._strategy.experimental_local_results(value)[0]
        return {name: first(value) for name, value in values.items()}

    # ------------------------------------------------------------ evaluation

    def evaluate(
        self, dataset: tf.data.Dataset, scores: Mapping[str, Callable]
    ) -> dict[str, float]:
        """Means over all cases of a data set.

        Args:
          dataset: batches `(x, y)` of all replicas together, of any sizes.
          scores: name -> function of `(y, outputs)`, which gives a number for each
            case.
        """
        evaluate = self._evaluators.setdefault(
            tuple(scores.items()),
            tf.function(lambda b: self._evaluate_step(b, scores), autograph=False),
        )
        totals = dict.fromkeys(["cases", *scores], 0.0)
        batches = iter(self._distributed(dataset))
        with contextlib.suppress(tf.errors.OutOfRangeError):
            while True:
                for name, value in evaluate(batches).items():
                    totals[name] += float(value)
        return {name: totals[name] / totals["cases"] for name in scores}

    def _evaluate_step(
        self, batches: Any, scores: Mapping[str, Callable]
    ) -> dict[str, tf.Tensor]:
        def sums(batch):
            x, y = batch[:2]
            outputs = self._model(x, training=False)
            found = {"cases": tf.cast(tf.shape(outputs)[0], tf.float32)}
            for name, score in scores.items():
                found[name] = tf.reduce_sum(tf.cast(score(y, outputs), tf.float32))
            return found

        found = self._strategy.run(sums, args=(batches.get_next(),))
        return {
            name: self._strategy.reduce("SUM", value, axis=None)
            for name, value in found.items()
        }

    # ------------------------------------------------------------ checkpoints

    def save(self) -> str | None:
        """Writes a checkpoint; to be called by all workers. Returns its path."""
        if self._manager is None:
            return None
        path = self._manager.save(checkpoint_number=int(self.step.numpy()))
        if not self._is_chief:
            # All have to take part, but one copy is enough.
            shutil.rmtree(self._manager.directory, ignore_errors=True)
        return path

    def _open(self, directory: pathlib.Path, keep: int) -> None:
        checkpoint = tf.train.Checkpoint(
            step=self.step, model=self._model, optimizer=self._optimizer
        )
        last = tf.train.latest_checkpoint(directory)
        if last is not None:
            checkpoint.restore(last).assert_existing_objects_matched()
        own = directory
        if not self._is_chief:
            resolver = self._strategy.cluster_resolver
            own = directory / f".worker_{resolver.task_type}_{resolver.task_id}"
        self._manager = tf.train.CheckpointManager(checkpoint, str(own), keep)
        self._directory = directory

    def _meet(self) -> None:
        """Waits for all workers: one that ends early looks dead to the others."""
        if strategies.is_multi_worker(self._strategy):
            self._rendezvous()

    def _last_checkpoint(self) -> str:
        if self._manager is None:
            return "the start, since no directory for checkpoints was given"
        last = tf.train.latest_checkpoint(self._directory)
        return "the start, since there is no checkpoint yet" if last is None else last

    # ------------------------------------------------------------ helpers

    def _as_floats(self, values: Mapping[str, tf.Tensor]) -> dict[str, float]:
        return {name: float(value) for name, value in values.items()}

    def _where(self) -> str:
        resolver = self._strategy.cluster_resolver
        name = ""
        if strategies.is_multi_worker(self._strategy):
            name = f"{resolver.task_type} {resolver.task_id}, "
        return f"{name}after step {int(self.step.numpy())}"


class _Watchdog:
    """Ends the process if nobody pats it for a while.

    The main thread may be stuck where no exception reaches it: in a collective that
    has no time limit, or in the connection of a cluster.
    """

    def __init__(self, patience: float, where: Callable[[], str]):
        self._patience = patience
        self._where = where
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def pat(self) -> None:
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._patience / 4)):
            waited = time.monotonic() - self._last
            if waited < self._patience:
                continue
            print(
                f"{self._where()}: no step was completed for {waited:.0f} seconds. "
                "Another worker probably hangs, or the input does. Ending this "
                "process; start all workers again.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(_EXIT_CODE)


def _is_due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def _print_report(step: int, scalars: Scalars) -> None:
    shown = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
    print(f"step {step:5d}  {shown}", flush=True)


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "ollective" in line and "node" not in line]
    return (told or lines or [type(error).__name__])[0][:300]
