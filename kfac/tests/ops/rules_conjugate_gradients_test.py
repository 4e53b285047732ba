import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops.rules import conjugate_gradients as cg
from kfac.tests import graph_kinds

SHAPES = ((4, 3), (5,), ())
SIZE = 18


def _spd(seed, condition, size=SIZE):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return (q * np.geomspace(1.0, condition, size)) @ q.T


def _split(vector):
    sizes = [int(np.prod(shape)) for shape in SHAPES]
    parts = np.split(np.asarray(vector), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]


def _joined(parts):
    return np.concatenate([np.ravel(part) for part in parts])


def _product(matrix):
    """The matrix as a linear map of lists of tensors."""
    sizes = [int(np.prod(shape)) for shape in SHAPES]

    def product(vectors):
        column = tf.concat([tf.reshape(v, [-1]) for v in vectors], 0)
        image = tf.linalg.matvec(tf.constant(matrix, column.dtype), column)
        return [
            tf.reshape(part, shape)
            for part, shape in zip(tf.split(image, sizes), SHAPES, strict=True)
        ]

    return product


def _solve(matrix, b, **kwargs):
    for name in ("preconditioner", "start"):
        if name in kwargs:
            wrap = _product if name == "preconditioner" else _split
            kwargs[name] = wrap(kwargs[name])

    def build():
        return cg.solve(_product(matrix), _split(b), **kwargs)

    x, iterations, residual = graph_kinds.Run(graph_kinds.FUNCTION, build)()
    return _joined(x), int(iterations), float(residual)


def _b(seed=7):
    return np.random.default_rng(seed).normal(size=SIZE)


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
def test_solves_to_the_tolerance_in_every_kind_of_graph(kind):
    matrix, b, tolerance = _spd(0, 50.0), _b(), 1e-6

    def build():
        return cg.solve(_product(matrix), _split(b), tolerance=tolerance)

    x, iterations, residual = graph_kinds.Run(kind, build)()
    x = _joined(x)
    true_residual = np.linalg.norm(b - matrix @ x) / np.linalg.norm(b)
    assert 0 < iterations <= 2 * SIZE
    assert residual <= tolerance
    # The recurrence and the true residual part by rounding only (1e-16 * 50).
    np.testing.assert_allclose(residual, true_residual, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-10)]
)
def test_agrees_with_a_dense_solve_to_the_tolerance_in_both_precisions(
    dtype, tolerance
):
    condition = 20.0
    matrix, b = _spd(3, condition), _b()
    parts = [part.astype(dtype) for part in _split(b)]
    build = lambda: cg.solve(_product(matrix), parts, tolerance=tolerance)
    x, _, residual = graph_kinds.Run(graph_kinds.FUNCTION, build)()
    assert all(part.dtype == dtype for part in x)
    assert residual <= tolerance
    # The smallest eigenvalue is 1, so that |x - A^-1 b| is at most the residual's
    # length; that of the recurrence is off by rounding, condition * eps.
    error = np.linalg.norm(_joined(x) - np.linalg.solve(matrix, b))
    slack = 10 * condition * np.finfo(dtype).eps
    assert error <= (tolerance + slack) * np.linalg.norm(b)


def test_iterates_are_those_of_tensorflows_own_for_one_vector():
    matrix, b = _spd(1, 30.0), _b()
    start = 0.7 * np.linalg.solve(matrix, b) + 0.01 * _b(8)  # Better than zero.
    diagonal = 1 / np.diag(matrix)
    operator = tf.linalg.LinearOperatorFullMatrix(
        matrix, is_self_adjoint=True, is_positive_definite=True
    )
    for count in (1, 3, 6):
        expected = tf.linalg.experimental.conjugate_gradient(
            operator,
            tf.constant(b),
            preconditioner=tf.linalg.LinearOperatorDiag(diagonal),
            x=tf.constant(start),
            tol=0.0,
            max_iter=count,
        )
        x, iterations, residual = _solve(
            matrix,
            b,
            preconditioner=np.diag(diagonal),
            start=start,
            tolerance=0.0,
            max_iterations=count,
        )
        assert iterations == count
        np.testing.assert_allclose(x, expected.x, rtol=1e-9)
        np.testing.assert_allclose(
            residual, np.linalg.norm(expected.r) / np.linalg.norm(b), rtol=1e-8
        )


def test_is_exact_after_as_many_steps_as_there_are_distinct_eigenvalues():
    rng = np.random.default_rng(2)
    q, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    matrix = (q * rng.choice([1.0, 4.0, 9.0], SIZE)) @ q.T
    _, iterations, residual = _solve(matrix, _b(), tolerance=1e-10)
    assert iterations == 3
    assert residual < 1e-10


