"""A training loop for replicas and workers: progress, checkpoints, evaluation.

Keras' `fit` does not run under `MultiWorkerMirroredStrategy`; this does, and under
every other strategy, with the same results:

    strategy = kfac.keras.distributed.make_strategy("multi_worker")
    with strategy.scope():
        model = keras.Sequential([keras.Input([784]), keras.layers.Dense(10)])
        optimizer = kfac.keras.optimizers.Kfac(
            learning_rate=0.05, damping=0.01, model=model, loss="mse")
    loop = kfac.keras.distributed.DistributedLoop(
        strategy, model, optimizer, directory="checkpoints")
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
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from kfac.python.keras.distributed import strategies
from kfac.python.keras.models import tf_variable
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

        What a checkpoint holds, hyper-parameters that are state (learning rate,
        damping, ...) included, takes the place of what the optimizer was made with.
        To change one, assign it after this.

        Raises:
          ValueError: model or optimizer are none, or were made without the strategy;
            the directory is a file; its checkpoint is of another model or optimizer.
        """
        _check_made_for(strategy, model, optimizer)
        if not patience > 0:
            raise ValueError(f"patience is {patience!r}; expected seconds.")
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
            self._open(os.fspath(directory), keep)

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

        If all steps were taken before, there is an evaluation and nothing else.

        Raises:
          PeerLostError: another worker did not take part.
          ValueError: the data ended before the last step, or nonsense arguments.
        """
        _check_run(dataset, checkpoint_every, evaluate_every, report_every)
        if checkpoint_every is not None and self._manager is None:
            raise ValueError(
                f"checkpoint_every={checkpoint_every}, but DistributedLoop was made "
                "without a directory to keep checkpoints in."
            )
        report = report or _print_report
        scalars: dict[str, float] = {}
        with _Watchdog(self._patience, self._where) as watchdog:
            try:
                taken = int(self.step.numpy())
                if taken >= steps and evaluate:
                    scalars |= evaluate()
                    if self._is_chief:
                        report(taken, dict(scalars))
                batches = self._batches(dataset, taken)
                for step in range(taken, steps):
                    values = self._train(batches)
                    self.step.assign_add(1)
                    watchdog.pat()
                    done, last = step + 1, step + 1 == steps
                    measures = evaluate and (last or _is_due(done, evaluate_every))
                    if measures or last or _is_due(done, report_every):
                        found = self._as_floats(values)
                        found |= evaluate() if measures else {}
                        scalars |= found
                        if self._is_chief:
                            report(done, found)
                    if last or _is_due(done, checkpoint_every):
                        self.save()
                    watchdog.pat()
                self.wait_for_all()
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

    def _batches(self, dataset: Any, taken: int) -> Any:
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
        return {name: self._first(value) for name, value in values.items()}

    # ------------------------------------------------------------ evaluation

    def evaluate(
        self, dataset: tf.data.Dataset, scores: Mapping[str, Callable]
    ) -> dict[str, float]:
        """Means over all cases of a data set.

        Args:
          dataset: batches `(x, y)` of all replicas together, of any sizes.
          scores: name -> function of `(y, outputs)`, which gives a number for each
            case.

        Raises:
          ValueError: there are no cases, or a score is one number for all of them.
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
        cases = totals.pop("cases")
        if not cases:
            raise ValueError("There is nothing to evaluate: the data set is empty.")
        return {name: total / cases for name, total in totals.items()}

    def _evaluate_step(
        self, batches: Any, scores: Mapping[str, Callable]
    ) -> dict[str, tf.Tensor]:
        def sums(batch):
            x, y = batch[:2]
            outputs = self._model(x, training=False)
            cases = tf.shape(tf.nest.flatten(outputs)[0])[0]
            found = {"cases": tf.cast(cases, tf.float32)}
            for name, score in scores.items():
                values = tf.convert_to_tensor(score(y, outputs))
                if values.shape.rank == 0:
                    raise ValueError(
                        f"The score {name!r} is one number for all cases; expected one "
                        "for each (of a Keras loss: reduction='none')."
                    )
                found[name] = tf.reduce_sum(tf.cast(values, tf.float32))
            return utils.all_sum(found, "evaluation")

        found = self._strategy.run(sums, args=(batches.get_next(),))
        return {name: self._first(value) for name, value in found.items()}

    # ------------------------------------------------------------ checkpoints

    def save(self) -> str | None:
        """Writes a checkpoint; to be called by all workers. Returns its path."""
        if self._manager is None:
            return None
        path = self._manager.save(checkpoint_number=int(self.step.numpy()))
        if not self._is_chief:
            # All have to take part, but one copy is enough.
            tf.io.gfile.rmtree(self._manager.directory)
        return path

    def _open(self, directory: str, keep: int) -> None:
        if tf.io.gfile.exists(directory) and not tf.io.gfile.isdir(directory):
            raise ValueError(
                f"Checkpoints are kept in a directory, but {directory!r} is a file."
            )
        checkpoint = tf.train.Checkpoint(
            step=self.step, model=self._model, optimizer=self._optimizer
        )
        last = tf.train.latest_checkpoint(directory)
        if last is not None:
            try:
                checkpoint.restore(last).assert_existing_objects_matched()
            except (AssertionError, ValueError, tf.errors.OpError) as error:
                raise ValueError(
                    f"The checkpoint {last!r} does not fit this model and optimizer. "
                    "Make them as they were made when it was written, or give another "
                    f"directory. TensorFlow says: {str(error).splitlines()[0][:300]}"
                ) from error
        own = directory
        if not self._is_chief:
            resolver = self._strategy.cluster_resolver
            name = f".worker_{resolver.task_type}_{resolver.task_id}"
            own = os.path.join(directory, name)
        self._manager = tf.train.CheckpointManager(checkpoint, own, keep)
        self._directory = directory

    def wait_for_all(self) -> None:
        """Waits for all workers: one that ends early looks dead to the others."""
        if strategies.is_multi_worker(self._strategy):
            self._rendezvous()

    def _last_checkpoint(self) -> str:
        if self._manager is None:
            return "the start, since no directory for checkpoints was given"
        last = tf.train.latest_checkpoint(self._directory)
        return "the start, since there is no checkpoint yet" if last is None else last

    # ------------------------------------------------------------ helpers

    def _first(self, value: Any) -> tf.Tensor:
        return self._strategy.experimental_local_results(value)[0]

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


