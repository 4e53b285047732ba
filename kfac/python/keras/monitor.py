"""A Keras callback that shows what K-FAC does."""

from __future__ import annotations

import csv
import pathlib
import statistics
import time
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from kfac.python.keras import schedule
from kfac.python.keras.readings import Readings, Spectrum, spectrum
from kfac.python.ops import report

# Kinds of steps, by what they compute beyond gradient and update.
PLAIN, STATISTICS, INVERSES = "plain", "statistics", "inverses"

# Marks a summary as a scalar, as `tf.summary.scalar` does; that one needs the
# tensorboard package to be installed where the model trains.
_SCALAR = tf.compat.v1.SummaryMetadata(
    plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars"),
    data_class=1,  # DATA_CLASS_SCALAR, see summary.proto.
)


class CurvatureMonitor(keras.callbacks.Callback):
    """Puts damping, rho, spectra of the factors and phase times where you look.

        monitor = kfac.keras.callbacks.CurvatureMonitor(csv_path="curvature.csv")
        model.fit(x, y, callbacks=[monitor])
        print(monitor.table())

    Put it before other callbacks, such as `CSVLogger` and `TensorBoard`, that should
    see its values in their logs.  It reads the optimizer's state on the host, between
    steps; the training step is the same with it and without.

    In the logs of every batch (hence in the progress bar) and of every epoch (hence in
    the history):

    * `damping` and `learning_rate`; `fallbacks`, the number of inverses that had to be
      replaced because the statistics were not finite or not positive definite: it
      should stay zero; where adapted also `momentum` and `rho`, the actual over the
      predicted reduction of the loss, which should be near 1;

    and in those of every epoch also

    * `worst_condition` and `least_rank_share` over the factors, see `Spectrum`;
    * `step_ms`, the mean time of a step, and `statistics_ms` and `inverses_ms`, by how
      much these updates lengthen a step (medians, where steps with and without them
      occurred; not with several steps an execution).

    Args:
      every: batches between readings of the scalars.
      spectra_every: batches between spectra of the factors; None for once an epoch.
      max_side: factors with more rows, or `max_side**2` numbers on a diagonal, get no
        spectrum (that of a matrix takes `4/3 side**3` operations on the host).
      log_dir: folder for TensorBoard; None writes none.
      csv_path: file with one row a spectrum; None writes none.
      in_logs: put values into the logs at all.

    Attributes:
      records: what was read, one dictionary for each row of the CSV file.
    """

    def __init__(
        self,
        every: int = 10,
        spectra_every: int | None = None,
        max_side: int = 2048,
        log_dir: str | None = None,
        csv_path: str | None = None,
        in_logs: bool = True,
    ):
        super().__init__()
        if every < 1 or (spectra_every is not None and spectra_every < 1):
            raise ValueError(
                "every and spectra_every are numbers of batches, 1 or more; got "
                f"{every} and {spectra_every}."
            )
        self.records: list[dict[str, float]] = []
        self._every = every
        self._spectra_every = spectra_every
        self._max_side = max_side
        self._csv_path = None if csv_path is None else pathlib.Path(csv_path)
        self._writer = log_dir and tf.summary.create_file_writer(
            str(pathlib.Path(log_dir) / "curvature")
        )
        self._in_logs = in_logs
        self._readings: Readings | None = None
        self._spectra: dict[str, Spectrum] = {}
        self._scalars: dict[str, float] = {}
        self._batches = 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._readings = Readings(self.model.optimizer)
        self._times = StepTimes(self.model.optimizer)
        self._batches = 0

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self._times.begin(self._readings.steps)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._times.end(self._readings.steps)
        if self._batches % self._every == 0:
            self._scalars = self._readings.scalars()
            self._write_summaries(self._scalars)
        self._batches += 1
        if self._spectra_every and self._batches % self._spectra_every == 0:
            self._take_spectra()
        if self._in_logs and logs is not None:
            logs.update(self._scalars)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._scalars = self._readings.scalars()
        if not self._spectra_every or not self._spectra:
            self._take_spectra()
        if self._in_logs and logs is not None:
            logs.update({**self._scalars, **self._summary(), **self._times.phases()})

    def table(self) -> str:
        """The last spectra by factor, and the times of steps, as a table of text."""
        fallbacks = {} if self._readings is None else self._readings.fallbacks()
        lines = report.aligned(
            ["Factor", "Side", "Condition", "Effective rank", "Fallbacks"],
            [
                [
                    name,
                    f"{found.side}",
                    f"{found.condition:.2g}",
                    f"{found.effective_rank:.1f} ({found.rank_share:.0%})",
                    f"{fallbacks.get(name, 0)}",
                ]
                for name, found in self._spectra.items()
            ],
        )
        if self._readings is not None:
            phases = self._times.phases()
            lines += ["", *(f"{name}: {value:.2f}" for name, value in phases.items())]
        return "\n".join(lines)

    def _take_spectra(self) -> None:
        self._spectra = {
            name: spectrum(moment)
            for name, moment in self._readings.moments().items()
            if moment.size <= self._max_side**2
        }
        record = {"iterations": self._readings.iterations, **self._scalars}
        record |= self._summary()
        for name, found in self._spectra.items():
            record[f"{name}/condition"] = found.condition
            record[f"{name}/effective_rank"] = found.effective_rank
        record |= self._times.phases()
        self.records.append(record)
        self._write_csv_row(record)
        self._write_summaries(
            {k: v for k, v in record.items() if k not in ("iterations", *self._scalars)}
        )

    def _summary(self) -> dict[str, float]:
        if not self._spectra:
            return {}
        found = self._spectra.values()
        return {
            "worst_condition": max(s.condition for s in found),
            "least_rank_share": min(s.rank_share for s in found),
        }

    def _write_csv_row(self, record: Mapping[str, float]) -> None:
        if self._csv_path is None:
            return
        is_first = len(self.records) == 1
        if is_first:
            self._csv_path.parent.mkdir(parents=True, exist_ok=True)
        with self._csv_path.open("w" if is_first else "a", newline="") as file:
            writer = csv.DictWriter(file, list(self.records[0]), extrasaction="ignore")
            if is_first:
                writer.writeheader()
            writer.writerow(record)

    def _write_summaries(self, values: Mapping[str, float]) -> None:
        if not self._writer:
            return
        with self._writer.as_default(step=self._readings.iterations):
            for name, value in values.items():
                tf.summary.write(
                    f"curvature/{name}",
                    tf.constant(value, tf.float32),
                    metadata=_SCALAR,
                )
        self._writer.flush()


