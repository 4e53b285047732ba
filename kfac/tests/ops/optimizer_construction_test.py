"""A constructor that raises leaves nothing behind, so it can be called again."""

import numpy as np
import pytest
import tensorflow as tf

import kfac
from kfac.python.ops import config, layer_collection, utils
from kfac.tests import graph_kinds
from kfac.tests.ops import optimizer_cases

tf1 = tf.compat.v1

CLASSES = {
    "plain": lambda **kwargs: kfac.KfacOptimizer(**kwargs),
    "periodic": lambda **kwargs: kfac.PeriodicInvCovUpdateKfacOpt(**kwargs),
    "asynchronous": lambda **kwargs: kfac.AsyncInvCovUpdateKfacOpt(
        cov_devices=None, inv_devices=None, **kwargs
    ),
}


class Replicator:
    """Stands in for `tf.distribute`."""

    num_replicas_in_sync = 2
    current_replica_id = 0

    def all_sum(self, tensors):
        return tensors

    def map_gather(self, thunks):
        return [thunk() for thunk in thunks]


# Arguments that nothing but the estimator or the state refuses.
REFUSED = {
    "unknown keyword": ({"cov_device": ["/cpu:0"]}, TypeError),
    "unknown assignment": ({"inv_assignment": "by_name"}, ValueError),
    "statistics of unknown batch": ({"compute_params_stats": True}, ValueError),
    "unknown dtype": ({"dtype": "float31"}, TypeError),
    "integer dtype": ({"dtype": "int32"}, ValueError),
    "variables that are no list": ({"var_list": 3}, TypeError),
    "negative batch": ({"batch_size": -1}, ValueError),
    "half a case": ({"batch_size": 0.5}, ValueError),
    "sizes of several batches": ({"batch_size": [4, 4]}, ValueError),
    "a batch size in words": ({"batch_size": "four"}, ValueError),
    "empty part of the batch": ({"cov_batch_fraction": 0.0}, ValueError),
    "bad keyword with a replicator": (
        {"tf_replicator": Replicator(), "cov_device": None},
        TypeError,
    ),
}
PLACEMENT = {
    "unknown placement": ({"placement_strategy": "here"}, ValueError),
    "replicas of one": ({"placement_strategy": "replica_round_robin"}, ValueError),
}


def make(which, **kwargs):
    arguments = {
        "learning_rate": 0.1,
        "damping": 0.02,
        "adapt_damping": True,
        "layer_collection": layer_collection.LayerCollection(),
    }
    return CLASSES[which](**{**arguments, **kwargs})


def names_of_variables():
    return [v.op.name for v in tf1.global_variables()]


@pytest.mark.parametrize("which", CLASSES)
def test_a_refused_construction_leaves_no_variable_and_can_be_repeated(which):
    with tf.Graph().as_default():
        make(which)
        expected = names_of_variables()
    refused = {**REFUSED, **(PLACEMENT if which != "asynchronous" else {})}
    for arguments, error in refused.values():
        settings = config.settings()
        with tf.Graph().as_default() as graph:
            collection = layer_collection.LayerCollection()
            for _ in range(2):
                with pytest.raises(error):
                    make(which, layer_collection=collection, **arguments)
            assert config.settings() is settings
            assert not graph.get_operations()
            make(which, layer_collection=collection)
            assert names_of_variables() == expected


def test_a_refused_construction_does_not_take_its_name_in_a_trace():
    refused = []

    def build():
        if not refused:  # A second trace finds the state of the first.
            # The state itself cannot be made: its start is known only to the function.
            with pytest.raises(ValueError, match="initial damping") as error:
                make("plain", damping=tf.random.uniform([]))
            refused.append(error)
        with pytest.raises(TypeError):
            make("plain", cov_device=None)
        return make("plain").counter

    run = graph_kinds.Run(graph_kinds.FUNCTION, build)
    assert run() == 0
    assert "KFAC/damping" in run.store.named_variables()
    assert not [name for name in run.store.named_variables() if "_1" in name]


def test_an_accepted_replicator_stays_installed():
    replicator = Replicator()
    with config.override(), tf.Graph().as_default():
        make("plain", tf_replicator=replicator)
        assert utils.get_tf_replicator() is replicator


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_the_preconditioner_follows_an_adapted_damping(kind):
    def build():
        opt = make("plain", dtype="float64", precon_damping_mult=4.0)
        before = tf.identity(tf.convert_to_tensor(opt._fisher_est.damping))
        with tf.control_dependencies([before]):
            written = opt._store(opt._damping, tf.constant(0.5, tf.float64))
        with tf.control_dependencies([written]):
            return before, opt._fisher_est.damping + 0.0

    before, after = graph_kinds.Run(kind, build)()
    assert before == np.float64(0.02) * 4
    assert after == 2.0


