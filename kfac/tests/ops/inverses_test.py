import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config, inverses
from kfac.tests import graph_kinds

RNG = np.random.RandomState(0)
ROOT = RNG.randn(6, 6)
POSITIVE = ROOT @ ROOT.T / 6
DAMPINGS = np.array([0.1, 1.0])
EYE = np.eye(6)
PREVIOUS = np.diag(np.arange(1.0, 7.0))
INVERSE_METHODS = ["cholesky", "eig", "matrix_inverse"]


def _power(matrix, exponent):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
def test_every_function_is_exact_for_a_well_conditioned_matrix(kind):
    def build():
        matrix = tf.constant(POSITIVE)
        eig = inverses.symmetric_eig(matrix)
        return (
            [inverses.damped_inverse(matrix, 0.1, None, m) for m in INVERSE_METHODS],
            inverses.damped_cholesky(matrix, 0.1),
            inverses.damped_cholesky_inverse(matrix, 0.1),
            inverses.damped_power(eig, -0.5, 0.1),
            (eig.eigenvalues, eig.failed),
        )

    inverse_results, factor, factors, root, eig = graph_kinds.Run(kind, build)()
    damped = POSITIVE + 0.1 * EYE
    # XLA computes eigendecompositions by Jacobi sweeps to about half precision.
    tolerance = 1e-7 if kind == graph_kinds.XLA else 1e-11
    for inverse, fell_back in inverse_results:
        assert not fell_back
        np.testing.assert_allclose(inverse @ damped, EYE, atol=tolerance)
        np.testing.assert_allclose(inverse, inverse.T, atol=tolerance)
    for lower in (factor[0], factors[0], factors[1]):
        np.testing.assert_array_equal(lower, np.tril(lower))
    np.testing.assert_allclose(factor[0] @ factor[0].T, damped, atol=1e-13)
    np.testing.assert_allclose(factors[0] @ factors[0].T, damped, atol=1e-13)
    np.testing.assert_allclose(factors[0] @ factors[1], EYE, atol=1e-12)
    np.testing.assert_allclose(root[0], _power(damped, -0.5), atol=tolerance)
    np.testing.assert_allclose(eig[0], np.linalg.eigvalsh(POSITIVE), atol=tolerance)
    assert not any(bool(flag) for flag in (factor[1], factors[2], root[1], eig[1]))


def test_a_batch_of_dampings_gives_what_each_gives_alone():
    matrix = tf.constant(POSITIVE)
    eig = inverses.symmetric_eig(matrix)
    for function in (
        lambda damping: inverses.damped_inverse(matrix, damping),
        lambda damping: inverses.damped_cholesky(matrix, damping),
        lambda damping: inverses.damped_power(eig, -0.25, damping),
    ):
        batch, fell_back = function(DAMPINGS)
        assert fell_back.shape == [2] and not np.any(fell_back)
        for result, damping in zip(batch, DAMPINGS, strict=True):
            np.testing.assert_allclose(result, function(damping)[0], rtol=1e-11)


def test_a_batch_of_matrices_may_have_a_damping_each():
    matrices = np.stack([POSITIVE, 2 * POSITIVE])
    batch, _ = inverses.damped_inverse(tf.constant(matrices), DAMPINGS)
    damped = matrices + DAMPINGS[:, None, None] * EYE
    np.testing.assert_allclose(batch @ damped, [EYE, EYE], atol=1e-11)


def test_powers_share_one_decomposition():
    with tf.Graph().as_default() as graph:
        eig = inverses.symmetric_eig(tf.constant(POSITIVE))
        inverses.damped_power(eig, -1, DAMPINGS)
        inverses.damped_power(eig, -0.5, 0.1)
        types = [op.type for op in graph.get_operations()]
    assert types.count("SelfAdjointEigV2") == 1


def test_no_general_solver_is_used_for_an_inverse():
    def used(graph):
        return {op.type for op in graph.get_operations()} | {
            node.op
            for function in graph.as_graph_def().library.function
            for node in function.node_def
        }

    with tf.Graph().as_default() as graph:
        inverses.damped_inverse(tf.constant(POSITIVE), 0.1)
        types = used(graph)
    assert {"Cholesky", "MatrixTriangularSolve"} <= types
    assert not types & {"MatrixInverse", "MatrixSolve", "SelfAdjointEigV2"}


# Symmetric, with one clearly negative eigenvalue that no jitter of 1 % lifts.
INDEFINITE = np.diag([1.0, 1, 1, 1, 1, -0.5])
NAN = np.where(EYE > 0, np.nan, 0.0)
INFINITE = np.where(EYE > 0, np.inf, 0.0)
# Negative by rounding: the first jitter, 1e-6 of the mean diagonal, lifts it.
BARELY_INDEFINITE = np.diag([1.0, 1, 1, 1, 1, -1e-9])


