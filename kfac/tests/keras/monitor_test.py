"""The monitor shows the optimizer's state and leaves the training step alone."""

import csv
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from kfac.python.keras import monitor, readings, schedule
from kfac.python.keras.optimizers import Kfac
from kfac.python.ops import curvature_operator

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 6)).astype("float32")
Y = RNG.integers(0, 3, size=48)


def _model(**options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(3)]
    )
    if not options.get("adaptive"):
        options["learning_rate"] = 0.05
    model.compile(
        optimizer=Kfac(damping=0.1, model=model, seed=0, **options),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def _fit(model, callbacks, epochs=2, **kwargs):
    return model.fit(
        X, Y, batch_size=16, epochs=epochs, verbose=0, callbacks=callbacks, **kwargs
    )


# Spectra.


def test_equal_eigenvalues_have_full_rank_and_condition_one():
    found = readings.spectrum(3 * np.eye(5, dtype="float32"))
    assert found.side == 5
    np.testing.assert_allclose(found.condition, 1)
    np.testing.assert_allclose(found.effective_rank, 5)


@pytest.mark.parametrize("as_matrix", [True, False])
def test_the_spectrum_of_a_matrix_is_that_of_its_eigenvalues(as_matrix):
    values = np.array([1.0, 2.0, 5.0])
    rotation = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    moment = rotation * values @ rotation.T if as_matrix else values
    shares = values / 8
    found = readings.spectrum(7 * moment)
    np.testing.assert_allclose(found.condition, 5)
    entropy = -np.sum(shares * np.log(shares))
    np.testing.assert_allclose(found.effective_rank, np.exp(entropy))


def test_the_condition_is_bounded_by_the_precision_of_the_matrix():
    found = readings.spectrum(np.diag([1.0, 1e-30]).astype("float32"))
    np.testing.assert_allclose(found.condition, 1 / np.finfo("float32").eps)
    np.testing.assert_allclose(found.effective_rank, 1, rtol=1e-5)


@pytest.mark.parametrize("moment", [np.zeros((2, 2)), np.full((2, 2), np.nan)])
def test_no_spectrum_of_a_matrix_without_information(moment):
    assert np.isnan(readings.spectrum(moment).condition)


# Schedule.


def test_inverses_are_due_often_at_first_then_once_a_period():
    steps = range(40)
    due = [step for step in steps if schedule.inverses_due(step, 16)]
    assert due == [0, 1, 2, 4, 8, 16, 32]
    in_graph = schedule.inverses_due(tf.range(40, dtype=tf.int64), 16)
    assert np.flatnonzero(in_graph).tolist() == due
    assert [s for s in range(9) if schedule.statistics_due(s, 4)] == [0, 1, 2, 4, 8]


# The callback.


def test_history_csv_and_tensorboard_get_the_values_of_the_state(tmp_path):
    model = _model(cov_update_every=2)
    path = tmp_path / "logs" / "curvature.csv"
    watch = monitor.CurvatureMonitor(csv_path=str(path), log_dir=str(tmp_path / "tb"))
    history = _fit(model, [watch]).history
    assert history["damping"] == pytest.approx([0.1, 0.1])
    assert history["learning_rate"] == pytest.approx([0.05, 0.05])
    assert history["fallbacks"] == [0, 0]
    assert "rho" not in history and "momentum" not in history
    moments = {
        name: variable.numpy()
        for name, variable in model.optimizer._store.named_variables().items()
        if name.endswith("cov/var")
    }
    found = [readings.spectrum(moment) for moment in moments.values()]
    assert len(found) == 4
    assert history["worst_condition"][-1] == max(s.condition for s in found)
    assert history["least_rank_share"][-1] == min(s.rank_share for s in found)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["iterations"] for row in rows] == ["3", "6"]
    conditions = [float(v) for k, v in rows[-1].items() if k.endswith("/condition")]
    assert sorted(conditions) == sorted(s.condition for s in found)
    assert _tags(tmp_path / "tb") >= {"curvature/damping", "curvature/worst_condition"}
    table = watch.table()
    assert table.count("/output") == 2 and "Effective rank" in table


def _tags(folder):
    files = [str(path) for path in folder.rglob("*") if path.is_file()]
    return {
        value.tag
        for file in files
        for event in tf.compat.v1.train.summary_iterator(file)
        for value in event.summary.value
    }


