"""The declared loss is compared with the one that is trained."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from kfac.python.keras.loss_check import LossMismatchError
from kfac.tests.keras import keras_cases as cases


class OwnLoss(cases.Subclassed):
    """Computes another loss than the one it is compiled with."""

    def __init__(self, factor=1.0, power=2, linear=0.0):
        super().__init__()
        self.factor, self.power, self.linear = factor, power, linear

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        error = ops.abs(y_pred - y) ** self.power
        return self.factor * ops.mean(error) + self.linear * ops.sum(y_pred)


def train(model, loss="mse", **kwargs):
    optimizer = cases.make(model, loss, **kwargs)
    x, y = cases.data()
    targets = np.eye(cases.CLASSES, dtype=np.float32)[y]
    model.train_on_batch(x, y if "sparse" in str(loss).lower() else targets)
    return optimizer


def test_the_same_loss_in_other_words_passes():
    train(OwnLoss())


def test_terms_linear_in_the_outputs_have_no_curvature():
    train(OwnLoss(linear=0.3))


def test_a_constant_factor_is_found_and_named():
    with pytest.raises(LossMismatchError, match="3 times.*overrides compute_loss"):
        train(OwnLoss(factor=3.0))


def test_a_loss_that_is_compiled_later_is_compared_again():
    model = OwnLoss()
    optimizer = train(model)
    model.factor = 2.0
    model.compile(optimizer, "mse")
    x, y = cases.data()
    with pytest.raises(LossMismatchError, match="2 times"):
        model.train_on_batch(x, np.eye(cases.CLASSES, dtype=np.float32)[y])


def test_another_loss_is_found():
    with pytest.raises(LossMismatchError, match="another one.*register_losses"):
        train(OwnLoss(power=4))


def test_a_loss_registered_by_hand_is_trusted():
    def register(collection, outputs, batch):
        assert batch.sample_weight is None
        collection.register_squared_error_loss(outputs, coeff=1.0)

    optimizer = train(OwnLoss(factor=3.0), register_losses=register)
    assert int(optimizer.iterations) == 1


@pytest.mark.parametrize(
    ("activation", "loss"),
    [
        ("softmax", "sparse_categorical_crossentropy"),
        ("softmax", keras.losses.CategoricalCrossentropy(label_smoothing=0.2)),
        ("sigmoid", keras.losses.BinaryCrossentropy(reduction="sum")),
        (None, keras.losses.MeanSquaredError(reduction="sum")),
    ],
)
def test_losses_of_keras_pass(activation, loss):
    train(cases.sequential(activation), loss)


def test_a_subclass_of_a_loss_must_be_registered():
    class Focal(keras.losses.CategoricalCrossentropy):
        pass

    with pytest.raises(ValueError, match="register_losses"):
        train(cases.sequential(), Focal())


def test_sequences_and_dictionaries_of_outputs_pass():
    inputs = keras.Input((4, 5))
    outputs = {
        "a": layers.Dense(3, activation="softmax", name="a")(inputs),
        "b": layers.Dense(1, name="b")(layers.Flatten()(inputs)),
    }
    model = keras.Model(inputs, outputs)
    cases.make(
        model,
        {"a": "sparse_categorical_crossentropy", "b": "mse"},
        {"loss_weights": {"a": 0.5, "b": 2.0}},
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4, 5)).astype(np.float32)
    y = {"a": rng.integers(3, size=(6, 4)), "b": rng.normal(size=(6,))}
    assert np.isfinite(model.train_on_batch(x, y)[0])


def test_wrong_loss_weights_are_found():
    class Forgetful(keras.Model):
        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
            mse = keras.losses.MeanSquaredError()
            return sum(mse(t, p) for t, p in zip(y, y_pred, strict=True))

    inputs = keras.Input((5,))
    model = Forgetful(inputs, [layers.Dense(2)(inputs), layers.Dense(1)(inputs)])
    cases.make(model, ["mse", "mse"], {"loss_weights": [1.0, 0.5]})
    x = np.zeros((4, 5), np.float32)
    with pytest.raises(LossMismatchError, match="output 1 its curvature is 2 times"):
        model.train_on_batch(x, [x[:, :2], x[:, :1]])


def test_what_cannot_be_evaluated_on_random_data_is_warned_about():
    class Picky(cases.Subclassed):
        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
            if y_pred.shape[0] != cases.CASES:
                raise RuntimeError("Only my own data!")
            return ops.mean((y_pred - y) ** 2)

    with pytest.warns(UserWarning, match="could not compare.*Only my own data"):
        train(Picky())


def test_a_training_step_of_ones_own_is_warned_about():
    class OwnStep(cases.Subclassed):
        def train_step(self, data):
            return super().train_step(data)

    with pytest.warns(UserWarning, match="overrides train_step"):
        train(OwnStep())
