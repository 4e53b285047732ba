"""Parts of a batch on several devices of one graph are worth the whole batch on one."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

import kfac
from kfac.python.ops import fisher_factors
from kfac.tests import graph_kinds

tf1 = tf.compat.v1

CASES, CLASSES = 8, 3
DEVICES = [f"/cpu:{i}" for i in range(4)]
V1_KINDS = (graph_kinds.V1_OFF, graph_kinds.V1_ON)
# No step after which inverses are due is the last one, nor are all of them.
STEPS = 4
PERIODS = {"cov_update_every": 2, "invert_every": 3}
# A branch that never ends is a failure, not a test that never does.
TIMEOUT_MS = 120_000


def parameters():
    random = np.random.default_rng(1)
    shapes = {"filters": (2, 2, 1, 2), "shift": (2,), "out": (8, CLASSES)}
    return {name: random.normal(size=shape) for name, shape in shapes.items()}


def losses_of_towers(collection, variables, count):
    """Registers a part of the batch on each of the first devices; their mean losses."""
    random = np.random.default_rng(0)
    images = np.split(random.normal(size=(CASES, 2, 2, 1)), count)
    labels = np.split(random.integers(CLASSES, size=CASES), count)
    losses = []
    for tower, (x, y) in enumerate(zip(images, labels, strict=True)):
        with tf.device(DEVICES[tower]):
            maps = tf.nn.conv2d(tf.constant(x), variables["filters"], 1, "SAME")
            hidden = tf.reshape(tf.tanh(maps + variables["shift"]), [-1, 8])
            logits = tf.matmul(hidden, variables["out"])
            collection.register_softmax_cross_entropy_loss(
                logits, targets=tf.constant(y), name="loss", reuse=tower > 0
            )
            losses.append(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)
            )
    return [tf.reduce_mean(of_tower) for of_tower in losses]


def trained(kind, towers, **options):
    """The parameters after some steps, and the devices of the curvature's updates."""
    off = kind == graph_kinds.V1_OFF
    switches = graph_kinds.v2_behavior_off() if off else contextlib.nullcontext()
    with switches, tf.Graph().as_default() as graph:
        variables = {
            name: tf1.get_variable(name, initializer=value, use_resource=True)
            for name, value in parameters().items()
        }
        collection = kfac.LayerCollection()
        losses = losses_of_towers(collection, variables, towers)
        collection.auto_register_layers(
            list(variables.values()), batch_size=CASES // towers
        )
        optimizer = kfac.PeriodicInvCovUpdateKfacOpt(
            learning_rate=0.1,
            damping=0.05,
            layer_collection=collection,
            estimation_mode="exact",
            batch_size=CASES,
            dtype="float64",
            **{**PERIODS, **options},
        )
        step = optimizer.minimize(tf.add_n(losses) / towers)
        configuration = tf1.ConfigProto(
            device_count={"CPU": len(DEVICES)}, operation_timeout_in_ms=TIMEOUT_MS
        )
        with tf1.Session(config=configuration) as session:
            session.run(tf1.global_variables_initializer())
            for _ in range(STEPS):
                session.run(step)
            found = session.run(variables)
        return found, {
            variable.device for variable in graph.get_collection("variables")
        }


@pytest.mark.parametrize("strategy", ["separate", "concat"])
@pytest.mark.parametrize("kind", V1_KINDS)
def test_towers_train_as_the_whole_batch_on_one_device(kind, strategy):
    before = fisher_factors.TOWER_STRATEGY
    expected, _ = trained(kind, towers=1)
    fisher_factors.set_global_constants(tower_strategy=strategy)
    try:
        found, _ = trained(kind, towers=2)
    finally:
        fisher_factors.set_global_constants(tower_strategy=before)
    for name, value in parameters().items():
        # Float64, so only the order of sums differs.
        np.testing.assert_allclose(found[name], expected[name], atol=1e-12)
        assert np.abs(found[name] - value).max() > 1e-2


@pytest.mark.parametrize(
    "options",
    [{}, {"inv_assignment": "largest_first"}, {"trans_devices": DEVICES[1:]}],
    ids=["in turn", "largest first", "products, too"],
)
@pytest.mark.parametrize("kind", V1_KINDS)
def test_devices_that_share_the_work_change_nothing(kind, options):
    expected, no_devices = trained(kind, towers=2)
    found, devices = trained(
        kind,
        towers=2,
        placement_strategy="round_robin",
        cov_devices=DEVICES[:2],
        inv_devices=DEVICES[2:],
        **options,
    )
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-12)
    # Covariances live where they are updated.
    assert devices - no_devices == {"/device:CPU:0", "/device:CPU:1"}