class StepTimes:
    """Wall-clock time of steps, by what was due in them.

    Args:
      optimizer: the `Kfac` (or the `LossScaleOptimizer` around it) that takes the
        steps.
    """

    def __init__(self, optimizer: Any):
        config = getattr(optimizer, "inner_optimizer", optimizer).get_config()
        self._cov_update_every = config["cov_update_every"]
        self._invert_every = config["invert_every"]
        self._seconds: dict[str | None, list[float]] = {}
        self._step: int | None = None
        self._has_traced = False

    def begin(self, step: int) -> None:
        """Starts the clock of step number `step`."""
        self._step = step
        self._start = time.perf_counter()

    def end(self, step: int) -> None:
        """Stops it; `step` is the number of the next step."""
        seconds = time.perf_counter() - self._start
        if self._has_traced and step == self._step + 1:
            self._seconds.setdefault(self._kind(self._step), []).append(seconds)
        self._has_traced = True  # The first execution includes tracing.

    def phases(self) -> dict[str, float]:
        """Times in milliseconds; see `CurvatureMonitor`."""
        everything = [seconds for kind in self._seconds.values() for seconds in kind]
        if not everything:
            return {}
        found = {"step_ms": 1e3 * statistics.fmean(everything)}
        median = {k: 1e3 * statistics.median(v) for k, v in self._seconds.items()}
        if {PLAIN, STATISTICS} <= median.keys():
            found["statistics_ms"] = median[STATISTICS] - median[PLAIN]
        before = STATISTICS if self._inverses_come_with_statistics else PLAIN
        if {before, INVERSES} <= median.keys():
            found["inverses_ms"] = median[INVERSES] - median[before]
        return found

    @property
    def _inverses_come_with_statistics(self) -> bool:
        return self._invert_every % self._cov_update_every == 0

    def _kind(self, step: int) -> str | None:
        statistics_due = schedule.statistics_due(step, self._cov_update_every)
        if not schedule.inverses_due(step, self._invert_every):
            return STATISTICS if statistics_due else PLAIN
        # Of the inverses' steps only those are comparable that do the same.
        same = statistics_due == self._inverses_come_with_statistics
        return INVERSES if same else None
