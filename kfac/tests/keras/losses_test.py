"""Keras losses are read with the exact scale that their reductions put in."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kfac.python.keras import losses

RNG = np.random.default_rng(0)

CASES = {
    "sparse, logits": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "sparse, probabilities": keras.losses.SparseCategoricalCrossentropy(),
    "categorical, logits": keras.losses.CategoricalCrossentropy(from_logits=True),
    "binary, logits": keras.losses.BinaryCrossentropy(from_logits=True),
    "binary, probabilities": keras.losses.BinaryCrossentropy(),
    "mse": keras.losses.MeanSquaredError(),
}
REDUCTIONS = ["sum_over_batch_size", "sum"]
try:
    keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    REDUCTIONS.append("mean_with_sample_weight")
except ValueError:  # An older Keras.
    pass


def _with_reduction(loss, reduction):
    return type(loss).from_config({**loss.get_config(), "reduction": reduction})


def _outputs(read, shape):
    """Logits, the model output made from them, and targets."""
    z = tf.constant(RNG.normal(size=shape), tf.float64)
    if read.distribution == losses.CATEGORICAL:
        classes = RNG.integers(shape[-1], size=shape[:-1])
        y = classes if read.sparse else np.eye(shape[-1])[classes]
    elif read.distribution == losses.BERNOULLI:
        y = RNG.integers(2, size=shape).astype(float)
    else:
        y = RNG.normal(size=shape)
    return z, tf.constant(y)


def _activate(read, z):
    if read.distribution == losses.SQUARED_ERROR or read.from_logits:
        return z
    softmax = read.distribution == losses.CATEGORICAL
    return keras.activations.softmax(z) if softmax else keras.activations.sigmoid(z)


def _nll(read, z, y):
    """Negative log-likelihood of every element, summed over the last axis."""
    if read.distribution == losses.CATEGORICAL:
        if read.sparse:
            return tf.nn.sparse_softmax_cross_entropy_with_logits(
                tf.cast(y, tf.int64), z
            )
        return tf.nn.softmax_cross_entropy_with_logits(y, z)
    if read.distribution == losses.BERNOULLI:
        values = tf.nn.sigmoid_cross_entropy_with_logits(y, z)
        return tf.reduce_sum(values, -1)
    return tf.reduce_sum((y - z) ** 2, -1)


@pytest.mark.parametrize("shape", [(5, 3), (4, 6, 3)], ids=["rank2", "rank3"])
@pytest.mark.parametrize("weighting", ["plain", "sample_weight", "mask", "both"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", CASES)
def test_loss_is_the_mean_over_the_batch_of_weighted_log_likelihoods(
    name, reduction, weighting, shape
):
    loss = _with_reduction(CASES[name], reduction)
    read = losses.read(loss)
    z, y = _outputs(read, shape)
    sample_weight = mask = None
    if weighting in ("sample_weight", "both"):
        sample_weight = tf.constant(RNG.uniform(0.5, 2, size=shape[:-1]), tf.float32)
    if weighting in ("mask", "both"):
        mask = np.ones(shape[:-1], bool)
        mask.flat[::3] = False
        mask = tf.constant(mask)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(z)
        y_pred = _activate(read, z)
        if mask is not None:
            y_pred._keras_mask = mask
        actual = loss(y, y_pred, sample_weight=sample_weight)
        coefficients = tf.cast(read.coefficients(y_pred, sample_weight, mask), z.dtype)
        nll = _nll(read, z, y)
        ours = tf.reduce_sum(coefficients * nll) / shape[0]
    # Keras computes its losses in float32.
    np.testing.assert_allclose(
        tape.gradient(ours, z), tape.gradient(actual, z), rtol=2e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", CASES)
def test_natural_parameters_reproduce_the_distribution(name):
    read = losses.read(CASES[name])
    z, _ = _outputs(read, (5, 3))
    for keep_logits in (True, False):
        y_pred = _activate(read, z)
        if not keep_logits:
            y_pred = tf.identity(y_pred)  # Drops the attribute Keras left on it.
        recovered = read.natural_parameters(y_pred)
        if read.distribution == losses.CATEGORICAL:
            np.testing.assert_allclose(
                tf.nn.softmax(recovered), tf.nn.softmax(z), rtol=1e-6
            )
        else:
            np.testing.assert_allclose(recovered, z, rtol=1e-6)


def test_names_functions_and_objects_of_a_loss_are_read_alike():
    by_name = losses.read("mse")
    assert by_name == losses.read(keras.losses.mean_squared_error)
    assert by_name == losses.read(keras.losses.MeanSquaredError())
    assert losses.read("sparse_categorical_crossentropy").sparse


@pytest.mark.parametrize(
    ("loss", "fragment"),
    [
        ("mae", "register_losses"),
        (lambda y, p: tf.reduce_sum(p), "register_losses"),
        (keras.losses.CategoricalCrossentropy(axis=1), "axis=-1"),
        (keras.losses.SparseCategoricalCrossentropy(ignore_class=0), "sample_weight"),
        (keras.losses.MeanSquaredError(reduction=None), "sum_over_batch_size"),
    ],
)
def test_unsupported_losses_are_refused_with_advice(loss, fragment):
    with pytest.raises(losses.UnsupportedLossError, match=fragment):
        losses.read(loss)


@pytest.mark.parametrize(
    ("loss", "weights", "y_pred", "names"),
    [
        (["mse", "mse"], [1.0, 3.0], [0, 0], ["a", "b"]),
        ({"b": "mse", "a": "mse"}, {"b": 3.0}, [0, 0], ["a", "b"]),
        ({"b": "mse", "a": "mse"}, {"b": 3.0}, {"a": 0, "b": 0}, None),
        ("mse", [1.0, 3.0], (0, 0), ["a", "b"]),
    ],
)
def test_losses_and_weights_find_their_outputs(loss, weights, y_pred, names):
    pairs = losses.read_all(loss, weights, y_pred, names)
    assert [read.weight for read, _ in pairs] == [1.0, 3.0]
    assert [key for _, key in pairs] == (
        ["a", "b"] if isinstance(y_pred, dict) else [0, 1]
    )


def test_an_output_without_a_loss_is_left_out():
    pairs = losses.read_all({"b": "mse"}, None, {"a": 0, "b": 0})
    assert [key for _, key in pairs] == ["b"]


@pytest.mark.parametrize(
    ("loss", "weights", "fragment"),
    [
        (["mse"], None, "1 entries"),
        ({"c": "mse"}, None, "the model has"),
        ("mse", {"c": 1.0}, "loss_weights"),
    ],
)
def test_losses_that_do_not_fit_the_outputs_are_refused(loss, weights, fragment):
    with pytest.raises(ValueError, match=fragment):
        losses.read_all(loss, weights, [0, 0], ["a", "b"])


def test_scaling_the_signal_keeps_the_value_and_scales_products_by_the_coefficient():
    z = tf.constant(RNG.normal(size=(4, 3)))
    c = tf.constant([0.0, 0.25, 1.0, 4.0], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(z)
        scaled = losses.scale_signal(z, c)
        value = tf.reduce_sum(scaled * 2.0)
    np.testing.assert_allclose(scaled, z)
    np.testing.assert_allclose(
        tape.gradient(value, z), 2.0 * np.sqrt(c)[:, None] * np.ones((4, 3))
    )


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_logits_behind_probabilities_are_found_whatever_the_loss_says(
    kind, from_logits
):
    # Keras' losses do the same, with a warning where from_logits contradicts it.
    logits = tf.constant([[0.5, -1.0, 2.0]])
    outputs = keras.activations.get(kind)(logits)
    distribution = losses.CATEGORICAL if kind == "softmax" else losses.BERNOULLI
    read = losses.OutputLoss(distribution, from_logits)
    np.testing.assert_array_equal(read.natural_parameters(outputs), logits)
