"""The schedule: what runs at which step, and what does not."""

import collections
import re

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import layer_collection, state
from kfac.python.ops.kfac_utils import periodic_inv_cov_update_kfac_opt as periodic
from kfac.tests import graph_kinds
from kfac.tests.ops import optimizer_cases

tf1 = tf.compat.v1

V1, FUNCTION = graph_kinds.FAST


class BackwardPasses:
    """Counts how often a backward pass really goes through a tensor."""

    def __init__(self):
        self.count = 0

    def hook(self, tensor):
        @tf.custom_gradient
        def counted(x):
            def grad(dy):
                result = tf.numpy_function(self._one_more, [dy], dy.dtype)
                result.set_shape(dy.shape)
                return result

            return tf.identity(x), grad

        return counted(tensor)

    def _one_more(self, dy):
        self.count += 1
        return dy

    def during(self, run):
        before = self.count
        run()
        return self.count - before


def train(kind, *, hook=None, **options):
    """A runner of steps that returns everything the schedule can be seen from."""
    options = {"learning_rate": 0.1, "estimation_mode": "empirical", **options}

    def build():
        model = optimizer_cases.Model(hook=hook)
        opt = optimizer_cases.make_optimizer(model, **options)
        with tf.control_dependencies([opt.minimize(model.loss)]):
            return {
                "params": model.values(),
                "cov": [tf.identity(c) for cs in opt.get_cov_vars() for c in cs],
                "inv": [tf.identity(i) for inv in opt.get_inv_vars() for i in inv],
                "counter": opt.counter,
                "burnin": tf.identity(opt._burnin_counter),
            }

    return graph_kinds.Run(kind, build)


def changed(before, after, key):
    """Whether all of these values changed; all or none must have."""
    changes = {
        not np.array_equal(x, y) for x, y in zip(before[key], after[key], strict=True)
    }
    assert len(changes) == 1
    return changes.pop()


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_statistics_and_inverses_are_updated_on_their_steps_only(kind):
    run = train(kind, cov_update_every=2, invert_every=3)
    before = run()
    for k in range(1, 7):
        after = run()
        assert changed(before, after, "cov") == (k % 2 == 0)
        assert changed(before, after, "inv") == (k % 3 == 0)
        assert changed(before, after, "params")
        assert after["counter"] == k + 1
        before = after


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_without_statistics_due_there_is_one_backward_pass(kind):
    passes = BackwardPasses()
    run = train(kind, hook=passes.hook, cov_update_every=10)
    counts = [passes.during(run) for _ in range(11)]
    assert counts == [2] + [1] * 9 + [2]


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_during_burn_in_statistics_share_one_backward_pass_each_step(kind):
    passes = BackwardPasses()
    run = train(kind, hook=passes.hook, cov_update_every=10, num_burnin_steps=2)
    # The loss's own gradient is computed too, outside the branch.
    assert [passes.during(run) for _ in range(4)] == [2, 2, 2, 1]


def executed_ops(session, train_op):
    """How often each op type was really executed in one run."""
    metadata = tf1.RunMetadata()
    session.run(train_op, options=tf1.RunOptions(trace_level=3), run_metadata=metadata)
    labels = [
        stats.timeline_label
        for device in metadata.step_stats.dev_stats
        for stats in device.node_stats
    ]
    types = (re.search(r" = (\w+)\(", label) for label in labels)
    return collections.Counter(found[1] for found in types if found)


# What statistics and inverses are made of, and a step is not, or not only.
COSTLY = ["MatMul", "BatchMatMulV2", "Einsum", "Cholesky", "MatrixTriangularSolve"]
COSTLY += ["Softmax", "SoftmaxCrossEntropyWithLogits", "TanhGrad"]
COSTLY += ["SparseSoftmaxCrossEntropyWithLogits"]


def session_of(graph):
    # Unoptimized, so that executed nodes are those of the graph.
    config = tf1.ConfigProto()
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    config.graph_options.optimizer_options.opt_level = -1
    session = tf1.Session(graph=graph, config=config)
    session.run(tf1.global_variables_initializer())
    return session


