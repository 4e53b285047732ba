import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import utils
from kfac.python.ops.utils import subgraph
from kfac.tests import graph_kinds

tf1 = tf.compat.v1


def _count(kind, build):
    """What `build` returns (Python values), from the graph of that kind."""
    found = []

    def wrapped():
        found.append(build())
        return tf.constant(0)

    graph_kinds.Run(kind, wrapped)()
    return found[0]


def _variable(name="w", shape=(2, 2)):
    return graph_kinds.variable(np.ones(shape), name)


def _layer(w):
    return tf.matmul(tf.ones([3, 2], tf.float64), w)


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_members_are_the_outputs_and_their_ancestors(kind):
    def build():
        w = _variable()
        x = tf.ones([3, 2], tf.float64)
        product = tf.matmul(x, w)
        output = tf.reduce_sum(product)
        descendant, stranger = output + 1.0, tf.matmul(x, x, transpose_b=True)
        graph = utils.SubGraph([output])
        nodes = [x, product, product.op, output, descendant, stranger, stranger.op]
        kept = graph.filter_list(list(reversed(nodes)))
        return (
            [graph.is_member(node) for node in nodes],
            [node is other for node, other in zip(kept, nodes[3::-1], strict=True)],
        )

    assert _count(kind, build) == ([True] * 4 + [False] * 3, [True] * 4)


def test_sibling_outputs_and_control_inputs_are_not_followed():
    with tf.Graph().as_default():
        first, second = tf.split(tf.ones([4]), 2)
        control = tf.ones([3])
        with tf.control_dependencies([control]):
            output = tf.identity(first)
        graph = utils.SubGraph([output])
        assert graph.is_member(first) and graph.is_member(first.op)
        assert not graph.is_member(second)
        assert not graph.is_member(control)


def test_outputs_of_several_losses_are_united():
    with tf.Graph().as_default():
        a, b, c = tf.ones([2]), tf.ones([2]), tf.ones([2])
        graph = utils.SubGraph((a * 2.0, b * 2.0))
        assert graph.is_member(a) and graph.is_member(b) and not graph.is_member(c)


def test_a_subgraph_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        utils.SubGraph([])


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_uses_are_the_distinct_member_ops_that_consume_the_value(kind):
    def build():
        once, twice, squared, outside, unused = (_variable(n) for n in "abcde")
        first = _layer(once) + _layer(twice)
        second = _layer(twice) + tf.matmul(squared, squared)[:1]
        _layer(outside)
        graph = utils.SubGraph([first, second])
        return [graph.variable_uses(v) for v in (once, twice, squared, outside, unused)]

    # `a @ a` reads the variable for each operand: one op all the same.
    assert _count(kind, build) == [1, 2, 1, 0, 0]


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_reads_and_casts_are_looked_through(kind):
    def build():
        w = _variable()
        half = tf.cast(tf.identity(w), tf.float16)
        y = tf.matmul(half, tf.ones([2, 3], tf.float16))
        return utils.SubGraph([y]).variable_uses(w)

    assert _count(kind, build) == 1


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_a_gather_is_one_use_whoever_takes_its_output(kind):
    def build():
        table = _variable()
        rows = tf.nn.embedding_lookup(table, [1, 0, 1])
        return utils.SubGraph([rows * 2.0, rows + 1.0]).variable_uses(table)

    assert _count(kind, build) == 1


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_a_branch_looks_into_the_graph_around_it(kind):
    counts = []

    def build():
        w, other = _variable(), _variable("other")
        outside = _layer(w)

        def branch():
            graph = utils.SubGraph([tf.reduce_sum(outside + _layer(w))])
            counts.append((graph.variable_uses(w), graph.variable_uses(other)))
            counts.append((graph.is_member(outside), graph.is_member(other)))
            return tf.constant(0)

        return tf.cond(tf.reduce_all(outside > 0), branch, lambda: tf.constant(1))

    graph_kinds.Run(kind, build)()
    assert counts[0] == (2, 0)
    assert counts[1] == (True, False)


def test_reference_variables_are_followed_from_their_value():
    with tf.Graph().as_default():
        w = tf1.get_variable("w", [2, 2], use_resource=False)
        y = tf.matmul(w, w) + tf.matmul(w, tf.ones([2, 2]))
        assert utils.is_reference_variable(w)
        assert utils.SubGraph([y]).variable_uses(w) == 2


def test_only_reference_variables_and_what_says_so_are_reference_variables():
    class ActsAsOne:
        _should_act_as_ref_variable = True

    with tf.Graph().as_default():
        assert not utils.is_reference_variable(
            tf1.get_variable("w", [2, 2], use_resource=True)
        )
        assert not utils.is_reference_variable(tf.ones([2]))
    assert not utils.is_reference_variable(3)
    assert utils.is_reference_variable(ActsAsOne())


def test_only_variables_have_uses():
    with tf.Graph().as_default():
        x = tf.ones([2])
        graph = utils.SubGraph([x])
        for thing in (x, "w", 3):
            with pytest.raises(ValueError, match="variable is expected"):
                graph.variable_uses(thing)


def test_a_wrapped_variable_is_unwrapped():
    class Wrapper:  # As Keras 3 does.
        def __init__(self, value):
            self.value = value

    with tf.Graph().as_default():
        w = tf1.get_variable("w", [2, 2], use_resource=True)
        assert utils.SubGraph([w + 1.0]).variable_uses(Wrapper(w)) == 1
        assert subgraph.unwrap_variable(w) is w


def test_the_use_count_can_be_replaced_on_the_class(monkeypatch):
    monkeypatch.setattr(utils.SubGraph, "variable_uses", lambda self, var: 7)
    with tf.Graph().as_default():
        assert utils.SubGraph([tf.ones([2])]).variable_uses(None) == 7
