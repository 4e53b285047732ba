"""The Keras example: models, equal budgets, the sweep, runs of each optimizer."""

import keras
import numpy as np
import pytest

import kfac
from kfac.examples import keras_convnet, keras_models, program, reporting
from kfac.tests.examples import example_runs


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    return example_runs.write_few_images(tmp_path_factory.mktemp("mnist"))


@pytest.mark.parametrize("name", keras_models.MODELS)
def test_models_map_images_to_one_logit_a_class(name):
    model = keras_models.MODELS[name]()
    logits = model(np.zeros([3, 28, 28], np.float32))
    assert logits.shape == (3, 10)
    assert model.layers[-1].activation is keras.activations.linear


def test_the_transformer_depends_on_the_order_of_rows():
    keras.utils.set_random_seed(0)
    model = keras_models.transformer()
    images = np.random.default_rng(1).random((1, 28, 28), np.float32)
    difference = model(images) - model(images[:, ::-1])
    assert np.max(np.abs(difference)) > 1e-3


def test_every_optimizer_trains_and_reports(few_images, monkeypatch):
    flags = example_runs.few_images_flags(few_images)
    histories = example_runs.run(
        keras_convnet,
        monkeypatch,
        **flags,
        optimizer=["kfac", "adam", "sgd"],
        show_curvature=True,
    )
    assert [h.name for h in histories] == ["kfac", "adam", "sgd"]
    starts = [h.metrics["train_loss"][0] for h in histories]
    # Equal initial weights.
    assert starts[0] == pytest.approx(starts[1]) == pytest.approx(starts[2])
    for history in histories:
        assert history.updates == [0, 3, 6]
        assert history.metrics["train_loss"][-1] < starts[0]
        assert history.metrics["start_up"][-1] > 0


def test_training_stops_when_its_seconds_are_spent(few_images, monkeypatch):
    flags = example_runs.few_images_flags(few_images)
    flags.update(train_steps=None, train_seconds=0.2, eval_every=10**6)
    (history,) = example_runs.run(
        keras_convnet, monkeypatch, **flags, optimizer=["sgd"]
    )
    assert history.updates[0] == 0 and len(history.updates) == 2
    # The clock includes the update that crosses the limit, but no evaluation.
    assert history.seconds[-1] >= 0.2
    assert history.metrics["start_up"][-1] > history.seconds[-1] / history.updates[-1]


def test_kfac_gets_the_flags():
    model = keras_models.convnet()
    values = {"damping": 0.5, "invert_every": 7, "cov_batch_fraction": 0.5}
    with example_runs.with_flags(keras_convnet, **values):
        fixed = keras_convnet.make_optimizer("kfac", 0.2, model)
        with example_runs.with_flags(keras_convnet, adaptive=True):
            adaptive = keras_convnet.make_optimizer("kfac", 0.2, model)
    config = fixed.get_config()
    assert {k: config[k] for k in values} == values
    assert config["learning_rate"] == pytest.approx(0.2)
    assert config["norm_constraint"] == pytest.approx(1e-2)
    assert "learning_rate" not in adaptive.mutable_hyperparameters
    assert isinstance(
        keras_convnet.make_optimizer("sgd", 0.1, model), keras.optimizers.SGD
    )


def test_the_sweep_takes_the_rate_of_the_least_finite_loss():
    tried = []

    def train_at(rate):
        tried.append(rate)
        history = reporting.History("adam")
        loss = np.nan if rate == 1e-3 else abs(np.log10(rate / 3e-3))
        history.record(1, 1.0, {"train_loss": loss})
        return history

    assert keras_convnet.best_learning_rate("adam", train_at) == 3e-3
    assert tuple(tried) == keras_convnet.GRIDS["adam"]


def test_the_rate_of_the_sweep_is_used(monkeypatch):
    used = []

    def train(name, rate, data, seconds):
        used.append((name, rate, seconds))
        history = reporting.History(name)
        history.record(1, 1.0, dict.fromkeys(("train_loss", "test_error"), rate))
        return history

    monkeypatch.setattr(keras_convnet, "train", train)
    monkeypatch.setattr(program, "report", lambda *a, **k: None)
    with example_runs.with_flags(
        keras_convnet, optimizer=["sgd"], sweep_seconds=2.0, train_seconds=9.0
    ):
        keras_convnet.main([])
    # The least loss is that of the first rate here.
    assert used[-1] == ("sgd", keras_convnet.GRIDS["sgd"][0], 9.0)
    assert [entry[2] for entry in used[:-1]] == [2.0] * 4


@pytest.mark.parametrize("name", keras_models.MODELS)
def test_kfac_has_a_block_for_every_layer_of_the_models(name):
    model = keras_models.MODELS[name]()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = kfac.keras.optimizers.Kfac(
        learning_rate=0.01, damping=0.01, model=model, loss=loss
    )
    rows = optimizer.explain(print_fn=None)
    assert [row.reason for row in rows] == [None] * len(rows)
    covered = [path for row in rows for path in row.variables]
    assert sorted(covered) == sorted(v.path for v in model.trainable_variables)
