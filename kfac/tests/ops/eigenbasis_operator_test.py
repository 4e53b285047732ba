"""`LinearOperatorEigenbasis` against dense matrices."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import eigenbasis
from kfac.tests import graph_kinds, oracle

EIGENVALUES = np.random.RandomState(0).rand(3, 2) + 0.1
INPUT_BASIS = np.linalg.qr(np.random.RandomState(1).randn(3, 3))[0]
OUTPUT_BASIS = np.linalg.qr(np.random.RandomState(2).randn(2, 2))[0]
TOLERANCE = dict(rtol=1e-12, atol=1e-13)


def make(has_input_basis=True, has_output_basis=True):
    """The operator and its dense matrix."""
    bases = (
        INPUT_BASIS if has_input_basis else None,
        OUTPUT_BASIS if has_output_basis else None,
    )
    basis = np.kron(
        *(np.eye(n) if b is None else b for b, n in zip(bases, (3, 2), strict=True))
    )
    operator = eigenbasis.LinearOperatorEigenbasis(
        EIGENVALUES, *bases, is_positive_definite=True
    )
    return operator, basis @ np.diag(EIGENVALUES.ravel()) @ basis.T


@pytest.mark.parametrize("has_output_basis", [True, False])
@pytest.mark.parametrize("has_input_basis", [True, False])
def test_everything_is_that_of_the_dense_matrix(has_input_basis, has_output_basis):
    x = np.random.RandomState(3).randn(6, 4)
    batched = np.random.RandomState(4).randn(2, 6, 3)
    operator, matrix = make(has_input_basis, has_output_basis)
    for actual, expected in (
        (operator.to_dense(), matrix),
        (operator.matmul(x), matrix @ x),
        (operator.matmul(x.T, adjoint_arg=True), matrix @ x),
        (operator.matmul(batched), matrix @ batched),
        (operator.matvec(x[:, 0]), matrix @ x[:, 0]),
        (operator.solve(x), np.linalg.solve(matrix, x)),
        (operator.solve(x.T, adjoint_arg=True), np.linalg.solve(matrix, x)),
        (operator.solvevec(x[:, 0]), np.linalg.solve(matrix, x[:, 0])),
        (operator.adjoint().matmul(x), matrix @ x),
        (operator.inverse().matmul(x), np.linalg.solve(matrix, x)),
        (operator.trace(), np.trace(matrix)),
        (operator.diag_part(), np.diag(matrix)),
        (operator.determinant(), np.linalg.det(matrix)),
        (operator.log_abs_determinant(), np.linalg.slogdet(matrix)[1]),
        (operator.eigvals(), np.linalg.eigvalsh(matrix)),
        (operator.cond(), np.linalg.cond(matrix)),
        (operator.power(-0.5).to_dense(), oracle.matrix_power(matrix, -0.5)),
        (operator.power(3).to_dense(), oracle.matrix_power(matrix, 3)),
    ):
        np.testing.assert_allclose(actual, expected, **TOLERANCE)
    assert operator.shape == operator.to_dense().shape == (6, 6)
    assert operator.is_self_adjoint and operator.is_positive_definite


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_it_works_inside_block_diagonal_operators_in_graphs(kind):
    x = np.random.RandomState(3).randn(8)
    matrix = make()[1]
    dense = np.block([[matrix, np.zeros((6, 2))], [np.zeros((2, 6)), 2 * np.eye(2)]])

    def build():
        both = tf.linalg.LinearOperatorBlockDiag(
            [
                make()[0],
                tf.linalg.LinearOperatorDiag(tf.constant([2.0, 2.0], "float64")),
            ]
        )
        return [both.matvec(x), both.solvevec(x), both.log_abs_determinant()]

    actual = graph_kinds.Run(kind, build)()
    expected = [dense @ x, np.linalg.solve(dense, x), np.linalg.slogdet(dense)[1]]
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, **TOLERANCE)


def test_coordinates_and_back_are_inverse_and_keep_lengths():
    vectors = np.random.RandomState(5).randn(4, 3, 2)
    there = eigenbasis.to_eigenbasis(vectors, INPUT_BASIS, OUTPUT_BASIS)
    back = eigenbasis.from_eigenbasis(there, INPUT_BASIS, OUTPUT_BASIS)
    np.testing.assert_allclose(back, vectors, **TOLERANCE)
    np.testing.assert_allclose(
        np.linalg.norm(there, axis=(1, 2)), np.linalg.norm(vectors, axis=(1, 2))
    )
    flat = vectors.reshape(4, 6) @ np.kron(INPUT_BASIS, OUTPUT_BASIS)
    np.testing.assert_allclose(there, flat.reshape(4, 3, 2), **TOLERANCE)


def test_a_rotated_diagonal_is_the_diagonal_of_the_rotated_matrix():
    rotation = np.kron(INPUT_BASIS, OUTPUT_BASIS)
    dense = rotation @ np.diag(EIGENVALUES.ravel()) @ rotation.T
    actual = eigenbasis.diagonal_after_rotation(EIGENVALUES, INPUT_BASIS, OUTPUT_BASIS)
    np.testing.assert_allclose(np.ravel(actual), np.diag(dense), **TOLERANCE)
    np.testing.assert_allclose(np.sum(actual), EIGENVALUES.sum(), **TOLERANCE)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.ones(3),), "eigenvalues"),
        ((np.ones((3, 2)), np.eye(2)), "input_basis"),
        ((np.ones((3, 2)), None, np.eye(3)), "output_basis"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        eigenbasis.LinearOperatorEigenbasis(*arguments)
