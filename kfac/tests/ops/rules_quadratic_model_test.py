import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac.python.ops.rules import quadratic_model

SHAPES = ((3, 2), (4,))
SIZE = 10
SEEDS = st.integers(0, 1000)


def tensors(vector, dtype=tf.float64):
    parts = np.split(vector, [6])
    return [
        tf.constant(part.reshape(shape), dtype)
        for part, shape in zip(parts, SHAPES, strict=True)
    ]


def scalars_of(matrix):
    return np.array([[float(x) for x in row] for row in matrix])


class Problem:
    """A proposal d, a previous update p and a curvature `J'J / batch + damping I`."""

    def __init__(self, seed, damping=0.3, batch=4, dtype=tf.float64):
        rng = np.random.default_rng(seed)
        self.d, self.p, self.g = rng.normal(size=(3, SIZE))
        self.jacobian = rng.normal(size=(7, SIZE))
        self.curvature = self.jacobian.T @ self.jacobian / batch
        self.damping = damping
        self.damped = self.curvature + damping * np.eye(SIZE)
        images = [
            [tf.constant(part, dtype) for part in np.split(self.jacobian @ x, [3])]
            for x in (self.d, self.p)
        ]
        self.terms = quadratic_model.build_terms(
            tensors(self.d, dtype),
            tensors(self.p, dtype),
            tensors(self.g, dtype),
            *images,
            damping,
            batch,
        )

    def value(self, step, curvature=None):
        curvature = self.damped if curvature is None else curvature
        return 0.5 * step @ curvature @ step + self.g @ step

    def step(self, alpha, mu):
        return alpha * self.d + mu * self.p


def test_the_terms_are_those_of_the_explicit_curvature_matrix():
    problem = Problem(0)
    m, c, b = problem.terms
    basis = np.stack([problem.d, problem.p])
    np.testing.assert_allclose(scalars_of(m), basis @ problem.damped @ basis.T)
    np.testing.assert_allclose(scalars_of(c)[:, 0], basis @ problem.g)
    np.testing.assert_allclose(scalars_of(b), problem.damping * basis @ basis.T)


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_the_solution_minimizes_the_model_over_the_plane(seed):
    problem = Problem(seed)
    alpha, mu, change = (float(x) for x in quadratic_model.solve(*problem.terms))
    least = problem.value(problem.step(alpha, mu))
    np.testing.assert_allclose(change, least, rtol=1e-9)
    for other in np.random.default_rng(seed).normal(size=(10, 2)):
        assert least <= problem.value(problem.step(*(other + [alpha, mu]))) + 1e-12


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_two_directions_never_predict_less_decrease_than_one(seed):
    problem = Problem(seed)
    change = float(quadratic_model.solve(*problem.terms).change)
    alone = float(quadratic_model.solve(*problem.terms, fixed_mu=0.0).change)
    assert change <= alone + 1e-12


def test_a_fixed_momentum_is_kept_and_the_step_size_is_best_for_it():
    problem = Problem(1)
    alpha, mu, change = (
        float(x) for x in quadratic_model.solve(*problem.terms, fixed_mu=0.7)
    )
    assert mu == 0.7
    np.testing.assert_allclose(change, problem.value(problem.step(alpha, mu)))
    for offset in (-1e-3, 1e-3):
        assert change < problem.value(problem.step(alpha + offset, mu))


@pytest.mark.parametrize("fixed_mu", [None, 0.9])
def test_without_a_previous_update_only_the_proposal_is_scaled(fixed_mu):
    problem = Problem(2)
    problem.p = np.zeros(SIZE)
    d_norm = problem.d @ problem.damped @ problem.d
    m = [[tf.constant(d_norm), tf.constant(0.0, tf.float64)]] + [
        [tf.zeros([], tf.float64)] * 2
    ]
    c = [[tf.constant(problem.g @ problem.d)], [tf.zeros([], tf.float64)]]
    alpha, mu, change = quadratic_model.solve(m, c, m, fixed_mu)
    best = -problem.g @ problem.d / d_norm
    np.testing.assert_allclose(alpha, best, rtol=1e-12)
    assert float(mu) == (fixed_mu or 0.0)
    np.testing.assert_allclose(change, problem.value(best * problem.d), rtol=1e-12)


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
@pytest.mark.parametrize("length", [1.0, 1e-3, -2.0])
def test_collinear_directions_give_the_best_multiple_of_the_proposal(dtype, length):
    rng = np.random.default_rng(3)
    d, g = rng.normal(size=(2, SIZE))
    image = [tf.constant(rng.normal(size=5), dtype)]
    scaled = [length * image[0]]
    terms = quadratic_model.build_terms(
        tensors(d, dtype), tensors(length * d, dtype), tensors(g, dtype), image, scaled,
        0.1, 2,
    )  # fmt: skip
    alpha, mu, _ = quadratic_model.solve(*terms)
    assert float(mu) == 0.0
    np.testing.assert_allclose(
        float(alpha),
        -float(terms.linear[0][0]) / float(terms.quadratic[0][0]),
        rtol=1e-6,
    )


