"""Construction: what is refused, which variables are made, what is introspectable."""

import inspect

import numpy as np
import pytest
import tensorflow as tf

import kfac
from kfac.python.ops import optimizer, state
from kfac.python.ops.kfac_utils import periodic_inv_cov_update_kfac_opt as periodic
from kfac.tests import graph_kinds
from kfac.tests.ops import optimizer_cases
from kfac.tests.ops.optimizer_cases import make_base_optimizer

tf1 = tf.compat.v1

QMODEL = {"momentum_type": "qmodel", "learning_rate": None, "momentum": None}

SIGNATURE = {
    "learning_rate": inspect.Parameter.empty,
    "damping": inspect.Parameter.empty,
    "layer_collection": inspect.Parameter.empty,
    "cov_ema_decay": 0.95,
    "var_list": None,
    "momentum": 0.9,
    "momentum_type": "adam",
    "use_weight_decay": False,
    "weight_decay_coeff": 0.1,
    "qmodel_update_rescale": None,
    "norm_constraint": None,
    "name": "KFAC",
    "estimation_mode": "gradients",
    "colocate_gradients_with_ops": True,
    "batch_size": None,
    "placement_strategy": None,
    "compute_params_stats": False,
    "adapt_damping": False,
    "update_damping_immediately": True,
    "is_chief": True,
    "prev_train_batch": None,
    "loss": None,
    "loss_fn": None,
    "min_damping": 1e-8,
    "l2_reg": 0.0,
    "damping_adaptation_decay": 0.95,
    "damping_adaptation_interval": 5,
    "damping_decrease_rho_threshold": 0.75,
    "damping_increase_rho_threshold": 0.25,
    "precon_damping_mult": 1.0,
    "use_passed_loss": True,
    "train_batch": None,
    "print_logs": False,
    "tf_replicator": None,
    "dtype": "float32",
    "cov_batch_fraction": 1.0,
    "qmodel_batch_fraction": 1.0,
}


def test_the_constructor_can_be_introspected():
    parameters = inspect.signature(kfac.KfacOptimizer).parameters
    named = {k: v.default for k, v in parameters.items() if k != "kwargs"}
    assert list(named.items()) == list(SIGNATURE.items())
    assert parameters["kwargs"].kind == inspect.Parameter.VAR_KEYWORD


