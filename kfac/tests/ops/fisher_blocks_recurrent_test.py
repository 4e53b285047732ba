"""The series approximations invert the matrices of the chains they stand for."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import fisher_blocks as fb
from kfac.python.ops import layer_collection
from kfac.python.ops.fisher_blocks import recurrent
from kfac.tests import graph_kinds, oracle
from kfac.tests.ops import fisher_blocks_cases as cases

OPTIONS = (fb.SeriesFBApproximation.option1, fb.SeriesFBApproximation.option2)
STEPS = 4
BATCH = 6


@pytest.mark.parametrize("length", (1, 2, 3, 4, 5, 8, 13))
def test_total_correlation_is_the_double_sum_over_steps(length):
    step = np.array([-0.99, -0.5, 0.0, 0.3, 0.9, 1 - 1e-9, 1.0])
    steps = np.arange(length)
    distance = np.abs(steps[:, None] - steps[None, :])
    expected = [(x**distance).sum() for x in step]
    total = recurrent.total_correlation(tf.constant(step), length)
    np.testing.assert_allclose(total, expected, rtol=1e-12)


def test_total_correlation_is_the_reciprocal_of_gamma_of_the_paper():
    x, t = np.linspace(-0.9, 0.9, 7), 7
    gamma = (1 - x) ** 2 / (t * (1 - x**2) - 2 * x * (1 - x**t))
    total = recurrent.total_correlation(tf.constant(x), t)
    np.testing.assert_allclose(total, 1 / gamma, rtol=1e-11)


def test_total_correlation_stays_positive_where_steps_cancel():
    """Two steps of correlation -1 have no variance in total."""
    total = recurrent.total_correlation(tf.constant([-1.0, -5.0, 2.0], tf.float64), 2)
    np.testing.assert_allclose(total, [0.02, 0.02, 4.0], rtol=1e-12)


def _block(option, data=None, has_bias=False):
    """A block fed with lists over steps; `data` are inputs and gradients by step."""
    if data is None:
        data = np.zeros((STEPS, BATCH, 3)), np.zeros((STEPS, BATCH, 2))
    inputs, grads = (tuple(tf.constant(step) for step in part) for part in data)
    block = fb.FullyConnectedSeriesFB(
        layer_collection.LayerCollection(), has_bias=has_bias, option=option
    )
    block.register_additional_tower(inputs, grads)
    return block, ((grads,),)


def _moments(size, seed, symmetric):
    """Second moments of a stationary chain: within a step, and between two steps.

    The correlation between steps has signs and a norm well below 1.
    """
    rng = np.random.RandomState(seed)
    root = rng.normal(size=(size, size))
    c0 = root @ root.T + 0.5 * np.eye(size)
    step = rng.normal(size=(size, size))
    step = step + step.T if symmetric else step
    step *= 0.7 / np.linalg.norm(step, 2)
    half = oracle.matrix_power(c0, 0.5)
    return c0, half @ step @ half


def _inverse_product(option, moments, vector):
    """The block's inverse product for given moments; also the dampings it used."""

    def build():
        block, grads = _block(option)
        block.instantiate_factors(grads, 0.01)
        ready = []
        for factor, (c0, c1) in zip(block._factors(), moments, strict=True):
            factor.instantiate_cov_variables()
            for average, value in ((factor._cov, c0), (factor._cov_dt1, c1)):
                ready += [
                    average._var.assign(value),
                    average._total_weight.assign(1.0),
                ]
        block.register_inverse()
        for factor in block._factors():
            factor.instantiate_inv_variables()
        with tf.control_dependencies(ready):
            dampings = block._input_damping_func(), block._output_damping_func()
            updates = [
                op for f in block._factors() for op in f.make_inverse_update_ops()
            ]
        with tf.control_dependencies(tf.nest.flatten(updates)):
            return block.multiply_inverse(tf.constant(vector)), dampings

    return graph_kinds.Run(graph_kinds.V1_ON, build)()


