"""Construction, finalisation and their errors."""

import inspect

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import estimator, layer_collection, state, utils
from kfac.tests import estimator_cases as cases
from kfac.tests import graph_kinds

tf1 = tf.compat.v1


@pytest.fixture
def dense():
    """One registered dense layer, and a free variable, in a v1 graph."""
    with tf.Graph().as_default():
        x = tf1.placeholder(tf.float64, [4, 3])
        w = tf1.get_variable("w", initializer=np.eye(3), use_resource=True)
        free = tf1.get_variable("free", initializer=np.eye(3), use_resource=True)
        out = tf.matmul(x, w)
        collection = layer_collection.LayerCollection()
        collection.register_fully_connected(w, x, out)
        collection.register_softmax_cross_entropy_loss(out)
        yield cases.Model(cases.DENSE_SOFTMAX, collection, [w], x, [out, free])


def test_strategies_select_the_class(dense):
    for strategy in (None, "round_robin"):
        made = dense.estimator(placement_strategy=strategy)
        assert isinstance(made, estimator.FisherEstimatorRoundRobin)
    with pytest.raises(ValueError, match="everywhere"):
        dense.estimator(placement_strategy="everywhere")
    with pytest.raises(ValueError, match="replicas"):
        dense.estimator(placement_strategy="replica_round_robin")


def test_the_base_class_is_abstract(dense):
    with pytest.raises(TypeError):
        estimator.FisherEstimator(
            variables=[], cov_ema_decay=0.9, damping=0.1, layer_collection=None
        )


def test_concrete_classes_take_keywords_only(dense):
    with pytest.raises(TypeError, match="keyword"):
        estimator.FisherEstimatorRoundRobin([], 0.9, 0.1, dense.collection)


def test_the_signature_is_that_of_the_reference_with_new_options_last():
    expected = (
        "variables cov_ema_decay damping layer_collection exps estimation_mode "
        "colocate_gradients_with_ops name compute_cholesky compute_cholesky_inverse "
        "compute_params_stats batch_size cov_batch_fraction strict"
    )
    names = inspect.signature(estimator.FisherEstimator).parameters
    assert list(names) == expected.split()


@pytest.mark.parametrize(
    "options",
    [
        {"compute_params_stats": True},
        {"cov_batch_fraction": 0},
        {"cov_batch_fraction": 1.5},
        {"cov_batch_fraction": "half"},
        {"inv_assignment": "biggest"},
    ],
    ids=str,
)
def test_bad_options_are_refused_by_the_constructor(dense, options):
    with pytest.raises(ValueError):
        dense.estimator(**options)


def test_the_constructor_looks_at_no_registration_and_builds_no_op(dense):
    before = len(tf1.get_default_graph().get_operations())
    made = dense.estimator(variables=(), estimation_mode="nonsense", exps=[-1])
    assert len(tf1.get_default_graph().get_operations()) == before
    assert made.variables == [] and made.name == "FisherEstimator"
    assert made.damping == 0.3 and made.layers is dense.collection
    assert made.blocks == dense.collection.get_blocks() and made.factors == ()


@pytest.mark.parametrize("listed", ["none", "unregistered too"])
def test_the_variables_must_be_those_registered(dense, listed):
    variables = [] if listed == "none" else [*dense.variables, dense.outputs[1]]
    made = dense.estimator(variables=variables)
    with pytest.raises(ValueError, match="w|free"):
        made.make_vars_and_create_op_thunks()


def test_the_number_of_uses_is_looked_up_on_the_sub_graph(dense, monkeypatch):
    monkeypatch.setattr(utils.SubGraph, "variable_uses", lambda self, var: 42)
    with pytest.raises(ValueError, match="42"):
        dense.estimator().make_vars_and_create_op_thunks()


def test_a_collection_without_losses_is_refused():
    with tf.Graph().as_default():
        collection = layer_collection.LayerCollection()
        model = cases.Model(cases.DENSE_SOFTMAX, collection, [], None, [])
        with pytest.raises(ValueError, match="[Ll]oss"):
            model.estimator().create_ops_and_vars_thunks()


def test_a_collection_serves_one_estimator(dense):
    dense.estimator().create_ops_and_vars_thunks()
    with pytest.raises(ValueError, match="finalised"):
        dense.estimator().create_ops_and_vars_thunks()


def test_a_failed_finalisation_can_be_retried(dense):
    w, free = dense.variables[0], dense.outputs[1]
    made = dense.estimator(variables=[w, free], estimation_mode="exact")
    for _ in range(2):
        with pytest.raises(ValueError, match="free"):
            made.create_ops_and_vars_thunks()
    made = dense.estimator(variables=[w])
    assert len(made.create_ops_and_vars_thunks()[0]) == 2


def test_a_finalisation_that_failed_in_a_block_is_not_taken_for_a_complete_one(
    dense, monkeypatch
):
    def fail(*args):
        raise RuntimeError("no factors today")

    monkeypatch.setattr(dense.collection.get_blocks()[0], "instantiate_factors", fail)
    made = dense.estimator()
    with pytest.raises(RuntimeError, match="today"):
        made.create_ops_and_vars_thunks()
    with pytest.raises(ValueError, match="finalised"):
        made.create_ops_and_vars_thunks()


