"""Factors in every kind of graph: v1 sessions, functions, branches, XLA."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import fisher_factors as ff
from kfac.tests import graph_kinds
from kfac.tests.ops import fisher_factor_cases as cases
from kfac.tests.ops.fisher_factor_cases import damping_func


def dense_and_diagonal_step():
    """One statistics and one inverse update of both families, then their results."""
    inputs = tf.constant([[1.0, 2.0], [3.0, -1.0]], tf.float64)
    grads = tf.constant([[0.5, 1.0, 2.0], [1.0, 0.0, -1.0]], tf.float64)
    dense = ff.FullyConnectedKroneckerFactor(((inputs,),), True)
    dense.set_name("dense/input")
    diagonal = ff.FullyConnectedDiagonalFactor((inputs,), ((grads,),))
    diagonal.set_name("dense/diagonal")
    damping = damping_func(0.1)
    for factor in (dense, diagonal):
        factor.register_inverse(damping) if factor is dense else None
        factor.register_matpower(-0.5, damping)
        factor.register_cholesky(damping)
        factor.instantiate_cov_variables()
        factor.instantiate_inv_variables()
    updates = [f.make_covariance_update_op(0.9, 1.0) for f in (dense, diagonal)]
    with tf.control_dependencies(updates):
        inverse_updates = dense.make_inverse_update_ops()
    with tf.control_dependencies(inverse_updates):
        return [
            tf.convert_to_tensor(tensor)
            for tensor in (
                dense.cov,
                dense.get_inverse(damping).to_dense(),
                dense.get_matpower(-0.5, damping).to_dense(),
                dense.get_cholesky(damping).to_dense(),
                diagonal.cov,
                diagonal.get_matpower(-0.5, damping).to_dense(),
            )
        ]


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
def test_both_families_work_in_every_kind_of_graph(kind):
    # XLA's own eigensolver iterates until about 1e-7, whatever the dtype.
    tolerance = 1e-5 if kind == graph_kinds.XLA else 1e-9
    run = graph_kinds.Run(kind, dense_and_diagonal_step)
    run()
    cov, inverse, root, lower, squares, diagonal_root = run()
    rows = np.array([[1.0, 2.0, 1.0], [3.0, -1.0, 1.0]])
    expected = rows.T @ rows / 2
    damped = expected + 0.1 * np.eye(3)
    np.testing.assert_allclose(cov, expected, rtol=1e-12)
    np.testing.assert_allclose(inverse, np.linalg.inv(damped), rtol=tolerance)
    np.testing.assert_allclose(root @ root @ damped, np.eye(3), atol=tolerance)
    np.testing.assert_allclose(lower @ lower.T, damped, rtol=1e-9)
    grads = np.array([[0.5, 1.0, 2.0], [1.0, 0.0, -1.0]])
    expected = (rows[:, :2] ** 2).T @ grads**2 / 2
    np.testing.assert_allclose(squares, expected, rtol=1e-12)
    np.testing.assert_allclose(
        np.diag(diagonal_root), (expected.ravel() + 0.1) ** -0.5, rtol=1e-9
    )


def test_traces_of_a_function_share_state_by_stable_name():
    run = graph_kinds.Run(graph_kinds.FUNCTION, dense_and_diagonal_step)
    run()
    names = set(run.store.named_variables())
    # Built again in a second trace of its own, on the state of the first.
    again = graph_kinds.Run(graph_kinds.FUNCTION, dense_and_diagonal_step)
    again.store._by_name.update(run.store.named_variables())
    again()
    assert set(again.store.named_variables()) == names
    total_weight = again.store.named_variables()["dense/input/cov/total_weight"]
    np.testing.assert_allclose(total_weight.numpy(), 1.9)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_class_takes_its_statistics_in_both_worlds(case, kind):
    data = case.data(0)

    def build():
        tensors = cases.map_data(tf.constant, data, case.ids)
        factor = case.build(*cases.map_data(cases.deferred_of, tensors))
        factor.register_matpower(-1, damping_func(0.3))
        factor.instantiate_cov_variables()
        factor.instantiate_inv_variables()
        with tf.control_dependencies([factor.make_covariance_update_op(1.0, 1.0)]):
            updates = factor.make_inverse_update_ops() or [tf.no_op()]
        with tf.control_dependencies(updates):
            inverse = factor.get_matpower(-1, damping_func(0.3)).to_dense()
            return tf.identity(factor.cov), tf.convert_to_tensor(inverse)

    cov, inverse = graph_kinds.Run(kind, build)()
    np.testing.assert_allclose(cov, case.expected_total(data), rtol=1e-11, atol=1e-12)
    assert np.isfinite(inverse).all() and inverse.any()
