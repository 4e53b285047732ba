"""Training goes on after loading as if it had not been interrupted."""

import itertools
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

from kfac.python.keras import saving_utils
from kfac.python.keras.optimizers import Kfac
from kfac.tests.keras import keras_cases as cases

OPTIONS = {
    "fixed": {},
    "adaptive": {"adaptive": True, "damping": 1.0},
    "fallback": {"fallback": "adam", "fisher_approx": {"first": "fallback"}},
}
SEEDS = itertools.count()


def model_of(options):
    keras.utils.set_random_seed(20)
    hidden = keras.layers.Dense(6, activation="tanh", name="first")
    model = keras.Sequential(
        [keras.Input((cases.FEATURES,)), hidden, keras.layers.Dense(cases.CLASSES)]
    )
    # Another seed every time, unless it is restored.
    cases.make(model, seed=next(SEEDS), invert_every=2, **options)
    return model


def train(model, steps):
    """Some steps, whose inverses are not all fresh; returns the weights."""
    x, y = cases.data()
    for _ in range(steps):
        model.train_on_batch(x, y)
    return cases.weights(model)


class Saved:
    """A model that was saved in all ways after 3 steps, and its weights after 6."""

    def __init__(self, directory, options):
        self.directory = directory
        self.options = options
        model = model_of(options)
        train(model, 3)
        model.save(directory / "model.keras")
        model.save(directory / "model.h5")
        model.save_weights(directory / "model.weights.h5")
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        self.checkpoint = checkpoint.save(str(directory / "checkpoint"))
        self.end = train(model, 3)

    def loaded(self, how):
        if how in ("keras", "h5"):
            return saving_utils.load_model(self.directory / f"model.{how}")
        model = model_of(self.options)
        if how == "weights":
            model.optimizer.build(model.trainable_variables)
            model.load_weights(self.directory / "model.weights.h5")
            return model
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        status = checkpoint.restore(self.checkpoint)
        if how == "checkpoint, built before":
            model.optimizer.build(model.trainable_variables)
            status.assert_consumed()
        return model


@pytest.fixture(scope="module", params=OPTIONS)
def saved(request, tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("saved"), OPTIONS[request.param])