def _check_made_for(strategy: Any, model: Any, optimizer: Any) -> None:
    if not getattr(model, "trainable_variables", None):
        raise ValueError(
            "DistributedLoop needs a built model: give it an Input, or call "
            "model.build(input_shape) under strategy.scope()."
        )
    if not (hasattr(optimizer, "step") and hasattr(optimizer, "build_for")):
        raise ValueError(
            "DistributedLoop needs an optimizer with `step(x, y)`, such as Kfac; got "
            f"{type(optimizer).__name__}."
        )
    if strategy is tf.distribute.get_strategy() and not tf.distribute.has_strategy():
        return  # None at all.
    first = model.trainable_variables[0]
    for name, variable in (("model", first), ("optimizer", optimizer.iterations)):
        if not strategy.extended.variable_created_in_scope(tf_variable(variable)):
            raise ValueError(
                f"The {name} was not made for this strategy: make model and optimizer "
                "under strategy.scope()."
            )


def _check_run(dataset: Any, *periods: int | None) -> None:
    if not (callable(dataset) or isinstance(dataset, tf.data.Dataset)):
        raise ValueError(
            "dataset is a tf.data.Dataset of batches, or a function of a step that "
            f"gives one; got {type(dataset).__name__}. Of arrays make "
            "tf.data.Dataset.from_tensor_slices((x, y)).batch(64).repeat()."
        )
    if any(every is not None and every < 1 for every in periods):
        raise ValueError(
            "checkpoint_every, evaluate_every, report_every are "
            f"{', '.join(map(repr, periods))}; expected at least 1, or None."
        )


def _is_due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def _print_report(step: int, scalars: Scalars) -> None:
    shown = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
    print(f"step {step:5d}  {shown}", flush=True)


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "ollective" in line and "node" not in line]
    return (told or lines or [type(error).__name__])[0][:300]
