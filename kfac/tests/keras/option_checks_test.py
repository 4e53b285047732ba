"""Values that Kfac's arguments may not have are refused before anything is made."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import kfac
from kfac.python.keras import option_checks
from kfac.python.keras.arguments import DEFAULTS
from kfac.python.keras.optimizers import CurvatureUpdates, Kfac
from kfac.tests.keras import keras_cases as cases

PLAIN = {"learning_rate": 0.1, "damping": 0.2}
NO_NUMBERS = ("0.1", True, [0.1], np.array([0.1, 0.2]), 1j, math.nan, math.inf, -0.5)
NO_COUNTS = (0, -1, 1.5, 10.0, "10", True, None, math.nan)
NO_PARTS = (0, -1, 1.5, "1", True, None, math.nan)
NO_TRUTHS = ("yes", 2, None, 0.0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("learning_rate", NO_NUMBERS),
        ("damping", NO_NUMBERS),
        ("momentum", NO_NUMBERS),
        ("weight_decay_coeff", NO_NUMBERS),
        ("weight_decay", NO_NUMBERS),
        ("l2_reg", NO_NUMBERS),
        ("norm_constraint", (*NO_NUMBERS, 0)),
        ("loss_scale_factor", (*NO_NUMBERS, 0)),
        ("invert_every", NO_COUNTS),
        ("cov_update_every", NO_COUNTS),
        ("damping_adaptation_interval", NO_COUNTS),
        ("num_burnin_steps", (-1, 1.5, "3", None, True)),
        ("batch_size", (0, -1, 1.5, "x")),
        ("gradient_accumulation_steps", (1, 1.5, "x", -2)),
        ("ema_overwrite_frequency", (0, 1.5, "x")),
        ("cov_batch_fraction", NO_PARTS),
        ("qmodel_batch_fraction", NO_PARTS),
        ("damping_adaptation_decay", NO_PARTS),
        ("cov_ema_decay", (-0.1, 1.5, "0.9", None)),
        ("ema_momentum", (-0.1, 1.5, "0.9", None)),
        ("adaptive", NO_TRUTHS),
        ("strict", NO_TRUTHS),
        ("use_weight_decay", NO_TRUTHS),
        ("adapt_damping", NO_TRUTHS),
        ("reject_bad_steps", NO_TRUTHS),
        ("use_ema", NO_TRUTHS),
        ("momentum_type", ("nonsense", 3, None)),
        ("estimation_mode", ("nonsense", "Gradients", 3, None)),
        ("placement_strategy", ("nonsense", 3)),
        ("dtype", ("int32", "nonsense")),
        ("seed", ("x", 1.5, True)),
        ("fisher_approx", (3, {3: "kron"})),
        ("register_losses", ("x", 3)),
        ("loss_fn", (3,)),
        ("loss", (3, keras.losses.MeanSquaredError, ["mse", 3])),
        ("loss_weights", ("a", -1.0, {"a": "b"})),
        ("model", (keras.Sequential, "x")),
        ("fallback", (None, keras.optimizers.Adam)),
        ("updates", (CurvatureUpdates(every=0),)),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(name, values):
    expected = "cov_update_every" if name == "updates" else name
    for value in values:
        with pytest.raises(ValueError, match=f"{expected}.*(must|use)"):
            Kfac(**{**PLAIN, name: value})


def test_every_option_is_checked_or_answered_by_the_step():
    answered = {"loss_tensor", "prev_train_batch", "update_damping_immediately"}
    answered |= {"var_list", "is_chief", "tf_replicator", "train_batch"}
    checks = option_checks.SCALARS | option_checks.OTHERS
    assert set(DEFAULTS) - answered <= set(checks)
    option_checks.checked(DEFAULTS)  # Nothing refuses its own default.


def test_numbers_of_numpy_and_tensors_are_numbers():
    optimizer = Kfac(
        learning_rate=np.array(0.1),
        damping=np.float32(0.5),
        momentum=np.float64(0.5),
        invert_every=np.int64(4),
        cov_update_every=tf.constant(2),
        num_burnin_steps=np.array(3),
        batch_size=np.int64(16),
        cov_batch_fraction=np.float32(0.5),
        seed=np.int32(3),
        use_ema=np.bool_(True),
    )
    config = optimizer.get_config()
    expected = {"invert_every": 4, "cov_update_every": 2, "num_burnin_steps": 3}
    expected |= {"batch_size": 16, "cov_batch_fraction": 0.5, "seed": 3}
    for name, value in expected.items():
        assert config[name] == value and type(config[name]) is type(value)
    assert config["use_ema"] is True


def test_hyperparameters_may_be_whole_numbers_in_tensors_but_not_in_variables():
    model = cases.sequential()
    optimizer = cases.make(model, learning_rate=tf.constant(1), damping=tf.constant(2))
    x, y = cases.data()
    model.train_on_batch(x, y)
    assert float(optimizer.damping) == 2.0
    with pytest.raises(ValueError, match="floating-point"):
        Kfac(learning_rate=0.1, damping=tf.Variable(1))


def test_tensors_with_axes_are_no_hyperparameters():
    for name in PLAIN:
        with pytest.raises(ValueError, match=f"{name} must be a scalar"):
            Kfac(**{**PLAIN, name: tf.constant([0.1, 0.2])})


@pytest.mark.parametrize("name", ["learning_rate", "damping"])
def test_hyperparameters_in_use_refuse_what_the_constructor_refuses(name):
    optimizer = Kfac(**PLAIN)
    optimizer.damping  # noqa: B018
    for value in NO_NUMBERS:
        with pytest.raises(ValueError, match=name):
            setattr(optimizer, name, value)
    setattr(optimizer, name, np.array(0.75))
    assert float(getattr(optimizer, name)) == 0.75


def test_a_train_batch_is_looked_at_only_when_damping_is_adapted():
    Kfac(**PLAIN, train_batch=3)
    for bad, fragment in ((3, "tuple"), ((1, 2), "must use TF tensors")):
        with pytest.raises(ValueError, match=fragment):
            Kfac(adaptive=True, damping=1.0, train_batch=bad)
    Kfac(adaptive=True, damping=1.0, train_batch=(tf.zeros([2, 3]), tf.zeros([2])))


def test_after_a_refusal_at_the_first_step_another_optimizer_trains_the_model():
    model = cases.sequential()
    refused = cases.make(model, fisher_approx={"no_such_layer": "kron"})
    before = cases.weights(model)
    x, y = cases.data()
    with pytest.raises(ValueError, match="no_such_layer"):
        model.fit(x, y, verbose=0)
    assert refused.state_variable_names() == []
    assert int(refused.iterations) == 0
    for one, other in zip(cases.weights(model), before, strict=True):
        np.testing.assert_array_equal(one, other)
    cases.make(model)
    losses = cases.losses_of_fit(model, x, y)
    assert losses[-1] < losses[0]


def test_a_plan_needs_a_number_of_cases():
    model = cases.sequential()
    for value in (0, 1.5, "32", None, True):
        with pytest.raises(ValueError, match="batch_size"):
            kfac.keras.plan(model, value, print_fn=None)
    planned = kfac.keras.plan(model, np.int64(32), print_fn=None)
    assert type(planned.batch_size) is int


def test_after_a_batch_of_the_wrong_shape_the_next_step_is_taken():
    model = cases.sequential()
    optimizer = Kfac(**PLAIN, model=model, loss=cases.sparse_logits())
    x, y = cases.data()
    with pytest.raises(ValueError, match="shape"):
        optimizer.step(x[:, :3], y)
    assert int(optimizer.state_variable("kfac/counter")) == 0
    losses = [float(optimizer.step(x, y)["loss"]) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert int(optimizer.iterations) == 3
