"""Adaptive damping: inputs, chief, schedule, and who reads the damping when."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import layer_collection, optimizer, state
from kfac.python.ops.optimizer import damping as damping_adaptation
from kfac.tests import graph_kinds
from kfac.tests.ops import optimizer_cases

tf1 = tf.compat.v1

V1 = graph_kinds.V1_OFF
OMEGA = 0.95**2


def train(kind, *, loss_fn=None, batch="model's", delayed=False, **options):
    """Steps of an adaptive optimizer with an interval of two steps."""

    def build():
        model = optimizer_cases.Model()
        data = model.batch if batch == "model's" else batch
        inputs = {"prev_train_batch" if delayed else "train_batch": data}
        opt = optimizer_cases.make_optimizer(
            model,
            **{
                "learning_rate": 0.05,
                "adapt_damping": True,
                "damping_adaptation_interval": 2,
                "update_damping_immediately": not delayed,
                "loss_fn": loss_fn or model.loss_fn,
                **inputs,
                **options,
            },
        )
        opt.minimize(model.loss)
        return opt.step_metrics()

    return graph_kinds.Run(kind, build)


def dampings(run, steps):
    return [float(run()["damping"]) for _ in range(steps)]


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_the_damping_changes_in_the_last_step_of_an_interval(kind):
    values = dampings(train(kind), 4)
    assert values[0] == 0.02
    np.testing.assert_allclose(values[1], 0.02 * OMEGA)
    assert values[2] == values[1]
    np.testing.assert_allclose(values[3], 0.02 * OMEGA**2)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_a_delayed_change_comes_one_step_later(kind):
    values = dampings(train(kind, delayed=True), 5)
    assert values[0] == values[1] == 0.02
    np.testing.assert_allclose(values[2], 0.02 * OMEGA)
    assert values[3] == values[2]
    np.testing.assert_allclose(values[4], 0.02 * OMEGA**2)


def test_the_minimized_loss_is_remembered():
    metrics = train(V1)()
    assert np.isfinite(metrics["loss"])


def test_a_loss_set_by_hand_is_kept():
    with tf.Graph().as_default():
        model = optimizer_cases.Model()
        opt = optimizer_cases.make_optimizer(model, learning_rate=0.1)
        given = tf.constant(1.0)
        opt.set_loss(given)
        opt.minimize(model.loss)
        assert opt._loss_tensor is given


def test_a_loss_of_the_constructor_is_kept():
    with tf.Graph().as_default():
        model = optimizer_cases.Model()
        given = tf.constant(1.0)
        opt = optimizer_cases.make_optimizer(model, learning_rate=0.1, loss=given)
        opt.compute_gradients(model.loss)
        assert opt._loss_tensor is given


@pytest.mark.parametrize("delayed", [False, True])
def test_the_loss_before_a_step_may_be_evaluated_anew(delayed):
    evaluated = []

    def loss_fn(batch):
        evaluated.append(batch)
        # Odd evaluations are built first: the delayed adaptation opens a step, the
        # immediate one closes it.
        opens_step = len(evaluated) % 2 == 1
        return tf.constant(1.0 if opens_step != delayed else 2.0, tf.float64)

    run = train(
        V1,
        loss_fn=loss_fn,
        batch="data",
        delayed=delayed,
        use_passed_loss=False,
        train_batch="data",
    )
    values = dampings(run, 3)
    # From 1 before the step to 2 after it, the loss grew.
    np.testing.assert_allclose(values[-1], 0.02 / OMEGA)
    assert evaluated == ["data"] * 2


def test_a_loss_that_is_not_finite_any_more_increases_the_damping():
    run = train(V1, loss_fn=lambda _: tf.constant(np.nan, tf.float64))
    np.testing.assert_allclose(dampings(run, 2)[-1], 0.02 / OMEGA)


def test_the_damping_has_a_floor():
    values = dampings(train(V1, min_damping=0.015, l2_reg=0.004), 8)
    assert min(values) == 0.019


@pytest.mark.parametrize("delayed", [False, True])
def test_a_worker_that_is_not_chief_adapts_nothing(delayed):
    run = train(V1, delayed=delayed, is_chief=False, loss_fn=lambda _: None)
    for _ in range(3):
        metrics = run()
    assert metrics["damping"] == 0.02
    assert np.isnan(metrics["rho"])
    assert np.isnan(metrics["qmodel_change"])


@pytest.mark.parametrize(
    "missing, said",
    [
        ({"loss_fn": None}, "loss_fn"),
        ({"train_batch": None}, "train_batch"),
        (
            {"update_damping_immediately": False, "prev_train_batch": None},
            "prev_train_batch",
        ),
    ],
)
def test_what_the_adaptation_lacks_is_named(missing, said):
    with tf.Graph().as_default():
        model = optimizer_cases.Model()
        inputs = {"loss_fn": model.loss_fn, "train_batch": model.batch}
        opt = optimizer_cases.make_optimizer(
            model, learning_rate=0.1, adapt_damping=True, **{**inputs, **missing}
        )
        with pytest.raises(ValueError, match=said):
            opt.minimize(model.loss)


def test_losses_from_elsewhere_replace_loss_fn_and_batch():
    class TwoLosses(optimizer.KfacOptimizer):
        def _get_prev_loss(self):
            return tf.constant(2.0)

        def _get_current_loss(self):
            return tf.constant(1.0)

    with tf.Graph().as_default(), tf1.Session() as session:
        collection = layer_collection.LayerCollection()
        opt = TwoLosses(0.1, 0.2, collection, adapt_damping=True)
        with tf.control_dependencies([opt._qmodel_change.assign(-1.0)]):
            update = opt._update_damping()
        session.run(tf1.global_variables_initializer())
        session.run(update)
        # rho = (1 - 2) / -1 is above 3/4: the damping falls by 0.95 per step of five.
        assert session.run(opt.rho) == 1.0
        np.testing.assert_allclose(session.run(opt.damping), 0.2 * 0.95**5, rtol=1e-6)


def test_a_missing_loss_is_named():
    with tf.Graph().as_default():
        model = optimizer_cases.Model()
        opt = optimizer_cases.make_optimizer(
            model,
            learning_rate=0.1,
            adapt_damping=True,
            loss_fn=model.loss_fn,
            train_batch=model.batch,
        )
        gradients = tf.gradients(model.loss, model.variables)
        with pytest.raises(ValueError, match="set_loss"):
            opt.apply_gradients(zip(gradients, model.variables, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"adapt_damping": False, "update_damping_immediately": False},
        {"adapt_damping": True, "update_damping_immediately": True},
        {
            "adapt_damping": True,
            "update_damping_immediately": False,
            "is_chief": False,
        },
    ],
)
def test_there_is_no_pre_update_unless_the_chief_adapts_later(options):
    with tf.Graph().as_default():
        opt = optimizer_cases.make_base_optimizer(**options)
        assert opt.maybe_pre_update_adapt_damping().type == "NoOp"


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_the_preconditioner_reads_the_damping_where_it_is_used(kind):
    def build():
        value = state.get_variable("value", dtype=tf.float64, initializer=2.0)
        damping = damping_adaptation.for_preconditioner(value, 3.0)
        before = tf.convert_to_tensor(damping)
        with tf.control_dependencies([before, value.assign(tf.minimum(before, 5.0))]):
            after = tf.convert_to_tensor(damping)
            return before, after, damping / 2, 2 * damping, damping**2, 1 + damping

    before, *after = graph_kinds.Run(kind, build)()
    assert before == 6.0
    np.testing.assert_allclose(after, [15.0, 7.5, 30.0, 225.0, 16.0])


def test_the_preconditioners_damping_is_a_number_if_it_can_be():
    assert damping_adaptation.for_preconditioner(0.5, 4) == 2.0


def test_the_pre_update_reaches_inverses_of_the_same_step():
    """With invert_every = 1, an inverse always belongs to the current damping."""

    def build():
        model = optimizer_cases.Model()
        opt = optimizer_cases.make_optimizer(
            model,
            learning_rate=0.05,
            adapt_damping=True,
            damping_adaptation_interval=1,
            update_damping_immediately=False,
            loss_fn=model.loss_fn,
            prev_train_batch=model.batch,
        )
        with tf.control_dependencies([opt.minimize(model.loss)]):
            return (
                opt.damping,
                [tf.identity(i) for (i,) in opt.get_inv_vars()],
                [tf.identity(c) for (c,) in opt.get_cov_vars()],
            )

    run = graph_kinds.Run(V1, build)
    for _ in range(3):
        damping, inverses, covariances = run()
        for left in (0, 2):
            # (A + pi r)(G + r / pi): removing A and G leaves pi r and r / pi, whose
            # product is the damping.
            excess = [
                np.trace(np.linalg.inv(inverses[i]) - covariances[i]) / len(inverses[i])
                for i in (left, left + 1)
            ]
            np.testing.assert_allclose(excess[0] * excess[1], damping, rtol=1e-6)