def test_the_exact_inverse_as_preconditioner_needs_one_iteration():
    matrix = _spd(3, 1e4)
    x, iterations, _ = _solve(matrix, _b(), preconditioner=np.linalg.inv(matrix))
    assert iterations == 1
    np.testing.assert_allclose(x, np.linalg.solve(matrix, _b()), rtol=1e-6)


def test_a_start_at_the_solution_needs_no_iteration():
    matrix = _spd(4, 10.0)
    solution = np.linalg.solve(matrix, _b())
    x, iterations, residual = _solve(matrix, _b(), start=solution)
    assert iterations == 0
    assert residual < 1e-12
    np.testing.assert_array_equal(x, solution)


@pytest.mark.parametrize("bad", [-1.0, 100.0, np.nan, np.inf])
def test_a_start_worse_than_zero_is_not_used(bad):
    matrix = _spd(4, 10.0)
    start = bad * np.linalg.solve(matrix, _b())
    expected = _solve(matrix, _b(), max_iterations=3)
    actual = _solve(matrix, _b(), start=start, max_iterations=3)
    np.testing.assert_array_equal(actual[0], expected[0])


def test_every_iterate_is_a_descent_direction_and_lowers_the_quadratic():
    matrix, b = _spd(5, 1e3), _b()
    values = []
    for count in range(1, 8):
        x, iterations, _ = _solve(matrix, b, max_iterations=count, tolerance=0.0)
        assert iterations == count
        assert b @ x > 0
        values.append(0.5 * x @ matrix @ x - b @ x)
    assert np.all(np.diff([0.0, *values]) < 0)


def test_ends_with_the_last_good_iterate_where_the_curvature_is_not_positive():
    matrix = np.diag(np.r_[np.full(SIZE - 1, 2.0), -50.0])
    x, iterations, _ = _solve(matrix, np.ones(SIZE))
    # The first direction is b itself, b' A b = 17 * 2 - 50 < 0: no step was taken.
    assert iterations == 0
    np.testing.assert_array_equal(x, np.zeros(SIZE))


def test_a_product_that_is_not_finite_leaves_the_result_finite():
    def product(vectors):
        return [v * np.nan for v in vectors]

    build = lambda: cg.solve(product, _split(_b()))
    x, iterations, residual = graph_kinds.Run(graph_kinds.FUNCTION, build)()
    assert iterations == 0
    assert residual == 1.0
    np.testing.assert_array_equal(_joined(x), np.zeros(SIZE))


def test_a_preconditioner_that_is_not_finite_leaves_the_result_finite():
    build = lambda: cg.solve(
        _product(np.eye(SIZE)),
        _split(_b()),
        preconditioner=lambda vectors: [v * np.nan for v in vectors],
    )
    x, iterations, residual = graph_kinds.Run(graph_kinds.FUNCTION, build)()
    assert (iterations, residual) == (0, 1.0)
    np.testing.assert_array_equal(_joined(x), np.zeros(SIZE))


@pytest.mark.parametrize("signs", [[-1.0], [1.0, -1.0]])
def test_a_preconditioner_that_is_not_definite_is_survived(signs):
    matrix = _spd(8, 10.0)
    preconditioner = np.diag(np.resize(signs, SIZE))
    x, _, residual = _solve(matrix, _b(), preconditioner=preconditioner, tolerance=1e-8)
    assert residual <= 1e-8
    # |x - A^-1 b| <= |A^-1| |b| 1e-8, and A's smallest eigenvalue is 1.
    error = np.linalg.norm(x - np.linalg.solve(matrix, _b()))
    assert error <= 1e-8 * np.linalg.norm(_b())


@pytest.mark.parametrize("most", [0, 1])
def test_takes_no_more_iterations_than_allowed(most):
    matrix, b = _spd(9, 10.0), _b()
    x, iterations, residual = _solve(matrix, b, max_iterations=most)
    steepest = most * b * (b @ b) / (b @ matrix @ b)
    assert iterations == most
    np.testing.assert_allclose(x, steepest, rtol=1e-12)
    expected = np.linalg.norm(b - matrix @ steepest) / np.linalg.norm(b)
    np.testing.assert_allclose(residual, expected, rtol=1e-10)


def test_a_right_hand_side_that_is_not_finite_gives_zero():
    x, iterations, residual = _solve(_spd(6, 2.0), np.r_[np.nan, _b()[1:]])
    assert iterations == 0
    assert np.isnan(residual)
    np.testing.assert_array_equal(x, np.zeros(SIZE))


def test_a_zero_right_hand_side_gives_zero():
    x, iterations, residual = _solve(_spd(6, 2.0), np.zeros(SIZE))
    assert (iterations, residual) == (0, 0.0)
    np.testing.assert_array_equal(x, np.zeros(SIZE))


def test_vectors_of_another_length_are_refused():
    build = lambda: cg.solve(lambda v: v[:1], _split(_b()))
    with pytest.raises(ValueError, match="vector of 3 tensors"):
        graph_kinds.Run(graph_kinds.FUNCTION, build)()
