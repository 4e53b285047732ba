import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kfac.examples import datasets
from kfac.python.keras.fishleg import FishLeg
from kfac.python.ops import fisher_blocks, layer_inverses
from kfac.tests.keras import keras_cases as cases


def _make(model, loss=None, compiled=None, **kwargs):
    kwargs = {"learning_rate": 0.1, "damping": 0.1, "seed": 1, **kwargs}
    optimizer = FishLeg(model=model, **kwargs)
    loss = cases.sparse_logits() if loss is None else loss
    model.compile(optimizer=optimizer, loss=loss, **(compiled or {}))
    return optimizer


def _digits(count):
    images = datasets.load().x_train[:count].reshape(count, 7, 4, 7, 4)
    return images.mean(axis=(2, 4)).reshape(count, -1)


def _autoencoder():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input([49]),
            layers.Dense(24, activation="tanh"),
            layers.Dense(6),
            layers.Dense(24, activation="tanh"),
            layers.Dense(49),
        ]
    )


def test_trains_an_autoencoder_faster_than_sgd_and_learns_the_inverse():
    x = _digits(500)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    losses = {}
    for name in ("fishleg", "sgd"):
        model = _autoencoder()
        if name == "fishleg":
            # The loss is a mean over 49 pixels, and so is its curvature.
            optimizer = _make(model, loss, damping=3e-3, warmup_steps=300)
        else:
            model.compile(keras.optimizers.SGD(1.0, momentum=0.9), loss=loss)
        history = model.fit(
            x, x, batch_size=100, epochs=12, shuffle=False, verbose=0
        ).history["loss"]
        losses[name] = history[-1]
    assert losses["fishleg"] < losses["sgd"]
    assert float(optimizer.auxiliary_loss) < 0
    assert float(optimizer.auxiliary_residual) < 1.0


def _many_layers():
    """Convolution, depthwise convolution, normalisation, dense layers."""
    return keras.Sequential(
        [
            keras.Input([4, 4, 2]),
            layers.Conv2D(3, 2, activation="relu", name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.DepthwiseConv2D(2, name="depthwise"),
            layers.Flatten(),
            layers.Dense(4, activation="tanh", use_bias=False, name="first"),
            layers.Dense(3, name="last"),
        ]
    )


def test_each_layer_has_the_inverse_of_its_kind():
    keras.utils.set_random_seed(1)
    model = _many_layers()
    optimizer = _make(model)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[32, 4, 4, 2]).astype(np.float32)
    y = (x[:, :2].sum(axis=(1, 2, 3)) > 0).astype(int)
    history = cases.losses_of_fit(model, x, y, epochs=8)
    assert history[-1] < 0.7 * history[0]

    def shape(ending):
        names = optimizer.state_variable_names()
        (name,) = [name for name in names if name.endswith(f"/{ending}")]
        return tuple(optimizer.state_variable(name).shape)

    assert shape("conv/kernel/left") == (9, 9)
    assert shape("conv/kernel/right") == (3, 3)
    assert shape("norm/gamma/diagonal_0") == (3,)
    assert shape("depthwise/kernel/diagonal_0") == (2, 2, 3, 1)
    assert shape("first/kernel/left") == (12, 12)
    assert shape("last/kernel/left") == (5, 5)


def test_the_inverse_is_trained_where_it_is_due_only():
    model = cases.sequential()
    optimizer = _make(model, update_aux_every=3, warmup_steps=7)
    x, y = cases.data()
    counts = []
    for _ in range(5):
        model.train_on_batch(x, y)
        counts.append(int(optimizer.state_variable("kfac/fishleg/steps")))
    assert counts == [7, 7, 7, 8, 8]


def test_updates_train_on_the_gradient_of_the_step_before():
    model = cases.sequential()
    optimizer = _make(model, learning_rate=0.0, momentum=0.0)
    x, y = cases.data()
    model.train_on_batch(x, y)
    with tf.GradientTape() as tape:
        loss = cases.sparse_logits()(y, model(x))
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    names = optimizer.state_variable_names()
    kept = [name for name in names if name.endswith("/previous_gradient")]
    for name, gradient in zip(kept, gradients, strict=True):
        value = optimizer.state_variable(name)
        np.testing.assert_allclose(value, gradient, rtol=1e-4, atol=1e-7)