def test_nine_of_ten_steps_execute_only_what_the_step_itself_needs():
    def costly(make_train_op):
        with graph_kinds.v2_behavior_off(), tf.Graph().as_default() as graph:
            model = optimizer_cases.Model()
            train_op = make_train_op(model)
            with session_of(graph) as session:
                counts = [executed_ops(session, train_op) for _ in range(10)]
        return [{kind: count[kind] for kind in COSTLY} for count in counts]

    def by_schedule(model):
        opt = optimizer_cases.make_optimizer(
            model,
            learning_rate=0.1,
            estimation_mode="gradients",
            cov_update_every=10,
            invert_every=10,
        )
        return opt.minimize(model.loss)

    def without_any_update(model):
        opt = optimizer_cases.make_base_optimizer(model)
        opt.make_vars_and_create_op_thunks()
        return opt.minimize(model.loss)

    first, *others = costly(by_schedule)
    bare = costly(without_any_update)[0]
    assert bare["MatMul"] > 0
    assert others == [bare] * 9
    assert first["Cholesky"] > 0
    assert first["MatMul"] > bare["MatMul"]


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_burn_in_only_collects_statistics(kind):
    def build():
        model = optimizer_cases.Model()
        global_step = state.get_variable("global_step", dtype=tf.int64)
        opt = optimizer_cases.make_optimizer(
            model, learning_rate=0.1, num_burnin_steps=2
        )
        trained = opt.minimize(model.loss, global_step=global_step)
        assert tf.is_tensor(trained)
        with tf.control_dependencies([trained]):
            return {
                "params": model.values(),
                "velocity": [
                    tf.identity(opt.get_slot(v, "velocity")) for v in model.variables
                ],
                "cov": [tf.identity(c) for cs in opt.get_cov_vars() for c in cs],
                "inv": [tf.identity(i) for inv in opt.get_inv_vars() for i in inv],
                "counters": [
                    opt.counter,
                    tf.identity(opt._burnin_counter),
                    tf.identity(global_step),
                ],
            }

    run = graph_kinds.Run(kind, build)
    first, second, third = run(), run(), run()
    assert first["counters"] == [0, 1, 0]
    assert second["counters"] == [0, 2, 0]
    assert third["counters"] == [1, 2, 1]
    for key in ("params", "velocity", "inv"):
        assert not changed(first, second, key)
        assert changed(second, third, key)
    # The model does not move, so the plain mean of equal statistics does not either,
    # up to rounding.
    for before, after in zip(first["cov"], second["cov"], strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-12)


@pytest.mark.parametrize(
    "given, expected", [({}, 0.95**4), ({"cov_ema_decay": 0.5}, 0.5**4)]
)
def test_the_decay_of_statistics_is_per_step(given, expected):
    with tf.Graph().as_default():
        opt = periodic.PeriodicInvCovUpdateKfacOpt(
            cov_update_every=4,
            learning_rate=0.1,
            damping=1.0,
            layer_collection=layer_collection.LayerCollection(),
            **given,
        )
        np.testing.assert_allclose(opt._fisher_est._cov_ema_decay, expected)


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(
        tf.get_logger(), "warning", lambda text, *args: messages.append(text % args)
    )
    return messages


@pytest.mark.parametrize("interval, expected", [(10, 0), (7, 1)])
def test_an_interval_that_inverses_do_not_follow_is_warned_of(
    warnings, interval, expected
):
    with tf.Graph().as_default():
        periodic.PeriodicInvCovUpdateKfacOpt(
            invert_every=5,
            learning_rate=0.1,
            damping=1.0,
            layer_collection=layer_collection.LayerCollection(),
            adapt_damping=True,
            damping_adaptation_interval=interval,
        )
    assert len(warnings) == expected


def test_minimize_may_be_called_again(warnings):
    with tf.Graph().as_default():
        model = optimizer_cases.Model()
        opt = optimizer_cases.make_optimizer(model, learning_rate=0.1)
        assert not opt._made_vars_already
        opt.minimize(model.loss)
        assert opt._made_vars_already
        number = len(tf1.global_variables())
        opt.minimize(2 * model.loss)
        assert len(tf1.global_variables()) == number
    assert not warnings


def test_thunks_made_by_hand_are_used():
    with tf.Graph().as_default():
        model = optimizer_cases.Model()
        opt = optimizer_cases.make_optimizer(model, learning_rate=0.1)
        cov_thunks, inv_thunks = opt.make_vars_and_create_op_thunks()
        assert len(cov_thunks) == len(inv_thunks) == len(opt.factors) == 4
        opt.minimize(model.loss)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_update_ops_alone_make_the_variables_and_warn(kind, warnings):
    def build():
        model = optimizer_cases.Model()
        opt = optimizer_cases.make_optimizer(model, learning_rate=0.1)
        with tf.control_dependencies([opt.kfac_update_ops()]):
            return [tf.identity(i) for inv in opt.get_inv_vars() for i in inv]

    assert all(np.any(inverse) for inverse in graph_kinds.Run(kind, build)())
    # A function that makes variables is traced twice.
    assert len(warnings) == (1 if kind == V1 else 2)
    assert "minimize" in warnings[0]


@pytest.mark.parametrize(
    "wrong", [{"invert_every": 0}, {"cov_update_every": -1}, {"num_burnin_steps": -1}]
)
def test_impossible_schedules_are_refused(wrong):
    with tf.Graph().as_default(), pytest.raises(ValueError, match=next(iter(wrong))):
        periodic.PeriodicInvCovUpdateKfacOpt(
            learning_rate=0.1,
            damping=1.0,
            layer_collection=layer_collection.LayerCollection(),
            **wrong,
        )


def test_burn_in_is_refused_in_replicas_of_a_mirrored_strategy():
    strategy = tf.distribute.MirroredStrategy(["/cpu:0"])

    def replica():
        periodic.PeriodicInvCovUpdateKfacOpt(
            num_burnin_steps=1,
            learning_rate=0.1,
            damping=1.0,
            layer_collection=layer_collection.LayerCollection(),
        )

    with tf.Graph().as_default(), strategy.scope():
        with pytest.raises(ValueError, match="num_burnin_steps"):
            strategy.run(replica)
