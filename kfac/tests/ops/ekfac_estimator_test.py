"""EKFAC through the estimator: graphs, sub-batches, checkpoints, replicas."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import state
from kfac.tests import graph_kinds
from kfac.tests.ops import ekfac_cases as cases

tf1 = tf.compat.v1

CLOSE = dict(rtol=1e-9, atol=1e-11)


def trained(case, approx="ekfac", **options):
    """A build function: an update, a refresh, an update; then the blocks."""

    def build(dynamic=False):
        made = cases.build(case, approx, dynamic).estimator(**options)
        cov, inv = made.make_vars_and_create_op_thunks()
        vectors = [(tf.ones_like(v), v) for v in made.variables]
        return cases.in_turn(
            [
                cases.update(cov),
                cases.update(inv),
                cases.update(cov),
                lambda: {
                    "blocks": [b.full_fisher_block() for b in made.blocks],
                    "products": [t for t, _ in made.multiply_inverse(vectors)],
                },
            ]
        )

    return build


@pytest.fixture(scope="module")
def expected():
    """Results in a v1 graph, by case."""
    return {
        case.name: graph_kinds.Run(graph_kinds.V1_ON, trained(case))()
        for case in (cases.DENSE, cases.CONV, cases.MULTI)
    }


def assert_close(actual, wanted, **tolerance):
    for a, e in zip(tf.nest.flatten(actual), tf.nest.flatten(wanted), strict=True):
        np.testing.assert_allclose(a, e, **(tolerance or CLOSE))


@pytest.mark.parametrize(
    "case, kind",
    [(cases.DENSE, kind) for kind in graph_kinds.ALL_AND_XLA]
    + [(case, graph_kinds.FUNCTION) for case in (cases.CONV, cases.MULTI)],
    ids=str,
)
def test_results_are_the_same_in_every_kind_of_graph(case, kind, expected):
    actual = graph_kinds.Run(kind, trained(case))()
    # XLA's eigenvectors are accurate to some 1e-6, also in float64.
    tolerance = dict(rtol=1e-3, atol=1e-5) if kind == graph_kinds.XLA else CLOSE
    assert_close(actual, expected[case.name], **tolerance)


@pytest.mark.parametrize("case", [cases.CONV, cases.MULTI], ids=str)
def test_the_batch_size_may_be_unknown(case, expected):
    run = graph_kinds.Run(graph_kinds.V1_ON, lambda: trained(case)(dynamic=True))
    assert_close(run(), expected[case.name])


@pytest.mark.parametrize("case", [cases.CONV, cases.MULTI], ids=str)
def test_a_sub_batch_gives_the_statistics_of_its_cases(case):
    whole = case.first(4)
    options = dict(cov_batch_fraction=0.5)
    part = graph_kinds.Run(graph_kinds.V1_ON, trained(whole, **options))()
    alone = graph_kinds.Run(graph_kinds.V1_ON, trained(case.first(2)))()
    assert_close(part, alone)


def test_updates_work_inside_branches_and_inverses_in_other_ones(expected):
    def build():
        made = cases.build(cases.CONV, "ekfac").estimator()
        cov, inv = made.make_vars_and_create_op_thunks()
        yes = tf1.placeholder_with_default(True, [])

        def in_branch(step):
            def run():
                with tf.control_dependencies([step()]):
                    return tf.constant(True)

            return lambda: tf.cond(yes, run, lambda: tf.constant(False))

        return cases.in_turn(
            [
                in_branch(cases.update(cov)),
                in_branch(cases.update(inv)),
                in_branch(cases.update(cov)),
                lambda: [b.full_fisher_block() for b in made.blocks],
            ]
        )

    for kind in (graph_kinds.V1_OFF, graph_kinds.FUNCTION):
        assert_close(graph_kinds.Run(kind, build)(), expected["conv2d"]["blocks"])


def test_layers_with_the_same_inputs_share_their_factor():
    def build():
        x = tf1.placeholder_with_default(cases.DENSE.x, cases.DENSE.x.shape)
        variables = [
            graph_kinds.variable(np.ones((3, 2)) + i, f"w{i}") for i in range(2)
        ]
        collection = cases.layer_collection.LayerCollection()
        pre_activations = [x @ v for v in variables]
        for variable, pre_activation in zip(variables, pre_activations, strict=True):
            collection.register_fully_connected(
                variable, x, pre_activation, approx="ekfac"
            )
        outputs = [tf.tanh(p) for p in pre_activations]
        collection.register_squared_error_loss(outputs[0] * outputs[1])
        model = cases.Model(collection, variables, x, outputs[0])
        made = model.estimator()
        cov, inv = made.make_vars_and_create_op_thunks()
        assert len(made.factors) == 5  # Not 6.
        return cases.in_turn(
            [
                cases.update(cov),
                cases.update(inv),
                lambda: [
                    tf.identity(b.eigenbasis_factor.input_basis) for b in made.blocks
                ],
            ]
        )

    first, second = graph_kinds.Run(graph_kinds.V1_ON, build)()
    np.testing.assert_array_equal(first, second)
    moment = cases.DENSE.x.T @ cases.DENSE.x
    rotated = first.T @ moment @ first
    np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=1e-12)


def test_state_variables_are_complete_and_listed_once():
    with tf.Graph().as_default():
        made = cases.build(cases.DENSE, "ekfac").estimator()
        made.make_vars_and_create_op_thunks()
        names = [v.op.name for v in made.state_variables()]
        assert sorted(names) == sorted(
            v.op.name for v in tf1.global_variables("FisherEstimator")
        )
        assert "FisherEstimator/p0/eigenbasis/cov/var" in names
        assert "FisherEstimator/p2/eigenbasis/input_basis" in names


def test_a_session_continues_from_a_saver_bit_for_bit(tmp_path):
    def start():
        made = cases.build(cases.CONV, "ekfac").estimator()
        cov, inv = made.make_vars_and_create_op_thunks()
        step = cases.in_turn([cases.update(cov), cases.update(inv), cases.update(cov)])
        blocks = [b.full_fisher_block() for b in made.blocks]
        return step, blocks, tf1.train.Saver(made.state_variables())

    path = str(tmp_path / "curvature")
    with tf.Graph().as_default(), tf1.Session() as session:
        step, blocks, saver = start()
        session.run(tf1.global_variables_initializer())
        session.run(step)
        saver.save(session, path)
        session.run(step)
        expected = session.run(blocks)
    with tf.Graph().as_default(), tf1.Session() as session:
        step, blocks, saver = start()
        session.run(tf1.global_variables_initializer())
        saver.restore(session, path)
        session.run(step)
        tf.nest.map_structure(
            np.testing.assert_array_equal, session.run(blocks), expected
        )


def test_a_function_continues_from_a_checkpoint_bit_for_bit(tmp_path):
    def start():
        store = state.VariableStore()
        values = [tf.Variable(p) for p in cases.DENSE.params]

        @tf.function(autograph=False)
        def step():
            with store.as_default():
                out, layers = cases.DENSE.forward(values, tf.constant(cases.DENSE.x))
                collection = cases.layer_collection.LayerCollection()
                names = dict(zip((v.ref() for v in values), "abc", strict=True))
                with state.parameter_names(names):
                    for params, (_, inputs, outputs, _) in zip(
                        (tuple(values[:2]), values[2]), layers, strict=True
                    ):
                        collection.register_fully_connected(
                            params, inputs, outputs, approx="ekfac"
                        )
                    collection.register_softmax_cross_entropy_loss(out)
                    model = cases.Model(collection, values, None, out)
                    made = model.estimator()
                    cov, inv = made.make_vars_and_create_op_thunks()
                    cases.in_turn([cases.update(cov), cases.update(inv)])
                    return [b.full_fisher_block() for b in made.blocks]

        return step, tf.train.Checkpoint(state=store)

    step, checkpoint = start()
    step()
    path = checkpoint.write(str(tmp_path / "curvature"))
    expected = step()
    step, checkpoint = start()
    status = checkpoint.read(path)
    actual = step()
    status.assert_consumed()
    tf.nest.map_structure(np.testing.assert_array_equal, actual, expected)


PROGRAM = """
import json
import numpy as np
import tensorflow as tf
from kfac.python.ops import estimator, layer_collection, state
from kfac.tests.ops import ekfac_cases as cases

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
X = np.random.RandomState(0).randn(6, 3)


