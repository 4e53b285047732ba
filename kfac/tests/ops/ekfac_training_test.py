"""EKFAC inside the optimizers: steps, schedules, damping, Keras."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops.kfac_utils import async_inv_cov_update_kfac_opt as asynchronous
from kfac.python.ops.kfac_utils import periodic_inv_cov_update_kfac_opt as periodic
from kfac.tests import graph_kinds
from kfac.tests.ops import ekfac_cases as cases

tf1 = tf.compat.v1

CASE = cases.DENSE


def mean_loss(out, targets):
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, out))


def make_optimizer(model, cls=periodic.PeriodicInvCovUpdateKfacOpt, **options):
    defaults = dict(
        learning_rate=0.3,
        damping=cases.DAMPING,
        layer_collection=model.collection,
        var_list=model.variables,
        momentum=0.0,
        momentum_type="regular",
        estimation_mode="exact",
        batch_size=len(CASE.x),
        dtype="float64",
    )
    return cls(**(defaults | options))


def training(approx="ekfac", **options):
    """A build function: one step, and what is known after it."""

    def build():
        model = cases.build(CASE, approx)
        targets = tf.constant(CASE.targets)
        loss = mean_loss(model.out, targets)
        if options.get("adapt_damping"):
            options.update(
                loss_fn=lambda batch: mean_loss(
                    CASE.forward(model.variables, batch[0])[0], batch[1]
                ),
                train_batch=(model.x, targets),
            )
        opt = make_optimizer(model, **options)
        gradients = tf.gradients(loss, model.variables)
        before = [tf.identity(v) for v in model.variables]
        with tf.control_dependencies([loss, *gradients, *before]):
            train_op = opt.minimize(loss)
        blocks = opt.layers.get_blocks() if approx != "kron" else ()
        with tf.control_dependencies([train_op]):
            return {
                "loss": loss,
                "gradients": gradients,
                "before": before,
                "after": [tf.identity(v) for v in model.variables],
                "damped": [b.linear_operator().to_dense() for b in blocks],
                "damping": tf.identity(opt.damping),
                "bases": [
                    tf.identity(basis)
                    for block in blocks
                    for basis in block.eigenbasis_factor.get_inv_vars()
                ],
            }

    return build


@pytest.mark.parametrize("kind", graph_kinds.FAST)
@pytest.mark.parametrize("approx", ["ekfac", "ekfac_product"])
def test_a_step_is_the_gradient_times_the_inverse_of_the_damped_block(kind, approx):
    run = graph_kinds.Run(kind, training(approx, invert_every=2))
    for _ in range(4):
        found = run()
        for group, damped in zip(CASE.groups, found["damped"], strict=True):
            flat = lambda key, group=group: np.concatenate(
                [found[key][i].ravel() for i in group]
            )
            expected = -0.3 * np.linalg.solve(damped, flat("gradients"))
            np.testing.assert_allclose(
                flat("after") - flat("before"), expected, rtol=1e-8, atol=1e-12
            )


def test_bases_are_refreshed_on_their_steps_only_and_moments_on_others_too():
    run = graph_kinds.Run(graph_kinds.V1_ON, training(invert_every=3))
    before = run()
    for k in range(1, 7):
        after = run()
        same = [
            np.array_equal(a, b)
            for a, b in zip(after["bases"], before["bases"], strict=True)
        ]
        # (The network's inputs, and hence their eigenvectors, stay the same.)
        assert all(same) if k % 3 else not any(same[1:])
        for a, b in zip(after["damped"], before["damped"], strict=True):
            assert not np.allclose(a, b, rtol=1e-6)
        before = after


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_training_with_adapted_damping_goes_down_at_least_as_fast_as_kfac(kind):
    options = dict(
        adapt_damping=True,
        damping_adaptation_interval=2,
        momentum_type="qmodel",
        learning_rate=None,
        momentum=None,
        invert_every=2,
        damping=1.0,
    )
    losses, dampings = {}, {}
    for approx in ("kron", "ekfac"):
        run = graph_kinds.Run(kind, training(approx, **options))
        results = [run() for _ in range(30)]
        losses[approx] = [float(r["loss"]) for r in results]
        dampings[approx] = [float(r["damping"]) for r in results]
    assert losses["ekfac"][-1] < 0.1 * losses["ekfac"][0]
    assert losses["ekfac"][-1] < 1.5 * losses["kron"][-1]
    assert dampings["ekfac"][-1] < 0.5
    assert not np.allclose(losses["ekfac"], losses["kron"], rtol=1e-3)


def test_a_new_damping_acts_without_an_inverse_update():
    with tf.Graph().as_default(), tf1.Session() as session:
        damping = tf1.get_variable("damping", initializer=0.1, use_resource=True)
        made = cases.build(CASE, "ekfac").estimator(damping=damping)
        cov, inv = made.make_vars_and_create_op_thunks()
        step = cases.in_turn([cases.update(cov), cases.update(inv)])
        block = made.blocks[1]
        pieces = [block.full_fisher_block(), block.linear_operator().to_dense()]
        session.run(tf1.global_variables_initializer())
        session.run(step)
        session.run(damping.assign(3.0))
        undamped, damped = session.run(pieces)
    np.testing.assert_allclose(damped, undamped + 3.0 * np.eye(len(damped)))


def test_asynchronous_updates_train_too():
    with tf.Graph().as_default(), tf1.Session() as session:
        model = cases.build(CASE, "ekfac")
        loss = mean_loss(model.out, tf.constant(CASE.targets))
        opt = make_optimizer(
            model,
            asynchronous.AsyncInvCovUpdateKfacOpt,
            cov_devices=["/cpu:0"],
            inv_devices=["/cpu:0"],
        )
        train_op = opt.minimize(loss)
        session.run(tf1.global_variables_initializer())
        opt.run_cov_inv_ops(session)
        first = session.run(loss)
        for _ in range(60):
            session.run(train_op)
        opt.stop_cov_inv_ops(session)
        assert session.run(loss) < 0.7 * first


def test_keras_takes_it_by_layer_name_and_by_class():
    keras = pytest.importorskip("keras")
    from kfac.python.keras.optimizers import Kfac

    keras.utils.set_random_seed(1)
    x = np.random.RandomState(0).randn(64, 6, 6, 1).astype("float32")
    y = (x.mean(axis=(1, 2, 3)) > 0).astype("int32")
    model = keras.Sequential(
        [
            keras.layers.Conv2D(3, 3, activation="tanh", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(8, activation="tanh", name="hidden"),
            keras.layers.Dense(2, name="readout"),
        ]
    )
    model.build(x.shape)
    optimizer = Kfac(
        learning_rate=0.05,
        damping=0.01,
        model=model,
        fisher_approx={"conv": "ekfac", "kfac_class_Dense": "ekfac"},
        seed=1,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    history = model.fit(x, y, batch_size=32, epochs=12, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]
    names = {
        v.path if hasattr(v, "path") else v.name for v in optimizer._store.variables
    }
    for layer in ("conv", "hidden", "readout"):
        assert any(layer in name and "input_basis" in name for name in names)