def _lagged(c0, c1, damping, lag):
    """`E[x_{t + lag} x_t^T]` of the linear chain with these moments, damped."""
    damped = c0 + damping * np.eye(len(c0))
    transition = c1 @ np.linalg.inv(damped)
    moment = np.linalg.matrix_power(transition, abs(lag)) @ damped
    return moment if lag >= 0 else moment.T


def _sum_over_lags(moments, dampings, lags):
    """Sum of the Kronecker products of input and output moments at these lags."""
    (inputs, outputs), (d_in, d_out) = moments, dampings
    return sum(
        np.kron(_lagged(*inputs, d_in, lag), _lagged(*outputs, d_out, lag))
        for lag in lags
    )


def test_option_1_inverts_the_matrix_of_a_symmetric_chain_of_any_length():
    moments = _moments(3, 0, symmetric=True), _moments(2, 1, symmetric=True)
    vector = np.random.RandomState(2).normal(size=(3, 2))
    product, dampings = _inverse_product(1, moments, vector)
    lags = [s - t for s, t in itertools.product(range(STEPS), repeat=2)]
    matrix = _sum_over_lags(moments, dampings, lags)
    np.testing.assert_allclose(
        matrix @ product.reshape(-1), vector.reshape(-1), rtol=1e-9, atol=1e-10
    )


