"""Whole steps against K-FAC written out in NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config, layer_collection
from kfac.python.ops.kfac_utils import periodic_inv_cov_update_kfac_opt as periodic
from kfac.tests import graph_kinds
from kfac.tests.ops import kfac_oracle, optimizer_cases

tf1 = tf.compat.v1

# Rounding after a few steps of a well-conditioned problem; float32 solves with
# damping 0.02 lose two of their seven digits.
TOLERANCES = {"float64": (1e-8, 1e-10), "float32": (5e-3, 5e-4)}

REGULAR = {"momentum_type": "regular", "learning_rate": 0.3}
ADAM = {"momentum_type": "adam", "learning_rate": 0.1}
QMODEL = {"momentum_type": "qmodel", "learning_rate": None, "momentum": None}
FIXED_MU = {"momentum_type": "qmodel_fixedmu", "learning_rate": None, "momentum": 0.4}
ADAPT = {"adapt_damping": True, "damping_adaptation_interval": 1}
DELAYED = {
    **ADAPT,
    "damping_adaptation_interval": 2,
    "update_damping_immediately": False,
}
V1, FUNCTION = graph_kinds.FAST

CASES = {
    "regular": (REGULAR, V1),
    "adam": (ADAM, FUNCTION),
    "qmodel": (QMODEL, V1),
    "qmodel_fixedmu": (FIXED_MU, V1),
    "regular, clipped": ({**REGULAR, "norm_constraint": 1e-3}, V1),
    "adam, clipped": ({**ADAM, "norm_constraint": 1e-3}, V1),
    "empirical": ({**ADAM, "estimation_mode": "empirical"}, V1),
    "weight decay": ({**REGULAR, "use_weight_decay": True}, V1),
    "qmodel, weight decay, rescaled": (
        {**QMODEL, "use_weight_decay": True, "qmodel_update_rescale": 0.5},
        V1,
    ),
    "preconditioner damped more": ({**ADAM, "precon_damping_mult": 10.0}, V1),
    "sparse schedule": (
        {**REGULAR, "cov_update_every": 2, "invert_every": 3},
        FUNCTION,
    ),
    "burn-in": ({**ADAM, "num_burnin_steps": 2}, FUNCTION),
    "burn-in, v1": ({**QMODEL, "num_burnin_steps": 1}, V1),
    "regular, adapted": ({**REGULAR, **ADAPT}, V1),
    "regular, adapted, all options": (
        {**REGULAR, **ADAPT, "l2_reg": 0.01, "precon_damping_mult": 2.0},
        V1,
    ),
    "adam, adapted, clipped": ({**ADAM, **ADAPT, "norm_constraint": 1e-2}, V1),
    "qmodel, adapted": ({**QMODEL, **ADAPT, "l2_reg": 0.01}, FUNCTION),
    "qmodel, adapted later": ({**QMODEL, **DELAYED, "qmodel_update_rescale": 0.7}, V1),
    "qmodel_fixedmu, adapted": ({**FIXED_MU, **ADAPT}, V1),
    "adam, adapted later": ({**ADAM, **DELAYED}, FUNCTION),
    "regular, adapted later": ({**REGULAR, **DELAYED, "precon_damping_mult": 3.0}, V1),
}


class Training:
    """The optimizer and its oracle, step by step."""

    def __init__(self, kind, options, dtype="float64", include_damping=False):
        options = {"damping": 0.02, "invert_every": 1, **options}
        params, batch = kfac_oracle.problem()
        self.oracle = kfac_oracle.Oracle(
            params,
            batch,
            train_batch=batch,
            prev_train_batch=batch,
            include_damping=include_damping,
            **options,
        )

        def build():
            model = optimizer_cases.Model(dtype, l2_reg=options.get("l2_reg", 0.0))
            if options.get("adapt_damping"):
                options.update(
                    loss_fn=model.loss_fn,
                    train_batch=model.batch,
                    prev_train_batch=model.batch,
                )
            opt = optimizer_cases.make_optimizer(model, **options)
            with tf.control_dependencies([opt.minimize(model.loss)]):
                return optimizer_cases.state_of(model, opt)

        with config.override(include_damping_in_qmodel_change=include_damping):
            self.run = graph_kinds.Run(kind, build)
            self.tolerances = TOLERANCES[dtype]
            self.check_step()

    def check_step(self):
        self.oracle.step()
        optimizer_cases.assert_state(
            self.run(), optimizer_cases.expected_state(self.oracle), *self.tolerances
        )


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_written_out_in_numpy(name):
    options, kind = CASES[name]
    training = Training(kind, options)
    for _ in range(4):
        training.check_step()


@pytest.mark.parametrize(
    "options",
    [{**ADAM, **ADAPT, "norm_constraint": 1e-2}, {**QMODEL, **ADAPT}],
    ids=["adam", "qmodel"],
)
def test_steps_in_float32_are_those_written_out_in_numpy(options):
    training = Training(V1, options, dtype="float32")
    training.check_step()


@pytest.mark.parametrize("options", [REGULAR, QMODEL], ids=["regular", "qmodel"])
def test_the_damping_may_count_in_the_predicted_change(options):
    Training(V1, {**options, **ADAPT}, include_damping=True).check_step()


def test_the_first_quadratic_model_step_minimizes_the_true_model_along_it():
    training = Training(V1, QMODEL)
    oracle = training.oracle
    # p = 0 before the first step, so mu must be 0 and the step -alpha d only.
    assert oracle.model_momentum == 0.0
    assert oracle.model_rate > 0


@pytest.mark.parametrize("kind", [graph_kinds.V1_ON, graph_kinds.COND, graph_kinds.XLA])
def test_every_graph_kind_takes_the_same_steps(kind):
    training = Training(kind, {**REGULAR, **ADAPT, "cov_update_every": 2})
    training.check_step()


def test_scalars_in_float32_serve_a_float64_model():
    params, batch = kfac_oracle.problem()

    def build():
        model = optimizer_cases.Model("float64")
        opt = optimizer_cases.make_optimizer(
            model,
            dtype="float32",
            loss_fn=model.loss_fn,
            train_batch=model.batch,
            momentum_type="qmodel",
            momentum=None,
            learning_rate=None,
            **ADAPT,
        )
        with tf.control_dependencies([opt.minimize(model.loss)]):
            return optimizer_cases.state_of(model, opt)

    oracle = kfac_oracle.Oracle(
        params, batch, damping=0.02, train_batch=batch, **QMODEL, **ADAPT
    )
    run = graph_kinds.Run(V1, build)
    for _ in range(2):
        oracle.step()
        optimizer_cases.assert_state(
            run(), optimizer_cases.expected_state(oracle), *TOLERANCES["float32"]
        )


def test_parts_of_the_batch_serve_statistics_and_quadratic_model():
    options = {**QMODEL, "qmodel_batch_fraction": 0.5, "cov_batch_fraction": 0.3}
    params, (x, y) = kfac_oracle.problem()

    class PartOracle(kfac_oracle.Oracle):
        def collect(self, decay):
            whole, self.batch = self.batch, (x[:2], y[:2])  # ceil(0.3 * 6) cases.
            super().collect(decay)
            self.batch = whole

        def quadratic_direction(self, g, d):
            whole, self.batch = self.batch, (x[:3], y[:3])
            result = super().quadratic_direction(g, d)
            self.batch = whole
            return result

    def build():
        model = optimizer_cases.Model()
        opt = optimizer_cases.make_optimizer(model, **options)
        with tf.control_dependencies([opt.minimize(model.loss)]):
            return optimizer_cases.state_of(model, opt)

    oracle = PartOracle(params, (x, y), damping=0.02, **QMODEL)
    run = graph_kinds.Run(FUNCTION, build)
    for _ in range(2):
        oracle.step()
        optimizer_cases.assert_state(
            run(), optimizer_cases.expected_state(oracle), *TOLERANCES["float64"]
        )


def test_a_one_parameter_model_never_gets_an_arbitrary_momentum():
    def build():
        w = graph_kinds.variable([[2.0]], "w", "float32")
        x = tf.constant([[1.0], [2.0]])
        y = tf.matmul(x, w)
        layers = layer_collection.LayerCollection()
        layers.register_fully_connected(w, x, y)
        layers.register_squared_error_loss(y, targets=tf.zeros_like(y))
        model_loss = tf.reduce_mean(tf.square(y))
        opt = periodic.PeriodicInvCovUpdateKfacOpt(
            damping=1e-6,
            layer_collection=layers,
            estimation_mode="exact",
            batch_size=2,
            **QMODEL,
        )
        with tf.control_dependencies([opt.minimize(model_loss)]):
            return tf.identity(w), opt.momentum

    run = graph_kinds.Run(V1, build)
    for _ in range(3):
        w, momentum = run()
        # Proposal and previous update are always collinear here.
        assert momentum == 0.0
        assert np.isfinite(w).all()
    # The loss is quadratic: one exact step already reaches the minimum, up to damping.
    assert abs(w[0, 0]) < 1e-3


def test_variables_given_as_scalars_are_read_at_every_step():
    params, batch = kfac_oracle.problem()
    with tf.Graph().as_default(), tf1.Session() as session:
        model = optimizer_cases.Model()
        rate, damping, momentum = scalars = [
            tf1.get_variable(name, initializer=np.float64(0.1), trainable=False)
            for name in ("rate", "damping", "momentum")
        ]
        opt = optimizer_cases.make_optimizer(
            model,
            learning_rate=rate,
            damping=damping,
            momentum=momentum,
            precon_damping_mult=2.0,
            momentum_type="regular",
            norm_constraint=tf.constant(0.01),
        )
        train_op = opt.minimize(model.loss)
        oracle = kfac_oracle.Oracle(
            params,
            batch,
            0.1,
            0.1,
            momentum_type="regular",
            precon_damping_mult=2.0,
            norm_constraint=0.01,
        )
        session.run(tf1.global_variables_initializer())
        for value in (0.1, 0.3, 0.02):
            for scalar in scalars:
                session.run(scalar.assign(value))
            oracle.eta = oracle.damping = oracle.momentum = value
            oracle.step()
            session.run(train_op)
            optimizer_cases.assert_state(
                session.run(optimizer_cases.state_of(model, opt)),
                optimizer_cases.expected_state(oracle),
                # The constraint is a float32 tensor.
                rtol=1e-7,
                atol=1e-8,
            )


@pytest.mark.parametrize(
    "options",
    [ADAM, {**REGULAR, "norm_constraint": 0.5}, QMODEL],
    ids=["adam", "regular", "qmodel"],
)
def test_embeddings_with_sparse_gradients_are_trained(options):
    def build():
        rng = np.random.default_rng(0)
        table = graph_kinds.variable(rng.normal(size=(5, 3)), "table")
        w = graph_kinds.variable(rng.normal(size=(3, 2)), "w")
        ids, labels = tf.constant([0, 2, 2, 4]), tf.constant([0, 1, 1, 0])
        rows = tf.gather(table, ids)
        hidden = tf.tanh(rows)
        logits = tf.matmul(hidden, w)
        layers = layer_collection.LayerCollection()
        layers.register_fully_connected(
            table, ids, rows, dense_inputs=False, approx="kron_in_diag"
        )
        layers.register_fully_connected(w, hidden, logits)
        layers.register_softmax_cross_entropy_loss(logits, targets=labels)
        loss = tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        )
        opt = periodic.PeriodicInvCovUpdateKfacOpt(
            damping=0.1,
            layer_collection=layers,
            estimation_mode="exact",
            batch_size=4,
            dtype="float64",
            adapt_damping=True,
            damping_adaptation_interval=1,
            loss_fn=lambda _: loss,
            train_batch="unused",
            **options,
        )
        assert isinstance(opt.compute_gradients(loss)[0][0], tf.IndexedSlices)
        opt.minimize(loss)
        return opt.step_metrics()

    run = graph_kinds.Run(V1, build)
    losses = [run()["loss"] for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert np.isfinite(run()["qmodel_change"])
