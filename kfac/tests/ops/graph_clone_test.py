"""Copies of part of a graph."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import graph_clone, utils
from kfac.tests import graph_kinds

tf1 = tf.compat.v1

X = np.random.RandomState(0).randn(6, 3)
W = np.random.RandomState(1).randn(3, 4)
V = np.random.RandomState(2).randn(4, 2)


def first_rows(count):
    """Replaces sources with an unknown number of rows by their first rows."""

    def substitution(source):
        if source.shape.as_list()[:1] == [None]:
            return lambda: source[:count]
        return None

    return substitution


def batch():
    return tf1.placeholder_with_default(X, [None, 3])


def in_branch(build):
    """`build()`'s tensors, computed in a taken branch of a conditional."""
    yes = tf1.placeholder_with_default(True, [])
    shapes = []

    def branch():
        values = [tf.identity(t) for t in build()]
        shapes.extend(t.shape for t in values)
        return values

    def other():
        return [tf.zeros([d or 1 for d in s.as_list()], tf.float64) for s in shapes]

    return tf.cond(yes, branch, other)


def numpy_silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
def test_copy_is_the_computation_on_the_replacement_also_in_a_branch(kind):
    def build():
        x = batch()
        w = graph_kinds.variable(W, "w")
        rows = tf.shape(x)[0]
        y = tf.reshape(tf.matmul(x, w), [rows, 2, 2])
        y = tf.reduce_sum(y * tf.constant([1.0, 2.0], tf.float64), axis=2)
        clone = graph_clone.GraphClone(y.graph, first_rows(2))
        return [clone.tensor(y), *in_branch(lambda: [clone.tensor(y)])]

    expected = (X[:2] @ W).reshape(2, 2, 2) @ [1.0, 2.0]
    for actual in graph_kinds.Run(kind, build)():
        np.testing.assert_allclose(actual, expected)


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_gradients_of_copies_follow_custom_gradients_and_reach_weights(kind):
    def build():
        x = batch()
        w = graph_kinds.variable(W, "w")
        h = tf.nn.silu(tf.matmul(x, w))  # Has a gradient closing over its tensors.
        y = tf.matmul(h, tf.constant(V))
        clone = graph_clone.GraphClone(y.graph, first_rows(2))

        def gradients():
            top = tf.reduce_sum(clone.tensor(y) ** 2)
            return utils.gradients(top, [clone.tensor(h), w])

        return [*gradients(), *in_branch(gradients)]

    z = X[:2] @ W
    sigmoid = 1 / (1 + np.exp(-z))
    of_h = 2 * numpy_silu(z) @ V @ V.T
    of_w = X[:2].T @ (of_h * (sigmoid + z * sigmoid * (1 - sigmoid)))
    actual = graph_kinds.Run(kind, build)()
    for i, expected in enumerate([of_h, of_w] * 2):
        np.testing.assert_allclose(actual[i], expected, rtol=1e-10)


def test_what_does_not_depend_on_a_replaced_source_is_shared():
    with tf.Graph().as_default() as graph:
        x = tf1.placeholder(tf.float64, [None, 3])
        w = tf1.get_variable("w", initializer=W, use_resource=True)
        normalised = w / tf.norm(w)
        y = tf.matmul(x, normalised)
        clone = graph_clone.GraphClone(graph, first_rows(2))
        before = [op.type for op in graph.get_operations()]
        copy = clone.tensor(y)
        added = [op.type for op in graph.get_operations()][len(before) :]
        assert clone.tensor(normalised) is normalised
        assert copy is not y and clone.tensor(y) is copy
        assert added.count("MatMul") == 1
        assert not {"ReadVariableOp", "VarHandleOp", "RealDiv", "Div"} & set(added)


def test_a_random_op_shaped_by_the_batch_is_drawn_for_the_replacement():
    def build():
        x = batch()
        noise = x + tf.random.uniform(tf.shape(x), 1.0, 2.0, dtype=tf.float64)
        return graph_clone.GraphClone(x.graph, first_rows(2)).tensor(noise)

    noise = graph_kinds.Run(graph_kinds.FUNCTION, build)() - X[:2]
    assert np.all((noise >= 1) & (noise <= 2)) and len(np.unique(noise)) == noise.size


@pytest.mark.parametrize("kind", [graph_kinds.V1_ON, graph_kinds.FUNCTION])
def test_loops_conditionals_and_function_calls_are_copied(kind):
    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float64)])
    def squared(x):
        return x**2

    def build():
        x = batch()
        y = squared(x)
        y = tf.cond(tf.reduce_sum(y) > 0, lambda: y + 1, lambda: y)
        _, y = tf.while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, 2 * t), (0, y))
        clone = graph_clone.GraphClone(y.graph, first_rows(2))
        copy = clone.tensor(y)
        copy.set_shape([None, 3])
        return copy, tf.gradients(copy, clone.tensor(x))[0]

    value, gradient = graph_kinds.Run(kind, build)()
    np.testing.assert_allclose(value, 8 * (X[:2] ** 2 + 1))
    np.testing.assert_allclose(gradient, 16 * X[:2])


def test_v1_control_flow_is_refused():
    with graph_kinds.v2_behavior_off(), tf.Graph().as_default() as graph:
        x = tf1.placeholder(tf.float64, [None, 3])
        y = tf1.cond(tf.reduce_sum(x) > 0, lambda: 2 * x, lambda: x)
        with pytest.raises(ValueError, match="enable_control_flow_v2"):
            graph_clone.GraphClone(graph, first_rows(2)).tensor(y)


def test_a_function_traced_for_the_static_shape_is_refused():
    with tf.Graph().as_default() as graph:
        x = tf1.placeholder(tf.float64, [6, 3])
        y = tf.function(lambda t: t**2)(x)
        clone = graph_clone.GraphClone(graph, lambda source: lambda: source[:2])
        with pytest.raises(ValueError, match="traced for"):
            clone.tensor(y)


def test_a_constant_batch_size_is_refused():
    with tf.Graph().as_default() as graph:
        x = tf1.placeholder(tf.float64, [6, 3])
        y = tf.reshape(x, [6, 3, 1])
        clone = graph_clone.GraphClone(graph, lambda source: lambda: source[:2])
        with pytest.raises(ValueError):
            clone.tensor(y)
