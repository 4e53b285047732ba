"""Temporal moments and the quantities of both approximations for recurrent layers."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import fisher_factors as ff
from kfac.python.ops import utils
from kfac.tests.ops import fisher_factor_cases as cases
from kfac.tests.ops.fisher_factor_cases import damping_func

tf1 = tf.compat.v1


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as new_graph:
        yield new_graph


def sequence(seed=0, uses=4, batch=5, features=3):
    """Correlated over time, so that C1 is far from zero."""
    rng = np.random.RandomState(seed)
    steps = [rng.randn(batch, features)]
    for _ in range(uses - 1):
        steps.append(0.8 * steps[-1] + 0.6 * rng.randn(batch, features))
    return np.array(steps)


def moments(data, has_bias):
    """C0 and C1 by loops."""
    uses, batch = data.shape[:2]
    rows = cases.with_ones(data, has_bias)
    zero = cases.mean_outer(rows.reshape(-1, rows.shape[-1]))
    one = np.zeros_like(zero)
    for t in range(uses - 1):
        for b in range(batch):
            one += np.outer(rows[t + 1, b], rows[t, b]) / (uses * batch)
    return zero, one


def inverse_root(zero, damping):
    values, vectors = np.linalg.eigh(zero)
    return (vectors * (values + damping) ** -0.5) @ vectors.T


def run(factor, fetches):
    update = factor.make_covariance_update_op(1.0, 1.0)
    inverse_updates = factor.make_inverse_update_ops()
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        session.run(update)
        session.run(inverse_updates)
        return session.run(fetches)


def layouts(data):
    """The same sequence, canonical, folded, and as one tensor per use."""
    folded = data.reshape(-1, data.shape[-1])
    parts = utils.PartitionedTensor(tuple(tf.constant(step) for step in data))
    return {
        "canonical": tf.constant(data),
        "folded": tf.constant(folded),
        "uses": parts,
    }


@pytest.mark.parametrize("layout", ["canonical", "folded", "uses"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_both_moments_follow_their_definition_in_every_layout(layout, has_bias):
    data = sequence()
    factor = ff.FullyConnectedMultiKF(((layouts(data)[layout],),), 4, has_bias)
    assert factor.batch_size() == 5
    factor.register_cov_dt1()
    factor.register_cov_dt1()
    factor.instantiate_cov_variables()
    zero, one = run(factor, factor.get_cov_vars())
    expected_zero, expected_one = moments(data, has_bias)
    np.testing.assert_allclose(zero, expected_zero, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(one, expected_one, rtol=1e-12, atol=1e-14)


def test_temporal_moment_averages_towers_sums_sources_and_decays_like_the_other():
    shards = [[sequence(10 * s + t) for t in range(2)] for s in range(3)]
    tensors = tuple(tuple(tf.constant(x) for x in towers) for towers in shards)
    factor = ff.FullyConnectedMultiKF(tensors, 4)
    factor.register_cov_dt1()
    factor.instantiate_cov_variables()
    ops = [factor.make_covariance_update_op(0.5, 2.0) for _ in range(2)]
    fetches = [factor.cov_dt1, factor._cov_dt1._var, factor._cov_dt1._total_weight]
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        for op in ops:
            session.run(op)
        value, var, weight = session.run(fetches)
    expected = sum(moments(x, False)[1] for towers in shards for x in towers) / 2
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-14)
    assert weight == 0.5 * 2 + 2
    np.testing.assert_allclose(var, 3 * expected, rtol=1e-12, atol=1e-14)
    prefix = factor.name
    names = [variable.op.name for variable in factor.cov_variables()]
    assert names == [
        f"{prefix}/{average}/{part}"
        for average in ("cov", "cov_dt1")
        for part in ("var", "total_weight")
    ]


def quantities(data, has_bias, damping=0.3, signed=False):
    """A factor with both options at one damping, run once."""
    factor = ff.FullyConnectedMultiKF(((tf.constant(data),),), None, has_bias)
    factor.register_cov_dt1()
    factor.instantiate_cov_variables()
    func = damping_func(damping)
    factor.register_option1quants(func, signed=signed)
    factor.register_option2quants(func)
    factor.instantiate_inv_variables()
    return factor, run(
        factor, [factor.get_option1quants(func), factor.get_option2quants(func)]
    )


@pytest.mark.parametrize("has_bias", [False, True])
def test_option_1_diagonalises_the_symmetrised_normalised_moment(has_bias):
    data = sequence()
    _, ((left, psi), _) = quantities(data, has_bias)
    zero, one = moments(data, has_bias)
    root = inverse_root(zero, 0.3)
    middle = root @ ((one + one.T) / 2) @ root
    signed = np.linalg.eigvalsh(middle)
    np.testing.assert_allclose(psi, np.abs(signed), rtol=1e-9)
    # L = S U with orthogonal U that diagonalises the middle matrix.
    vectors = np.linalg.solve(root, left)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(psi)), atol=1e-9)
    np.testing.assert_allclose(vectors.T @ middle @ vectors, np.diag(signed), atol=1e-9)


def test_option_1_keeps_the_sign_of_negative_correlation_if_asked():
    data = sequence()
    data[1::2] *= -1  # Alternating signs: successive steps are anti-correlated.
    _, ((_, psi), _) = quantities(data, False, signed=True)
    zero, one = moments(data, False)
    root = inverse_root(zero, 0.3)
    expected = np.linalg.eigvalsh(root @ (one + one.T) @ root / 2)
    assert expected.max() < 0
    np.testing.assert_allclose(psi, expected, rtol=1e-9)


@pytest.mark.parametrize("has_bias", [False, True])
def test_option_2_comes_from_the_singular_values_of_the_normalised_moment(has_bias):
    data = sequence()
    _, (_, (p, k, mu)) = quantities(data, has_bias)
    zero, one = moments(data, has_bias)
    root = inverse_root(zero, 0.3)
    psi = root @ one @ root
    _, singular, right = np.linalg.svd(psi)
    np.testing.assert_allclose(mu, np.minimum(singular**2, 1), rtol=1e-8)
    np.testing.assert_allclose(p, one.T @ root @ root, rtol=1e-9, atol=1e-12)
    vectors = np.linalg.solve(root, k)
    # Right singular vectors are unique up to sign.
    np.testing.assert_allclose(np.abs(right @ vectors), np.eye(len(mu)), atol=1e-7)


def test_large_singular_values_are_clipped_at_one():
    # Without damping to speak of, a constant sequence has psi near 1; scaled up over
    # time it exceeds 1.
    data = np.array([[[1.0]], [[3.0]], [[9.0]]])
    _, (_, (_, _, mu)) = quantities(data, False, damping=1e-9)
    zero, one = moments(data, False)
    assert mu[0] == min((one[0, 0] / (zero[0, 0] + 1e-9)) ** 2, 1)
    _, (_, (_, _, mu)) = quantities_of_moments(1.0, 2.0)
    np.testing.assert_array_equal(mu, [1.0])


def quantities_of_moments(zero, one):
    """The quantities for one feature of given moments."""
    with tf1.variable_scope("given"):
        factor = ff.FullyConnectedMultiKF(((tf.zeros([2, 1, 1], tf.float64),),), 2)
        factor.register_cov_dt1()
        factor.instantiate_cov_variables()
    func = damping_func(0.0)
    factor.register_option1quants(func)
    factor.register_option2quants(func)
    factor.instantiate_inv_variables()
    moves = [
        factor._cov.add_to_average(tf.constant([[zero]], tf.float64)),
        factor._cov_dt1.add_to_average(tf.constant([[one]], tf.float64)),
    ]
    ops = factor.make_inverse_update_ops()
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        session.run(moves)
        session.run(ops)
        return factor, session.run(
            [factor.get_option1quants(func), factor.get_option2quants(func)]
        )


def test_both_options_at_one_damping_have_variables_of_their_own():
    factor, _ = quantities(sequence(), False)
    nested = factor.get_inv_vars()
    assert [len(quants) for quants in nested] == [2, 3]
    names = [v.op.name.rsplit("/", 1)[1] for v in factor.inverse_variables()]
    assert names == [
        "Lmat_damp0.3", "psi_damp0.3", "Pmat_damp0.3", "Kmat_damp0.3", "mu_damp0.3",
    ]  # fmt: skip
    assert factor._vec_shape == [3]


def test_quantities_and_powers_share_one_eigendecomposition_in_one_group(graph):
    factor = ff.FullyConnectedMultiKF(((tf.constant(sequence()),),), 4)
    factor.register_cov_dt1()
    factor.instantiate_cov_variables()
    func = damping_func(0.3)
    factor.register_inverse(func)
    factor.register_option2quants(func)
    factor.instantiate_inv_variables()
    assert len(factor.make_inverse_update_ops()) == 1
    types = [op.type for op in graph.get_operations()]
    assert types.count("SelfAdjointEigV2") == 1 and "Cholesky" not in types
    inverse = run(factor, factor.get_inverse(func).to_dense())
    zero, _ = moments(sequence(), False)
    np.testing.assert_allclose(inverse, np.linalg.inv(zero + 0.3 * np.eye(3)))


def test_quantities_start_as_zeros_and_ones_and_wait_for_statistics():
    factor = ff.FullyConnectedMultiKF(((tf.constant(sequence()),),), 4)
    factor.register_cov_dt1()
    factor.instantiate_cov_variables()
    func = damping_func(0.3)
    factor.register_option1quants(func)
    factor.register_option2quants(func)
    factor.instantiate_inv_variables()
    ops = factor.make_inverse_update_ops()
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        session.run(ops)
        left, psi, p, k, mu = session.run(factor.inverse_variables())
    for zeros in (left, p, k):
        np.testing.assert_array_equal(zeros, np.zeros((3, 3)))
    for ones in (psi, mu):
        np.testing.assert_array_equal(ones, np.ones(3))


def test_quantities_of_a_spoilt_moment_keep_their_values_and_are_counted():
    factor, _ = quantities(sequence(), False)
    spoil = factor._cov_dt1._var.assign(np.full((3, 3), np.nan))
    update = factor.make_covariance_update_op(1.0, 1.0)
    ops = factor.make_inverse_update_ops()
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        session.run(update)
        session.run(ops)
        before = session.run(factor.inverse_variables())
        session.run(spoil)
        session.run(ops)
        after, fallbacks = session.run([factor.inverse_variables(), factor.fallbacks])
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert fallbacks == 2


def test_what_was_not_registered_is_refused():
    factor = ff.FullyConnectedMultiKF(((tf.constant(sequence()),),), 4)
    factor.instantiate_cov_variables()
    func = damping_func(0.3)
    for getter in (factor.get_option1quants, factor.get_option2quants):
        with pytest.raises(KeyError, match="quantities"):
            getter(func)
    with pytest.raises(AssertionError, match="register_cov_dt1"):
        _ = factor.cov_dt1
    with pytest.raises(AssertionError, match="before instantiate_cov_variables"):
        factor.register_cov_dt1()
    factor.register_option1quants(func)
    with pytest.raises(ValueError, match="registered with signed=False already"):
        factor.register_option1quants(func, signed=True)
    factor.instantiate_inv_variables()
    with pytest.raises(AssertionError, match="register_cov_dt1"):
        factor.make_inverse_update_ops()


def test_folded_data_need_the_number_of_uses():
    factor = ff.FullyConnectedMultiKF(((tf.zeros([6, 2]),),))
    with pytest.raises(TypeError, match="num_uses"):
        factor.batch_size()
    factor = ff.FullyConnectedMultiKF(((tf.zeros([3, 2, 2]),),), 2)
    factor.register_cov_dt1()
    factor.instantiate_cov_variables()
    with pytest.raises(ValueError, match="have 3 uses"):
        factor.make_covariance_update_op(1.0, 1.0)


def test_one_hot_ids_are_refused_by_dense_factors():
    ids = tf.zeros([6], tf.int32)
    ids.one_hot_depth = 4
    for make in (
        lambda: ff.FullyConnectedKroneckerFactor(((ids,),)),
        lambda: ff.FullyConnectedMultiKF(((ids,),), 2),
    ):
        with pytest.raises(ValueError, match="one-hot"):
            make()
