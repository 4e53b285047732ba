import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import natural_gradient
from kfac.python.ops.errors import MissingTargetsError
from kfac.python.ops.natural_gradient import DampedCurvature
from kfac.tests import estimator_cases, graph_kinds, oracle

DAMPING = 0.05
SEED = np.array([3, 4])


def _matrix(case, matrix):
    """The undamped matrix, from Jacobians."""
    if matrix != "empirical_fisher":
        return case.fisher()
    rows = case.example_gradients(square_root=True)
    return rows.T @ rows / len(rows)


def _damped(case, matrix):
    exact = _matrix(case, matrix)
    return exact + DAMPING * np.eye(len(exact))


def _vector(case, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=p.shape) for p in case.params]


def _flat(parts):
    return np.concatenate([np.ravel(part) for part in parts])


def _curvature(model, matrix, damping=DAMPING):
    return DampedCurvature(
        model.collection,
        model.variables,
        damping=damping,
        num_cases=tf.shape(model.x)[0],
        matrix=matrix,
    )


def _run(case, use, kind=graph_kinds.FUNCTION, **kwargs):
    build = lambda: use(estimator_cases.build(case, **kwargs))
    return graph_kinds.Run(kind, build)()


@pytest.mark.parametrize(
    ("case", "matrix"),
    [
        (estimator_cases.DENSE_SOFTMAX, "ggn"),
        (estimator_cases.CONV_SIGMOID, "empirical_fisher"),
        (estimator_cases.MEAN_VARIANCE, "fisher"),
        (estimator_cases.MEAN_VARIANCE, "empirical_fisher"),
        (estimator_cases.TWO_LOSSES, "fisher"),
        (estimator_cases.TWO_LOSSES, "ggn"),
        (estimator_cases.TWO_LOSSES, "empirical_fisher"),
    ],
    ids=str,
)
def test_products_are_exact_and_the_solution_agrees_with_a_dense_solve(case, matrix):
    g, tolerance = _vector(case, 1), 1e-6

    def use(model):
        curvature = _curvature(model, matrix)
        solution = curvature.solve(g, max_iterations=200, tolerance=tolerance)
        return curvature.multiply(g), *solution

    product, x, iterations, residual = _run(case, use, dynamic=True)
    damped = _damped(case, matrix)
    assert oracle.relative_error(_flat(product), damped @ _flat(g)) < 1e-12
    assert 0 < iterations < 200
    assert residual <= tolerance
    # |x - x*| <= |residual vector| / least eigenvalue, which is at least the damping.
    limit = 1.01 * tolerance * np.linalg.norm(_flat(g))
    assert np.linalg.norm(damped @ _flat(x) - _flat(g)) <= limit
    expected = np.linalg.solve(damped, _flat(g))
    assert np.linalg.norm(_flat(x) - expected) <= limit / DAMPING


@pytest.mark.parametrize(
    ("kind", "matrix"),
    [
        (graph_kinds.V1_OFF, "fisher"),
        (graph_kinds.V1_ON, "empirical_fisher"),
        (graph_kinds.COND, "empirical_fisher"),
        (graph_kinds.XLA, "fisher"),
    ],
)
def test_solves_in_every_kind_of_graph(kind, matrix):
    case = estimator_cases.DENSE_SOFTMAX
    g = _vector(case, 1)

    def use(model):
        solution = _curvature(model, matrix).solve(
            g, max_iterations=100, tolerance=1e-8
        )
        return solution.x

    x = _run(case, use, kind)
    expected = np.linalg.solve(_damped(case, matrix), _flat(g))
    assert oracle.relative_error(_flat(x), expected) < 1e-6


def test_a_warm_start_at_the_solution_saves_all_iterations():
    case = estimator_cases.DENSE_SOFTMAX
    g = _vector(case, 1)

    def use(model):
        curvature = _curvature(model, "fisher")
        cold = curvature.solve(g, max_iterations=100, tolerance=1e-6)
        warm = curvature.solve(g, start=cold.x, max_iterations=100, tolerance=1e-5)
        return cold.iterations, warm.iterations

    cold, warm = _run(case, use)
    assert cold > 3
    assert warm == 0


