"""Threads that update the curvature behind a session's back."""

import time

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops.kfac_utils import async_inv_cov_update_kfac_opt as async_opt
from kfac.tests import graph_kinds
from kfac.tests.ops import optimizer_cases

tf1 = tf.compat.v1

PATIENCE = 60.0  # Seconds; a loaded machine may need some of them.


def make(model, cov_devices=None, inv_devices=None, threads=2, **kwargs):
    return async_opt.AsyncInvCovUpdateKfacOpt(
        cov_devices,
        inv_devices,
        num_cov_inv_update_threads=threads,
        **{
            "learning_rate": 0.1,
            "damping": 0.02,
            "layer_collection": model.layers,
            "estimation_mode": "exact",
            **kwargs,
        },
    )


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def session():
    with tf.Graph().as_default() as graph, tf1.Session(graph=graph) as session:
        yield session


def start(session, opt):
    session.run(tf1.global_variables_initializer())
    opt.run_cov_inv_ops(session)


def inverses(session, opt):
    return session.run([inverse for (inverse,) in opt.get_inv_vars()])


def test_threads_keep_updating_while_the_model_trains(session):
    model = optimizer_cases.Model()
    opt = make(model)
    train_op = opt.minimize(model.loss)
    start(session, opt)
    wait_until(lambda: all(np.any(i) for i in inverses(session, opt)))
    first_loss = session.run(model.loss)
    before = inverses(session, opt)
    for _ in range(20):
        session.run(train_op)
    wait_until(
        lambda: all(
            not np.array_equal(x, y)
            for x, y in zip(before, inverses(session, opt), strict=True)
        )
    )
    opt.stop_cov_inv_ops(session)
    assert not any(thread.is_alive() for thread in opt._threads)
    assert session.run(model.loss) < first_loss
    assert session.run(opt.counter) == 20


def test_statistics_are_taken_before_any_inverse(session):
    model = optimizer_cases.Model()
    opt = make(model)
    opt.minimize(model.loss)
    start(session, opt)
    covariances = session.run([c for (c,) in opt.get_cov_vars()])
    assert all(np.isfinite(c).all() for c in covariances)
    opt.stop_cov_inv_ops(session)


def test_threads_can_be_started_again(session):
    model = optimizer_cases.Model()
    opt = make(model)
    opt.minimize(model.loss)
    for _ in range(2):
        start(session, opt)
        with pytest.raises(RuntimeError, match="already"):
            opt.run_cov_inv_ops(session)
        wait_until(lambda: all(np.any(i) for i in inverses(session, opt)))
        opt.stop_cov_inv_ops(session)
    opt.stop_cov_inv_ops(session)


def test_stopping_what_never_ran_is_harmless(session):
    make(optimizer_cases.Model()).stop_cov_inv_ops(session)


def test_ops_are_queued_by_name_in_order_for_ever(session):
    model = optimizer_cases.Model()
    opt = make(model)
    opt.minimize(model.loss)
    names = [session.run(opt._next_op_name) for _ in range(2 * len(opt._ops_by_name))]
    assert names == 2 * [name.encode() for name in sorted(opt._ops_by_name)]
    assert len(opt._ops_by_name) == 2 * len(opt.factors)


def test_a_failing_update_is_reported(session):
    fails = tf1.get_variable(
        "fails", initializer=False, trainable=False, use_resource=True
    )

    def hook(tensor):
        check = tf1.assert_equal(fails, False, message="made to fail")
        with tf.control_dependencies([check]):
            return tf.identity(tensor)

    model = optimizer_cases.Model(hook=hook)
    opt = make(model)
    opt.minimize(model.loss)
    start(session, opt)
    session.run(fails.assign(True))
    wait_until(opt._coord.should_stop)
    with pytest.raises(tf.errors.InvalidArgumentError, match="made to fail"):
        opt.stop_cov_inv_ops(session)
    assert not any(thread.is_alive() for thread in opt._threads)


def test_a_failing_first_pass_is_reported_at_once(session):
    model = optimizer_cases.Model()
    opt = make(model)
    opt.minimize(model.loss)
    with pytest.raises(tf.errors.FailedPreconditionError):
        opt.run_cov_inv_ops(session)  # Nothing is initialized.
    assert not opt._threads


def test_a_session_that_is_closed_ends_the_threads():
    with tf.Graph().as_default() as graph:
        model = optimizer_cases.Model()
        opt = make(model)
        opt.minimize(model.loss)
        with tf1.Session(graph=graph) as session:
            start(session, opt)
    wait_until(lambda: not any(thread.is_alive() for thread in opt._threads))
    opt.stop_cov_inv_ops(session)


def test_threads_never_keep_the_process_alive(session):
    model = optimizer_cases.Model()
    opt = make(model)
    opt.minimize(model.loss)
    start(session, opt)
    assert all(thread.daemon for thread in opt._threads)
    opt.stop_cov_inv_ops(session)


@pytest.mark.parametrize("given, expected", [(3, 3), (None, 4)])
def test_half_as_many_threads_as_ops_run_by_default(session, given, expected):
    model = optimizer_cases.Model()
    opt = make(model, threads=given)
    opt.minimize(model.loss)
    assert len(opt._ops_by_name) == 8
    assert opt._num_threads() == expected


def test_the_number_of_threads_is_capped(session):
    opt = make(optimizer_cases.Model(), threads=None)
    opt._ops_by_name = dict.fromkeys(range(100))
    assert opt._num_threads() == async_opt._MAX_NUM_COV_INV_UPDATE_THREADS == 10
    opt._ops_by_name = {"one": None}
    assert opt._num_threads() == 1


def test_devices_are_forwarded(session):
    model = optimizer_cases.Model()
    opt = make(model, cov_devices=["/cpu:0"], inv_devices=["/cpu:1", "/cpu:2"])
    opt.minimize(model.loss)
    devices = {op.device[-5:].upper() for op in opt._ops_by_name.values()}
    assert devices == {"CPU:0", "CPU:1", "CPU:2"}


def test_only_one_train_op_can_be_made(session):
    model = optimizer_cases.Model()
    opt = make(model)
    opt.minimize(model.loss)
    with pytest.raises(RuntimeError, match="once"):
        opt.minimize(model.loss)


def test_threads_need_a_train_op(session):
    with pytest.raises(RuntimeError, match="minimize"):
        make(optimizer_cases.Model()).run_cov_inv_ops(session)


def test_the_placement_strategy_is_not_negotiable(session):
    with pytest.raises(TypeError):
        make(optimizer_cases.Model(), placement_strategy="round_robin")


def test_no_thread_at_all_is_refused(session):
    with pytest.raises(ValueError, match="num_cov_inv_update_threads"):
        make(optimizer_cases.Model(), threads=0)


def test_functions_are_told_to_use_another_optimizer():
    def build():
        model = optimizer_cases.Model()
        return make(model).minimize(model.loss)

    with pytest.raises(RuntimeError, match="Periodic"):
        graph_kinds.Run(graph_kinds.FUNCTION, build)()
