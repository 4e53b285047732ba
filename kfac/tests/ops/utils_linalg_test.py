import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config, utils
from kfac.python.ops.utils import linalg
from kfac.tests import graph_kinds

RNG = np.random.RandomState(0)
ROOT = RNG.randn(5, 5)
POSITIVE = ROOT @ ROOT.T
DAMPING = 0.3
DAMPED = POSITIVE + DAMPING * np.eye(5)
INVERSE_METHODS = ["matrix_inverse", "cholesky", "eig"]


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_all_methods_invert_the_damped_matrix(kind):
    def build():
        results = []
        for method in INVERSE_METHODS:
            with config.override(posdef_inv_method=method):
                results.append(utils.posdef_inv(tf.constant(POSITIVE), DAMPING))
            invert = utils.posdef_inv_functions[method]
            identity = tf.eye(5, dtype=tf.float64)
            results.append(invert(tf.constant(POSITIVE), identity, DAMPING))
        return results

    for inverse in graph_kinds.Run(kind, build)():
        # Condition number below 1e3.
        np.testing.assert_allclose(inverse @ DAMPED, np.eye(5), atol=1e-11)


def test_the_inversion_method_is_read_at_call_time(monkeypatch):
    called = []
    monkeypatch.setitem(
        linalg.posdef_inv_functions,
        "eig",
        lambda tensor, identity, damping: called.append(damping),
    )
    monkeypatch.setattr(utils, "POSDEF_INV_METHOD", "eig")
    utils.posdef_inv(tf.eye(2), 0.5)
    assert called == [0.5]


def test_an_unknown_method_is_refused_by_name():
    with config.override(posdef_inv_method="magic", posdef_eig_method="magic"):
        with pytest.raises(KeyError, match="magic.*cholesky"):
            utils.posdef_inv(tf.eye(2), 0.5)
        with pytest.raises(KeyError, match="magic.*svd"):
            utils.posdef_eig(tf.eye(2))


def test_a_failed_factorisation_gives_a_finite_inverse():
    indefinite = tf.constant(np.diag([1.0, -1.0]))
    with config.override(posdef_inv_method="cholesky"):
        assert np.all(np.isfinite(utils.posdef_inv(indefinite, 0.0)))


def test_cholesky_is_the_lower_factor_of_the_damped_matrix():
    factor = utils.cholesky(tf.constant(POSITIVE), DAMPING).numpy()
    np.testing.assert_array_equal(factor, np.tril(factor))
    np.testing.assert_allclose(factor @ factor.T, DAMPED, rtol=1e-12)


def test_damping_is_cast_to_the_dtype_of_the_matrix():
    matrix = tf.constant(POSITIVE, tf.float32)
    damping = tf.constant(DAMPING, tf.float64)
    assert utils.posdef_inv(matrix, damping).dtype == tf.float32
    assert utils.cholesky(matrix, damping).dtype == tf.float32


def test_both_eigendecompositions_rebuild_a_positive_matrix():
    for method, order in (("self_adjoint", 1), ("svd", -1)):
        with config.override(posdef_eig_method=method):
            values, vectors = (t.numpy() for t in utils.posdef_eig(tf.constant(DAMPED)))
        assert np.all(np.diff(values) * order >= 0)
        np.testing.assert_allclose((vectors * values) @ vectors.T, DAMPED, rtol=1e-11)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(5), atol=1e-13)


def test_self_adjoint_gives_magnitudes_in_the_order_of_the_signed_values():
    values, vectors = utils.posdef_eig_self_adjoint(np.diag([1.0, -3.0, 2.0]))
    np.testing.assert_allclose(values, [3, 1, 2])
    np.testing.assert_allclose(np.abs(vectors), np.eye(3)[:, [1, 0, 2]], atol=1e-15)


def test_svd_gives_left_vectors_in_descending_order():
    values, vectors = utils.posdef_eig_svd(np.diag([1.0, 3.0, 2.0]))
    np.testing.assert_allclose(values, [3, 2, 1])
    np.testing.assert_allclose(np.abs(vectors), np.eye(3)[:, [1, 2, 0]], atol=1e-15)