@pytest.mark.parametrize("matrix", ["fisher", "empirical_fisher"])
def test_sampled_gradients_have_the_matrix_as_covariance(matrix):
    case, count = estimator_cases.TWO_LOSSES, 4000

    def use(model):
        curvature = _curvature(model, matrix)

        def sample(i):
            seed = tf.stack([tf.constant(5, tf.int64), i])
            parts = curvature.sample_gradient(seed)
            return tf.concat([tf.reshape(part, [-1]) for part in parts], 0)

        return tf.map_fn(
            sample, tf.range(count, dtype=tf.int64), fn_output_signature=tf.float64
        )

    samples = _run(case, use)
    exact = _matrix(case, matrix)
    covariance = len(case.x) * samples.T @ samples / count
    # The error of entry (i, j) has a variance of at most 2 C_ii C_jj / count for sums
    # of independent signs; over all entries: 2 (tr C)^2 / count. Four deviations.
    bound = 4 * np.sqrt(2 / count) * np.trace(exact)
    assert np.linalg.norm(covariance - exact) < bound
    assert np.linalg.norm(samples.mean(0)) < 4 * np.sqrt(
        np.trace(exact) / len(case.x) / count
    )


def test_the_diagonal_is_estimated_without_bias():
    matrix = "ggn"
    case, count = estimator_cases.DENSE_SOFTMAX, 2000

    def use(model):
        return _curvature(model, matrix).estimate_diagonal(count, tf.constant(SEED))

    diagonal = _flat(_run(case, use))
    expected = np.diag(_matrix(case, matrix))
    assert np.all(diagonal >= 0)
    # Squares of sums of signs have at most twice their squared mean as variance.
    deviations = (diagonal - expected) / (expected * np.sqrt(2 / count) + 1e-12)
    assert np.max(np.abs(deviations)) < 5


def test_the_diagonal_preconditioner_divides_by_the_damped_diagonal():
    precondition = natural_gradient.diagonal_preconditioner(
        [tf.constant([1.0, 3.0])], damping=1.0
    )
    np.testing.assert_allclose(precondition([tf.constant([2.0, 8.0])])[0], [1.0, 2.0])


def test_the_estimator_preconditioner_with_the_exact_inverse_needs_one_iteration():
    """One case and a full block: the estimate is the exact matrix."""
    case = estimator_cases.DENSE_SOFTMAX.first(1)
    g = _vector(case, 1)

    def use(model):
        estimator = model.estimator(
            damping=DAMPING, estimation_mode="exact", cov_ema_decay=0.0
        )
        covs, invs = estimator.make_vars_and_create_op_thunks()
        updated = estimator_cases.update_all(covs)
        with tf.control_dependencies([updated]):
            inverted = estimator_cases.update_all(invs)
        with tf.control_dependencies([inverted]):
            curvature = _curvature(model, "fisher")
            return curvature.solve(
                g,
                preconditioner=natural_gradient.estimator_preconditioner(
                    estimator, model.variables
                ),
                tolerance=1e-6,
            )

    _, iterations, residual = _run(case, use)
    assert iterations == 1
    assert residual < 1e-6


def test_an_unknown_matrix_is_refused():
    with pytest.raises(ValueError, match="'fisher', 'ggn', 'empirical_fisher'"):
        _run(estimator_cases.DENSE_SOFTMAX, lambda m: _curvature(m, "hessian"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("damping", -1.0), ("damping", np.nan), ("num_cases", 0), ("num_cases", -3)],
)
def test_numbers_that_make_no_sense_are_refused(name, value):
    arguments = {"damping": 0.1, "num_cases": 3, name: value}
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        natural_gradient.DampedCurvature(None, [], **arguments)


def test_the_empirical_matrix_needs_targets():
    with pytest.raises(MissingTargetsError, match="needs targets"):
        _run(
            estimator_cases.DENSE_SOFTMAX,
            lambda m: _curvature(m, "empirical_fisher"),
            targets=False,
        )
