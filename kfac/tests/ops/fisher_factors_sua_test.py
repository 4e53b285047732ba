"""The SUA input factor against the dense matrix that it stands for."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config
from kfac.python.ops import fisher_factors as ff
from kfac.tests.ops.fisher_factor_cases import damping_func

tf1 = tf.compat.v1

FILTER = (2, 3, 2, 5)
OFFSETS = 6
MODES = {
    # (assume_zero_mean_activations, subtract_mean_contrib_from_cov)
    "with mean": (False, True),
    "mean is always subtracted": (False, False),
    "zero mean, subtracted": (True, True),
    "zero mean, kept": (True, False),
}


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as new_graph:
        yield new_graph


def images(seed=0):
    return np.random.RandomState(seed).randn(3, 4, 4, 2) + [0.5, -1.0]


def make(
    mode, has_bias, dampings=(0.3,), data=None, dtype=tf.float64, filter_shape=FILTER
):
    zero_mean, subtract = MODES[mode]
    with config.override(
        assume_zero_mean_activations=zero_mean, subtract_mean_contrib_from_cov=subtract
    ):
        factor = ff.ConvInputSUAKroneckerFactor(
            (tf.constant(images() if data is None else data, dtype),),
            filter_shape,
            has_bias,
        )
    factor.instantiate_cov_variables()
    for damping in dampings:
        factor.register_matpower(-1, damping_func(damping))
    factor.instantiate_inv_variables()
    return factor


def run(factor, fetches):
    update = factor.make_covariance_update_op(1.0, 1.0)
    inverse_updates = factor.make_inverse_update_ops()
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        session.run(update)
        session.run(inverse_updates)
        return session.run(fetches)


def dense_matrix(mode, has_bias):
    """F of the spec, by Kronecker products: channels slow, offsets fast."""
    zero_mean, subtract = MODES[mode]
    pixels = images().reshape(-1, 2)
    mean = pixels.mean(0)
    cov = pixels.T @ pixels / len(pixels)
    if subtract or not zero_mean:
        cov = cov - np.outer(mean, mean)
    matrix = np.kron(cov, np.eye(OFFSETS))
    column = np.repeat(mean, OFFSETS)
    if has_bias:
        matrix = np.block(
            [[matrix, np.zeros((len(matrix), 1))], [np.zeros((1, len(matrix) + 1))]]
        )
        column = np.append(column, 1.0)
    return matrix if zero_mean else matrix + np.outer(column, column)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_operators_are_the_dense_matrix_its_damped_form_and_the_exact_inverse(
    mode, has_bias
):
    factor = make(mode, has_bias)
    func = damping_func(0.3)
    operators = [
        factor.get_cov_as_linear_operator(),
        factor.get_matpower(1, lambda: 0.3),  # Needs no id.
        factor.get_inverse(func),
    ]
    size = 2 * OFFSETS + has_bias
    x = np.random.RandomState(1).randn(size, 4)
    for operator in operators:
        assert int(operator.domain_dimension) == size
    dense, products, traces = run(
        factor,
        [
            [operator.to_dense() for operator in operators],
            [operator.matmul(x) for operator in operators],
            [operator.trace() for operator in operators],
        ],
    )
    matrix = dense_matrix(mode, has_bias)
    damped = matrix + 0.3 * np.eye(size)
    expected = [matrix, damped, np.linalg.inv(damped)]
    for got, product, trace, want in zip(
        dense, products, traces, expected, strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(product, want @ x, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(trace, np.trace(want), rtol=1e-9)


def test_make_cov_linear_operator_takes_an_optional_damping():
    factor = make("with mean", True)
    operators = [
        factor._make_cov_linear_operator(),
        factor._make_cov_linear_operator(damping=0.3),
    ]
    undamped, damped = run(factor, [operator.to_dense() for operator in operators])
    np.testing.assert_allclose(undamped, dense_matrix("with mean", True))
    np.testing.assert_allclose(damped, undamped + 0.3 * np.eye(len(undamped)))


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
def test_operators_have_the_dtype_of_the_data(dtype):
    factor = make("with mean", True, dtype=dtype)
    assert factor.get_cov_as_linear_operator().dtype == dtype
    assert factor.get_inverse(damping_func(0.3)).dtype == dtype


def test_for_one_pixel_kernels_the_matrix_is_the_patch_second_moment():
    # No spatial correlations to neglect, so nothing is approximated.
    sua = make("with mean", True, filter_shape=(1, 1, 2, 5))
    exact = ff.ConvInputKroneckerFactor(
        (tf.constant(images()),), (1, 1, 2, 5), "SAME", has_bias=True
    )
    exact.instantiate_cov_variables()
    update = exact.make_covariance_update_op(1.0, 1.0)
    with tf.control_dependencies([update]):
        expected = exact.cov
    got, expected = run(sua, [sua.get_cov_as_linear_operator().to_dense(), expected])
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_the_mean_is_averaged_like_the_covariance_and_absent_under_zero_mean():
    factor = make("with mean", False)
    assert factor.get_cov_vars()[0].shape == (2, 2)
    assert len(factor.get_cov_vars()) == 1
    mean = run(factor, factor.mu)
    np.testing.assert_allclose(mean[:, 0], images().reshape(-1, 2).mean(0))
    names = [variable.op.name for variable in factor.cov_variables()]
    assert names[2:] == [f"{factor.name}/mu/var", f"{factor.name}/mu/total_weight"]
    with tf1.variable_scope("other"):
        centred = make("zero mean, kept", False)
    with pytest.raises(AttributeError, match="keeps no mean"):
        _ = centred.mu
    assert len(centred.cov_variables()) == 2


@pytest.mark.parametrize(
    "mode, ops_each, vars_each", [("with mean", 3, 4), ("zero mean, kept", 2, 2)]
)
def test_all_helper_variables_are_in_the_factors_scope(mode, ops_each, vars_each):
    factor = make(mode, True, dampings=(0.3, 0.5))
    assert len(factor.make_inverse_update_ops()) == 2 * ops_each
    assert len(factor.get_inv_vars()) == 2
    variables = factor.inverse_variables()
    assert len(variables) == 2 * vars_each
    prefix = factor.name + "/"
    assert all(variable.op.name.startswith(prefix) for variable in variables)
    names = {variable.op.name.removeprefix(prefix) for variable in variables}
    assert {"matpower_exp-1_damp0.3", "damping_var_-1_0.3"} <= names
    assert list(factor._damping_var_by_id) == [(0.3,), (0.5,)]


def test_two_factors_with_equal_dampings_do_not_clash():
    for seed in range(2):
        make("with mean", True, data=images(seed))


def test_before_the_first_inverse_update_the_inverse_is_zero():
    factor = make("with mean", True)
    inverse = factor.get_inverse(damping_func(0.3)).to_dense()
    ops = factor.make_inverse_update_ops()
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        for _ in range(2):
            np.testing.assert_array_equal(session.run(inverse), np.zeros((13, 13)))
            session.run(ops)  # No statistics yet: changes nothing.


def test_the_inverse_is_stale_in_all_its_parts_until_the_next_update():
    factor = make("with mean", True)
    inverse = factor.get_inverse(damping_func(0.3)).to_dense()
    update = factor.make_covariance_update_op(0.0, 1.0)
    ops = factor.make_inverse_update_ops()
    move = [
        factor._cov.add_to_average(np.eye(2), decay=0.0),
        factor._mu.add_to_average(np.ones((2, 1)), decay=0.0),
    ]
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        session.run(update)
        session.run(ops)
        before = session.run(inverse)
        session.run(move)
        np.testing.assert_array_equal(session.run(inverse), before)
        session.run(ops)
        assert np.abs(session.run(inverse) - before).max() > 0.01


@pytest.mark.parametrize("part", ["_cov", "_mu"])
def test_spoilt_statistics_keep_the_last_inverse_and_are_counted(part):
    factor = make("with mean", True)
    inverse = factor.get_inverse(damping_func(0.3)).to_dense()
    update = factor.make_covariance_update_op(1.0, 1.0)
    ops = factor.make_inverse_update_ops()
    average = getattr(factor, part)
    spoil = average._var.assign(tf.fill(average._var.shape, np.float64("nan")))
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        session.run(update)
        session.run(ops)
        before = session.run(inverse)
        session.run(spoil)
        session.run(ops)
        after, fallbacks = session.run([inverse, factor.fallbacks])
    np.testing.assert_allclose(after, before, rtol=1e-12)
    assert fallbacks == 1


def test_only_the_powers_1_and_minus_1_exist_and_no_cholesky():
    factor = make("with mean", False, dampings=())
    func = damping_func(0.3)
    factor.register_matpower(1, func)
    assert not factor._matpower_registrations
    for call in (factor.register_matpower, factor.get_matpower):
        with pytest.raises(ValueError, match="powers 1 and -1 only"):
            call(-0.5, func)
    with pytest.raises(KeyError, match="matrix power"):
        factor.get_matpower(-1, func)
    for call in (
        factor.register_cholesky,
        factor.register_cholesky_inverse,
        factor.get_cholesky,
        factor.get_cholesky_inverse,
    ):
        with pytest.raises(NotImplementedError, match="Cholesky"):
            call(func)


def test_settings_are_those_of_construction():
    factor = make("zero mean, kept", False)
    with config.override(assume_zero_mean_activations=False):
        matrix = run(factor, factor.get_cov_as_linear_operator().to_dense())
    np.testing.assert_allclose(matrix, dense_matrix("zero mean, kept", False))