FINITE = "learning_rate momentum weight_decay_coeff"
NOT_NEGATIVE = "damping min_damping l2_reg precon_damping_mult"
BETWEEN = "cov_ema_decay damping_adaptation_decay"
LIMITS = "damping_decrease_rho_threshold damping_increase_rho_threshold"
NO_SCALAR = ["x", [1.0], (0.5,), np.ones(2), {}, object(), float("nan")]
OUT_OF_RANGE = {
    **{name: [float("inf"), -float("inf"), None] for name in FINITE.split()},
    **{name: [float("inf"), -1.0, None] for name in NOT_NEGATIVE.split()},
    **{name: [1.01, -0.1, None] for name in BETWEEN.split()},
    **{name: [None] for name in LIMITS.split()},
    "norm_constraint": [-1.0],
    "damping_adaptation_interval": [0, 1.5, float("inf"), None],
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_hyper_parameters_are_scalars_in_their_range(name):
    with tf.Graph().as_default() as graph:
        for value in [*NO_SCALAR, *OUT_OF_RANGE[name]]:
            with pytest.raises(ValueError, match=name):
                make("plain", **{name: value})
        assert not graph.get_operations()
        for value in (tf.ones([2]), tf.constant(float("nan"))):
            with pytest.raises(ValueError, match=name):
                make("plain", **{name: value})
        assert not names_of_variables()
        variable = tf1.get_variable("v", [], trainable=False)
        for i, value in enumerate([1, np.float32(1), np.array(1.0), variable]):
            make("plain", name=f"opt_{i}", **{name: value})


@pytest.mark.parametrize("name", ["invert_every", "cov_update_every"])
def test_periods_are_whole_numbers_of_steps(name):
    with tf.Graph().as_default() as graph:
        for value in (0, -1, 1.5, None, "x", [1], float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{name} counts steps"):
                make("periodic", **{name: value})
        assert not graph.get_operations()
        for i, value in enumerate([2, 2.0, np.int64(2)]):
            opt = make("periodic", name=f"opt_{i}", **{name: value})
            assert type(getattr(opt, f"_{name}")) is int


def test_a_loss_function_must_be_callable():
    with tf.Graph().as_default(), pytest.raises(ValueError, match="loss_fn"):
        make("plain", loss_fn=tf.constant(1.0))


@pytest.mark.parametrize(
    "batch_size", [7, 7.0, np.int64(7), np.float32(7), np.array(7)]
)
def test_whole_numbers_of_any_kind_are_static_batch_sizes(batch_size):
    with tf.Graph().as_default():
        model = optimizer_cases.Model()
        opt = optimizer_cases.make_base_optimizer(model, batch_size=batch_size)
        assert type(opt._fisher_est._batch_size) is int
        cov_thunks, _ = opt.make_vars_and_create_op_thunks()
        with pytest.raises(ValueError, match="but 7 are expected"):
            cov_thunks[0]()


def test_a_tensor_is_a_batch_size_that_is_checked_when_it_runs():
    with tf.Graph().as_default(), tf1.Session() as session:
        model = optimizer_cases.Model()
        size = tf1.placeholder_with_default(7, [])
        opt = optimizer_cases.make_base_optimizer(model, batch_size=size)
        cov_thunks, _ = opt.make_vars_and_create_op_thunks()
        update = cov_thunks[0]()
        session.run(tf1.global_variables_initializer())
        with pytest.raises(tf.errors.InvalidArgumentError, match="dynamic number"):
            session.run(update)


@pytest.mark.parametrize("size", [np.int64(3), 3.0, np.array(3)])
def test_generic_towers_of_whole_numbers_have_a_static_size(size):
    with tf.Graph().as_default():
        collection = layer_collection.LayerCollection()
        variable = graph_kinds.variable(np.zeros(2), "v")
        collection.register_generic(variable, size)
        collection.register_generic(variable, 4, reuse=True)
        (block,) = collection.get_blocks()
        assert block._total_batch() == 7
        assert type(block._total_batch()) is int