def test_lengths_of_the_directions_do_not_matter_for_the_conditioning():
    problem = Problem(4)
    reference = problem.step(
        *(float(x) for x in quadratic_model.solve(*problem.terms)[:2])
    )
    # In float32 the determinant of the unscaled matrix would underflow to zero.
    small = Problem(4, dtype=tf.float64)
    scale = np.diag([1e-14, 1e-9])
    m = (scale @ scalars_of(small.terms.quadratic) @ scale).astype(np.float32)
    c = (scale @ scalars_of(small.terms.linear)).astype(np.float32)
    alpha, mu = quadratic_model.minimum(
        [[tf.constant(x) for x in row] for row in m],
        [[tf.constant(x) for x in row] for row in c],
    )
    step = problem.step(float(alpha) * 1e-14, float(mu) * 1e-9)
    np.testing.assert_allclose(step, reference, rtol=1e-4, atol=1e-4)


def test_a_zero_gradient_gives_a_zero_step():
    zero = tf.zeros([], tf.float64)
    solution = quadratic_model.solve([[zero] * 2] * 2, [[zero]] * 2, [[zero] * 2] * 2)
    assert [float(x) for x in solution] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rescale", [1.0, 0.4])
@pytest.mark.parametrize("fixed_mu", [None, 0.5])
def test_the_change_is_that_of_the_rescaled_step_without_the_damping(rescale, fixed_mu):
    problem = Problem(5)
    alpha, mu, change = (
        float(x)
        for x in quadratic_model.solve(
            *problem.terms, fixed_mu=fixed_mu, rescale=rescale, damping_share=1.0
        )
    )
    plain = quadratic_model.solve(*problem.terms, fixed_mu=fixed_mu)
    np.testing.assert_allclose([alpha, mu], [float(x) for x in plain[:2]])
    step = rescale * problem.step(alpha, mu)
    np.testing.assert_allclose(
        change, problem.value(step, problem.curvature), rtol=1e-9
    )


def test_the_l2_part_of_the_damping_stays_in_the_change():
    problem, l2_reg = Problem(6), 0.1
    share = quadratic_model.l2_complement(
        l2_reg, tf.constant(problem.damping, tf.float64)
    )
    alpha, mu, change = quadratic_model.solve(*problem.terms, damping_share=share)
    step = problem.step(float(alpha), float(mu))
    with_l2 = problem.curvature + l2_reg * np.eye(SIZE)
    np.testing.assert_allclose(change, problem.value(step, with_l2), rtol=1e-9)


def test_a_zero_damping_has_no_l2_part():
    assert float(quadratic_model.l2_complement(0.0, tf.constant(0.0))) == 1.0


@pytest.mark.parametrize("surplus", [0.0, 0.2])
def test_the_regular_change_is_the_model_without_the_surplus_damping(surplus):
    problem = Problem(7)
    change = quadratic_model.regular_change(
        tf.constant(problem.d @ problem.damped @ problem.d),
        tf.constant(problem.d @ problem.g),
        tf.constant(problem.d @ problem.d),
        surplus,
    )
    left = problem.damped - surplus * np.eye(SIZE)
    np.testing.assert_allclose(change, problem.value(problem.d, left))


def test_the_adam_change_is_the_model_of_the_clipped_step():
    problem = Problem(8)
    v, rate, kappa = problem.p, 0.3, 0.6
    r = kappa * np.linalg.solve(problem.damped, v)
    change = quadratic_model.adam_change(
        tf.constant(r @ v), tf.constant(r @ problem.g), rate, kappa
    )
    np.testing.assert_allclose(change, problem.value(-rate * r), rtol=1e-10)


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_the_two_by_two_solve_inverts_any_regular_matrix(seed):
    rng = np.random.default_rng(seed)
    m = rng.normal(size=(2, 2)) + 3 * np.eye(2)
    vec = rng.normal(size=(2, 1))
    nested = [[tf.constant(x) for x in row] for row in m]
    solved = quadratic_model.two_by_two_solve(
        nested, [[tf.constant(x)] for x in vec[:, 0]]
    )
    assert solved.shape == (2, 1)
    np.testing.assert_allclose(solved, np.linalg.solve(m, vec), rtol=1e-9)


def test_quadratics_are_evaluated_as_one_by_one_matrices():
    m, c, x = [[2.0, 1.0], [1.0, 3.0]], [[4.0], [5.0]], [[1.0], [-2.0]]
    np.testing.assert_allclose(quadratic_model.evaluate_no_c(m, x), [[5.0]])
    np.testing.assert_allclose(quadratic_model.evaluate(m, c, x), [[-1.0]])
