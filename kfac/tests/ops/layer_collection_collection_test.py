"""The collection as a whole: finalisation, the audit of uses, factors, the default."""

from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

import kfac
from kfac.python.ops import layer_collection as lc_lib
from kfac.python.ops import state, utils
from kfac.tests import graph_kinds
from kfac.tests.ops.layer_collection_cases import BATCH, data, unchanged, variable

tf1 = tf.compat.v1


@pytest.fixture(autouse=True)
def graph(request):
    """A v1 graph, unless the test runs in a kind of graph of its own."""
    if "kind" in request.fixturenames:
        yield None
        return
    with tf.Graph().as_default() as g:
        yield g


@pytest.fixture
def lc(graph):
    return lc_lib.LayerCollection()


class Model:
    """Two dense layers, the second without a bias, and a squared error."""

    def __init__(self):
        self.w1 = graph_kinds.variable(np.ones([3, 4]), "w1", np.float32)
        self.b1 = graph_kinds.variable(np.ones([4]), "b1", np.float32)
        self.w2 = graph_kinds.variable(np.ones([4, 2]), "w2", np.float32)
        self.x = tf.ones([BATCH, 3])
        self.hidden = tf.matmul(self.x, self.w1) + self.b1
        self.activations = tf.nn.relu(self.hidden)
        self.out = tf.matmul(self.activations, self.w2)
        self.lc = lc_lib.LayerCollection()

    def register(self):
        self.lc.register_fully_connected((self.w1, self.b1), self.x, self.hidden)
        self.lc.register_fully_connected(self.w2, self.activations, self.out)
        targets = tf.zeros([BATCH, 2])
        self.lc.register_squared_error_loss(self.out, targets=targets)
        return self.lc

    @property
    def variables(self):
        return [self.w1, self.b1, self.w2]


# Construction.


def test_a_new_collection_is_empty_and_knows_its_graph(lc, graph):
    assert lc.graph is graph
    assert lc.subgraph is None
    assert len(lc.fisher_blocks) == len(lc.fisher_factors) == 0
    assert lc.get_blocks() == lc.get_factors() == ()
    assert lc.registered_variables == ()
    assert lc.linked_parameters == {}
    assert lc.generic_reasons == {}
    other = tf.Graph()
    assert lc_lib.LayerCollection(graph=other).graph is other
    assert kfac.LayerCollection is lc_lib.LayerCollection


def test_only_an_empty_collection_can_move_to_another_graph(lc, graph):
    other = tf.Graph()
    lc.move_to_graph(other)
    assert lc.graph is other
    lc.move_to_graph(graph)
    lc.register_squared_error_loss(data(2))
    with unchanged(lc), pytest.raises(ValueError, match="before registering"):
        lc.move_to_graph(other)
    assert lc.graph is graph
    layers_only = lc_lib.LayerCollection()
    layers_only.register_generic(variable([2], "p"), BATCH)
    with pytest.raises(ValueError, match="before registering"):
        layers_only.move_to_graph(other)


def test_variable_scopes_of_collections_are_unique():
    with tf1.variable_scope("outer"):
        scopes = [lc_lib.LayerCollection()._var_scope for _ in range(2)]
    scopes.append(lc_lib.LayerCollection(name="mine")._var_scope)
    assert scopes == ["outer/LayerCollection", "outer/LayerCollection_1", "mine"]


# Finalisation and the audit of uses.


def test_finalising_without_a_loss_can_be_done_again(lc):
    w = variable([3, 2], "w")
    x = data(3)
    out = tf.matmul(x, w)
    with unchanged(lc), pytest.raises(ValueError, match="No loss"):
        lc.finalize()
    lc.register_fully_connected(w, x, out)
    lc.register_squared_error_loss(out)
    assert lc.finalize() is None
    assert lc.subgraph.is_member(x)
    with pytest.raises(ValueError, match="only one"):
        lc.finalize()
    assert lc.check_registration([w]) is None


def test_finalising_can_be_done_again_after_any_failure():
    lc = Model().register()
    with (
        mock.patch.object(utils, "SubGraph", side_effect=RuntimeError("broken")),
        unchanged(lc),
        pytest.raises(RuntimeError),
    ):
        lc.finalize()
    lc.finalize()