def test_option_2_inverts_the_matrix_of_an_endless_chain():
    moments = _moments(3, 0, symmetric=False), _moments(2, 1, symmetric=False)
    vector = np.random.RandomState(2).normal(size=(3, 2))
    product, dampings = _inverse_product(2, moments, vector)
    # Terms fall off like 0.49^lag; beyond 60 they are below 1e-18.
    matrix = STEPS * _sum_over_lags(moments, dampings, range(-60, 61))
    np.testing.assert_allclose(
        matrix @ product.reshape(-1), vector.reshape(-1), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_uncorrelated_steps_make_it_the_independent_approximation(option):
    moments = [(c0, 0 * c1) for c0, c1 in (_moments(3, 0, True), _moments(2, 1, True))]
    vector = np.random.RandomState(2).normal(size=(3, 2))
    product, dampings = _inverse_product(option, moments, vector)
    left, right = (
        c0 + d * np.eye(len(c0)) for (c0, _), d in zip(moments, dampings, strict=True)
    )
    expected = np.linalg.solve(left, vector) @ np.linalg.inv(right) / STEPS
    np.testing.assert_allclose(product, expected, rtol=1e-10)


def _formula(option, moments, dampings, vector):
    """NumPy transcription of the paper's algorithms, for `Z = V^T`."""
    quantities = []
    for (c0, c1), damping in zip(moments, dampings, strict=True):
        root = oracle.matrix_power(c0 + damping * np.eye(len(c0)), -0.5)
        if option == 1:
            psi, vectors = np.linalg.eigh(root @ (c1 + c1.T) / 2 @ root)
            quantities.append((root @ vectors, psi))
        else:
            _, singular_values, e_transposed = np.linalg.svd(root @ c1 @ root)
            p, k = c1.T @ root @ root, root @ e_transposed.T
            quantities.append((p, k, np.minimum(singular_values**2, 1)))
    z = vector.T
    if option == 1:
        (m_a, psi_a), (m_g, psi_g) = quantities
        x = np.outer(psi_g, psi_a)
        y = (1 - x) ** 2 / (STEPS * (1 - x**2) - 2 * x * (1 - x**STEPS))
        z = m_g @ ((m_g.T @ z @ m_a) * y) @ m_a.T
    else:
        (p_a, k_a, mu_a), (p_g, k_g, mu_g) = quantities
        z = z - p_g @ z @ p_a.T
        z = (k_g.T @ z @ k_a) / (1 - np.outer(mu_g, mu_a))
        z = k_g @ z @ k_a.T
        z = (z - p_g.T @ z @ p_a) / STEPS
    return z.T


def _data_moments(data, has_bias):
    """`C0` and `C1` of `[steps, batch, features]`, both over all rows."""
    if has_bias:
        data = np.concatenate([data, np.ones((*data.shape[:2], 1))], axis=-1)
    steps, batch, size = data.shape
    rows = data.reshape(-1, size)
    later, earlier = data[1:].reshape(-1, size), data[:-1].reshape(-1, size)
    return rows.T @ rows / (steps * batch), later.T @ earlier / (steps * batch)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
@pytest.mark.parametrize("option", OPTIONS)
def test_from_data_to_product_as_in_the_paper(option, kind):
    """Lists over steps and one `[steps, batch, n]` tensor; weights and bias."""
    rng = np.random.RandomState(3)
    x, g = rng.normal(size=(STEPS, BATCH, 3)), rng.normal(size=(STEPS, BATCH, 2))
    x[1:] += 0.5 * x[:-1]
    g[1:] += 0.5 * g[:-1]
    vector = rng.normal(size=(4, 2))

    def build():
        listed, listed_grads = _block(option, (x, g), has_bias=True)
        unfolded = fb.FullyConnectedSeriesFB(
            layer_collection.LayerCollection(), True, STEPS, option
        )
        grads = tf.constant(g)
        unfolded.register_additional_tower(tf.constant(x), grads)
        results = []
        for block, sources in ((listed, listed_grads), (unfolded, ((grads,),))):
            done = cases.update(block, sources, exps=(-1,))
            with tf.control_dependencies([done]):
                product = block.multiply_inverse(
                    [tf.constant(vector[:-1]), tf.constant(vector[-1])]
                )
                dampings = block._input_damping_func(), block._output_damping_func()
            results.append((cases.flat_tensor(product), dampings))
        return results

    moments = _data_moments(x, True), _data_moments(g, False)
    for product, dampings in graph_kinds.Run(kind, build)():
        expected = _formula(option, moments, dampings, vector)
        np.testing.assert_allclose(product, expected.reshape(-1), rtol=1e-9, atol=1e-11)


def test_the_damping_is_normalised_by_the_number_of_steps():
    def build():
        block, grads = _block(1)
        block.instantiate_factors(grads, 0.4)
        assert block._num_timesteps == STEPS
        return tf.convert_to_tensor(block.damping)

    damping = graph_kinds.Run(graph_kinds.V1_ON, build)()
    np.testing.assert_allclose(damping, 0.4 / STEPS, rtol=1e-6)


def test_only_the_inverse_is_served():
    vector = tf.zeros([3, 2], tf.float64)
    with tf.Graph().as_default():
        block, grads = _block(1)
        block.instantiate_factors(grads, 0.1)
        for call in (
            lambda: block.register_matpower(-0.5),
            lambda: block.multiply(vector),
            lambda: block.multiply_matpower(vector, 0.5),
            block.register_cholesky,
            block.register_cholesky_inverse,
            lambda: block.multiply_cholesky(vector, transpose=True),
            lambda: block.multiply_cholesky_inverse(vector, transpose=True),
        ):
            with pytest.raises(NotImplementedError, match="inverse only"):
                call()
        for call in (block.full_fisher_block, lambda: block._renorm_coeff):
            for kind in (AssertionError, NotImplementedError):
                with pytest.raises(kind):
                    call()


def test_an_unknown_option_is_refused_when_used():
    with tf.Graph().as_default():
        block, grads = _block(3)
        block.instantiate_factors(grads, 0.1)
        with pytest.raises(ValueError, match="Unknown option 3"):
            block.register_inverse()
        with pytest.raises(ValueError, match="Unknown option 3"):
            block.multiply_inverse(tf.zeros([3, 2], tf.float64))


def test_the_description_and_the_configuration_tell_the_option():
    with tf.Graph().as_default():
        block, grads = _block(2)
        assert block.description().uses == STEPS
        block.instantiate_factors(grads, 0.1)
        description = block.description()
    assert description.approximation == "kron_series_2"
    assert description.factor_sides == ((3, 3), (2, 2))
    assert block.configuration() == {"has_bias": False, "num_uses": STEPS, "option": 2}
