"""Layers inside control flow and nested functions are named, not guessed."""

import pytest
import tensorflow as tf

from kfac.tests import graph_kinds
from kfac.tests.ops.tensormatch_cases import (
    BATCH,
    GENERIC,
    assert_generic,
    blocks,
    data,
    reason,
    scan,
    variable,
)

tf1 = tf.compat.v1


@pytest.mark.parametrize("use_resource", [True, False])
def test_v1_control_flow(use_resource):
    with graph_kinds.v2_behavior_off(), tf.Graph().as_default():
        x = data(None, 3)
        w, v = (tf1.get_variable(n, [3, 3], use_resource=use_resource) for n in "wv")
        _, y = tf1.while_loop(
            lambda i, _: i < 2, lambda i, h: (i + 1, tf.matmul(h, w)), (0, x)
        )
        z = tf1.cond(tf.reduce_sum(x) > 0, lambda: tf.matmul(y, v), lambda: y)
        collection = scan(z, [w, v], BATCH)
        assert blocks(collection) == {"w": GENERIC, "v": GENERIC}
        assert "loop" in reason(collection, w)
        assert "conditional" in reason(collection, v)


@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (
            lambda x, w: tf.while_loop(
                lambda i, _: i < 2, lambda i, h: (i + 1, tf.matmul(h, w)), (0, x)
            )[1],
            "unroll=True",
        ),
        (lambda x, w: tf.function(tf.matmul)(x, w), "nested function call"),
        (
            lambda x, w: tf.cond(
                tf.reduce_sum(x) > 0, lambda: tf.matmul(x, w), lambda: x
            ),
            "a conditional",
        ),
    ],
)
def test_calls_in_functions_are_named(wrap, text):
    def build():
        x, w = data(None, 3), variable("w", 3, 3)
        assert_generic(wrap(x, w), [w], text)
        return tf.constant(0)

    graph_kinds.Run(graph_kinds.FUNCTION, build)()