BAD = [INDEFINITE, NAN, INFINITE]
NO_PREVIOUS = [np.zeros((6, 6)), PREVIOUS * np.nan, None]
# (bad matrix, previous result, what replaces it)
ALL_FALLBACKS = [(bad, PREVIOUS, PREVIOUS) for bad in BAD] + [
    (bad, unusable, EYE) for bad in BAD for unusable in NO_PREVIOUS
]
SOME_FALLBACKS = [(INDEFINITE, PREVIOUS, PREVIOUS), (NAN, NO_PREVIOUS[0], EYE)]


@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        (kind, ALL_FALLBACKS if kind == graph_kinds.V1_OFF else SOME_FALLBACKS)
        for kind in graph_kinds.ALL_AND_XLA
    ],
)
def test_bad_matrices_fall_back_to_the_last_good_result_then_to_the_identity(
    kind, cases
):
    def all_functions(matrix, previous):
        yield inverses.damped_inverse(matrix, 0.0, previous)
        yield inverses.damped_cholesky(matrix, 0.0, previous)
        pair = None if previous is None else (previous, previous)
        factor, inverse, fell_back = inverses.damped_cholesky_inverse(matrix, 0.0, pair)
        yield factor, fell_back
        yield inverse, fell_back
        eig = inverses.symmetric_eig(matrix)
        yield inverses.damped_power(eig, -0.5, 0.0, previous)

    def build():
        return [list(all_functions(tf.constant(bad), old)) for bad, old, _ in cases]

    for results, (_, _, replacement) in zip(
        graph_kinds.Run(kind, build)(), cases, strict=True
    ):
        for result, fell_back in results:
            assert fell_back
            np.testing.assert_array_equal(result, replacement)


@pytest.mark.parametrize("method", INVERSE_METHODS)
def test_a_matrix_that_is_not_finite_never_raises(method):
    for bad in (NAN, INFINITE):
        inverse, fell_back = inverses.damped_inverse(bad, 0.1, PREVIOUS, method)
        assert fell_back
        np.testing.assert_array_equal(inverse, PREVIOUS)


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
def test_rounding_errors_are_cured_by_a_jitter_not_by_an_old_inverse(kind):
    def build():
        matrix = tf.constant(BARELY_INDEFINITE)
        factor, fell_back = inverses.damped_cholesky(matrix, 0.0, PREVIOUS)
        return factor, fell_back

    factor, fell_back = graph_kinds.Run(kind, build)()
    assert fell_back
    jitter = 1e-6 * np.abs(np.diag(BARELY_INDEFINITE)).mean()
    np.testing.assert_allclose(
        factor @ factor.T, BARELY_INDEFINITE + jitter * EYE, atol=1e-15
    )


def test_only_the_bad_matrices_of_a_batch_are_replaced():
    batch = tf.constant(np.stack([POSITIVE, INDEFINITE, BARELY_INDEFINITE]))
    result, fell_back = inverses.damped_cholesky(batch, 0.0)
    np.testing.assert_array_equal(fell_back, [False, True, True])
    np.testing.assert_allclose(result[0], np.linalg.cholesky(POSITIVE), rtol=1e-11)
    np.testing.assert_array_equal(result[1], EYE)
    assert result[2][5, 5] > 0


def test_the_jitters_come_from_the_settings():
    with config.override(cholesky_jitters=(1.0,)):
        factor, fell_back = inverses.damped_cholesky(INDEFINITE, 0.0)
    assert fell_back
    jittered = INDEFINITE + np.abs(np.diag(INDEFINITE)).mean() * EYE
    np.testing.assert_allclose(factor @ tf.transpose(factor), jittered, rtol=1e-14)


def test_a_zero_matrix_without_damping_leaves_gradients_alone():
    inverse, fell_back = inverses.damped_inverse(np.zeros((6, 6)), 0.0)
    assert fell_back
    np.testing.assert_array_equal(inverse, EYE)


def test_damping_and_exponent_do_not_pass_through_float32():
    diagonal = np.diag([0.2, 0.7])
    inverse, _ = inverses.damped_inverse(diagonal, 0.1)
    np.testing.assert_allclose(np.diag(inverse), [1 / 0.3, 1 / 0.8], rtol=1e-15)
    power, _ = inverses.damped_power(inverses.symmetric_eig(diagonal), -0.3, 0.1)
    np.testing.assert_allclose(np.diag(power), [0.3**-0.3, 0.8**-0.3], rtol=1e-14)


def test_an_unknown_method_is_refused():
    with pytest.raises(KeyError, match="magic"):
        inverses.damped_inverse(POSITIVE, 0.1, method="magic")
