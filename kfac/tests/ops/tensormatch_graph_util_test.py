"""What a node is, and who its neighbours are."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops.tensormatch import tensorflow_graph_util as gu

tf1 = tf.compat.v1


@pytest.fixture(name="graph", autouse=True)
def graph_fixture():
    with tf.Graph().as_default() as graph:
        yield graph


def placeholder():
    return tf1.placeholder(tf.float32, [2, 2])


def variable(use_resource, name="v"):
    return tf1.get_variable(name, [2, 2], use_resource=use_resource)


def test_operations_are_told_from_tensors():
    x = placeholder()
    assert gu.is_op(x.op) and not gu.is_op(x)
    assert gu.is_tensor(x) and not gu.is_tensor(x.op)


@pytest.mark.parametrize("value", [1, "s", None, np.ones(2), [1]])
def test_python_values_are_no_nodes(value):
    predicates = [gu.is_op, gu.is_tensor, gu.is_var, gu.is_const, gu.is_identity]
    assert not any(predicate(value) for predicate in predicates)
    assert gu.expand_inputs(value) is None
    assert gu.expand_outputs(value) is None


@pytest.mark.parametrize("use_resource", [True, False])
def test_variables_are_tensors_variables_and_leaves(use_resource):
    v = variable(use_resource)
    root = v.handle if use_resource else v.op.outputs[0]
    for node in (v, root):
        assert gu.is_tensor(node) and gu.is_var(node) and gu.is_leaf(node)
        assert not gu.is_const(node) and not gu.is_placeholder(node)


def test_eager_variables_are_variables():
    with tf.init_scope():
        v = tf.Variable([1.0])
    assert gu.is_var(v) and gu.is_tensor(v)


def test_constants_and_placeholders_are_leaves_but_no_variables():
    constant, x = tf.constant(1.0), placeholder()
    assert gu.is_const(constant) and gu.is_leaf(constant) and not gu.is_var(constant)
    assert gu.is_placeholder(x) and gu.is_leaf(x) and not gu.is_var(x)


def test_a_captured_variable_is_a_variable():
    with tf.init_scope():
        v = tf.Variable(np.ones((2, 2), np.float32))
    function = tf.function(lambda: v * 2.0).get_concrete_function()
    (handle,) = function.graph.inputs
    assert gu.is_var(handle)
    product = next(op for op in function.graph.get_operations() if op.type == "Mul")
    assert gu.expand_inputs(product)[0] is handle


def test_identity_operations():
    x = placeholder()
    assert gu.is_identity(tf.identity(x).op)
    assert gu.is_identity(tf.identity_n([x, x])[0].op)
    assert gu.is_identity(variable(True).read_value().op.inputs[0].op)
    assert not gu.is_identity(tf.identity(x)), "a tensor is not an operation"
    assert not gu.is_identity(tf.tanh(x).op)


def test_op_type_is_asks_for_the_exact_type():
    x = placeholder()
    assert gu.op_type_is("Tanh")(tf.tanh(x).op)
    assert not gu.op_type_is("Tan")(tf.tanh(x).op)
    assert not gu.op_type_is("Tanh")(tf.tanh(x))


@pytest.mark.parametrize("use_resource", [True, False])
def test_identities_are_followed_to_the_variable(use_resource):
    v = variable(use_resource)
    root = v.handle if use_resource else v.op.outputs[0]
    read = tf.identity(tf.identity(v.read_value()))
    assert gu.reduce_identity_ops(read) is root
    assert gu.expand_inputs(tf.matmul(placeholder(), v).op)[1] is root


def test_other_nodes_are_not_reduced():
    y = tf.tanh(placeholder())
    assert gu.reduce_identity_ops(y) is y
    assert gu.reduce_identity_ops(y.op) is y.op
    assert gu.reduce_identity_ops(3) == 3


def test_identity_n_of_one_tensor_is_followed_and_of_different_ones_is_not():
    x, y = tf.tanh(placeholder()), tf.exp(placeholder())
    assert gu.reduce_identity_ops(tf.identity_n([x])[0]) is x
    assert gu.reduce_identity_ops(tf.identity_n([x, x])[1]) is x
    assert gu.reduce_identity_ops(tf.identity_n([x, x, y])[2]) is y
    stop = tf.identity_n([x, y])[0]
    assert gu.reduce_identity_ops(stop) is stop


def test_custom_gradients_do_not_stop_the_expansion_of_their_consumers():
    y = tf.nn.silu(placeholder())
    assert gu.expand_inputs(tf.exp(y).op)


def test_inputs_of_an_operation_are_tensors_and_of_a_tensor_its_producer():
    x = tf.tanh(placeholder())
    y = tf.add(tf.identity(x), x)
    assert gu.expand_inputs(y.op) == [x, x]
    assert gu.expand_inputs(y) == [y.op]
    assert gu.expand_inputs(tf.identity(y)) == [y.op]


def test_leaves_have_no_inputs():
    for leaf in (placeholder(), tf.constant(1.0), variable(True)):
        assert gu.expand_inputs(leaf) is None


def test_a_list_has_the_common_producer_of_its_tensors():
    parts = tf.unstack(tf.tanh(placeholder()), num=2)
    assert gu.expand_inputs([tf.identity(parts[0]), parts[1]]) == [parts[0].op]
    with pytest.raises(ValueError, match="several operations"):
        gu.expand_inputs([parts[0], tf.exp(parts[1])])


def test_outputs_of_operations_and_tensors():
    x = placeholder()
    y, z = tf.tanh(x), tf.exp(x)
    parts = tf.unstack(y, num=2)
    assert gu.expand_outputs(parts[0].op) == parts
    assert gu.expand_outputs(x) == [y.op, z.op]


@pytest.mark.parametrize("use_resource", [True, False])
def test_outputs_of_a_variable_are_the_consumers_of_its_value(use_resource, graph):
    v = variable(use_resource)
    product = tf.matmul(placeholder(), v)
    total = tf.reduce_sum(v)
    v.assign_add(tf.zeros(v.shape))
    before = len(graph.get_operations())
    assert gu.expand_outputs(v) == [product.op, total.op]
    assert len(graph.get_operations()) == before, "asking must not add operations"


def test_operation_patterns_carry_the_name_of_the_type():
    factory = gu.make_op_pattern("Tanh")
    assert factory.__name__ == "Tanh"
    tag, name, predicate = factory("t")
    assert (tag, name) == ("?", "t")
    assert predicate(tf.tanh(placeholder()).op)


def test_import_ops_does_not_overwrite():
    names = {"Const": 1}
    gu.import_ops_no_clobber(names, ["Const", "Tanh"])
    assert names["Const"] == 1
    assert names["Tanh"].__name__ == "Tanh"
