import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import errors
from kfac.python.ops import linear_operator as lo
from kfac.tests import graph_kinds

RNG = np.random.RandomState(0)


def _randn(*shape):
    return RNG.randn(*shape) + 1j * RNG.randn(*shape)


def _op(matrix, flag):
    return np.conj(np.swapaxes(matrix, -1, -2)) if flag else matrix


# Name -> (operator, its dense matrix): rectangular, batched, complex.
MATRIX, BATCH, DIAGONAL, DIAGONALS = (
    _randn(3, 4),
    _randn(2, 3, 4),
    _randn(3),
    _randn(2, 3),
)
CASES = {
    "full": (lo.LinearOperatorFullMatrix, MATRIX, MATRIX),
    "full, batch": (lo.LinearOperatorFullMatrix, BATCH, BATCH),
    "diagonal": (lo.LinearOperatorDiag, DIAGONAL, np.diag(DIAGONAL)),
    "diagonal, batch": (
        lo.LinearOperatorDiag,
        DIAGONALS,
        np.stack([np.diag(d) for d in DIAGONALS]),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("adjoint_arg", [False, True])
def test_dense_products_are_those_of_the_matrices(case, adjoint, adjoint_arg):
    make, value, dense = CASES[case]
    operator, matrix = make(value), _op(dense, adjoint)
    left = _op(_randn(2, matrix.shape[-1], 5), adjoint_arg)
    right = _op(_randn(2, 5, matrix.shape[-2]), adjoint_arg)
    flags = {"adjoint": adjoint, "adjoint_arg": adjoint_arg}
    np.testing.assert_allclose(
        operator.matmul(left, **flags), matrix @ _op(left, adjoint_arg), rtol=1e-12
    )
    np.testing.assert_allclose(
        operator.matmul_right(right, **flags), _op(right, adjoint_arg) @ matrix
    )


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("adjoint_arg", [False, True])
def test_the_free_function_serves_any_operator(adjoint, adjoint_arg):
    diagonal, matrix = np.array([1.0, 2, 4]), RNG.randn(3, 3)
    inverse = lo.LinearOperatorDiag(diagonal, is_non_singular=True).inverse()
    permuted = tf.linalg.LinearOperatorComposition(
        [inverse, tf.linalg.LinearOperatorFullMatrix(matrix)]
    )
    x = _op(RNG.randn(5, 3), adjoint_arg)
    np.testing.assert_allclose(
        lo.matmul_right(permuted, x, adjoint, adjoint_arg),
        _op(x, adjoint_arg) @ _op(np.diag(1 / diagonal) @ matrix, adjoint),
        rtol=1e-12,
    )


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_an_embedding_gradient_stays_sparse_between_its_factors(kind):
    indices, values = np.array([3, 0, 3]), RNG.randn(3, 2)
    left, right = RNG.rand(5), RNG.randn(2, 2)

    def build():
        gradient = tf.IndexedSlices(
            tf.constant(values), tf.constant(indices), tf.constant([5, 2])
        )
        diagonal = lo.LinearOperatorDiag(tf.constant(left))
        full = lo.LinearOperatorFullMatrix(graph_kinds.variable(right, "right"))
        results = []
        for adjoint in (False, True):
            product = full.matmul_right(gradient, adjoint=adjoint)
            product = diagonal.matmul(product, adjoint=adjoint)
            assert isinstance(product, tf.IndexedSlices)
            results.append(tf.convert_to_tensor(product))
        return results

    dense = np.zeros((5, 2))
    np.add.at(dense, indices, values)
    plain, adjoint = graph_kinds.Run(kind, build)()
    np.testing.assert_allclose(plain, np.diag(left) @ dense @ right, rtol=1e-12)
    np.testing.assert_allclose(adjoint, np.diag(left) @ dense @ right.T, rtol=1e-12)


def test_sparse_diagonal_products_conjugate_and_need_no_dense_shape():
    rows = tf.IndexedSlices(tf.constant(_randn(2, 4)), tf.constant([2, 0]))
    product = lo.LinearOperatorDiag(DIAGONAL).matmul(rows, adjoint=True)
    np.testing.assert_allclose(
        product.values, np.conj(DIAGONAL)[[2, 0], None] * rows.values
    )
    assert product.dense_shape is None


def _rows(dtype=np.float64, values_shape=(2, 3)):
    return tf.IndexedSlices(
        tf.ones(values_shape, dtype), tf.constant([0, 1]), tf.constant([3, 3])
    )


FULL = lo.LinearOperatorFullMatrix(np.eye(3))
DIAG = lo.LinearOperatorDiag(np.ones(3))


@pytest.mark.parametrize(
    "product", [FULL.matmul, DIAG.matmul_right], ids=["full", "diagonal"]
)
def test_products_that_would_not_be_row_sparse_say_so(product):
    with pytest.raises(NotImplementedError, match="IndexedSlices"):
        product(_rows())


@pytest.mark.parametrize(
    "product", [FULL.matmul_right, DIAG.matmul], ids=["full", "diagonal"]
)
def test_bad_sparse_operands_are_refused(product):
    with pytest.raises(errors.ArgumentError, match="adjoint_arg"):
        product(_rows(), adjoint_arg=True)
    with pytest.raises(TypeError, match="float64.*float32"):
        product(_rows(np.float32))
    with pytest.raises(ValueError, match="values"):
        product(_rows(values_shape=(2, 3, 1)))


def test_sparse_products_need_an_operator_that_is_not_a_batch():
    with pytest.raises(ValueError):
        lo.LinearOperatorFullMatrix(np.zeros([2, 3, 3])).matmul_right(_rows())
    with pytest.raises(ValueError):
        lo.LinearOperatorDiag(np.ones([2, 3])).matmul(_rows())


@pytest.mark.parametrize("operator", [FULL, DIAG], ids=["full", "diagonal"])
def test_bad_dense_operands_are_refused(operator):
    for product in (operator.matmul, operator.matmul_right):
        with pytest.raises(TypeError, match="float32"):
            product(np.ones((3, 3), np.float32))
        with pytest.raises(ValueError):
            product(np.ones((4, 4)))


def test_unknown_dimensions_pass_the_check():
    with tf.Graph().as_default():
        x = tf.compat.v1.placeholder(tf.float64, [None, None])
        operator = lo.LinearOperatorFullMatrix(np.eye(3))
        assert operator.matmul_right(x).shape.as_list() == [None, 3]


def test_nested_lists_take_the_dtype_of_the_operator():
    np.testing.assert_array_equal(DIAG.matmul([[1], [2], [3]]), [[1], [2], [3]])
    np.testing.assert_array_equal(DIAG.matmul_right([[1, 2, 3.5]]), [[1, 2, 3.5]])


def test_operators_compose_with_operators():
    square = lo.LinearOperatorFullMatrix(RNG.randn(3, 3))
    diagonal = lo.LinearOperatorDiag(np.array([1.0, 2.0, 3.0]))
    expected = square.to_dense() @ diagonal.to_dense()
    np.testing.assert_allclose(square.matmul(diagonal).to_dense(), expected)
    np.testing.assert_allclose(diagonal.matmul_right(square).to_dense(), expected)
    np.testing.assert_allclose((square @ diagonal).to_dense(), expected)


def test_they_are_tensorflow_operators():
    positive = np.array([[2.0, 1.0], [1.0, 3.0]])
    operator = lo.LinearOperatorFullMatrix(
        positive, is_self_adjoint=True, is_positive_definite=True
    )
    assert isinstance(operator, tf.linalg.LinearOperatorFullMatrix)
    assert isinstance(DIAG, tf.linalg.LinearOperatorDiag)
    for extended in (operator, DIAG):
        assert isinstance(extended, lo.LinearOperatorExtras)
    np.testing.assert_allclose(operator.solve(positive), np.eye(2), atol=1e-14)
    np.testing.assert_allclose(operator.matvec(np.ones(2)), [3, 4])
    assert float(operator.trace()) == 5.0
    assert lo.linalg is tf.linalg


def test_to_dense_gives_back_the_very_variable():
    variable = tf.Variable(np.eye(2))
    assert lo.LinearOperatorFullMatrix(variable).to_dense() is variable


def test_ops_are_made_in_a_scope_of_the_operator():
    with tf.Graph().as_default():
        operator = lo.LinearOperatorFullMatrix(tf.eye(2), name="factor")
        assert "factor/product" in operator.matmul_right(tf.eye(2), name="product").name
        sparse = operator.matmul_right(
            tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0]), tf.constant([2, 2]))
        )
        assert "factor/matmul" in sparse.values.name
