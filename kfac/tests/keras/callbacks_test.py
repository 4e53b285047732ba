"""Schedules assign the documented values before each batch."""

import keras
import numpy as np
import pytest

from kfac.python.keras import callbacks


class _Recorder(keras.callbacks.Callback):
    """Reads the learning rate that every batch is trained with."""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_train_batch_begin(self, batch, logs=None):
        value = self.model.optimizer.learning_rate
        self.values.append(float(keras.ops.convert_to_numpy(value)))


def _learning_rates(schedule, steps=6, learning_rate=1.0):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(learning_rate), "mse")
    recorder = _Recorder()
    x = np.zeros((steps, 1))
    history = model.fit(
        x, x, batch_size=1, verbose=0, shuffle=False, callbacks=[schedule, recorder]
    )
    return recorder.values, history.history


def test_polynomial_decay_reaches_its_final_value_and_stays():
    schedule = callbacks.PolynomialDecay("learning_rate", 1.0, 0.2, 2.0, 4)
    values, history = _learning_rates(schedule)
    expected = [1.0] + [0.8 * (1 - s / 4) ** 2 + 0.2 for s in (1, 2, 3, 4)] + [0.2]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_allclose(history["learning_rate"], [0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"final_value": 0.3, "decay_rate": 0.5}, [1, 0.5, 0.3, 0.3, 0.3, 0.3]),
        (
            {"decay_rate": 0.5, "num_decay_steps": 3},
            [1, 0.5, 0.25, 0.125, 0.125, 0.125],
        ),
        (
            {"final_value": 0.0625, "num_decay_steps": 4},
            [1, 0.5, 0.25, 0.125, 0.0625, 0.0625],
        ),
    ],
)
def test_exponential_decay_follows_its_three_forms(arguments, expected):
    schedule = callbacks.ExponentialDecay("learning_rate", 1.0, **arguments)
    values, _ = _learning_rates(schedule)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_nothing_changes_during_the_delay():
    schedule = callbacks.ExponentialDecay(
        "learning_rate", 1.0, decay_rate=0.5, num_decay_steps=9, num_delay_steps=3
    )
    values, _ = _learning_rates(schedule)
    np.testing.assert_allclose(values, [1, 1, 1, 1, 0.5, 0.25], rtol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"decay_rate": 0.5},
        {"final_value": 0.0, "decay_rate": 0.5, "num_decay_steps": 2},
    ],
)
def test_exponential_decay_wants_exactly_two_arguments(arguments):
    with pytest.raises(ValueError, match="must specify exactly two of"):
        callbacks.ExponentialDecay("learning_rate", 1.0, **arguments)


def test_an_optimizer_without_the_attribute_is_refused():
    schedule = callbacks.PolynomialDecay("damping", 1.0, 0.1, 1.0, 4)
    with pytest.raises(ValueError, match='must have a "damping" attribute'):
        _learning_rates(schedule)


def test_verbose_prints_the_value_of_every_epoch(capsys):
    _learning_rates(
        callbacks.PolynomialDecay("learning_rate", 1.0, 0.1, 1.0, 4, verbose=1)
    )
    assert "Epoch 1: learning_rate is 1.0" in capsys.readouterr().out