def test_the_subgraph_has_the_losses_inputs_as_roots_not_the_targets():
    model = Model()
    lc = model.register()
    targets = tf.identity(model.w1)
    mean, variance = model.out + 1.0, model.out**2 + 1.0
    lc.register_normal_mean_variance_predictive_distribution(
        mean, variance, targets=targets
    )
    lc.finalize()
    assert lc.subgraph.is_member(variance)
    assert lc.subgraph.is_member(mean)
    assert not lc.subgraph.is_member(targets)


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_a_right_registration_passes_in_every_kind_of_graph(kind):
    def build():
        model = Model()
        lc = model.register()
        lc.finalize()
        lc.check_registration(model.variables)
        lc.check_registration(tuple(model.variables))
        with pytest.raises(ValueError, match="w2"):
            lc.check_registration(model.variables[:2])
        with pytest.raises(ValueError, match="is not registered"):
            lc.check_registration([*model.variables, graph_kinds.variable([1], "v")])
        assert len(lc._vars_to_uses) == 3
        return lc.total_loss()

    assert graph_kinds.Run(kind, build)() > 0


def test_all_problems_are_named_at_once_and_again():
    model = Model()
    lc = model.register()
    lc.register_generic(variable([2], "unlisted"), BATCH)
    lc._add_uses(model.w2, 1)
    lc.finalize()
    unknown = variable([2], "unknown")
    messages = []
    for _ in range(2):
        with unchanged(lc), pytest.raises(ValueError, match="does not fit") as error:
            lc.check_registration([model.w1, model.b1, model.w2, unknown])
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "'unknown' is not registered" in messages[0]
    assert "'w2'" in messages[0] and "2 registered, 1 in the graph" in messages[0]
    assert "['unlisted']" in messages[0]
    assert "'w1'" not in messages[0]


def test_sets_are_compared_not_counts():
    model = Model()
    lc = model.register()
    lc.finalize()
    stranger = variable([2], "stranger")
    with pytest.raises(ValueError, match="stranger.*is not registered") as error:
        lc.check_registration([model.w1, model.b1, stranger])
    assert "['w2']" in str(error.value)


def test_generic_parameters_may_have_any_number_of_uses():
    model = Model()
    model.lc.register_generic(model.w1, BATCH)
    model.lc.register_generic((model.b1, model.w2), BATCH, approx="full")
    model.lc.register_squared_error_loss(model.out * tf.reduce_sum(model.w1))
    model.lc.finalize()
    model.lc.check_registration(model.variables)


def test_the_audit_counts_with_the_subgraphs_own_method():
    model = Model()
    lc = model.register()
    lc.finalize()
    with (
        mock.patch.object(utils.SubGraph, "variable_uses", return_value=5),
        pytest.raises(ValueError, match="1 registered, 5 in the graph"),
    ):
        lc.check_registration(model.variables)


# Factors.


class Factor:
    def __init__(self, *args):
        self.args = args
        self.name = None
        self.scope = tf1.get_variable_scope().name

    def set_name(self, name):
        self.name = name


class AnotherFactor(Factor):
    pass


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_factors_are_shared_by_class_and_arguments(kind):
    def build():
        lc = lc_lib.LayerCollection()
        x, y = tf.zeros([2]), tf.zeros([2])
        first = lc.make_or_get_factor(Factor, (((x, y),), 3))
        assert lc.make_or_get_factor(Factor, (((x, y),), 3)) is first
        others = [
            lc.make_or_get_factor(Factor, (((y, x),), 3)),
            lc.make_or_get_factor(Factor, (((x, y),), 4)),
            lc.make_or_get_factor(Factor, (((x, y),),)),
            lc.make_or_get_factor(AnotherFactor, (((x, y),), 3)),
            lc.make_or_get_factor(Factor, (utils.PartitionedTensor((x, y)), 3)),
        ]
        same = lc.make_or_get_factor(Factor, (utils.PartitionedTensor((x, y)), 3))
        assert same is others[-1]
        assert lc.get_factors() == (first, *others)
        assert lc.fisher_factors[Factor, (((x, y),), 3)] is first
        assert first.args[1] == 3
        assert first.scope == lc._var_scope
        with pytest.raises(TypeError, match="cannot be hashed"):
            lc.make_or_get_factor(Factor, ([x], 3))
        assert len(lc.get_factors()) == 6
        return tf.constant(0)

    graph_kinds.Run(kind, build)()


