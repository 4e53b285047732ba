"""Placement over replicas (over devices: `estimator_thunks_test`)."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config, estimator, layer_collection, placement
from kfac.tests import estimator_cases as cases

tf1 = tf.compat.v1


class Replicator:
    """Says that there are two replicas, and notes what is dealt out to them."""

    num_replicas_in_sync = 2
    current_replica_id = 0

    def __init__(self):
        self.gathered = []

    def all_sum(self, structure, name=None):
        return tf.nest.map_structure(lambda t: 2 * t, structure)

    def map_gather(self, thunks, name=None):
        self.gathered.append(len(thunks))
        return [thunk() for thunk in thunks]


def dense_and_diagonal(collection, diagonal_only=False):
    """Two layers: a Kronecker-factored one, and one with diagonal factors only."""
    x = tf1.placeholder_with_default(np.eye(3)[[0, 1, 2, 0]], [4, 3])
    w = tf1.get_variable("w", initializer=np.eye(3), use_resource=True)
    v = tf1.get_variable("v", initializer=np.eye(3), use_resource=True)
    hidden = tf.matmul(x, w)
    out = tf.matmul(hidden, v)
    approx = "diagonal" if diagonal_only else "kron"
    collection.register_fully_connected(w, x, hidden, approx=approx)
    collection.register_fully_connected(v, hidden, out, approx="diagonal")
    collection.register_squared_error_loss(out, targets=tf.zeros_like(out))
    return [w, v]


@pytest.fixture
def replicator():
    fake = Replicator()
    with config.override(tf_replicator=fake):
        yield fake


def make(diagonal_only=False, strategy="replica_round_robin", **options):
    collection = layer_collection.LayerCollection()
    variables = dense_and_diagonal(collection, diagonal_only)
    model = cases.Model(cases.DENSE_SOFTMAX, collection, variables, None, [])
    options = {"estimation_mode": "empirical", **options}
    return model.estimator(placement_strategy=strategy, **options)


def products_after_one_step(made, session):
    updates, inverses = made.make_vars_and_create_op_thunks()
    with tf.control_dependencies([cases.update_all(updates)]):
        inverted = cases.update_all(inverses)
    pairs = [(tf.ones_like(var), var) for var in made.variables]
    results = cases.after(
        inverted, lambda: [t for t, _ in made.multiply_inverse(pairs)]
    )
    session.run(tf1.global_variables_initializer())
    return len(inverses), session.run(results)


@pytest.mark.parametrize("distribute", [True, False])
def test_one_thunk_updates_all_inverses_dealt_out_to_the_replicas(
    replicator, distribute
):
    with tf.Graph().as_default(), tf1.Session() as session:
        made = make(distribute_transformations=distribute)
        num_thunks, spread = products_after_one_step(made, session)
    assert num_thunks == 1
    # Two dense factors have inverses; two blocks have products.
    assert replicator.gathered == ([2, 2] if distribute else [2])
    with tf.Graph().as_default(), tf1.Session() as session:
        made = make(strategy="round_robin")
        num_thunks, expected = products_after_one_step(made, session)
    assert num_thunks == 3
    np.testing.assert_allclose(spread, expected, rtol=1e-10)


def test_a_model_without_inverses_is_served(replicator):
    with tf.Graph().as_default(), tf1.Session() as session:
        num_thunks, products = products_after_one_step(make(True), session)
    assert num_thunks == 1 and replicator.gathered == [2]
    assert np.all(np.isfinite(products))


def test_products_with_diagonal_factors_weigh_nothing(replicator):
    with tf.Graph().as_default():
        made = make()
        kronecker, diagonal = made.blocks
        assert kronecker.product_flops() == diagonal.product_flops() == 0
        made.create_ops_and_vars_thunks()  # Makes the factors.
        # Two products of 3 by 3 matrices.
        assert kronecker.product_flops() == 2 * (2 * 3**3)
        assert diagonal.product_flops() == 0


def test_devices_belong_to_the_other_strategy(replicator):
    with tf.Graph().as_default(), pytest.raises(TypeError, match="cov_devices"):
        make(cov_devices=["/cpu:0"])


def test_the_strategy_needs_replicas():
    with tf.Graph().as_default(), pytest.raises(ValueError, match="replicas"):
        make()


def test_mix_ins_come_first():
    for cls, mixin in (
        (estimator.FisherEstimatorRoundRobin, placement.RoundRobinPlacementMixin),
        (
            estimator.FisherEstimatorReplicaRoundRobin,
            placement.ReplicaRoundRobinPlacementMixin,
        ),
    ):
        assert cls.__bases__ == (mixin, estimator.FisherEstimator)


def test_a_thunk_on_a_device_passes_its_arguments_on():
    with tf.Graph().as_default():
        thunk = placement._make_thunk_on_device(
            lambda a, b=0: tf.constant(a) + b, "/cpu:1"
        )
        assert thunk(1, b=2).device == "/device:CPU:1"


PROGRAM = """
import json
import numpy as np
import tensorflow as tf
from kfac.python.ops import estimator, layer_collection, state, utils

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
store = state.VariableStore()
with strategy.scope():
    w = tf.Variable(np.diag([1.0, 2.0]))
    v = tf.Variable(np.ones(2))


