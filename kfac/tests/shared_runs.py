"""Results of an expensive run, computed once though several test processes want it."""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import pytest


def computed_once(
    factory: pytest.TempPathFactory,
    name: str,
    compute: Callable[[], Any],
    patience: float = 900.0,
) -> Any:
    """What `compute()` returns, as JSON gives it back.

    With pytest-xdist the tests of a module may run in several processes, each of which
    would compute a module's fixture anew; here the first one computes.

    Args:
      factory: the fixture `tmp_path_factory`.
      name: of the run; unique among all tests.
      compute: gives something that JSON can hold.
      patience: seconds to wait for another process.
    """
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # Common to all processes of this run.
    result = folder / f"{name}.json"
    try:
        (folder / f"{name}.claim").mkdir()
    except FileExistsError:
        return _wait_for(result, patience)
    try:
        outcome = {"result": compute()}
    except BaseException as error:
        outcome = {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        partial = result.with_suffix(".partial")
        partial.write_text(json.dumps(outcome))
        partial.rename(result)
    return json.loads(json.dumps(outcome))["result"]


def _wait_for(result: pathlib.Path, patience: float) -> Any:
    deadline = time.monotonic() + patience
    while not result.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Nobody finished {result.stem} in {patience} seconds.")
        time.sleep(0.1)
    outcome = json.loads(result.read_text())
    if "error" in outcome:
        raise RuntimeError(f"In another test process: {outcome['error']}")
    return outcome["result"]