def test_factors_get_the_first_stable_name_that_is_free(lc):
    first = lc.make_or_get_factor(Factor, (1,), name="dense/kernel/input")
    assert lc.make_or_get_factor(Factor, (1,), name="other/input") is first
    second = lc.make_or_get_factor(Factor, (2,), name="dense/kernel/input")
    third = lc.make_or_get_factor(Factor, (3,), name="dense/kernel/input")
    unnamed = lc.make_or_get_factor(Factor, (4,))
    names = [factor.name for factor in (first, second, third, unnamed)]
    assert names == [
        "dense/kernel/input",
        "dense/kernel/input_1",
        "dense/kernel/input_2",
        None,
    ]


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_layers_with_the_same_input_share_a_factor_of_a_stable_name(kind):
    def build():
        x = tf.ones([BATCH, 3])
        v = graph_kinds.variable(np.ones([3, 2]), "v", np.float32)
        w = graph_kinds.variable(np.ones([3, 4]), "w", np.float32)
        outputs = [tf.matmul(x, v), tf.matmul(x, w)]
        lc = lc_lib.LayerCollection()
        lc.register_fully_connected(v, x, outputs[0])
        lc.register_fully_connected(w, x, outputs[1])
        for block, output in zip(lc.get_blocks(), outputs, strict=True):
            block.instantiate_factors(((tf.ones_like(output),),), 0.1)
        first, second = lc.get_blocks()
        assert first.input_factor is second.input_factor
        names = [factor.name for factor in lc.get_factors()]
        paths = [state.parameter_path(variable_) for variable_ in (v, w)]
        assert names == [f"{paths[0]}/input", *(f"{path}/output" for path in paths)]
        for factor in lc.get_factors():
            factor.instantiate_cov_variables()
        updates = [f.make_covariance_update_op(1.0, 1.0) for f in lc.get_factors()]
        with tf.control_dependencies(updates):
            return tf.identity(first.input_factor.cov), second.output_factor.cov

    run = graph_kinds.Run(kind, build)
    covariance, _ = run()
    np.testing.assert_allclose(covariance, np.ones([3, 3]))


# The default collection.


@pytest.fixture
def no_default():
    lc_lib.set_default_layer_collection(None)
    yield
    lc_lib.set_default_layer_collection(None)


def test_the_default_is_set_once_and_cleared(lc, no_default):
    with pytest.raises(ValueError, match="No default"):
        lc_lib.get_default_layer_collection()
    assert lc_lib.set_default_layer_collection(lc) is None
    assert lc_lib.get_default_layer_collection() is lc
    with pytest.raises(ValueError, match="already set"):
        lc_lib.set_default_layer_collection(lc)
    lc_lib.set_default_layer_collection(None)
    with pytest.raises(ValueError, match="No default"):
        lc_lib.get_default_layer_collection()


def test_as_default_nests_yields_the_collection_and_survives_exceptions(lc, no_default):
    other = lc_lib.LayerCollection()
    with lc.as_default() as outer:
        assert outer is lc
        with pytest.raises(RuntimeError), other.as_default() as inner:
            assert lc_lib.get_default_layer_collection() is inner is other
            raise RuntimeError
        assert lc_lib.get_default_layer_collection() is lc
        with pytest.raises(ValueError, match="already set"):
            lc_lib.set_default_layer_collection(other)
        lc_lib.set_default_layer_collection(None)
    with pytest.raises(ValueError, match="No default"):
        lc_lib.get_default_layer_collection()
    lc_lib.set_default_layer_collection(other)
    with lc.as_default():
        pass
    assert lc_lib.get_default_layer_collection() is other


# Automatic registration.


def test_auto_registration_needs_a_loss(lc):
    with unchanged(lc), pytest.raises(ValueError, match="No loss"):
        lc.auto_register_layers()


def test_auto_registration_covers_the_trainable_variables():
    model = Model()
    frozen = graph_kinds.variable([1.0], "frozen", trainable=False)
    model.lc.register_squared_error_loss(model.out)
    assert model.lc.auto_register_layers(batch_size=BATCH) is None
    assert frozen not in set(model.lc.registered_variables)
    assert set(model.lc.registered_variables) == set(model.variables)
    model.lc.finalize()
    model.lc.check_registration(model.variables)


@pytest.mark.parametrize("kind", [graph_kinds.FUNCTION])
def test_auto_registration_in_a_function_needs_a_list_of_variables(kind):
    def build():
        model = Model()
        model.lc.register_squared_error_loss(model.out)
        with pytest.raises(ValueError, match="var_list"):
            model.lc.auto_register_layers(batch_size=BATCH)
        return tf.constant(0)

    graph_kinds.Run(kind, build)()
