"""Interleaved timing of training steps, and files of results."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


# Contender -> for every round, the time of each of its steps.
Times = dict[str, list[list[float]]]


def interleaved(
    steps: Mapping[str, Callable[[], Any]], rounds: int, steps_a_round: int
) -> tuple[Times, Times]:
    """Wall-clock and processor seconds of every step, per contender and round.

    Contenders take turns step by step, so that whatever else the machine does slows
    all of them down alike; compare sums within a round, and rounds by their median.
    Processor time (of all threads) does not count waiting for a busy processor.
    """
    elapsed: Times = {name: [] for name in steps}
    worked: Times = {name: [] for name in steps}
    for _ in range(rounds):
        for times in (*elapsed.values(), *worked.values()):
            times.append([])
        for _ in range(steps_a_round):
            for name, step in steps.items():
                start, processor = time.perf_counter(), time.process_time()
                step()
                elapsed[name][-1].append(time.perf_counter() - start)
                worked[name][-1].append(time.process_time() - processor)
    return elapsed, worked


def round_means(rounds: list[list[float]]) -> list[float]:
    """Mean seconds a step, per round."""
    return [statistics.fmean(times) for times in rounds]


def paired_ratio(
    rounds: list[list[float]], baseline: list[list[float]]
) -> tuple[float, float, float]:
    """Median, least and largest ratio of two contenders' means within a round."""
    pairs = zip(round_means(rounds), round_means(baseline), strict=True)
    ratios = [mean / base for mean, base in pairs]
    return statistics.median(ratios), min(ratios), max(ratios)


def write_result(name: str, result: Mapping[str, Any]) -> pathlib.Path:
    """Writes `results/<name>.json`, with what it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    print(f"Results: {path.relative_to(RESULTS.parent.parent)}")
    return path


def machine() -> dict[str, Any]:
    """Processor, versions and load, to judge figures by."""
    import keras
    import tensorflow as tf

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
    }


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
