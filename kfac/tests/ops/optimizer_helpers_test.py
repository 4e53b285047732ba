"""The methods that other code calls: clipping, velocities, quadratic model, checks."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config, layer_collection, optimizer
from kfac.tests import graph_kinds
from kfac.tests.ops import kfac_oracle, optimizer_cases
from kfac.tests.ops.optimizer_cases import make_base_optimizer

tf1 = tf.compat.v1

QMODEL = {"momentum_type": "qmodel", "learning_rate": None, "momentum": None}


def evaluate(build, kind=graph_kinds.FUNCTION):
    return graph_kinds.Run(kind, build)()


def pairs(*vectors):
    return [(tf.constant(vector), None) for vector in vectors]


def test_the_squared_fisher_norm_is_the_inner_product_with_the_gradient():
    def build():
        return make_base_optimizer()._squared_fisher_norm(
            pairs([[1.0, 2.0]], [3.0]), pairs([[4.0, 5.0]], [6.0])
        )

    assert evaluate(build) == 4 + 10 + 18


@pytest.mark.parametrize("bound, expected", [(0.32, 0.4), (3.0, 1.0)])
def test_updates_are_clipped_to_the_norm_constraint(bound, expected):
    def build():
        opt = make_base_optimizer(learning_rate=0.5, norm_constraint=bound)
        gradient, preconditioned = pairs([1.0, 2.0]), pairs([2.0, 3.0])
        ((clipped, variable),) = opt._clip_updates(gradient, preconditioned)
        assert variable is None
        return opt._update_clip_coeff(gradient, preconditioned), clipped

    coefficient, clipped = evaluate(build)
    # min(1, sqrt(bound / (0.5^2 * 8)))
    np.testing.assert_allclose(coefficient, expected, rtol=1e-6)
    np.testing.assert_allclose(clipped, expected * np.array([2.0, 3.0]), rtol=1e-6)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_velocities_are_updated_by_reading_them(kind):
    def build():
        w = graph_kinds.variable([1.0, 2.0], "w", "float32")
        opt = make_base_optimizer(var_list=[w])
        ((velocity, variable),) = opt._update_velocities(
            [(tf.constant([1.0, 10.0]), w)], 0.5, vec_coeff=2.0
        )
        assert variable is w
        with tf.control_dependencies([velocity]):
            ((previous, _),) = opt._compute_prev_updates([w])
            return velocity, tf.identity(opt.get_slot(w, "velocity")), previous

    run = graph_kinds.Run(kind, build)
    np.testing.assert_allclose(run()[1], [2.0, 20.0])
    velocity, slot, previous = run()
    np.testing.assert_allclose(velocity, [3.0, 30.0])
    np.testing.assert_allclose(slot, velocity)
    np.testing.assert_allclose(previous, -velocity)


def test_only_velocity_slots_are_made():
    with tf.Graph().as_default():
        w = tf1.get_variable("w", [2])
        opt = make_base_optimizer()
        opt._update_velocities([(tf.zeros([2]), w)], 0.9)
        assert opt.get_slot_names() == ["velocity"]
        assert [v.name for v in opt.variables()] == ["KFAC/w/KFAC:0"]
        assert opt.get_slot(w, "velocity").shape == [2]


def test_weight_decay_leaves_the_pairs_variables_alone():
    def build():
        w = graph_kinds.variable([1.0, 2.0], "w", "float32")
        opt = make_base_optimizer(var_list=[w], weight_decay_coeff=0.5)
        ((decayed, variable),) = opt._add_weight_decay([(tf.constant([0.0, 1.0]), w)])
        assert variable is w
        return decayed

    np.testing.assert_allclose(evaluate(build), [0.5, 2.0])


def hyperparams(m, c, b, fixed_mu=None, **kwargs):
    def build():
        opt = make_base_optimizer(**{**QMODEL, "damping": 1.0, **kwargs})
        nested = [
            [[tf.constant(x, tf.float64) for x in row] for row in z] for z in (m, c, b)
        ]
        return opt._compute_qmodel_hyperparams(*nested, fixed_mu=fixed_mu)

    return np.array(evaluate(build))


M = np.array([[2.0, 0.5], [0.5, 1.0]])
C = np.array([[-1.0], [0.3]])
B = np.array([[0.4, 0.1], [0.1, 0.2]])


def test_hyperparameters_solve_the_two_dimensional_model():
    alpha, mu, change = hyperparams(M, C, B)
    x = -np.linalg.solve(M, C)
    np.testing.assert_allclose([[alpha], [mu]], x, rtol=1e-12)
    np.testing.assert_allclose(change, 0.5 * x.T @ (M - B) @ x + C.T @ x)


def test_the_rescale_changes_the_prediction_but_not_the_hyperparameters():
    alpha, mu, change = hyperparams(M, C, B, qmodel_update_rescale=0.5, l2_reg=0.25)
    x = -np.linalg.solve(M, C)
    np.testing.assert_allclose([[alpha], [mu]], x, rtol=1e-12)
    # damping 1, l2_reg 0.25: a quarter of the damping term stays.
    x, kept = 0.5 * x, M - 0.75 * B
    np.testing.assert_allclose(change, 0.5 * x.T @ kept @ x + C.T @ x)


def test_a_fixed_momentum_is_taken_as_it_is():
    alpha, mu, _ = hyperparams(M, C, B, fixed_mu=0.7)
    np.testing.assert_allclose([alpha, mu], [-(0.7 * 0.5 - 1.0) / 2.0, 0.7])


def test_without_a_previous_update_there_is_no_momentum():
    m, c = [[2.0, 0.0], [0.0, 0.0]], [[-1.0], [0.0]]
    np.testing.assert_allclose(hyperparams(m, c, m, l2_reg=1.0), [0.5, 0.0, -0.25])


@pytest.mark.parametrize("mode", ["exact", "empirical", "exact_GGN"])
def test_the_quadratic_model_is_that_of_the_explicit_fisher(mode):
    params, batch = kfac_oracle.problem()
    rng = np.random.default_rng(5)
    vectors = [[rng.normal(size=w.shape) for w in params] for _ in range(3)]

    def build():
        model = optimizer_cases.Model()
        opt = make_base_optimizer(
            model, estimation_mode=mode, batch_size=6, **{**QMODEL, "damping": 0.3}
        )
        d, p, g = (
            [(tf.constant(x), v) for x, v in zip(vector, model.variables, strict=True)]
            for vector in vectors
        )
        return opt._compute_qmodel(d, p, g)

    m, c, b = evaluate(build)
    d, p, g = vectors
    products = np.array(
        [
            [kfac_oracle.curvature_product(params, batch, u, v) for v in (d, p)]
            for u in (d, p)
        ]
    )
    gram = 0.3 * np.array([[kfac_oracle.ip(u, v) for v in (d, p)] for u in (d, p)])
    np.testing.assert_allclose(b, gram, rtol=1e-10)
    np.testing.assert_allclose(m, products + gram, rtol=1e-10)
    np.testing.assert_allclose(
        c, [[kfac_oracle.ip(g, d)], [kfac_oracle.ip(g, p)]], rtol=1e-10
    )


def test_the_quadratic_model_refuses_vectors_in_another_order():
    with tf.Graph().as_default():
        model = optimizer_cases.Model()
        opt = make_base_optimizer(model, batch_size=6, **QMODEL)
        d = [(tf.zeros_like(v), v) for v in model.variables]
        with pytest.raises(ValueError, match="order"):
            opt._compute_qmodel(d, d, d[::-1])


def test_the_quadratic_model_needs_the_batch_size():
    with tf.Graph().as_default():
        model = optimizer_cases.Model()
        opt = make_base_optimizer(model, **QMODEL)
        d = [(tf.zeros_like(v), v) for v in model.variables]
        with pytest.raises(ValueError, match="batch_size"):
            opt._compute_qmodel(d, d, d)


def test_the_l2_part_of_the_damping_is_known():
    def build():
        return make_base_optimizer(
            damping=0.5, l2_reg=0.1
        )._sub_damping_out_qmodel_change_coeff

    np.testing.assert_allclose(evaluate(build), 1 - 0.1 / 0.5)


def test_module_helpers_solve_and_evaluate():
    def build():
        m = [[tf.constant(2.0), 1.0], [1.0, 3.0]]
        x = optimizer._two_by_two_solve(m, [[1.0], [2.0]])
        return (
            x,
            optimizer._eval_quadratic_no_c(m, x),
            optimizer._eval_quadratic(m, [[1.0], [1.0]], x),
        )

    x, half, full = evaluate(build)
    np.testing.assert_allclose(x, [[0.2], [0.6]], rtol=1e-6)
    np.testing.assert_allclose(half, [[0.7]], rtol=1e-6)
    np.testing.assert_allclose(full, [[1.5]], rtol=1e-6)


def test_var_lists_must_be_the_registered_set():
    with tf.Graph().as_default():
        model = optimizer_cases.Model()
        opt = make_base_optimizer(model)
        opt.check_var_list(reversed(model.variables))
        other = tf1.get_variable("other", [1])
        for wrong in (model.variables[1:], [*model.variables, other], []):
            with pytest.raises(ValueError, match="var_list"):
                opt.check_var_list(wrong)
            with pytest.raises(ValueError, match="var_list"):
                opt.minimize(model.loss, var_list=wrong)
            with pytest.raises(ValueError, match="var_list"):
                opt.compute_gradients(model.loss, var_list=wrong)


def test_gradients_are_those_of_the_loss_for_registered_variables_only():
    params, batch = kfac_oracle.problem()

    def build():
        model = optimizer_cases.Model()
        graph_kinds.variable(1.0, "unrelated")
        opt = make_base_optimizer(model, var_list=model.variables)
        gradients = opt.compute_gradients(model.loss)
        assert isinstance(gradients, tuple)
        assert [v for _, v in gradients] == model.variables
        return [g for g, _ in gradients]

    expected = kfac_oracle.gradients(params, batch)
    for actual, gradient in zip(
        evaluate(build, graph_kinds.V1_OFF), expected, strict=True
    ):
        np.testing.assert_allclose(actual, gradient, rtol=1e-10, atol=1e-14)


def test_gradients_get_their_variables_static_shape():
    with tf.Graph().as_default():
        w = tf1.get_variable("w", [3, 2])
        opt = make_base_optimizer()
        x = tf1.placeholder(tf.float32, shape=[None, None])
        loss = tf.reduce_sum(w * tf.reshape(x, tf.shape(x)))
        ((gradient, _),) = opt.compute_gradients(loss)
        assert gradient.shape == [3, 2]


def test_a_variable_the_loss_ignores_is_named():
    with tf.Graph().as_default():
        tf1.get_variable("ignored", [1])
        opt = make_base_optimizer()
        with pytest.raises(ValueError, match="ignored"):
            opt.compute_gradients(tf.constant(1.0))


def test_the_loss_is_never_scaled():
    loss = object()
    assert optimizer.KfacOptimizer._scale_loss(loss) is loss


def test_a_step_without_curvature_variables_says_what_to_call():
    with tf.Graph().as_default():
        model = optimizer_cases.Model()
        opt = make_base_optimizer(model)
        with pytest.raises(ValueError, match="make_vars_and_create_op_thunks"):
            opt.minimize(model.loss)


def test_a_step_may_be_taken_with_another_preconditioner():
    class Doubling(optimizer.KfacOptimizer):
        def _multiply_preconditioner(self, vecs_and_vars):
            return [(2 * vec, var) for vec, var in vecs_and_vars]

    with tf.Graph().as_default(), tf1.Session() as session:
        x = tf1.get_variable("x", initializer=[3.0])
        opt = Doubling(0.1, 0.2, layer_collection.LayerCollection(), momentum=0.5)
        step = opt.apply_gradients([(tf.constant([1.0]), x)])
        session.run(tf1.global_variables_initializer())
        session.run(step)
        np.testing.assert_allclose(session.run(x), [2.8], rtol=1e-6)


def test_the_settings_are_read_when_the_graph_is_built():
    with (
        tf.Graph().as_default(),
        config.override(include_damping_in_qmodel_change=True),
    ):
        assert make_base_optimizer()._damping_share_left_out() == 0.0
