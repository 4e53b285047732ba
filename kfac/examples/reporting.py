"""What the example programs show: a progress line, a final table, a plot."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

# Columns of text where the output is not a terminal.
_PLAIN_WIDTH = 110


@dataclasses.dataclass
class History:
    """Measurements of one training run.

    `seconds` counts training only: the clock stands still during evaluations.
    """

    name: str
    updates: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    metrics: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def record(self, update: int, seconds: float, metrics: Mapping[str, float]) -> None:
        self.updates.append(update)
        self.seconds.append(seconds)
        for key, value in metrics.items():
            self.metrics.setdefault(key, []).append(float(value))


class TrainingClock:
    """A stopwatch that is paused while a run is evaluated."""

    def __init__(self):
        self._spent = 0.0
        self._since: float | None = None

    def __enter__(self) -> TrainingClock:
        self._since = time.perf_counter()
        return self

    def __exit__(self, *unused) -> None:
        self._spent += time.perf_counter() - self._since
        self._since = None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._spent + running


class Progress:
    """One live line on a terminal, a plain line now and then elsewhere."""

    PLAIN_EVERY = 10.0  # Seconds between lines when the output is not a terminal.

    def __init__(self, name: str, total_steps: int | None, total_seconds: float | None):
        from rich import console, progress  # The [examples] extra.

        self._name = name
        self._total_steps = total_steps
        self._total_seconds = total_seconds
        self._console = console.Console()
        self._last = 0.0
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[text]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Progress:
        self._bar.start()
        self._task = self._bar.add_task(self._name, total=1.0, text="")
        return self

    def __exit__(self, *unused) -> None:
        self._bar.stop()

    def update(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        values = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        text = f"update {step:5d}  {seconds:6.1f} s  {values}"
        fractions = [
            done / total
            for done, total in (
                (step, self._total_steps),
                (seconds, self._total_seconds),
            )
            if total
        ]
        self._bar.update(self._task, completed=max(fractions), text=text)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last >= self.PLAIN_EVERY:
            self._last = now
            print(f"{self._name:6s} {text}", flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Prints rows; numbers are right-aligned."""
    from rich import console, table  # The [examples] extra.

    view = table.Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        justify = "left" if i == 0 else "right"
        view.add_column(column, justify=justify, overflow="fold", no_wrap=i == 0)
    for row in rows:
        view.add_row(
            *(cell if isinstance(cell, str) else f"{cell:,.4g}" for cell in row)
        )
    terminal = console.Console()
    width = terminal.width if terminal.is_terminal else _PLAIN_WIDTH
    console.Console(width=width).print(view)


def write_json(histories: Sequence[History], path: str) -> None:
    """Writes the histories to a file; missing folders are made."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    measured = [dataclasses.asdict(history) for history in histories]
    target.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(f"Results: {target}")


def plot(
    histories: Sequence[History],
    path: str,
    title: str,
    metrics: Mapping[str, str],
    log_scale: bool = True,
) -> None:
    """Writes a PNG: a row of panels a metric, against updates and against seconds.

    Args:
      histories: the runs.
      path: of the PNG; missing folders are made.
      title: of the figure.
      metrics: key in `History.metrics` -> axis label.
      log_scale: of the metric axis.
    """
    import matplotlib  # The [examples] extra.

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(metrics), 2, figsize=(11, 4 * len(metrics)), squeeze=False, sharey="row"
    )
    for row, (key, label) in zip(axes, metrics.items(), strict=True):
        for axis, (field, axis_label) in zip(
            row, (("updates", "updates"), ("seconds", "training seconds")), strict=True
        ):
            for history in histories:
                x, y = getattr(history, field), history.metrics[key]
                axis.plot(x, y, label=history.name, linewidth=1.6)
            axis.set_xlabel(axis_label)
            axis.grid(alpha=0.3, which="both")
            if log_scale:
                _make_logarithmic(axis)
        row[0].set_ylabel(label)
        row[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, path)


def save_figure(figure: Any, path: str, dpi: int = 80) -> None:
    """Writes a figure as a small PNG of 128 colours, and closes it.

    Args:
      figure: of matplotlib.
      path: of the PNG; missing folders are made.
      dpi: pixels an inch.
    """
    from matplotlib import pyplot
    from PIL import Image  # Matplotlib needs it, too.

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi)
    pyplot.close(figure)
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = (
        Image.open(drawn)
        .convert("RGB")
        .quantize(
            128,
            method=Image.Quantize.MAXCOVERAGE,  # Rare colours matter, too.
            dither=Image.Dither.NONE,  # It would look like noise and take space.
        )
    )
    picture.save(target, optimize=True)
    print(f"Plot: {target}")


def _make_logarithmic(axis) -> None:
    """Log scale with plain numbers at 1, 2 and 5, also within one decade."""
    from matplotlib import ticker

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
