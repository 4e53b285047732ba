import re

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import utils
from kfac.python.ops.utils import scheduling
from kfac.tests import graph_kinds

tf1 = tf.compat.v1


@pytest.mark.parametrize("kind", graph_kinds.ALL)
@pytest.mark.parametrize(("num_thunks", "batch_size"), [(5, 2), (3, 3)])
def test_each_step_runs_the_next_batch_of_thunks_round_robin(
    kind, num_thunks, batch_size
):
    def build():
        step = graph_kinds.variable(0, "step", np.int64, trainable=False)
        counts = [
            graph_kinds.variable(0, f"count_{j}", np.int32, trainable=False)
            for j in range(num_thunks)
        ]
        ops = utils.batch_execute(
            step, [lambda c=c: c.assign_add(1) for c in counts], batch_size
        )
        assert len(ops) == num_thunks
        assert all(isinstance(op, tf.Operation) for op in ops)
        with tf.control_dependencies(ops):
            done = [tf.identity(count) for count in counts]
        with tf.control_dependencies(done):
            advance = step.assign_add(1)
        with tf.control_dependencies([advance]):
            return tf.stack([tf.identity(count) for count in done])

    run = graph_kinds.Run(kind, build)
    expected = np.zeros(num_thunks)
    for step in range(2 * num_thunks):
        for j in range(num_thunks):
            start = batch_size - 1 + step * batch_size - j
            expected[j] += start % num_thunks < batch_size
        assert expected.sum() == (step + 1) * batch_size
        np.testing.assert_array_equal(run(), expected)


def test_thunks_may_return_ops_tensors_structures_or_nothing():
    with tf.Graph().as_default(), tf1.Session() as session:
        v = tf1.get_variable("v", initializer=0.0, use_resource=True)
        thunks = [
            lambda: None,
            lambda: tf.no_op(),
            lambda: [v.assign_add(1.0), (tf.constant(2), None)],
        ]
        ops = utils.batch_execute(tf.constant(0), thunks, 3)
        session.run(tf1.global_variables_initializer())
        session.run(ops)
        assert session.run(v) == 1.0


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_a_conditional_effect_happens_where_the_predicate_holds(kind):
    def build():
        v = graph_kinds.variable(0, "v", np.int32, trainable=False)
        effects = [
            scheduling.run_if(
                tf.constant(holds),
                lambda amount=amount: [v.assign_add(amount), (None, tf.no_op())],
            )
            for holds, amount in ((True, 1), (False, 10))
        ]
        assert all(isinstance(op, tf.Operation) for op in effects)
        with tf.control_dependencies(effects):
            return tf.identity(v)

    assert graph_kinds.Run(kind, build)() == 1


def test_nothing_to_execute_is_no_ops():
    assert utils.batch_execute(0, [], 2) == []


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_multiline_print_prints_a_line_for_each_sequence(kind, capfd):
    def build():
        op = utils.multiline_print(
            [("loss:", tf.constant(2)), ("damping:", tf.constant(3)), (tf.constant(4),)]
        )
        with tf.control_dependencies([op]):
            return tf.constant(0)

    graph_kinds.Run(kind, build)()
    printed = [line.split() for line in capfd.readouterr().err.strip().split("\n")]
    expected = [["loss:", "2"], ["damping:", "3"], ["4"]]
    assert [
        line for line in printed if re.match(r"loss|damping|4", line[0])
    ] == expected