def replica(x, due):
    with store.as_default():
        hidden = tf.matmul(x, w)
        out = hidden * v
        collection = layer_collection.LayerCollection()
        collection.register_fully_connected(w, x, hidden)
        collection.register_generic(v, 2)
        collection.register_squared_error_loss(out, targets=tf.zeros_like(out))
        made = estimator.make_fisher_estimator(
            "replica_round_robin",
            variables=[w, v],
            cov_ema_decay=0.9,
            damping=0.1,
            layer_collection=collection,
            estimation_mode="empirical",
            cov_batch_fraction=FRACTION,
        )
        updates, inverses = made.make_vars_and_create_op_thunks()
        if CONDITIONAL:
            updated = utils.smart_cond(
                due, lambda: [thunk() for thunk in updates], lambda: None
            )
            with tf.control_dependencies([updated]):
                inverted = utils.smart_cond(
                    due, lambda: [thunk() for thunk in inverses], lambda: None
                )
        else:
            updated = tf.group(*(thunk() for thunk in updates))
            with tf.control_dependencies([updated]):
                inverted = tf.group(*(thunk() for thunk in inverses))
        with tf.control_dependencies([inverted]):
            products = made.multiply_inverse([(tf.ones_like(p), p) for p in (w, v)])
            return [t for t, _ in products], [f.cov for f in made.factors]


@tf.function(autograph=False)
def step(x, due):
    return strategy.run(replica, args=(x, due))


def of_replica(context):
    first = 2.0 * context.replica_id_in_sync_group
    return tf.constant([[first + 1, 1.0], [0.0, 1.0]], tf.float64)


x = strategy.experimental_distribute_values_from_function(of_replica)
result = step(x, tf.constant(True))


def local(i):
    return tf.nest.map_structure(
        lambda t: strategy.experimental_local_results(t)[i].numpy().tolist(), result
    )


print("FOUND" + json.dumps([local(0), local(1)]))
"""


@pytest.mark.parametrize("fraction, conditional", [(1.0, False), (0.5, True)])
def test_two_replicas_average_statistics_and_agree_on_products(fraction, conditional):
    root = pathlib.Path(__file__).parents[3]
    program = PROGRAM.replace("FRACTION", str(fraction))
    run = subprocess.run(
        [sys.executable, "-c", program.replace("CONDITIONAL", str(conditional))],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    first, second = json.loads(run.stdout.split("FOUND")[1])
    for a, b in zip(tf.nest.flatten(first), tf.nest.flatten(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    rows = 1 if fraction == 0.5 else 2
    batches = [np.array([[2.0 * i + 1, 1.0], [0.0, 1.0]])[:rows] for i in range(2)]
    outs = [x @ np.diag([1.0, 2.0]) for x in batches]
    moments = [np.mean([m.T @ m / rows for m in of], 0) for of in (batches, outs)]
    per_replica = [(2 * out * out).sum(axis=0) ** 2 / rows for out in outs]
    expected = [moments[0], 4 * moments[1], np.mean(per_replica, axis=0)]
    for actual, value in zip(first[1], expected, strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-12)