@pytest.mark.parametrize(
    "how", ["keras", "h5", "weights", "checkpoint", "checkpoint, built before"]
)
def test_training_continues_bit_for_bit(saved, how):
    for one, other in zip(train(saved.loaded(how), 3), saved.end, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_fresh_process_continues_bit_for_bit(tmp_path):
    model = cases.Subclassed()
    cases.make(model, seed=None)
    train(model, 2)
    model.save(tmp_path / "model.keras")
    end = train(model, 2)
    code = f"""
        import numpy as np
        from kfac.python.keras import saving_utils
        from kfac.tests.keras import keras_cases as cases, saving_test
        model = saving_utils.load_model({str(tmp_path / "model.keras")!r})
        weights = saving_test.train(model, 2)
        np.savez({str(tmp_path / "weights.npz")!r}, *weights)
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300
    )
    with np.load(tmp_path / "weights.npz") as arrays:
        for one, other in zip(arrays.values(), end, strict=True):
            np.testing.assert_array_equal(one, other)


def test_backup_and_restore_continues_an_interrupted_fit(tmp_path):
    x, y = cases.data()

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def fit(*callbacks):
        keras.utils.set_random_seed(21)
        model = cases.sequential()
        cases.make(model, seed=4)
        backup = keras.callbacks.BackupAndRestore(tmp_path / str(bool(callbacks)))
        try:
            cases.losses_of_fit(model, x, y, epochs=4, callbacks=[backup, *callbacks])
        except KeyboardInterrupt:
            cases.make(model, seed=4)  # Nothing of the optimizer is left.
            cases.losses_of_fit(model, x, y, epochs=4, callbacks=[backup])
        return cases.weights(model)

    for one, other in zip(fit(), fit(Interrupt()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_loss_scaling_is_restored(tmp_path):
    with cases.dtype_policy("mixed_float16"):
        model = cases.sequential()
        cases.make(model, seed=5)
        train(model, 2)
        model.save(tmp_path / "model.keras")
        end = train(model, 2)
        loaded = saving_utils.load_model(tmp_path / "model.keras")
        assert isinstance(loaded.optimizer, keras.optimizers.LossScaleOptimizer)
        for one, other in zip(train(loaded, 2), end, strict=True):
            np.testing.assert_array_equal(one, other)


def test_hyperparameters_that_were_changed_are_saved_with_weights(tmp_path):
    model = model_of({})
    train(model, 1)
    model.optimizer.damping = 0.75
    model.optimizer.learning_rate = 0.03
    model.save_weights(tmp_path / "a.weights.h5")
    again = model_of({})
    again.optimizer.build(again.trainable_variables)
    again.load_weights(tmp_path / "a.weights.h5")
    assert float(again.optimizer.damping) == 0.75
    np.testing.assert_allclose(float(again.optimizer.learning_rate), 0.03)


def test_weights_come_in_the_order_of_the_reference_api():
    model = model_of(OPTIONS["adaptive"])
    train(model, 1)
    optimizer = model.optimizer
    first, *names = [variable.path.rpartition("/")[2] for variable in optimizer.weights]
    assert first == "iteration"
    assert names[:8] == [
        *("kfac.damping", "kfac.rho", "kfac.prev_loss", "kfac.qmodel_learning_rate"),
        *("kfac.qmodel_momentum", "kfac.qmodel_change", "kfac.counter"),
        "kfac.burnin_counter",
    ]
    kinds = [name.rpartition(".")[2] for name in names[8:]]
    covariances = ["var", "total_weight"] * 4
    inverses = ["fallbacks", "matpower_exp-1_damp0"] * 4
    assert kinds == [*covariances, *inverses, *["kfac"] * 4]  # Velocities.
    values = optimizer.get_weights()
    assert len(values) == len(optimizer.weights) < len(optimizer.variables)
    train(model, 1)
    optimizer.set_weights(values)
    for one, other in zip(optimizer.get_weights(), values, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="weights and"):
        optimizer.set_weights(values[:-1])


def test_another_instance_of_a_model_finds_the_state_in_spite_of_other_names(tmp_path):
    def instance():
        model = cases.sequential()
        cases.make(model)
        return model

    first, second = instance(), instance()
    assert first.layers[0].name != second.layers[0].name
    train(first, 2)
    first.save_weights(tmp_path / "a.weights.h5")
    second.optimizer.build(second.trainable_variables)
    second.load_weights(tmp_path / "a.weights.h5")
    for one, other in zip(train(first, 1), train(second, 1), strict=True):
        np.testing.assert_array_equal(one, other)


def test_state_of_another_model_or_optimizer_is_reported(tmp_path):
    model = model_of({})
    train(model, 1)
    model.save_weights(tmp_path / "kfac.weights.h5")
    other = Kfac(learning_rate=0.1, damping=0.1)
    keys = {"0": 1, "1": 0.1, "state|kfac|nowhere|cov|var": np.zeros([2, 2])}
    other.load_own_variables({k: np.asarray(v) for k, v in keys.items()})
    model.compile(other, cases.sparse_logits())
    with pytest.warns(UserWarning, match="no counterpart in this model"):
        other.register_layers(model)

    model.compile("adam", cases.sparse_logits())
    train(model, 1)
    model.save_weights(tmp_path / "adam.weights.h5")
    model.compile(Kfac(learning_rate=0.1, damping=0.1), cases.sparse_logits())
    model.optimizer.build(model.trainable_variables)
    with pytest.warns(UserWarning, match="saved by another optimizer"):
        model.load_weights(tmp_path / "adam.weights.h5")


def test_models_of_other_optimizers_load_as_by_keras(tmp_path):
    model = cases.sequential()
    model.compile("adam", cases.sparse_logits())
    model.save(tmp_path / "model.keras")
    custom = {}
    loaded = saving_utils.load_model(tmp_path / "model.keras", custom)
    assert isinstance(loaded.optimizer, keras.optimizers.Adam)
    assert custom == {}


def test_a_file_without_training_configuration_is_refused(tmp_path):
    cases.sequential().save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="no training configuration"):
        saving_utils.load_model(tmp_path / "model.keras")


def test_a_loaded_optimizer_can_be_renamed(tmp_path):
    model = model_of({})
    model.save(tmp_path / "model.keras")
    loaded = saving_utils.load_model(tmp_path / "model.keras", optimizer_name="new")
    assert loaded.optimizer.name == "new"


@pytest.mark.parametrize(
    "options", [{"use_ema": True}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_weights_files_hold_the_averages_and_sums_of_keras(options, tmp_path):
    model = model_of(options)
    train(model, 3)
    model.save_weights(tmp_path / "model.weights.h5")
    expected = train(model, 3)
    again = model_of(options)
    again.load_weights(tmp_path / "model.weights.h5")
    for one, other in zip(train(again, 3), expected, strict=True):
        np.testing.assert_array_equal(one, other)
