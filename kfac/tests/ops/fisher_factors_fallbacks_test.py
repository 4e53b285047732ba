"""What dense factors serve when a matrix cannot be inverted."""

import unittest.mock

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config
from kfac.tests.ops.fisher_factor_cases import damping_func
from kfac.tests.ops.fisher_factor_dummy import Dummy

tf1 = tf.compat.v1


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as new_graph:
        yield new_graph


def failing_factor(register):
    """A factor whose average is set by hand, and its running session."""
    factor = Dummy((2, 2))
    factor.instantiate_cov_variables()
    register(factor)
    factor.instantiate_inv_variables()
    value = tf1.placeholder(tf.float64, (2, 2))
    move = factor._cov.add_to_average(value, decay=0.0, weight=1.0)
    ops = factor.make_inverse_update_ops()
    session = tf1.Session()
    session.run(tf1.global_variables_initializer())

    def update(matrix):
        session.run(move, {value: matrix})
        session.run(ops)
        return session.run([factor.get_inv_vars()[0], factor.fallbacks])

    return factor, update, session, ops


KINDS = {
    "inverse": lambda factor: factor.register_inverse(damping_func(0.5)),
    "cholesky": lambda factor: factor.register_cholesky(damping_func(0.5)),
    "cholesky_inverse": lambda factor: factor.register_cholesky_inverse(
        damping_func(0.5)
    ),
    "power": lambda factor: factor.register_matpower(-0.5, damping_func(0.5)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nan_keeps_the_last_good_result_and_is_counted(kind):
    _, update, session, _ = failing_factor(KINDS[kind])
    good, fallbacks = update(np.diag([1.0, 2.0]))
    assert fallbacks == 0 and np.isfinite(good).all()
    for count in (1, 2):
        kept, fallbacks = update(np.full((2, 2), np.nan))
        np.testing.assert_array_equal(kept, good)
        assert fallbacks == count
    session.close()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_before_any_good_result_gives_the_identity(kind):
    _, update, session, _ = failing_factor(KINDS[kind])
    result, fallbacks = update(np.full((2, 2), np.nan))
    np.testing.assert_array_equal(result, np.eye(2))
    assert fallbacks == 1
    session.close()


def test_a_slightly_indefinite_matrix_is_inverted_with_jitter_and_counted():
    _, update, session, _ = failing_factor(KINDS["inverse"])
    # Damped diagonal (2.5, -1e-3): of the jitters 1e-6, 1e-4 and 1e-2 times the mean
    # absolute diagonal, 1.2505, the last one repairs it.
    result, fallbacks = update(np.diag([2.0, -0.501]))
    jitter = 1e-2 * (2.5 + 1e-3) / 2
    expected = np.diag([1 / (2.5 + jitter), 1 / (jitter - 1e-3)])
    np.testing.assert_allclose(result, expected, rtol=1e-9)
    assert fallbacks == 1
    session.close()


def test_a_very_indefinite_matrix_keeps_the_last_good_inverse():
    _, update, session, _ = failing_factor(KINDS["inverse"])
    good, _ = update(np.eye(2))
    kept, fallbacks = update(np.diag([2.0, -5.0]))
    np.testing.assert_array_equal(kept, good)
    assert fallbacks == 1
    session.close()


def test_without_statistics_inverses_keep_their_values_and_nothing_is_counted():
    factor, update, session, ops = failing_factor(KINDS["inverse"])
    session.run(ops)
    assert not session.run(factor.get_inv_vars()[0]).any()
    update(np.eye(2))
    session.run(factor._cov.reset())
    session.run(ops)
    value, fallbacks = session.run([factor.get_inv_vars()[0], factor.fallbacks])
    np.testing.assert_allclose(value, np.eye(2) / 1.5)
    assert fallbacks == 0
    session.close()


def test_an_average_that_is_not_debiased_is_inverted_from_the_start():
    # It holds what it is meant to hold, zeros; only 0 / 0 is no statistic.
    with config.override(zero_debias=False):
        factor, _, session, ops = failing_factor(KINDS["inverse"])
    session.run(ops)
    inverse, fallbacks = session.run([factor.get_inv_vars()[0], factor.fallbacks])
    np.testing.assert_allclose(inverse, 2 * np.eye(2))
    assert fallbacks == 0
    session.close()


def test_anything_with_a_value_may_stand_for_the_average():
    factor = Dummy((2, 2))
    # A mock has every attribute, also those of a debiased average.
    factor._cov = unittest.mock.MagicMock(value=tf.zeros([2, 2], tf.float64))
    KINDS["inverse"](factor)
    factor.instantiate_inv_variables()
    ops = factor.make_inverse_update_ops()
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        session.run(ops)
        inverse = session.run(factor.get_inv_vars()[0])
    np.testing.assert_allclose(inverse, 2 * np.eye(2))


def test_statistics_that_are_all_zero_are_statistics():
    # A dead layer's average is a zero matrix; its damped inverse is I / damping.
    _, update, session, _ = failing_factor(KINDS["inverse"])
    result, fallbacks = update(np.zeros((2, 2)))
    np.testing.assert_allclose(result, 2 * np.eye(2))
    assert fallbacks == 0
    session.close()