def test_learning_goes_on_after_a_batch_that_is_not_finite():
    x, y = cases.data()
    bad = x.copy()
    bad[3] = np.nan
    model = cases.sequential()
    optimizer = _make(model, adapt_damping=True, reject_bad_steps=True, invert_every=5)
    model.train_on_batch(x, y)
    before = cases.weights(model)
    model.train_on_batch(bad, y)  # Is undone.
    for one, other in zip(before, cases.weights(model), strict=True):
        np.testing.assert_array_equal(one, other)
    losses = cases.losses_of_fit(model, x, y, epochs=8)
    assert np.isfinite(float(optimizer.auxiliary_residual))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ({"run_eagerly": True}, {}),
        ({"jit_compile": True}, {"momentum_type": "regular"}),
        ({}, {"num_burnin_steps": 2, "norm_constraint": 0.1}),
        ({}, {"adaptive": True, "learning_rate": None}),
        ({}, {"momentum_type": "regular", "adapt_damping": True}),
    ],
    ids=["eager", "xla", "burn-in", "adaptive", "adapted damping"],
)
def test_the_training_loss_falls(mode, options):
    keras.utils.set_random_seed(3)
    model = cases.functional()
    _make(model, compiled=mode, warmup_steps=20, **options)
    x, y = cases.data()
    history = cases.losses_of_fit(model, x, y, epochs=6)
    assert history[-1] < 0.75 * history[0]


def test_training_goes_on_from_a_saved_model_as_if_it_had_not_stopped(tmp_path):
    x, y = cases.data()
    keras.utils.set_random_seed(4)
    model = cases.sequential()
    _make(model)
    model.fit(x, y, batch_size=24, epochs=2, shuffle=False, verbose=0)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert isinstance(loaded.optimizer, FishLeg)
    loaded.optimizer.register_layers(loaded)
    for each in (model, loaded):
        each.fit(x, y, batch_size=24, epochs=2, shuffle=False, verbose=0)
    for one, other in zip(*map(cases.weights, (model, loaded)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_state_survives_a_checkpoint(tmp_path):
    x, y = cases.data()
    models = []
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        model = cases.sequential()
        _make(model, warmup_steps=10)
        cases.losses_of_fit(model, x, y, epochs=2)
        models.append(model)
    saved, restored = (
        tf.train.Checkpoint(model=m, optimizer=m.optimizer) for m in models
    )
    restored.restore(saved.save(str(tmp_path / "checkpoint")))
    for model in models:
        cases.losses_of_fit(model, x, y, epochs=2)
    for one, other in zip(*map(cases.weights, models), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_kind_of_layer_of_ones_own_plugs_in(monkeypatch):
    monkeypatch.setattr(layer_inverses, "_REGISTRY", dict(layer_inverses._REGISTRY))

    @layer_inverses.register(fisher_blocks.FullyConnectedKFACBasicFB)
    class Scalar(layer_inverses.LayerInverse):
        def initial_values(self, scale):
            return {"root": np.array(np.sqrt(scale))}

        def multiply(self, values, vector):
            return [tf.square(values["root"]) * part for part in vector]

    model = cases.sequential()
    optimizer = _make(model)
    x, y = cases.data()
    model.train_on_batch(x, y)
    names = optimizer.state_variable_names()
    roots = [name for name in names if name.endswith("/root")]
    assert len(roots) == 2
    assert not any(name.endswith("/left") for name in names)
    assert all(float(optimizer.state_variable(name)) != 1.0 for name in roots)


def test_the_configuration_makes_an_equal_optimizer():
    optimizer = FishLeg(
        learning_rate=0.1,
        damping=0.2,
        update_aux_every=4,
        aux_learning_rate=0.01,
        warmup_steps=5,
        initial_scale=2.0,
    )
    config = optimizer.get_config()
    assert FishLeg.from_config(config).get_config() == config
    assert config["update_aux_every"] == 4
    assert np.isnan(optimizer.auxiliary_loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update_aux_every": 0}, "update_aux_every must be an integer"),
        ({"update_aux_every": 1.5}, "update_aux_every must be an integer"),
        ({"warmup_steps": 0}, "warmup_steps must be an integer"),
        ({"aux_learning_rate": -1e-3}, "aux_learning_rate must be .* above 0"),
        ({"initial_scale": 0.0}, "initial_scale must be .* above 0"),
        ({"initial_scale": "1"}, "initial_scale must be .* above 0"),
        ({"damping": None}, "needs a damping"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    arguments = {"learning_rate": 0.1, "damping": 0.1, **arguments}
    with pytest.raises(ValueError, match=message):
        FishLeg(**arguments)