def block(placement, w, store, x):
    with store.as_default():
        out = tf.matmul(x, w)
        collection = layer_collection.LayerCollection()
        collection.register_fully_connected(w, x, out, approx="ekfac")
        collection.register_squared_error_loss(out, targets=tf.zeros_like(out))
        made = estimator.make_fisher_estimator(
            placement,
            variables=[w],
            cov_ema_decay=0.9,
            damping=0.1,
            layer_collection=collection,
            estimation_mode="empirical",
        )
        cov, inv = made.make_vars_and_create_op_thunks()
        return cases.in_turn(
            [
                cases.update(cov),
                cases.update(inv),
                cases.update(cov),
                made.blocks[0].full_fisher_block,
            ]
        )


def weights():
    return tf.Variable(np.arange(6.0).reshape(3, 2) / 6)


def of_replica(context):
    i = context.replica_id_in_sync_group
    return tf.constant(X[3 * i : 3 * i + 3])


def on_replicas(placement):
    store = state.VariableStore()
    with strategy.scope():
        w = weights()
    step = tf.function(
        lambda x: strategy.run(lambda x: block(placement, w, store, x), args=(x,)),
        autograph=False,
    )
    x = strategy.experimental_distribute_values_from_function(of_replica)
    return strategy.experimental_local_results(step(x))


def alone():
    store, w = state.VariableStore(), weights()
    step = tf.function(lambda x: block(None, w, store, x), autograph=False)
    return step(tf.constant(X))


found = [alone(), *on_replicas("round_robin"), *on_replicas("replica_round_robin")]
print("FOUND" + json.dumps([r.numpy().tolist() for r in found]))
"""


def test_replicas_agree_on_the_block_of_the_whole_batch():
    root = pathlib.Path(__file__).parents[3]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    alone, *of_replicas = json.loads(run.stdout.split("FOUND")[1])
    assert len(of_replicas) == 4
    for block in of_replicas:
        np.testing.assert_allclose(block, alone, **CLOSE)
