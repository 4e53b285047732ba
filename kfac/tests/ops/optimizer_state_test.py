"""State: checkpoints, several traces, slots, metrics and logs."""

import re

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import state
from kfac.tests import graph_kinds
from kfac.tests.ops import kfac_oracle, optimizer_cases

tf1 = tf.compat.v1

OPTIONS = {
    "momentum_type": "qmodel",
    "learning_rate": None,
    "momentum": None,
    "cov_update_every": 2,
    "invert_every": 3,
    "adapt_damping": True,
    "damping_adaptation_interval": 3,
}


def adaptive_optimizer(model, **options):
    return optimizer_cases.make_optimizer(
        model,
        **{**OPTIONS, "loss_fn": model.loss_fn, "train_batch": model.batch, **options},
    )


def assert_identical(actual, expected):
    for got, want in zip(
        tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_a_session_continues_from_a_saver_bit_for_bit(tmp_path):
    with tf.Graph().as_default() as graph:
        model = optimizer_cases.Model()
        opt = adaptive_optimizer(model)
        train_op = opt.minimize(model.loss)
        variables = tf1.global_variables()
        saver = tf1.train.Saver()
    with tf1.Session(graph=graph) as session:
        with graph.as_default():
            initializer = tf1.global_variables_initializer()
        session.run(initializer)
        for _ in range(4):
            session.run(train_op)
        path = saver.save(session, str(tmp_path / "model"))
        for _ in range(4):
            session.run(train_op)
        expected = session.run(variables)
    with tf1.Session(graph=graph) as session:
        saver.restore(session, path)
        for _ in range(4):
            session.run(train_op)
        assert_identical(session.run(variables), expected)


def test_object_checkpoints_of_the_optimizer_hold_the_velocities(tmp_path):
    with tf.Graph().as_default(), tf1.Session() as session:
        model = optimizer_cases.Model()
        opt = optimizer_cases.make_optimizer(model, learning_rate=0.1)
        train_op = opt.minimize(model.loss)
        session.run(tf1.global_variables_initializer())
        session.run(train_op)
        checkpoint = tf.train.Checkpoint(opt=opt, w1=model.variables[0])
        path = checkpoint.write(str(tmp_path / "checkpoint"))
        slot = opt.get_slot(model.variables[0], "velocity")
        saved = session.run(slot)
        session.run(slot.assign(tf.zeros_like(slot)))
        checkpoint.read(path).run_restore_ops()
        np.testing.assert_array_equal(session.run(slot), saved)


class TrainStep:
    """A `tf.function` that trains on the batch it is given, and its state."""

    def __init__(self):
        self.store = state.VariableStore()
        params, self.batch = kfac_oracle.problem()
        self.variables = [
            tf.Variable(value, name=name)
            for value, name in zip(params, kfac_oracle.NAMES, strict=True)
        ]
        self.traces = 0
        self.function = tf.function(self._train)
        self.checkpoint = tf.train.Checkpoint(state=self.store, model=self.variables)

    @tf.autograph.experimental.do_not_convert
    def _train(self, x, y):
        self.traces += 1
        with self.store.as_default():
            model = optimizer_cases.Model(batch=(x, y), variables=self.variables)
            opt = adaptive_optimizer(model, batch_size=tf.shape(x)[0])
            opt.minimize(model.loss)
            return opt.step_metrics()

    def __call__(self, cases=6):
        x, y = (tf.constant(part[:cases]) for part in self.batch)
        return self.function(x, y)

    def values(self):
        variables = [*self.variables, *self.store.named_variables().values()]
        return [variable.numpy() for variable in variables]


def test_a_function_continues_from_a_checkpoint_bit_for_bit(tmp_path):
    train = TrainStep()
    for _ in range(4):
        train()
    path = train.checkpoint.write(str(tmp_path / "checkpoint"))
    for _ in range(4):
        train()
    other = TrainStep()
    other()
    other.checkpoint.read(path).assert_consumed()
    for _ in range(4):
        other()
    assert_identical(other.values(), train.values())


def test_two_traces_train_on_with_one_state():
    train = TrainStep()
    train()
    names = list(train.store.named_variables())
    before = train.traces
    assert train(cases=4)["counter"].numpy() == 2
    assert train.traces == before + 1
    assert list(train.store.named_variables()) == names
    assert train()["counter"].numpy() == 3
    assert train.traces == before + 1


def test_state_has_stable_names():
    train = TrainStep()
    train()
    names = set(train.store.named_variables())
    assert {"KFAC/damping", "KFAC/counter", "KFAC/burnin_counter"} <= names
    assert {f"KFAC/{name}/KFAC" for name in kfac_oracle.NAMES} <= names
    assert "KFAC/FisherEstimator/w1/input/cov/var" in names


def test_parameters_of_one_name_have_velocities_of_their_own():
    store = state.VariableStore()
    parameters = [tf.Variable([1.0]), tf.Variable([2.0])]
    assert parameters[0].name == parameters[1].name

    @tf.function
    @tf.autograph.experimental.do_not_convert
    def update():
        with store.as_default():
            opt = optimizer_cases.make_base_optimizer(var_list=parameters)
            vectors = [(2 * p, p) for p in parameters]
            return [v for v, _ in opt._update_velocities(vectors, 0.5)]

    update()
    # 2 p, then 0.5 * 2 p + 2 p.
    np.testing.assert_allclose(update(), [[3.0], [6.0]])


def test_metrics_describe_the_step_they_wait_for():
    def build():
        model = optimizer_cases.Model()
        opt = adaptive_optimizer(model, damping_adaptation_interval=1)
        opt.minimize(model.loss)
        return opt.step_metrics()

    params, batch = kfac_oracle.problem()
    run = graph_kinds.Run(graph_kinds.V1_OFF, build)
    first = run()
    assert first["counter"] == 1
    np.testing.assert_allclose(first["loss"], kfac_oracle.loss(params, batch))
    # qmodel starts without momentum, with a step that decreases the loss.
    assert first["momentum"] == 0.0
    assert first["learning_rate"] > 0
    assert first["qmodel_change"] < 0
    second = run()
    # rho compares the first step's losses; the second step's starts where it ended.
    reached = first["loss"] + first["rho"] * first["qmodel_change"]
    np.testing.assert_allclose(second["loss"], reached)


def test_metrics_need_a_step():
    with tf.Graph().as_default():
        with pytest.raises(ValueError, match="minimize"):
            optimizer_cases.make_base_optimizer().step_metrics()


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_logs_print_the_step_before_it_is_counted(kind, capfd):
    def build():
        model = optimizer_cases.Model()
        opt = optimizer_cases.make_optimizer(model, learning_rate=0.25, print_logs=True)
        with tf.control_dependencies([opt.minimize(model.loss)]):
            return opt.counter

    run = graph_kinds.Run(kind, build)
    run(), run()
    logs = capfd.readouterr().err
    assert re.findall(r"Iteration (\d+)", logs) == ["0", "1"]
    params, batch = kfac_oracle.problem()
    loss = float(re.search(r"loss = ([\d.]+)", logs)[1])
    np.testing.assert_allclose(loss, kfac_oracle.loss(params, batch), rtol=1e-4)
    for text in ("learning_rate = 0.25", "momentum = 0.9", "damping = 0.02"):
        assert logs.count(text) == 2
    assert logs.count("rho = nan") == logs.count("qmodel_change = nan") == 2


def test_without_logs_nothing_is_printed(capfd):
    def build():
        model = optimizer_cases.Model()
        opt = optimizer_cases.make_optimizer(model, learning_rate=0.25)
        with tf.control_dependencies([opt.minimize(model.loss)]):
            return opt.counter

    graph_kinds.Run(graph_kinds.V1_OFF, build)()
    assert "Iteration" not in capfd.readouterr().err


def test_global_step_counts_steps_and_the_op_is_one():
    with tf.Graph().as_default(), tf1.Session() as session:
        model = optimizer_cases.Model()
        step = tf1.train.get_or_create_global_step()
        opt = optimizer_cases.make_optimizer(model, learning_rate=0.1)
        gradients = opt.compute_gradients(model.loss)
        # Any iterable will do, and is used once.
        train_op = opt.apply_gradients(iter(gradients), global_step=step, name="go")
        assert isinstance(train_op, tf.Operation)
        session.run(tf1.global_variables_initializer())
        session.run(train_op)
        session.run(train_op)
        assert session.run([step, opt.counter]) == [2, 2]
