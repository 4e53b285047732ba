"""What Kfac accepts, refuses, says of itself, and lets one change."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from kfac.python.keras import optimizers
from kfac.python.keras.optimizers import CurvatureUpdates, DampingAdaptation, Kfac
from kfac.tests.keras import keras_cases as cases

PLAIN = {"learning_rate": 0.1, "damping": 0.2}


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"_sentinel": 1}, "Do not pass positional arguments"),
        ({"damping": None}, "damping"),
        ({"learning_rate": None}, "learning_rate"),
        ({"clipnorm": 1.0}, "norm_constraint"),
        ({"clipvalue": 1.0}, "norm_constraint"),
        ({"global_clipnorm": 1.0}, "norm_constraint"),
        ({"dampling": 1.0}, "dampling"),
        ({"layer_collection": object()}, "fisher_approx"),
        ({"momentum_type": "qmodel"}, "learning_rate must be None"),
        ({"adaptive": True}, "learning_rate must be None"),
        (
            {"learning_rate": 0.0, "momentum_type": "Qmodel"},
            "learning_rate must be None",
        ),
        (
            {"learning_rate": None, "momentum_type": "qmodel", "momentum": 0.9},
            "momentum must be None",
        ),
        ({"learning_rate": None, "adaptive": True, "momentum": 0.5}, "momentum"),
        (
            {"learning_rate": None, "adaptive": True, "adapt_damping": False},
            "adapt_damping",
        ),
        (
            {
                "adapt_damping": True,
                "invert_every": 3,
                "damping_adaptation_interval": 4,
            },
            "multiple of invert_every",
        ),
        ({"tf_replicator": object()}, "use tf.distribute"),
        ({"distribute_transformations": False}, "replica_round_robin"),
        ({"distribute_transformations": 1}, "True or False"),
        ({"placement_strategy": "replicas"}, "replica_round_robin"),
        ({"update_damping_immediately": False}, "in the step itself"),
        ({"invert_every": 0}, "counts steps"),
        ({"num_burnin_steps": -1}, "num_burnin_steps"),
        ({"reject_bad_steps": True}, "adapt_damping=True"),
        (
            {"adapt_damping": True, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps",
        ),
        (
            {"learning_rate": None, "adaptive": True, "weight_decay": 0.1},
            "use_weight_decay",
        ),
        ({"fallback": 3}, "Keras optimizer"),
        ({"model": 3}, "trainable_variables"),
        ({"updates": {"every": 2}}, "CurvatureUpdates"),
        (
            {"updates": CurvatureUpdates(every=2), "cov_update_every": 3},
            "given twice",
        ),
    ],
)
def test_mistakes_are_told_at_once(arguments, fragment):
    with pytest.raises(ValueError, match=fragment):
        Kfac(**{**PLAIN, **arguments})


def test_every_reference_argument_is_accepted_at_its_default():
    optimizer = Kfac(**PLAIN, **optimizers._DEFAULT_KWARGS)
    assert optimizer.get_config()["cov_ema_decay"] == 0.95


def test_config_objects_stand_for_flat_arguments():
    one = Kfac(
        **PLAIN,
        updates=CurvatureUpdates(every=2, invert_every=10, batch_fraction=0.5),
        adapt_damping=DampingAdaptation(interval=20, decay=0.9, l2_reg=1e-4),
    )
    other = Kfac(
        **PLAIN,
        cov_update_every=2,
        invert_every=10,
        cov_batch_fraction=0.5,
        adapt_damping=True,
        damping_adaptation_interval=20,
        damping_adaptation_decay=0.9,
        l2_reg=1e-4,
    )
    assert one.get_config() == {**other.get_config(), "name": one.name}


@pytest.mark.parametrize(
    ("given", "invert_every", "interval"),
    [
        ({}, 5, 5),
        ({"invert_every": 4}, 4, 4),
        ({"damping_adaptation_interval": 6}, 6, 6),
        ({"invert_every": 2, "damping_adaptation_interval": 6}, 2, 6),
    ],
)
def test_periods_of_adapted_damping_fit_each_other(given, invert_every, interval):
    config = Kfac(adaptive=True, damping=1.0, **given).get_config()
    assert config["invert_every"] == invert_every
    assert config["damping_adaptation_interval"] == interval


SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)


@pytest.mark.parametrize(
    "arguments",
    [
        PLAIN,
        {**PLAIN, "norm_constraint": 1e-3, "seed": 3, "strict": True},
        {"adaptive": True, "damping": 1.0, "reject_bad_steps": True},
        {"learning_rate": SCHEDULE, "damping": SCHEDULE},
        {**PLAIN, "loss": keras.losses.BinaryCrossentropy(from_logits=True)},
        {**PLAIN, "loss": ["mse", "sparse_categorical_crossentropy"]},
        {**PLAIN, "fisher_approx": {keras.layers.Dense: "diagonal", "a": None}},
        {**PLAIN, "fallback": keras.optimizers.AdamW(3e-3), "use_ema": True},
    ],
)
def test_a_config_round_trip_is_the_identity(arguments):
    optimizer = Kfac(**arguments)
    config = optimizer.get_config()
    assert json.loads(json.dumps(config))["damping"] == config["damping"]
    again = Kfac.from_config(config)
    assert again.get_config() == config
    serialized = keras.optimizers.serialize(optimizer)
    assert keras.optimizers.deserialize(serialized).get_config() == config


def test_the_config_holds_what_the_reference_documents():
    config = Kfac(**PLAIN).get_config()
    documented = set(optimizers._DEFAULT_KWARGS) | {
        *("learning_rate", "damping", "name", "loss", "loss_weights"),
        *("fisher_approx", "seed", "loss_tensor"),
    }
    assert documented <= set(config)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (PLAIN, {"learning_rate", "momentum", "damping", "weight_decay_coeff"}),
        (
            {**PLAIN, "norm_constraint": 1.0, "adapt_damping": True},
            {"learning_rate", "momentum", "weight_decay_coeff", "norm_constraint"},
        ),
        ({"adaptive": True, "damping": 1.0}, {"weight_decay_coeff"}),
    ],
)
def test_mutable_hyperparameters_are_those_that_nobody_else_sets(arguments, expected):
    assert Kfac(**arguments).mutable_hyperparameters == expected
    assert expected <= optimizers._MUTABLE_HYPER_PARAMS


def test_numbers_become_variables_that_numbers_are_assigned_to():
    optimizer = Kfac(**{**PLAIN, "damping": 1})
    optimizer.damping = tf.constant(0.3)  # Before the first read anything goes.
    optimizer.damping = np.float64(0.5)
    variable = optimizer.damping
    optimizer.damping = 0.25
    assert float(variable) == 0.25
    assert optimizer.get_config()["damping"] == 0.25
    with pytest.raises(ValueError, match="Dynamic reassignment only"):
        optimizer.damping = tf.constant(0.1)
    optimizer.lr = 0.01
    np.testing.assert_allclose(float(optimizer.learning_rate), 0.01)
    with pytest.raises(ValueError, match="Dynamic reassignment only"):
        optimizer.learning_rate = tf.constant(0.1)


def test_variables_are_used_as_they_are():
    rate, damping = tf.Variable(0.5), tf.Variable(0.25)
    optimizer = Kfac(learning_rate=rate, damping=damping)
    assert optimizer.damping is damping
    optimizer.damping = 2.0
    optimizer.learning_rate = 3.0
    assert (float(damping), float(rate)) == (2.0, 3.0)
    assert optimizer.get_config()["learning_rate"] == 3.0


def test_tensors_cannot_be_reassigned_once_read():
    optimizer = Kfac(learning_rate=tf.constant(0.1), damping=tf.constant(0.2))
    optimizer.damping  # noqa: B018
    with pytest.raises(AttributeError, match="Can't set attribute: damping"):
        optimizer.damping = 0.1
    with pytest.raises(AttributeError, match="Can't set attribute: learning_rate"):
        optimizer.learning_rate = 0.1


def test_what_the_optimizer_adapts_cannot_be_set():
    optimizer = Kfac(adaptive=True, damping=1.0)
    for name in ("damping", "momentum", "learning_rate", "norm_constraint"):
        with pytest.raises(AttributeError, match=name):
            setattr(optimizer, name, 0.5)


def test_the_name_can_be_changed_until_there_are_variables():
    model = cases.sequential()
    optimizer = cases.make(model, name="first")
    optimizer.name = "second"
    assert optimizer.get_config()["name"] == "second"
    x, y = cases.data()
    model.train_on_batch(x, y)
    with pytest.raises(ValueError, match="after the variables are created"):
        optimizer.name = "third"


def test_train_batches_of_the_reference_api_are_checked_and_unused():
    optimizer = Kfac(adaptive=True, damping=1.0)
    with pytest.raises(ValueError, match="tuple"):
        optimizer.register_train_batch([tf.zeros([2, 3])])
    with pytest.raises(ValueError, match="must use TF tensors"):
        optimizer.register_train_batch((np.zeros((2, 3)), tf.zeros([2])))
    optimizer.register_train_batch((tf.zeros([2, 3]), tf.zeros([2])))

    unknown = Kfac(adaptive=True, damping=1.0)

    @tf.function(input_signature=[tf.TensorSpec([None, 3])], autograph=False)
    def register(x):
        with pytest.raises(ValueError, match="Could not infer batch_size"):
            unknown.register_train_batch((x,))
        unknown.register_train_batch((x,), batch_size=2)
        return x

    register(tf.zeros([2, 3]))
