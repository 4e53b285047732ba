"""The autoencoder example: schedule, registration, model, a short run."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

import kfac
from kfac.examples import autoencoder_mnist, autoencoder_model
from kfac.tests.examples import example_runs

WIDTHS = (784, 8, 4, 8, 784)


def sizes(total, growing, count, first=1000):
    images = np.zeros([total, 1], np.float32)
    stream = autoencoder_mnist.batches(images, first, growing)
    return [len(images) for (images,) in itertools.islice(stream, count)]


def test_a_fixed_schedule_keeps_the_batch_size():
    assert sizes(6000, growing=False, count=3) == [1000] * 3
    assert sizes(600, growing=False, count=3) == [600] * 3


def test_a_growing_schedule_is_exponential_up_to_all_data_at_update_500():
    schedule = [
        autoencoder_mnist.batch_size_at(update, 1000, 60000, growing=True)
        for update in range(600)
    ]
    assert schedule[0] == 1000
    assert schedule[499] == pytest.approx(60000, abs=1)  # Rounded down.
    assert set(schedule[500:]) == {60000}
    assert schedule == sorted(schedule)
    # Exponential: halfway, the geometric mean.
    assert schedule[249] * schedule[250] == pytest.approx(6e7, rel=1e-2)


def test_a_batch_has_no_image_twice():
    images = np.arange(50, dtype=np.float32)[:, np.newaxis]
    (batch,) = next(autoencoder_mnist.batches(images, 50, seed=3))
    assert sorted(batch[:, 0]) == list(range(50))


def test_the_code_is_the_only_linear_hidden_layer():
    model = autoencoder_model.Autoencoder(WIDTHS)
    images = np.random.default_rng(0).random((5, 784), np.float32)
    logits, calls = model(images)
    assert logits.shape == (5, 784)
    code = calls[2].inputs
    np.testing.assert_array_equal(code, calls[1].outputs)
    for call, before in ((calls[1], calls[0]), (calls[3], calls[2])):
        np.testing.assert_array_equal(call.inputs, tf.tanh(before.outputs))
    np.testing.assert_array_equal(logits, calls[-1].outputs)


def test_losses_are_summed_over_pixels_and_averaged_over_images():
    logits = np.array([[0.0, 2.0], [-1.0, 0.5]])
    images = np.array([[1.0, 0.0], [0.25, 1.0]])
    p = 1 / (1 + np.exp(-logits))
    entropy = -(images * np.log(p) + (1 - images) * np.log(1 - p)).sum() / 2
    np.testing.assert_allclose(
        autoencoder_model.cross_entropy(tf.constant(logits), tf.constant(images)),
        entropy,
    )
    np.testing.assert_allclose(
        autoencoder_model.squared_error(tf.constant(logits), tf.constant(images)),
        ((p - images) ** 2).sum() / 2,
    )


def collection(auto):
    model = autoencoder_model.Autoencoder(WIDTHS)
    images = tf.compat.v1.placeholder(tf.float32, [None, 784])
    logits, calls = model(images)
    layers = kfac.LayerCollection()
    layers.register_multi_bernoulli_predictive_distribution(logits)
    if auto:
        layers.auto_register_layers(list(model.trainable_variables))
    else:
        for call in calls:
            call.register(layers)
    return layers


def test_the_scanner_registers_what_is_registered_by_hand():
    with tf.Graph().as_default():
        by_hand = collection(auto=False).explain(print_fn=None)
    with tf.Graph().as_default():
        found = collection(auto=True).explain(print_fn=None)
    assert len(by_hand) == 4
    assert {row.block for row in by_hand} == {"FullyConnectedKFACBasicFB"}
    assert set(found) == set(by_hand)


def test_kfac_and_first_order_methods_reduce_the_entropy(tmp_path, monkeypatch):
    histories = example_runs.run(
        autoencoder_mnist,
        monkeypatch,
        **example_runs.few_images_flags(example_runs.write_few_images(tmp_path)),
        optimizer=["kfac", "adam", "sgd"],
        hidden_widths=["16", "6", "16"],
    )
    assert [history.name for history in histories] == ["kfac", "adam", "sgd"]
    for history in histories:
        assert history.updates == [0, 3, 6]
        assert (
            history.metrics["train_entropy"][-1] < history.metrics["train_entropy"][0]
        )
    assert histories[0].metrics["train_entropy"][0] == pytest.approx(
        histories[1].metrics["train_entropy"][0]
    )


def test_defaults_are_those_of_the_paper():
    with example_runs.with_flags(autoencoder_mnist):
        widths = [784, *autoencoder_mnist.program.hidden_widths(), 784]
    assert widths == [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
