"""Flags that all examples share, and what is done for each optimizer."""

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import app, flags

from kfac.examples import program, reporting, training
from kfac.tests.examples import example_runs

FLAGS = flags.FLAGS


def run_of(log, name):
    """A run that notes the batches it gets."""
    log[name] = []

    def step(*batch):
        log[name].append([part.numpy().tolist() for part in batch])
        return {}

    return training.Run(step, lambda: {"loss": 1.0}, lambda: log[name].append("closed"))


def numbers():
    return ([np.array(i)] for i in range(1000))


def test_every_optimizer_gets_the_same_batches_and_is_closed():
    log = {}
    with example_runs.with_flags(None, optimizer=["kfac", "adam"], train_steps=3):
        histories = program.train_each(lambda name: run_of(log, name), numbers)
    assert log == {name: [[0], [1], [2], "closed"] for name in ("kfac", "adam")}
    assert [history.name for history in histories] == ["kfac", "adam"]


def updates(**limits):
    now = itertools.count()  # Every look at the clock takes a second.
    with (
        pytest.MonkeyPatch.context() as patches,
        example_runs.with_flags(None, **limits),
    ):
        patches.setattr(time, "perf_counter", lambda: float(next(now)))
        (history,) = program.train_each(lambda name: run_of({}, name))
    return history.updates[-1]


def test_seconds_replace_the_default_number_of_updates():
    assert updates() == 300
    assert updates(train_seconds=1000.0) > 300
    assert updates(train_steps=5, train_seconds=1000.0) == 5
    assert updates(train_steps=1000, train_seconds=10.0) < 300


def test_a_failed_run_is_closed_too():
    closed = []

    def fail():
        raise FloatingPointError

    run = training.Run(fail, lambda: {}, lambda: closed.append(True))
    with (
        example_runs.with_flags(None, train_steps=3),
        pytest.raises(FloatingPointError),
    ):
        program.train_each(lambda name: run)
    assert closed == [True]


def test_unknown_optimizers_are_named():
    with (
        example_runs.with_flags(None, optimizer=["kfac", "lbfgs"]),
        pytest.raises(app.UsageError, match="lbfgs.*expected"),
    ):
        program.train_each(lambda name: None)


def test_widths_are_numbers():
    with example_runs.with_flags(None, hidden_widths=["20", "10"]):
        assert program.hidden_widths() == [20, 10]
    for wrong in ("ten", "0", "-3"):
        with (
            example_runs.with_flags(None, hidden_widths=["20", wrong]),
            pytest.raises(app.UsageError, match=f"{wrong}.*expected"),
        ):
            program.hidden_widths()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_steps", -1),
        ("batch_size", 0),
        ("damping", -0.1),
        ("eval_every", 0),
        ("eval_size", 0),
    ],
)
def test_sizes_that_make_no_sense_are_refused(name, value):
    with pytest.raises(flags.IllegalFlagValueError, match=name):
        example_runs.with_flags(None, **{name: value}).__enter__()


def test_a_program_may_have_other_defaults(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        app, "run", lambda main: seen.update(damping=FLAGS.damping, ran=main)
    )
    before = FLAGS["damping"].default
    with example_runs.with_flags(None):
        program.start("main", {"damping": 7.0})
    FLAGS.set_default("damping", before)
    assert seen == {"damping": 7.0, "ran": "main"}


def test_a_flag_that_would_do_nothing_is_refused():
    finished = subprocess.run(
        [
            *[sys.executable, "-m", "kfac.examples.cg_preconditioning"],
            "--invert_every=3",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode != 0
    assert "Unknown command line flag 'invert_every'" in finished.stderr


def test_the_report_is_a_table_and_a_plot_if_asked_for(tmp_path, capsys):
    history = reporting.History("kfac")
    history.record(0, 0.0, {"loss": 4.0, "error": 3.0})
    history.record(50, 12.34, {"loss": 2.5, "error": 1.25})
    columns, curves = {"loss": "the loss"}, {"error": "the error"}
    plot = tmp_path / "curves.png"
    with example_runs.with_flags(None, plot=None):
        program.report("Title", [history], columns, curves)
    output = capsys.readouterr().out
    assert not plot.exists()
    for text in ("Title", "kfac", "50", "12.3", "the loss", "2.5"):
        assert text in output
    with example_runs.with_flags(None, plot=str(plot)):
        program.report("Title", [history], columns, curves)
    assert plot.stat().st_size > 1000