REFUSED = {
    "unknown momentum type": ({"momentum_type": "nesterov"}, "nesterov"),
    "no momentum": ({"momentum": None}, "momentum"),
    "no learning rate": ({"learning_rate": None}, "learning_rate"),
    "a callable learning rate": ({"learning_rate": lambda: 0.1}, "callable"),
    "rescale without a model": ({"qmodel_update_rescale": 0.5}, "rescale"),
    "qmodel with learning rate": ({**QMODEL, "learning_rate": 0.1}, "learning_rate"),
    "qmodel with a zero learning rate": (
        {**QMODEL, "learning_rate": 0.0},
        "learning_rate",
    ),
    "qmodel with momentum": ({**QMODEL, "momentum": 0.9}, "momentum"),
    "qmodel with norm constraint": (
        {**QMODEL, "norm_constraint": 1.0},
        "norm_constraint",
    ),
    "fixed momentum without one": (
        {**QMODEL, "momentum_type": "qmodel_fixedmu"},
        "momentum",
    ),
    "loss_fn on no batch": ({"use_passed_loss": False}, "train_batch"),
    "negative damping": ({"damping": -1e-3}, "damping"),
    "NaN damping": ({"damping": float("nan")}, "damping"),
    "negative l2": ({"l2_reg": -1.0}, "l2_reg"),
    "growing decay": ({"damping_adaptation_decay": 1.5}, "decay"),
    "no interval": ({"damping_adaptation_interval": 0}, "interval"),
    "empty part of the batch": ({"cov_batch_fraction": 0.0}, "cov_batch_fraction"),
    "more than the batch": ({"qmodel_batch_fraction": 2}, "qmodel_batch_fraction"),
    "unknown placement": ({"placement_strategy": "here"}, "here"),
    "replica placement of one replica": (
        {"placement_strategy": "replica_round_robin"},
        "replica",
    ),
    "statistics of unknown batch": ({"compute_params_stats": True}, "batch_size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradicting_arguments_are_refused(name):
    arguments, said = REFUSED[name]
    with tf.Graph().as_default(), pytest.raises(ValueError, match=said):
        make_base_optimizer(**arguments)


def test_a_constant_tensor_of_negative_damping_is_refused():
    with tf.Graph().as_default(), pytest.raises(ValueError, match="damping"):
        make_base_optimizer(damping=tf.constant(-1.0))


def test_the_momentum_type_is_checked_before_anything_is_built():
    with tf.Graph().as_default() as graph:
        with pytest.raises(ValueError, match="momentum_type"):
            make_base_optimizer(momentum_type="foo", damping="nonsense")
        assert not graph.get_operations()


@pytest.mark.parametrize(
    "arguments", [{"cov_device": ["/cpu:0"]}, {"tf_replicator": object()}]
)
def test_unknown_keywords_and_replicators_are_type_errors(arguments):
    with tf.Graph().as_default(), pytest.raises(TypeError):
        make_base_optimizer(**arguments)


def test_eager_use_names_the_keras_optimizer():
    with pytest.raises(RuntimeError, match=r"kfac\.keras"):
        make_base_optimizer()


@pytest.mark.parametrize("kind", ["REGULAR", "Adam", "QModel", "qmodel_FixedMu"])
def test_momentum_types_are_case_insensitive(kind):
    arguments = {"momentum_type": kind}
    if kind.lower().startswith("qmodel"):
        arguments["learning_rate"] = None
        arguments["momentum"] = 0.9 if kind == "qmodel_FixedMu" else None
    with tf.Graph().as_default():
        assert make_base_optimizer(**arguments)._momentum_type == kind.lower()


def names_of_variables():
    return [v.op.name for v in tf1.global_variables()]


@pytest.mark.parametrize("adapt", [False, True])
def test_scalar_state_is_made_in_a_fixed_order(adapt):
    names = ["rho", "prev_loss", "qmodel_learning_rate", "qmodel_momentum"]
    names += ["qmodel_change", "counter"]
    with tf.Graph().as_default():
        make_base_optimizer(name="opt", adapt_damping=adapt)
        expected = ["opt/damping"] * adapt + [f"opt/{name}" for name in names]
        assert names_of_variables() == expected
        assert not tf1.trainable_variables()
        dtypes = {v.op.name: v.dtype for v in tf1.global_variables()}
        assert dtypes.pop("opt/counter") == tf.int64
        assert set(dtypes.values()) == {tf.float32}


def test_the_burn_in_counter_follows_the_step_counter():
    with tf.Graph().as_default(), tf1.variable_scope("outer"):
        periodic.PeriodicInvCovUpdateKfacOpt(
            learning_rate=0.1, damping=1.0, layer_collection=kfac.LayerCollection()
        )
        names = ["outer/KFAC/counter", "outer/KFAC/burnin_counter"]
        assert names_of_variables()[-2:] == names


def test_curvature_and_velocities_follow_the_scalars():
    with tf.Graph().as_default():
        model = optimizer_cases.Model()
        opt = optimizer_cases.make_optimizer(model, learning_rate=0.1)
        opt.minimize(model.loss)
        names = names_of_variables()[len(model.variables) :]
        scalars = 7
        velocities = [f"KFAC/{name}/KFAC" for name in ("w1", "b1", "w2", "b2")]
        assert names[-4:] == velocities
        curvature = names[scalars:-4]
        assert all(name.startswith("KFAC/FisherEstimator/") for name in curvature)
        is_cov = [name.split("/")[-2] == "cov" for name in curvature]
        # All covariance state precedes all inverse state.
        assert is_cov == sorted(is_cov, reverse=True)
        assert sum(is_cov) == 2 * len(opt.factors)


def test_scalars_start_at_nan_and_the_counter_at_zero():
    with tf.Graph().as_default(), tf1.Session() as session:
        opt = make_base_optimizer(**QMODEL)
        session.run(tf1.global_variables_initializer())
        values = [opt.rho, opt.qmodel_change, opt.learning_rate, opt.momentum]
        assert np.isnan(session.run(values)).all()
        assert session.run(opt.counter) == 0


def test_given_scalars_are_served_as_tensors():
    with tf.Graph().as_default(), tf1.Session() as session:
        rate = tf1.get_variable("rate", initializer=0.25)
        opt = make_base_optimizer(learning_rate=rate, damping=tf.constant(2.0))
        session.run(tf1.global_variables_initializer())
        values = [opt.learning_rate, opt.damping, opt.momentum]
        np.testing.assert_allclose(session.run(values), [0.25, 2.0, 0.9])
        session.run(rate.assign(0.5))
        assert session.run(opt.learning_rate) == 0.5


@pytest.mark.parametrize("initial", ["number", "tensor", "variable"])
def test_an_adapted_damping_starts_at_what_is_given(initial):
    with tf.Graph().as_default(), tf1.Session() as session:
        damping = {
            "number": lambda: 0.1,
            "tensor": lambda: tf.constant(0.1, tf.float64),
            "variable": lambda: tf1.get_variable(
                "given", initializer=np.float64(0.1), use_resource=True
            ),
        }[initial]()
        opt = make_base_optimizer(damping=damping, adapt_damping=True, dtype="float64")
        session.run(tf1.global_variables_initializer())
        assert session.run(opt.damping) == 0.1


def test_a_damping_known_only_to_a_function_cannot_start_an_adapted_one():
    def build():
        given = tf.random.uniform([])
        return make_base_optimizer(damping=given, adapt_damping=True).damping

    with pytest.raises(ValueError, match="initial damping"):
        graph_kinds.Run(graph_kinds.FUNCTION, build)()


def test_two_optimizers_of_one_graph_need_two_names():
    with tf.Graph().as_default():
        make_base_optimizer()
        make_base_optimizer(name="other")
        with pytest.raises(ValueError, match="KFAC"):
            make_base_optimizer()


def test_two_optimizers_of_one_trace_need_two_names():
    def build():
        make_base_optimizer(name="other")
        make_base_optimizer()
        return make_base_optimizer().counter

    with pytest.raises(ValueError, match="'KFAC'"):
        graph_kinds.Run(graph_kinds.FUNCTION, build)()


def test_the_estimator_gets_its_arguments():
    with tf.Graph().as_default():
        opt = make_base_optimizer(
            damping=0.5,
            precon_damping_mult=4.0,
            estimation_mode="curvature_prop",
            compute_cholesky=True,
            cov_batch_fraction=0.5,
        )
        estimator = opt._fisher_est
        assert estimator.damping == 2.0
        assert opt.mat_type == "Fisher"
        assert estimator._compute_cholesky
        assert estimator._cov_batch_fraction == 0.5
        assert opt.layers is estimator.layers


def test_variables_default_to_the_graphs_trainable_ones():
    with tf.Graph().as_default():
        variables = [tf1.get_variable(name, [2]) for name in "ab"]
        tf1.get_variable("c", [2], trainable=False)
        registered = make_base_optimizer().registered_variables
        assert [v.ref() for v in registered] == [v.ref() for v in variables]


def test_a_tuple_of_variables_is_as_good_as_a_list_and_an_empty_one_is_empty():
    with tf.Graph().as_default():
        a, _ = (tf1.get_variable(name, [2]) for name in "ab")
        opt = make_base_optimizer(var_list=(a,))
        assert opt.registered_variables == [a]
        assert make_base_optimizer(var_list=[], name="none").registered_variables == []


def test_variables_of_a_function_default_to_the_registered_ones():
    seen = []

    def build():
        model = optimizer_cases.Model()
        opt = optimizer_cases.make_optimizer(model, learning_rate=0.1)
        seen.append([v.name for v in opt.registered_variables])
        return opt.counter

    graph_kinds.Run(graph_kinds.FUNCTION, build)()
    assert sorted(seen[0]) == ["b1:0", "b2:0", "w1:0", "w2:0"]


def test_the_reference_constant_is_a_view_of_the_setting():
    before = optimizer._INCLUDE_DAMPING_IN_QMODEL_CHANGE
    try:
        optimizer.set_global_constants(include_damping_in_qmodel_change=True)
        assert optimizer._INCLUDE_DAMPING_IN_QMODEL_CHANGE is True
        optimizer.set_global_constants()
        assert optimizer._INCLUDE_DAMPING_IN_QMODEL_CHANGE is True
    finally:
        optimizer._INCLUDE_DAMPING_IN_QMODEL_CHANGE = before
    assert kfac.python.ops.config.settings().include_damping_in_qmodel_change is before


def test_without_a_store_a_function_is_told_what_to_do():
    @tf.function
    def train():
        make_base_optimizer()

    with pytest.raises(RuntimeError, match="VariableStore"):
        train()
    assert state.current_store() is None


def test_integers_are_real_numbers():
    with tf.Graph().as_default():
        opt = kfac.KfacOptimizer(
            learning_rate=1,
            damping=2,
            momentum=0,
            layer_collection=kfac.LayerCollection(),
            var_list=[],
        )
        for value in (opt.learning_rate, opt.damping, opt.momentum):
            assert value.dtype == tf.float32