def test_adapted_values_come_from_the_state_and_reach_every_batch():
    model = _model(adaptive=True)
    seen = []

    class Later(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(dict(logs))

    _fit(model, [monitor.CurvatureMonitor(every=1), Later()])
    state = model.optimizer._store.named_variables()
    assert seen[-1]["damping"] == pytest.approx(state["kfac/damping"].numpy())
    assert seen[-1]["rho"] == pytest.approx(state["kfac/rho"].numpy())
    assert seen[-1]["momentum"] == state["kfac/qmodel_momentum"].numpy()
    rate = state["kfac/qmodel_learning_rate"].numpy()
    assert seen[-1]["learning_rate"] == rate
    # Adaptation happens at steps 5, 10, ...: not before the fifth step.
    assert np.isnan(seen[0]["rho"]) and np.isfinite(seen[-1]["rho"])


def test_the_monitor_neither_changes_training_nor_adds_traces():
    traces = []
    results = []
    for callbacks in ([], [monitor.CurvatureMonitor(every=1, spectra_every=2)]):
        model = _model()
        calls = []
        compute_loss = model.compute_loss
        model.compute_loss = lambda *a, c=calls, f=compute_loss, **k: (
            c.append(1),
            f(*a, **k),
        )[1]
        _fit(model, callbacks)
        traces.append(len(calls))
        results.append(model.get_weights())
    assert traces[0] == traces[1]
    for quiet, watched in zip(*results, strict=True):
        np.testing.assert_array_equal(quiet, watched)


def test_spectra_come_every_so_many_batches_and_only_of_small_factors():
    watch = monitor.CurvatureMonitor(spectra_every=2, max_side=5, in_logs=False)
    history = _fit(_model(), [watch]).history
    assert [record["iterations"] for record in watch.records] == [2, 4, 6]
    named = {k.rpartition("/")[0] for k in watch.records[-1] if "/condition" in k}
    # The input factors have sides 6 + 1 and 4 + 1.
    assert sum("input" in name for name in named) == 1
    assert set(history) == {"loss"}


@pytest.mark.parametrize("approximation", ["ekfac", "ekfac_product", "diagonal"])
def test_eigenvalues_that_are_stored_as_such_are_not_taken_for_a_matrix(approximation):
    """Also where they have a square shape, as here."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(4, use_bias=False),
            keras.layers.Dense(4, use_bias=False, name="square"),
            keras.layers.Dense(3),
        ]
    )
    optimizer = Kfac(
        learning_rate=0.05,
        damping=0.1,
        model=model,
        fisher_approx={"square": approximation},
        invert_every=2,
        seed=0,
    )
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    _fit(model, [])
    operator = curvature_operator.curvature_operator(optimizer, damped=False)
    names = [v.name for v in curvature_operator.parameters(optimizer)]
    (position,) = [i for i, name in enumerate(names) if "square" in name]
    sizes = [v.shape.num_elements() for v in curvature_operator.parameters(optimizer)]
    start = sum(sizes[:position])
    block = operator.to_dense().numpy()[start : start + 16, start : start + 16]
    expected = readings.spectrum(block)
    role = approximation if approximation == "diagonal" else "eigenbasis"
    moments = readings.Readings(optimizer).moments()
    (moment,) = [
        m for name, m in moments.items() if name.endswith(f"square/kernel/{role}")
    ]
    found = readings.spectrum(moment)
    assert found.side == 16
    np.testing.assert_allclose(found.effective_rank, expected.effective_rank, rtol=1e-3)


def test_phase_times_are_differences_of_medians_by_kind_of_step(monkeypatch):
    optimizer = types.SimpleNamespace(
        get_config=lambda: {"cov_update_every": 2, "invert_every": 4}
    )
    # The first step traces; inverses without statistics (step 1) are no kind.
    seconds = [90, 50, 7, 1, 7, 1, 3, 1, 7, 1, 3, 1]
    now = [0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    times = monitor.StepTimes(optimizer)
    for step, duration in enumerate(seconds):
        times.begin(step)
        now[0] += duration
        times.end(step + 1)
    found = times.phases()
    np.testing.assert_allclose(found["statistics_ms"], 2000)
    np.testing.assert_allclose(found["inverses_ms"], 4000)
    np.testing.assert_allclose(found["step_ms"], 1e3 * np.mean(seconds[1:]))


def test_steps_of_one_execution_are_not_told_apart():
    watch = monitor.CurvatureMonitor()
    model = _model()
    model.steps_per_execution = 3
    history = _fit(model, [watch]).history
    assert "step_ms" not in history and "worst_condition" in history


def test_another_optimizer_is_refused():
    model = _model()
    model.compile(optimizer="adam", loss="mse")
    with pytest.raises(ValueError, match="Only kfac.keras.optimizers.Kfac.*Adam"):
        _fit(model, [monitor.CurvatureMonitor()])


@pytest.mark.parametrize("numbers", [{"every": 0}, {"spectra_every": -1}])
def test_periods_are_at_least_one_batch(numbers):
    with pytest.raises(ValueError, match="1 or more"):
        monitor.CurvatureMonitor(**numbers)
