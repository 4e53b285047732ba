"""Matrix functions that dense factors keep: which, by what, and when."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config, errors
from kfac.python.ops.utils import MovingAverageVariable
from kfac.tests.ops.fisher_factor_cases import damping_func
from kfac.tests.ops.fisher_factor_dummy import Dummy, FixedCov

tf1 = tf.compat.v1


def spd(size=3, seed=0):
    half = np.random.RandomState(seed).randn(size, size)
    return half @ half.T / size + 0.1 * np.eye(size)


def run_updates(factor, fetches, times=1):
    ops = factor.make_inverse_update_ops()
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        for _ in range(times):
            session.run(ops)
        return session.run(fetches)


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as new_graph:
        yield new_graph


def ops_of_type(graph, *types):
    """Names of ops of these types in a graph and in its loop and branch bodies."""
    found = [op.name for op in graph.get_operations() if op.type in types]
    for function in graph.as_graph_def().library.function:
        found += [node.name for node in function.node_def if node.op in types]
    return found


def test_equal_damping_ids_share_one_variable_and_others_do_not():
    factor = Dummy((2, 2))
    dampings = [
        damping_func(0.1, "a"),
        damping_func(0.1, "a"),
        damping_func(1e-5, "b"),
        damping_func(1e-5, "b"),
    ]
    for damping in dampings:
        factor.register_inverse(damping)
    factor.instantiate_inv_variables()
    dense = [factor.get_inverse(damping).to_dense() for damping in dampings]
    assert dense[0] is dense[1] and dense[2] is dense[3] and dense[0] is not dense[2]
    in_scope = tf1.get_collection(tf1.GraphKeys.GLOBAL_VARIABLES, "dummy/a_b_c")
    assert in_scope == factor.get_inv_vars() == [dense[0], dense[2]]
    assert [v.name for v in in_scope] == [
        "dummy/a_b_c/matpower_exp-1_dampa:0",
        "dummy/a_b_c/matpower_exp-1_dampb:0",
    ]
    assert not any(variable.trainable for variable in tf1.global_variables())


def test_registrations_keep_their_order_and_compare_like_sets():
    factor = Dummy((2, 2))
    ids = [f"damping{i}" for i in range(6)]
    for func_id in ids:
        factor.register_matpower(np.float64(-0.5), damping_func(0.1, func_id))
        factor.register_matpower(-1.0, damping_func(0.1, func_id))
        factor.register_matpower(-1, damping_func(0.1, func_id))
        factor.register_matpower(1, damping_func(0.1, "never stored"))
        factor.register_cholesky(damping_func(0.1, func_id))
    expected = [(exp, (func_id,)) for func_id in ids for exp in (-0.5, -1)]
    assert list(factor._matpower_registrations) == expected
    assert factor._matpower_registrations == set(expected)
    assert list(factor._cholesky_registrations) == [(func_id,) for func_id in ids]
    assert not factor._cholesky_inverse_registrations
    assert list(factor._damping_funcs_by_id) == [(func_id,) for func_id in ids]
    factor.instantiate_inv_variables()
    names = [variable.op.name for variable in factor.get_inv_vars()]
    assert names[0] == "dummy/a_b_c/matpower_exp-0.5_dampdamping0"
    assert names[1] == "dummy/a_b_c/matpower_exp-1.0_dampdamping0"
    assert names[12] == "dummy/a_b_c/cholesky_dampdamping0"


def test_inverse_variables_start_at_zero_and_are_created_once():
    factor = Dummy((2, 2))
    factor.register_inverse(damping_func(0.1))
    factor.register_cholesky_inverse(damping_func(0.1))
    with config.override(init_inverses_at_zero=False):  # Chosen at import already.
        factor.instantiate_inv_variables()
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        for value in session.run(factor.get_inv_vars()):
            np.testing.assert_array_equal(value, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="already exists"):
        factor.instantiate_inv_variables()


def test_the_first_damping_function_of_an_id_is_the_one_evaluated_once():
    calls = []

    def first():
        calls.append("first")
        return 0.5

    def later():
        raise AssertionError("must not be called")

    factor = Dummy((3, 3), cov=spd())
    for function in (first, later):
        damping = ff_package(function, "same")
        factor.register_inverse(damping)
        factor.register_cholesky(damping)
    factor.instantiate_inv_variables()
    inverse = run_updates(
        factor, factor.get_inverse(ff_package(later, "same")).to_dense()
    )
    assert calls == ["first"]
    np.testing.assert_allclose(inverse, np.linalg.inv(spd() + 0.5 * np.eye(3)))


def ff_package(function, func_id):
    function_with_id = lambda: function()
    function_with_id.func_id = (func_id,)
    return function_with_id


def test_below_the_threshold_each_inverse_has_an_op_and_a_factorisation(graph):
    factor = Dummy((3, 3), cov=spd())
    count = config.settings().eigenvalue_decomposition_threshold - 1
    for i in range(count):
        factor.register_inverse(damping_func(0.1 + i))
    factor.instantiate_inv_variables()
    ops = factor.make_inverse_update_ops()
    assert len(ops) == count
    assert len(ops_of_type(graph, "PartitionedCall")) == count
    # Of one function, which all of them call.
    assert len(ops_of_type(graph, "Cholesky")) == 1
    assert not ops_of_type(graph, "SelfAdjointEigV2")


def test_from_the_threshold_on_one_eigendecomposition_gives_all_inverses(graph):
    factor = Dummy((3, 3), cov=spd())
    count = config.settings().eigenvalue_decomposition_threshold
    dampings = [damping_func(10.0**-i) for i in range(count)]
    for damping in dampings:
        factor.register_inverse(damping)
    factor.instantiate_inv_variables()
    fetches = [factor.get_inverse(damping).to_dense() for damping in dampings]
    results = run_updates(factor, fetches)
    assert len(ops_of_type(graph, "SelfAdjointEigV2")) == 1
    assert not ops_of_type(graph, "Cholesky")
    for damping, result in zip(dampings, results, strict=True):
        expected = np.linalg.inv(spd() + damping() * np.eye(3))
        np.testing.assert_allclose(result, expected, rtol=1e-10)
    assert len(factor.make_inverse_update_ops()) == 1


def test_any_other_power_makes_all_powers_use_the_eigendecomposition(graph):
    factor = Dummy((3, 3), cov=spd())
    factor.register_inverse(damping_func(0.1))
    factor.register_matpower(0.25, damping_func(0.1))
    factor.instantiate_inv_variables()
    assert len(factor.make_inverse_update_ops()) == 1
    assert len(ops_of_type(graph, "SelfAdjointEigV2")) == 1


def test_a_cached_eigendecomposition_is_used_and_then_forgotten(graph):
    factor = Dummy((3, 3), cov=spd())
    factor.register_inverse(damping_func(0.1))
    factor.instantiate_inv_variables()
    first = factor.get_eigendecomp()
    assert factor.get_eigendecomp() is first
    assert len(factor.make_inverse_update_ops()) == 1
    assert not ops_of_type(graph, "Cholesky")
    assert not factor._eigendecomp
    assert factor.get_eigendecomp() is not first


def test_eigendecompositions_do_not_leak_between_graphs():
    factor = Dummy((3, 3), cov=spd())
    here = factor.get_eigendecomp()
    with tf.Graph().as_default() as other:
        factor._cov = FixedCov(tf.constant(spd()))
        there = factor.get_eigendecomp()
    assert there[0].graph is other and here[0].graph is not other


@pytest.mark.parametrize("method", ["self_adjoint", "svd"])
def test_eigenvalues_are_ascending_and_clipped_and_reproduce_the_matrix(method):
    cov = spd(4)
    factor = Dummy((4, 4), cov=cov)
    with config.override(posdef_eig_method=method):
        values, vectors = factor.get_eigendecomp()
        factor._eigendecomp = None
        with config.override(eigenvalue_clipping_threshold=0.7):
            clipped, _ = factor.get_eigendecomp()
    with tf1.Session() as session:
        values, vectors, clipped = session.run([values, vectors, clipped])
    np.testing.assert_allclose(values, np.linalg.eigvalsh(cov), rtol=1e-10)
    np.testing.assert_allclose((vectors * values) @ vectors.T, cov, rtol=1e-10)
    np.testing.assert_allclose(clipped, np.maximum(values, 0.7), rtol=1e-10)


def test_inverse_and_cholesky_factors_at_one_damping_share_a_factorisation(graph):
    factor = Dummy((3, 3), cov=spd())
    damping, other = damping_func(0.1), damping_func(0.2)
    factor.register_inverse(damping)
    factor.register_cholesky(damping)
    factor.register_cholesky_inverse(damping)
    factor.register_cholesky(other)
    factor.instantiate_inv_variables()
    fetches = [
        factor.get_inverse(damping).to_dense(),
        factor.get_cholesky(damping).to_dense(),
        factor.get_cholesky_inverse(damping).to_dense(),
        factor.get_cholesky(other).to_dense(),
    ]
    # The inverse, the pair of Cholesky factors, the lone Cholesky factor.
    assert len(factor.make_inverse_update_ops()) == 3
    assert len(ops_of_type(graph, "Cholesky")) == 2
    inverse, lower, lower_inverse, other_lower = run_updates(factor, fetches)
    damped = spd() + 0.1 * np.eye(3)
    np.testing.assert_allclose(inverse, np.linalg.inv(damped), rtol=1e-10)
    np.testing.assert_allclose(lower, np.linalg.cholesky(damped), rtol=1e-10)
    np.testing.assert_allclose(lower_inverse @ lower, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(
        other_lower, np.linalg.cholesky(spd() + 0.2 * np.eye(3)), rtol=1e-10
    )


@pytest.mark.parametrize("method", ["cholesky", "matrix_inverse", "eig"])
def test_the_inverse_is_computed_by_the_method_in_force(graph, method):
    factor = Dummy((3, 3), cov=spd())
    factor.register_inverse(damping_func(0.1))
    factor.instantiate_inv_variables()
    with config.override(posdef_inv_method=method):
        inverse = run_updates(factor, factor.get_inv_vars()[0])
    op_types = {
        "cholesky": "Cholesky",
        "eig": "SelfAdjointEigV2",
        "matrix_inverse": "MatrixInverse",
    }
    for other, op_type in op_types.items():
        assert len(ops_of_type(graph, op_type)) == (other == method)
    expected = np.linalg.inv(spd() + 0.1 * np.eye(3))
    np.testing.assert_allclose(inverse, expected, rtol=1e-10)


def test_each_list_element_refreshes_its_own_variable_only():
    factor = Dummy((3, 3), cov=spd())
    for value in (0.1, 0.2):
        factor.register_inverse(damping_func(value))
    factor.instantiate_inv_variables()
    _, second = factor.make_inverse_update_ops()
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        session.run(second)
        values = session.run(factor.get_inv_vars())
    assert not values[0].any() and values[1].any()


def test_stored_functions_are_stale_until_the_next_update_and_power_one_is_fresh():
    factor = Dummy((2, 2))
    factor.instantiate_cov_variables()
    damping = damping_func(1.0)
    factor.register_inverse(damping)
    factor.instantiate_inv_variables()
    ops = factor.make_inverse_update_ops()
    fetches = [
        factor.get_inverse(damping).to_dense(),
        factor.get_matpower(1, damping).to_dense(),
    ]
    value = tf1.placeholder(tf.float64, (2, 2))
    move = factor._cov.add_to_average(value, decay=0.0, weight=1.0)
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        session.run(move, {value: np.eye(2)})
        session.run(ops)
        session.run(move, {value: 3 * np.eye(2)})
        stale, fresh = session.run(fetches)
    np.testing.assert_allclose(stale, np.eye(2) / 2)
    np.testing.assert_allclose(fresh, np.eye(2) * 4)


def test_operators_carry_the_hints_that_solvers_rely_on():
    factor = Dummy((2, 2), cov=np.eye(2))
    damping = damping_func(0.1)
    factor.register_inverse(damping)
    factor.register_cholesky(damping)
    factor.instantiate_inv_variables()
    cov = factor.get_cov_as_linear_operator()
    assert cov.is_self_adjoint and cov.is_square and cov.is_positive_definite is None
    for operator in (factor.get_inverse(damping), factor.get_matpower(1, damping)):
        assert operator.is_non_singular and operator.is_positive_definite
        assert operator.is_self_adjoint and operator.is_square
    lower = factor.get_cholesky(damping)
    assert lower.is_non_singular and lower.is_square and not lower.is_self_adjoint


def test_a_matrix_of_another_rank_is_refused():
    factor = Dummy((2, 2), cov=np.zeros((2, 2, 2)))
    with pytest.raises(AssertionError, match="Expected a matrix"):
        factor.get_cov_as_linear_operator()


def test_inverse_updates_work_inside_the_branch_of_a_conditional():
    factor = Dummy((2, 2))
    factor.instantiate_cov_variables()
    factor.register_matpower(-0.5, damping_func(1.0))
    factor.instantiate_inv_variables()
    due = tf1.placeholder(tf.bool, ())
    # An eigendecomposition of the outer graph must not be used in the branch, nor
    # that of the branch outside.
    outside = factor.get_eigendecomp()[0]
    update = tf1.cond(
        due, lambda: tf.group(*factor.make_inverse_update_ops()), tf.no_op
    )
    move = factor._cov.add_to_average(3 * np.eye(2))
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        session.run(move)
        session.run(update, {due: False})
        assert not session.run(factor.get_inv_vars()[0]).any()
        session.run(update, {due: True})
        value, eigenvalues = session.run([factor.get_inv_vars()[0], outside])
    np.testing.assert_allclose(value, np.eye(2) / 2)
    np.testing.assert_allclose(eigenvalues, [3.0, 3.0])


def test_two_factors_of_one_scope_share_the_average_and_clash_in_inverses():
    first, second = Dummy((2, 2)), Dummy((2, 2))
    for factor in (first, second):
        factor.instantiate_cov_variables()
        factor.register_inverse(damping_func(0.1))
    assert first._cov._var is second._cov._var
    assert isinstance(first._cov, MovingAverageVariable)
    first.instantiate_inv_variables()
    with pytest.raises(ValueError, match="already exists"):
        second.instantiate_inv_variables()


def test_naming_after_the_variables_exist_is_refused():
    factor = Dummy((2, 2))
    factor.instantiate_cov_variables()
    with pytest.raises(errors.ArgumentError, match="before instantiate_cov_variables"):
        factor.set_name("late")