def test_tensors_the_losses_do_not_depend_on_are_named(dense):
    x, free = dense.x, dense.outputs[1]
    beside = tf.matmul(x, free, name="beside")
    dense.collection.register_generic(free, 4)
    made = dense.estimator(variables=[dense.variables[0], free])
    with pytest.raises(ValueError, match="free"):
        made.create_ops_and_vars_thunks()
    assert beside.name == "beside:0"


def test_a_path_that_carries_no_gradient_is_reported_with_the_update():
    with tf.Graph().as_default():
        x = tf1.placeholder(tf.float64, [4, 3])
        w = tf1.get_variable("w", initializer=np.eye(3), use_resource=True)
        v = tf1.get_variable("v", initializer=np.eye(3), use_resource=True)
        hidden = tf.matmul(x, w, name="hidden")
        out = tf.matmul(tf.stop_gradient(hidden), v)
        collection = layer_collection.LayerCollection()
        collection.register_fully_connected(w, x, hidden)
        collection.register_generic(v, 4)
        collection.register_squared_error_loss(out)
        model = cases.Model(cases.DENSE_SOFTMAX, collection, [w, v], x, [out])
        updates, _ = model.estimator().make_vars_and_create_op_thunks()
        updates[0]()  # Of the layer's input: needs no backward pass.
        with pytest.raises(ValueError, match="hidden"):
            updates[1]()


def test_strict_refuses_generic_parameters():
    with tf.Graph().as_default():
        model = cases.build(cases.DENSE_SOFTMAX)
        assert len(model.estimator().explain(print_fn=None)) == 1
        with pytest.raises(ValueError, match="p0"):
            model.estimator(strict=True).create_ops_and_vars_thunks()


def test_finalisation_builds_no_backward_pass_and_no_sample(dense):
    graph = tf1.get_default_graph()
    before = len(graph.get_operations())
    made = dense.estimator(estimation_mode="gradients")
    made.create_ops_and_vars_thunks()
    added = graph.get_operations()[before:]
    assert not [op.name for op in added if "Grad" in op.type or "Multinom" in op.type]
    assert not any("MatMul" in op.type for op in added)


def test_building_thunks_again_builds_nothing(dense):
    made = dense.estimator()
    made.create_ops_and_vars_thunks()
    graph = tf1.get_default_graph()
    before = len(graph.get_operations())
    thunks = made.create_ops_and_vars_thunks()
    assert [len(of_kind) for of_kind in thunks] == [2, 2, 2, 2]
    assert len(graph.get_operations()) == before
    assert not tf1.global_variables("FisherEstimator")


def test_params_stats_need_finalisation_and_the_option(dense):
    made = dense.estimator(compute_params_stats=True, batch_size=4)
    with pytest.raises(AttributeError, match="make_vars_and_create_op_thunks"):
        _ = made.params_stats
    made.create_ops_and_vars_thunks()
    assert [t.shape.as_list() for t in made.params_stats] == [[3, 3]]


def test_a_second_trace_finds_the_state_of_the_first():
    def build(batch):
        model = cases.build(cases.DENSE_SOFTMAX.first(batch))
        made = model.estimator(estimation_mode="empirical", cov_ema_decay=1.0)
        updates, inverses = made.make_vars_and_create_op_thunks()
        with tf.control_dependencies([cases.update_all(updates)]):
            inverted = cases.update_all(inverses)
        return cases.after(inverted, lambda: made.factors[0].cov)

    store = state.VariableStore()
    traces = []

    @tf.function
    @tf.autograph.experimental.do_not_convert
    def step(batch):
        traces.append(batch)
        with store.as_default():
            return build(batch)

    for batch in (1, 1, 2):
        mean = step(batch)
        if batch == 1:
            first = mean.numpy()
    assert [batch for batch in dict.fromkeys(traces)] == [1, 2]
    names = [name for name in store.named_variables() if "cov/var" in name]
    assert names == ["FisherEstimator/p0/full/cov/var"]
    case = cases.DENSE_SOFTMAX.first(2)
    total = case.example_gradients(square_root=True).sum(axis=0)
    expected = (2 * first + np.outer(total, total) / 2) / 3
    np.testing.assert_allclose(mean, expected, rtol=1e-10)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_models_of_unknown_batch_size_are_served(kind):
    case = cases.DENSE_SOFTMAX

    def build():
        model = cases.build(case, dynamic=True)
        made = model.estimator(estimation_mode="empirical")
        updates, _ = made.make_vars_and_create_op_thunks()
        return cases.after(cases.update_all(updates), lambda: made.factors[0].cov)

    total = case.example_gradients(square_root=True).sum(axis=0)
    expected = np.outer(total, total) / len(case.x)
    np.testing.assert_allclose(graph_kinds.Run(kind, build)(), expected, rtol=1e-10)
