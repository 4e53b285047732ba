"""Dense, convolutional and recurrent classifiers: models, registration, short runs."""

import numpy as np
import pytest
import tensorflow as tf
from absl import app

from kfac.examples import (
    classification,
    classifier_mnist,
    convnet,
    convnet_model,
    datasets,
    layers,
    rnn_mnist,
)
from kfac.tests.examples import example_runs

MODELS = {
    "dense": lambda: classifier_mnist.Classifier([12]),
    "convolutional": lambda: convnet_model.ConvNet([2, 3]),
    "recurrent": lambda: rnn_mnist.RecurrentClassifier(6),
}
SMALL = {
    classifier_mnist: {"hidden_widths": ["16"]},
    convnet: {"filters": ["3", "4"]},
    rnn_mnist: {"state_size": 10},
}


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    return example_runs.write_few_images(tmp_path_factory.mktemp("mnist"))


def explained(make_model, **settings):
    """How a model is covered, as a set of rows."""
    with tf.Graph().as_default():
        model = make_model()
        images = tf.compat.v1.placeholder(tf.float32, [20, 28, 28])
        labels = tf.compat.v1.placeholder(tf.int32, [20])
        logits, calls = model(images)
        collection = classification.register(
            model, logits, calls, labels, classification.KfacSettings(**settings)
        )
        return set(collection.explain(print_fn=None))


@pytest.mark.parametrize("name", MODELS)
def test_the_scanner_registers_what_is_registered_by_hand(name):
    by_hand = explained(MODELS[name])
    assert all(row.reason is None for row in by_hand)
    assert explained(MODELS[name], auto_register_layers=True) == by_hand


@pytest.mark.parametrize("approx", ["kron_series_2", "kron_series_1", "kron_indep"])
def test_the_cell_has_28_uses_and_the_approximation_asked_for(approx):
    rows = explained(MODELS["recurrent"], shared_dense_approx=approx)
    (cell,) = [row for row in rows if "cell/weights" in row.variables[0]]
    assert (cell.uses, cell.approximation) == (28, approx)


def test_the_cell_is_a_recurrence_over_rows():
    model = MODELS["recurrent"]()
    image = np.random.default_rng(0).random((28, 28)).astype(np.float32)
    weights, biases = (variable.numpy() for variable in model.cell.params)
    state = np.zeros(6)
    for row in image:
        state = np.tanh(np.concatenate([row, state]) @ weights + biases)
    logits, _ = model(image[np.newaxis])
    # float32 over 28 steps.
    np.testing.assert_allclose(
        logits[0], state @ model.logits.weights.numpy(), rtol=1e-4
    )


def test_filters_start_within_glorots_bound():
    values = layers.glorot_uniform(np.random.default_rng(0), (3, 3, 20, 30))
    bound = np.sqrt(6 / (9 * 50))
    assert np.abs(values).max() <= bound
    # Uniform: variance bound^2 / 3; 5,400 samples, five standard errors of 1.2 %.
    np.testing.assert_allclose(values.var(), bound**2 / 3, rtol=0.06)


def test_the_penalty_is_half_the_squared_norm():
    model = MODELS["dense"]()
    logits, labels = tf.zeros([4, 10]), tf.constant([0, 1, 2, 3])
    squares = sum(np.square(v.numpy()).sum() for v in model.trainable_variables)
    loss = classification.mean_loss(model, logits, labels, l2_reg=0.3)
    np.testing.assert_allclose(loss, np.log(10) + 0.15 * squares, rtol=1e-5)


def test_accuracy_and_error_are_percentages_that_add_up():
    logits = tf.constant([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    accuracy = classification.accuracy(logits, tf.constant([1, 1, 1, 0]))
    assert accuracy == 0.75
    measured = classification.measurements((0.5, 1.0), (0.7, accuracy))
    assert (measured["test_accuracy"], measured["test_error"]) == (75.0, 25.0)


def test_images_stay_with_their_labels():
    data = datasets.load()
    images, labels = next(classification.batches(data, 20, seed=2))
    for image, label in zip(images, labels, strict=True):
        (row,) = np.flatnonzero((data.x_train == image).all(axis=(1, 2)))
        assert data.y_train[row] == label


def test_settings_come_from_the_flags():
    values = {"kfac_learning_rate": 0.7, "damping": 0.2, "cov_update_every": 4}
    with example_runs.with_flags(None, **values):
        settings = classification.KfacSettings.from_flags(
            shared_dense_approx="kron_series_1"
        )
    assert settings.learning_rate == 0.7
    assert (settings.damping, settings.cov_update_every) == (0.2, 4)
    assert settings.shared_dense_approx == "kron_series_1"


@pytest.mark.parametrize("module", SMALL, ids=lambda module: module.__name__)
def test_kfac_and_adam_learn_from_the_same_start(module, few_images, monkeypatch):
    histories = example_runs.run(
        module,
        monkeypatch,
        **example_runs.few_images_flags(few_images),
        **SMALL[module],
        optimizer=["kfac", "adam"],
        norm_constraint=1e-2,
    )
    of_kfac, of_adam = (history.metrics["train_loss"] for history in histories)
    assert of_kfac[0] == of_adam[0]
    assert of_kfac[-1] < 0.9 * of_kfac[0]
    assert of_adam[-1] < of_adam[0]


def test_adaptive_kfac_finds_its_own_step(few_images, monkeypatch):
    (history,) = example_runs.run(
        classifier_mnist,
        monkeypatch,
        **example_runs.few_images_flags(few_images),
        **SMALL[classifier_mnist],
        adaptive=True,
        damping=1.0,
        l2_reg=1e-4,
        auto_register_layers=True,
        kfac_learning_rate=None,
    )
    losses = history.metrics["train_loss"]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("mode", ["async", "chief_worker"])
def test_other_modes_are_for_kfac_with_fixed_damping(mode):
    for values in ({"optimizer": ["kfac", "adam"]}, {"adaptive": True}):
        with (
            example_runs.with_flags(convnet, mode=mode, **values),
            pytest.raises(app.UsageError, match=mode),
        ):
            convnet.main([])


def test_other_modes_need_a_worker():
    with (
        example_runs.with_flags(convnet, mode="chief_worker", num_threads=0),
        pytest.raises(app.UsageError, match="num_threads"),
    ):
        convnet.main([])
