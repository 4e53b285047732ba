"""Training without `fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kfac.tests.keras import keras_cases as cases


def one_step(how):
    """Weights after a step that is taken in one of several ways."""
    keras.utils.set_random_seed(12)
    x, y = map(tf.constant, cases.data())
    model = cases.sequential()
    optimizer = cases.make(model)
    loss_fn = cases.sparse_logits()
    variables = model.trainable_variables

    def taped():
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        return loss, tape

    def by_compute_loss():
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        optimizer.apply_gradients(
            zip(tape.gradient(loss, variables), variables, strict=True)
        )

    def by_show_batch():
        loss, tape = taped()
        optimizer.show_batch(x, y)
        optimizer.apply(tape.gradient(loss, variables), variables)

    def by_minimize_function():
        optimizer.show_batch(x, y)
        optimizer.minimize(lambda: taped()[0], variables)

    def by_minimize_tape():
        loss, tape = taped()
        optimizer.show_batch(x, y)
        optimizer.minimize(loss, variables, tape=tape)

    {
        "fit": lambda: cases.losses_of_fit(model, x, y, epochs=1),
        "step": lambda: optimizer.step(x, y),
        "step in a function": tf.function(lambda: optimizer.step(x, y)),
        "compute_loss": tf.function(by_compute_loss),
        "show_batch": tf.function(by_show_batch),
        "show_batch, eagerly": by_show_batch,
        "minimize a function": tf.function(by_minimize_function),
        "minimize with a tape": by_minimize_tape,
    }[how]()
    assert int(optimizer.iterations) == 1
    return cases.weights(model)


@pytest.fixture(scope="module")
def by_fit():
    return one_step("fit")


@pytest.mark.parametrize(
    "how",
    [
        *("step", "step in a function", "compute_loss", "show_batch"),
        *("show_batch, eagerly", "minimize a function", "minimize with a tape"),
    ],
)
def test_a_step_is_the_same_however_it_is_taken(how, by_fit):
    for one, other in zip(one_step(how), by_fit, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_a_step_reports_scalars_about_itself():
    keras.utils.set_random_seed(13)
    model = cases.sequential()
    optimizer = cases.make(model, momentum=0.0, damping=1e8, learning_rate=1e7)
    x, y = cases.data()
    expected_loss = float(cases.sparse_logits()(y, model(x)))
    before = np.concatenate([w.ravel() for w in cases.weights(model)])
    scalars = {k: float(v) for k, v in optimizer.step(x, y).items()}
    after = np.concatenate([w.ravel() for w in cases.weights(model)])
    assert set(scalars) == {
        *("loss", "damping", "rho", "learning_rate", "momentum", "update_norm"),
        *("cosine", "fallbacks", "rejected_steps"),
    }
    np.testing.assert_allclose(scalars["loss"], expected_loss, rtol=1e-6)
    np.testing.assert_allclose(
        scalars["update_norm"], np.linalg.norm(after - before), rtol=1e-5
    )
    # With an all-dominating damping the step is along the gradient.
    np.testing.assert_allclose(scalars["cosine"], 1.0, rtol=1e-4)
    assert scalars["momentum"] == 0.0
    assert scalars["fallbacks"] == 0.0
    assert np.isnan(scalars["rho"])
    assert optimizer.scalars()["update_norm"] == scalars["update_norm"]


def test_an_adaptive_step_reports_what_it_chose():
    model = cases.sequential()
    optimizer = cases.make(
        model, adaptive=True, damping=1.0, damping_adaptation_interval=1
    )
    scalars = {k: float(v) for k, v in optimizer.step(*cases.data()).items()}
    assert scalars["learning_rate"] > 0
    assert np.isfinite(scalars["rho"])
    assert scalars["damping"] != 1.0
    assert float(optimizer.learning_rate) == scalars["learning_rate"]


def test_a_step_uses_the_loss_that_the_model_was_compiled_with_last():
    model = cases.sequential()
    optimizer = cases.make(model)
    x, y = cases.data()
    optimizer.step(x, y)
    model.compile(optimizer, "mse")
    targets = np.zeros((len(y), cases.CLASSES), np.float32)
    expected = np.mean(np.square(model(x)))
    np.testing.assert_allclose(optimizer.step(x, targets)["loss"], expected, rtol=1e-5)


def test_a_batch_that_was_not_shown_is_asked_for():
    model = cases.sequential()
    optimizer = cases.make(model)
    x, y = cases.data()

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = cases.sparse_logits()(y, model(x, training=True))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)

    with pytest.raises(ValueError, match="optimizer.show_batch"):
        step()


def test_a_batch_of_evaluation_is_not_taken_for_one_of_training():
    model = cases.sequential()
    optimizer = cases.make(model, compiled={"run_eagerly": True})
    x, y = cases.data()
    model.train_on_batch(x, y)
    model.evaluate(x, y, verbose=0)
    variables = model.trainable_variables
    gradients = [tf.zeros_like(v) for v in variables]
    with pytest.raises(ValueError, match="has not seen the batch"):
        optimizer.apply(gradients, variables)


def test_an_unknown_model_or_loss_is_asked_for():
    optimizer = cases.Kfac(learning_rate=0.1, damping=0.1)
    with pytest.raises(ValueError, match="register_layers"):
        optimizer.step(*cases.data())
    with pytest.raises(ValueError, match="provide a model with a loss"):
        optimizer.register_layers()
    with pytest.raises(ValueError, match="provide a model with a loss"):
        optimizer.register_layers(cases.sequential())  # Not compiled.


def test_minimize_wants_a_function_or_a_tape():
    optimizer = cases.make(cases.sequential())
    with pytest.raises(ValueError, match="tape=tape"):
        optimizer.minimize(tf.constant(1.0), [])


def test_members_of_keras_graph_mode_say_what_replaced_them():
    optimizer = cases.make(cases.sequential())
    for removed in (optimizer.get_updates, optimizer.get_gradients):
        with pytest.raises(NotImplementedError, match="optimizer.step"):
            removed(None, None)


def test_the_report_tells_how_variables_are_covered_before_training():
    model = cases.functional()
    optimizer = cases.make(model)
    printed = []
    rows = optimizer.explain(print_fn=printed.append)
    blocks = {row.variables[0].rpartition("/")[2]: row.block for row in rows}
    assert blocks == {
        "kernel": "FullyConnectedKFACBasicFB",
        "gamma": "ScaleAndShiftFullFB",
    }
    assert len(rows) == 3
    assert "ScaleAndShiftFullFB" in printed[0]
    assert optimizer.layers.registered_variables
    assert optimizer.optimizer.layers is optimizer.layers
    assert int(optimizer.iterations) == 0


def test_the_report_of_a_model_of_unknown_inputs_wants_some():
    model = cases.Subclassed()
    optimizer = cases.make(model)
    x, _ = cases.data()
    model(x)
    with pytest.raises(ValueError, match="optimizer.explain"):
        optimizer.explain()
    assert len(optimizer.explain(x, print_fn=None)) == 2


def test_strict_refuses_what_no_pattern_covers():
    model = keras.Sequential(
        [keras.Input((cases.FEATURES,)), keras.layers.PReLU(), keras.layers.Dense(3)]
    )
    cases.make(model, strict=True)
    with pytest.raises(ValueError, match="alpha"):
        model.train_on_batch(*cases.data())
