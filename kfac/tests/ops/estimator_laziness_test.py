"""Curvature costs nothing where it is not due, and is shared where it is."""

import re

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import estimator, layer_collection, loss_functions
from kfac.tests import estimator_cases as cases
from kfac.tests import graph_kinds

tf1 = tf.compat.v1

X = np.random.RandomState(0).randn(4, 3)
W = np.random.RandomState(1).randn(3, 5)


class CountingLoss(loss_functions.NormalMeanNegativeLogProbLoss):
    """Counts how often its targets are sampled, in a variable."""

    def __init__(self, mean, counter, targets=None, seed=None):
        super().__init__(mean, targets=targets, seed=seed)
        self._counter = counter

    def sample(self, seed=None):
        with tf.control_dependencies([tf1.assign_add(self._counter, 1)]):
            return tf.identity(super().sample(seed))


def model(**options):
    """One dense layer whose loss counts its samples."""
    x = tf1.placeholder_with_default(X, [4, 3])
    w = graph_kinds.variable(W, "w")
    counter = graph_kinds.variable(0, "counter", np.int32, trainable=False)
    out = tf.matmul(x, w)
    collection = layer_collection.LayerCollection()
    collection.register_fully_connected(w, x, out)
    collection._register_loss_function(CountingLoss(out, counter), out, "counting")
    made = estimator.make_fisher_estimator(
        variables=[w],
        cov_ema_decay=0.9,
        damping=0.1,
        layer_collection=collection,
        **options,
    )
    return made, counter


def conditionally(due, ops):
    """Tensor evaluated after the ops that `ops()` builds in a conditional branch."""

    def branch():
        with tf.control_dependencies(ops()):
            return tf.constant(1)

    return tf.cond(due, branch, lambda: tf.constant(0))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("due", [False, True])
@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_updates_in_a_branch_sample_once_if_due_and_never_otherwise(
    kind, due, fraction
):
    def build():
        made, counter = model(cov_batch_fraction=fraction)
        updates, _ = made.make_vars_and_create_op_thunks()
        due_now = tf1.placeholder_with_default(due, [])
        done = conditionally(due_now, lambda: [thunk() for thunk in updates])
        return cases.after(done, lambda: [counter, *made.get_cov_vars()])

    run = graph_kinds.Run(kind, build)
    for step in (1, 2):
        count, *covs = run()
        assert count == (step if due else 0)
        assert all(np.any(cov != 0) == due for cov in tf.nest.flatten(covs))


def executed_ops(session, fetch, feed):
    """Names of the nodes that one step executes."""
    metadata = tf1.RunMetadata()
    options = tf1.RunOptions(trace_level=tf1.RunOptions.SOFTWARE_TRACE)
    session.run(fetch, feed, options=options, run_metadata=metadata)
    return {
        node.node_name.split(":")[0]
        for device in metadata.step_stats.dev_stats
        for node in device.node_stats
    }


@pytest.mark.parametrize("kind", [graph_kinds.V1_OFF, graph_kinds.V1_ON])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_no_node_of_the_statistics_executes_when_they_are_not_due(kind, fraction):
    nodes = {}

    def build():
        made, _ = model(cov_batch_fraction=fraction)
        updates, _ = made.make_vars_and_create_op_thunks()
        due = tf1.placeholder(tf.bool, [], name="due")
        done = conditionally(due, lambda: [thunk() for thunk in updates])
        nodes.update(due=due, done=done)
        return tf.no_op()

    run = graph_kinds.Run(kind, build)
    # What thunks build inside the branch; not the variables or switches feeding it.
    built = re.compile(r"cond/(then/_\d+/)?FisherEstimator(_1)?/(?!w/).*(?<!/Switch)$")
    executed = {
        due: executed_ops(run.session, nodes["done"], {nodes["due"]: due})
        for due in (True, False)
    }
    due, not_due = (
        {name for name in executed[due] if built.match(name)} for due in (True, False)
    )
    assert any("RandomStandardNormal" in name for name in due)
    assert any("gradients" in name for name in due)
    assert sum("MatMul" in name for name in due) >= 2
    assert sum("AssignVariableOp" in name for name in due) == 4
    assert ("clone" in " ".join(due)) == (fraction < 1)
    assert not not_due


def test_thunks_in_one_branch_share_a_backward_pass_and_separate_ones_do_not():
    def num_samples(build):
        with tf.Graph().as_default() as graph:
            made, _ = model()
            updates, _ = made.make_vars_and_create_op_thunks()
            build(made, updates)
            graphs = [graph.as_graph_def()]
            bodies = [f.node_def for f in graphs[0].library.function]
            return sum(
                node.op == "RandomStandardNormal"
                for nodes in [graphs[0].node, *bodies]
                for node in nodes
            )

    def together(made, updates):
        for thunk in updates:
            thunk()

    def one_branch(made, updates):
        conditionally(tf.constant(True), lambda: [thunk() for thunk in updates])

    def own_branches(made, updates):
        step = tf1.placeholder(tf.int32, [])
        # The output factor's twice; the input factor needs no backward pass.
        tf.switch_case(step, [updates[1], updates[1], updates[0]])

    assert num_samples(together) == 1
    assert num_samples(one_branch) == 1
    assert num_samples(own_branches) == 2


def test_params_stats_share_the_sample_of_the_updates():
    def build():
        made, counter = model(compute_params_stats=True, batch_size=4)
        updates, _ = made.make_vars_and_create_op_thunks()
        (stat,) = made.params_stats
        with tf.control_dependencies([cases.update_all(updates)]):
            return tf.identity(stat), tf.identity(made.factors[1].cov), counter + 0

    for kind in graph_kinds.FAST:
        stat, cov, count = graph_kinds.Run(kind, build)()
        assert count == 1
        # Both come from the same output gradients g: stat = xᵀ g / B, cov = gᵀ g / B.
        g = np.linalg.lstsq(X.T, 4 * stat, rcond=None)[0]
        assert np.linalg.norm(g) ** 2 <= 4 * np.trace(cov) * (1 + 1e-9)
        np.testing.assert_allclose(X.T @ g / 4, stat, rtol=1e-8)
