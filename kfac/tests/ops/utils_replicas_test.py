"""Two replicas of a MirroredStrategy on two logical CPUs.

Logical devices must be set up before TensorFlow starts, so one other process does all
the work, and the tests look at what it found.
"""

import json
import pathlib
import subprocess
import sys

import pytest
import tensorflow as tf

from kfac.python.ops import config, utils

tf1 = tf.compat.v1

PROGRAM = """
import json
import tensorflow as tf
from kfac.python.ops import state, utils

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
store = state.VariableStore()
found = {}

with strategy.scope():
    plain = tf.Variable(0.0, trainable=False)
    unsynced = tf.Variable(0.0, trainable=False)
    counter = tf.Variable(
        0, dtype=tf.int64, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
    )
    w = tf.Variable([1.0, 2.0])
    found["cross-replica"] = {
        "all_average": float(utils.all_average(tf.constant(4.0))),
        "all_sum": float(utils.all_sum(tf.constant(4.0))),
        "num_replicas": utils.get_num_replicas(),
        "replica_id": utils.get_replica_id(),
    }
    utils.smart_assign(plain, 7.0)
    found["cross-replica"]["assigned"] = [
        float(v) for v in strategy.experimental_local_results(plain)
    ]


@tf.function(autograph=False)
def train_step(predicate):
    def replica():
        index = tf.cast(utils.get_replica_id(), tf.float32)
        facts.update(
            num=utils.get_num_replicas(),
            replicated=utils.is_replicated(),
            tpu=utils.is_tpu_replicated(),
            int=utils.preferred_int_dtype().name,
        )
        sums = utils.all_sum({"a": index, "b": (index + 1.0, tf.stack([index, 3.0]))})
        means = utils.all_average([index, 10.0 * index])
        utils.smart_assign(plain, 1.0 + 2.0 * index)
        utils.smart_assign(unsynced, 5.0 + index, force_sync=False)
        utils.smart_assign(counter, tf.constant(3, tf.int64))
        with store.as_default():
            average = utils.MovingAverageVariable("average", [], tf.float32)
        # A collective in the branch: each replica must contribute its own value.
        done = utils.smart_cond(
            predicate,
            lambda: average.add_to_average(utils.all_average(1.0 + index)),
            lambda: None,
        )
        with tf.control_dependencies([done]):
            value = tf.identity(average.value)
        y = w * w
        products = utils.fwd_gradients([y], [w], stop_gradients=[w])
        uses = utils.SubGraph([y]).variable_uses(w)
        gathered = utils.map_gather([lambda: index, lambda: 2.0 * index])
        return {
            "sums": tf.nest.flatten(sums),
            "means": means,
            "plain": plain + 0.0,
            "unsynced": unsynced + 0.0,
            "counter": counter + 0,
            "average": value,
            "products": products[0],
            "uses": tf.constant(uses),
            "gathered": gathered,
        }

    return strategy.run(replica)


@tf.function(autograph=False)
def reduce_per_replica():
    values = strategy.run(lambda: tf.cast(utils.get_replica_id(), tf.float32))
    with strategy.scope():
        return utils.all_average(values), utils.all_sum([values])


def local(structure):
    def of_replica(i):
        return tf.nest.map_structure(
            lambda v: strategy.experimental_local_results(v)[i].numpy().tolist(),
            structure,
        )

    return [of_replica(i) for i in range(2)]


facts = {}
found["not due"] = local(train_step(tf.constant(False)))
found["due"] = local(train_step(tf.constant(True)))
found["facts"] = facts
found["reduced"] = [float(v) for v in tf.nest.flatten(reduce_per_replica())]
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=pathlib.Path(__file__).parents[3],
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.split("FOUND")[1])


def test_replicas_know_their_number(found):
    assert found["facts"] == {
        "num": 2,
        "replicated": True,
        "tpu": False,
        "int": "int64",
    }


def test_reductions_cover_a_whole_structure(found):
    for replica in found["due"]:
        assert replica["sums"] == [1.0, 3.0, [1.0, 6.0]]
        assert replica["means"] == [0.5, 5.0]


def test_a_plain_value_in_cross_replica_context_is_one_value_already(found):
    cross = found["cross-replica"]
    assert (cross["all_average"], cross["all_sum"]) == (4.0, 4.0)
    assert (cross["num_replicas"], cross["replica_id"]) == (2, 0)


def test_per_replica_values_in_cross_replica_context_are_reduced(found):
    assert found["reduced"] == [0.5, 1.0]


def test_an_assignment_in_cross_replica_context_reaches_every_copy(found):
    assert found["cross-replica"]["assigned"] == [7.0, 7.0]


def test_a_synchronised_assignment_gives_every_copy_the_mean(found):
    assert [replica["plain"] for replica in found["due"]] == [2.0, 2.0]
    assert [replica["counter"] for replica in found["due"]] == [3, 3]


def test_an_unsynchronised_assignment_writes_the_replicas_own_copy(found):
    assert [replica["unsynced"] for replica in found["due"]] == [5.0, 6.0]


def test_a_conditional_runs_each_replicas_own_branch(found):
    assert [replica["average"] for replica in found["not due"]] == [0.0, 0.0]
    assert [replica["average"] for replica in found["due"]] == [1.5, 1.5]


def test_derivatives_and_use_counts_see_the_replicas_copy(found):
    for replica in found["due"]:
        assert replica["products"] == [2.0, 4.0]
        assert replica["uses"] == 1


def test_every_replica_computes_every_gathered_thunk(found):
    assert [replica["gathered"] for replica in found["due"]] == [[0.0, 0.0], [1.0, 2.0]]


def test_without_replicas_everything_is_the_plain_operation():
    assert utils.get_tf_replicator() is None
    assert not utils.is_replicated() and not utils.is_tpu_replicated()
    assert (utils.get_num_replicas(), utils.get_replica_id()) == (1, 0)
    assert utils.preferred_int_dtype() == tf.int64
    structure = {"a": tf.constant(1.0)}
    assert utils.all_sum(structure) is utils.all_average(structure) is structure
    assert utils.map_gather([lambda: 1, lambda: 2]) == (1, 2)
    chosen = utils.smart_cond(tf.constant(True), lambda: 1, lambda: 2)
    assert int(chosen) == 1


def test_an_assignment_casts_only_if_it_is_told_to():
    v = tf.Variable(1.0, dtype=tf.float64)
    value = tf.constant(3.0, tf.float32)
    with pytest.raises((TypeError, ValueError)):
        utils.smart_assign(v, value)
    utils.smart_assign(v, value, force_cast=True)
    assert float(v) == 3.0
    utils.smart_assign(v, 2.0, assign_fn=tf1.assign_add)
    assert float(v) == 5.0


class FakeReplicator:
    num_replicas_in_sync = 4
    current_replica_id = 2

    def all_sum(self, structure, name=None):
        return tf.nest.map_structure(lambda value: 4 * value, structure)

    def map_gather(self, thunks, name=None):
        return [10 * thunk() for thunk in thunks]


def test_an_installed_replicator_takes_over():
    with config.override():
        utils.set_global_constants(tf_replicator=FakeReplicator())
        assert isinstance(utils._TF_REPLICATOR, FakeReplicator)
        assert utils.get_tf_replicator() is utils._TF_REPLICATOR
        assert utils.is_replicated()
        assert (utils.get_num_replicas(), utils.get_replica_id()) == (4, 2)
        assert utils.all_sum([1.0]) == [4.0]
        assert utils.all_average([1.0]) == [1.0]
        assert utils.map_gather([lambda: 1, lambda: 2]) == (10, 20)
        utils._TF_REPLICATOR = None
        assert not utils.is_replicated()


def test_something_else_than_a_replicator_is_refused():
    with pytest.raises(TypeError, match="tf.distribute"):
        utils.set_global_constants(tf_replicator=object())
    assert utils.get_tf_replicator() is None


def test_set_global_constants_leaves_alone_what_is_not_given():
    with config.override():
        utils.set_global_constants(posdef_inv_method="eig")
        utils.set_global_constants()
        assert utils.POSDEF_INV_METHOD == "eig"
        assert utils.POSDEF_EIG_METHOD == "self_adjoint"
        utils.set_global_constants(posdef_eig_method="svd")
        assert utils.POSDEF_INV_METHOD == "eig"
        assert utils.POSDEF_EIG_METHOD == "svd"


def test_a_mirrored_variable_wrapper_can_be_hashed_by_its_op():
    with tf.Graph().as_default():
        v = tf1.get_variable("v", [2], use_resource=True)
        wrapped = utils.MirroredVariableWrapper(v)
        assert isinstance(wrapped.op, utils.DistributedVarOp)
        assert (wrapped.op.name, wrapped.op.type) == ("v", "VarHandleOp")
        assert wrapped.op.graph is v.graph
        assert wrapped.shape == [2]
