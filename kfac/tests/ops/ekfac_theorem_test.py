"""EKFAC is never further from the exact block than K-FAC, in Frobenius norm.

George et al. 2018 (arXiv 1806.03884), theorem 2: among all matrices with the eigenbasis
of K-FAC's, the one with the second moments of gradients as eigenvalues is nearest.
"""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import fisher_blocks as fb
from kfac.tests import graph_kinds, oracle
from kfac.tests.ops import ekfac_cases as cases

tf1 = tf.compat.v1

# Sums of some hundred float64 products, and an eigendecomposition.
ROUNDING = 1e-10


def full_blocks(case, approx="ekfac", mode="exact", updates=60):
    """Undamped blocks in the course of training on one batch.

    Returns:
      Those of K-FAC, and a list of those after: the first refresh of the bases, an
      update, many updates, another refresh.
    """
    with tf.Graph().as_default(), tf1.Session() as session:
        made = cases.build(case, approx).estimator(estimation_mode=mode)
        cov, inv = made.make_vars_and_create_op_thunks()
        update, refresh = cases.update(cov)(), cases.update(inv)()
        blocks = [block.full_fisher_block() for block in made.blocks]
        of_kfac = [
            fb.KroneckerProductFB.full_fisher_block(block) for block in made.blocks
        ]
        session.run(tf1.global_variables_initializer())
        session.run(update)
        session.run(refresh)
        results = [session.run(blocks)]
        for count in (1, updates):
            for _ in range(count):
                session.run(update)
            results.append(session.run(blocks))
        session.run(refresh)
        results.append(session.run(blocks))
        return session.run(of_kfac), results


def best_in_eigenbasis(kfac_block, exact, shape):
    """The nearest matrix to `exact` with the Kronecker eigenbasis of `kfac_block`.

    Slow and independent of the library: the factors are recovered, up to scale, from
    the block's own Kronecker structure.
    """
    d_in, d_out = shape
    tensor = kfac_block.reshape(d_in, d_out, d_in, d_out)
    left = np.linalg.eigh(np.einsum("iaja->ij", tensor))[1]
    right = np.linalg.eigh(np.einsum("iaib->ab", tensor))[1]
    basis = np.kron(left, right)
    return basis @ np.diag(np.diag(basis.T @ exact @ basis)) @ basis.T


def sides(case, group):
    d_out = case.shapes[group[0]][-1]
    if case is cases.HEADS and group == (0,):
        d_out *= case.shapes[0][-2]  # Two heads of three features.
    return sum(int(np.prod(case.shapes[i])) for i in group) // d_out, d_out


@pytest.mark.parametrize(
    "case, mode",
    [(case, mode) for case in cases.CASES for mode in ("exact", "empirical")]
    + [(cases.CONV, "exact_GGN"), (cases.HEADS, "exact"), (cases.HEADS, "empirical")],
    ids=str,
)
def test_the_distance_to_the_exact_block_is_never_above_that_of_kfac(case, mode):
    exact = case.blocks(mode)
    kfac, (after_refresh, after_one, after_many, again) = full_blocks(case, mode=mode)
    for i, group in enumerate(case.groups):
        distance = lambda block: cases.relative_distance(block, exact[i])
        # The first refresh starts at K-FAC's own estimate ...
        np.testing.assert_allclose(after_refresh[i], kfac[i], atol=ROUNDING)
        # ... and every batch comes nearer, to the optimum.
        best = best_in_eigenbasis(kfac[i], exact[i], sides(case, group))
        assert distance(after_one[i]) <= distance(kfac[i]) + ROUNDING
        assert distance(after_many[i]) <= distance(after_one[i]) + ROUNDING
        assert distance(best) <= distance(after_many[i]) + ROUNDING
        # K-FAC's share of the average is 0.9^61 / 10.
        np.testing.assert_allclose(after_many[i], best, atol=1e-3 * np.abs(best).max())
        # The same statistics have the same eigenvectors.
        np.testing.assert_allclose(again[i], after_many[i], atol=ROUNDING)
    # Somewhere in every one of these networks K-FAC is not exact, and EKFAC better.
    gains = [
        cases.relative_distance(k, e) - cases.relative_distance(a, e)
        for k, a, e in zip(kfac, after_many, exact, strict=True)
    ]
    assert max(gains) > 0.005


@pytest.mark.parametrize(
    "case, mode, exact_blocks",
    [(case.first(1), "empirical", (0, 1)) for case in (cases.DENSE, cases.LINEAR)]
    + [(cases.LINEAR, "exact", (0, 1)), (cases.DENSE.first(1), "exact", (0, 1))]
    # The layers above those that are used several times.
    + [(case.first(1), "exact", (1,)) for case in (cases.CONV, cases.MULTI)],
    ids=lambda value: str(value),
)
def test_where_kfac_is_exact_so_is_ekfac(case, mode, exact_blocks):
    """One example, and deep linear networks with squared error."""
    exact = case.blocks(mode)
    kfac, results = full_blocks(case, mode=mode, updates=5)
    for blocks in results:
        for i in exact_blocks:
            scale = np.abs(exact[i]).max()
            np.testing.assert_allclose(kfac[i], exact[i], atol=1e-10 * scale)
            np.testing.assert_allclose(blocks[i], exact[i], atol=1e-10 * scale)


@pytest.mark.parametrize("case", [cases.CONV, cases.MULTI], ids=str)
def test_product_scaling_is_kfac(case):
    kfac, results = full_blocks(case, "ekfac_product", updates=3)
    for blocks in results:
        for actual, expected in zip(blocks, kfac, strict=True):
            np.testing.assert_allclose(actual, expected, atol=ROUNDING)


@pytest.mark.parametrize("case", [cases.CONV, cases.CONV_MULTI], ids=str)
def test_the_kronecker_factors_are_those_of_kfac(case):
    def build():
        made = cases.build(case, "kron").estimator()
        cov, _ = made.make_vars_and_create_op_thunks()
        return cases.in_turn(
            [cases.update(cov), lambda: [b.full_fisher_block() for b in made.blocks]]
        )

    expected = graph_kinds.Run(graph_kinds.V1_ON, build)()
    for actual, block in zip(full_blocks(case, updates=0)[0], expected, strict=True):
        np.testing.assert_allclose(actual, block, atol=ROUNDING)


@pytest.mark.parametrize("mode", ["gradients", "curvature_prop"])
@pytest.mark.parametrize("case", [cases.DENSE, cases.MULTI], ids=str)
def test_with_sampled_signals_the_distance_is_smaller_too(case, mode):
    draws = 1500
    exact = case.fisher_blocks()

    def average(approx):
        """Plain means over many draws, in bases from as many draws."""
        with tf.Graph().as_default(), tf1.Session() as session:
            tf1.set_random_seed(1)
            made = cases.build(case, approx).estimator(estimation_mode=mode)
            cov, inv = made.make_vars_and_create_op_thunks()
            update = cases.update(cov, should_decay=False)()
            refresh = cases.update(inv)()
            blocks = [b.full_fisher_block() for b in made.blocks]
            averages = [f._cov for f in made.factors if f.name.endswith("eigenbasis")]
            reset = tf.group(*(a.reset() for a in averages))
            session.run(tf1.global_variables_initializer())
            for _ in range(draws):
                session.run(update)
            session.run([refresh])
            if averages:
                session.run(reset)
                for _ in range(draws):
                    session.run(update)
            return session.run(blocks)

    for kfac, ekfac, matrix in zip(
        average("kron"), average("ekfac"), exact, strict=True
    ):
        # Each of the two is off by its sampling error, some 1 / sqrt(1500 * 6) = 1%
        # of the matrix.
        assert cases.relative_distance(ekfac, matrix) <= (
            cases.relative_distance(kfac, matrix) + 0.03
        )
        if len(matrix) == len(exact[0]):
            assert cases.relative_distance(ekfac, matrix) < (
                0.95 * cases.relative_distance(kfac, matrix)
            )


@pytest.mark.parametrize("case", [cases.DENSE, cases.CONV, cases.MULTI], ids=str)
def test_the_preconditioned_gradient_differs_from_that_of_kfac(case):
    def build(approx):
        def products():
            made = cases.build(case, approx).estimator()
            cov, inv = made.make_vars_and_create_op_thunks()
            vectors = [(tf.ones_like(v), v) for v in made.variables]
            return cases.in_turn(
                [
                    cases.update(cov),
                    cases.update(inv),
                    cases.update(cov),
                    lambda: [t for t, _ in made.multiply_inverse(vectors)],
                ]
            )

        return graph_kinds.Run(graph_kinds.V1_ON, products)()

    flat = lambda arrays: np.concatenate([np.ravel(a) for a in arrays])
    kfac, ekfac = flat(build("kron")), flat(build("ekfac"))
    assert oracle.relative_error(ekfac, kfac) > 0.05
    # Both are inverses of nearly the same matrix, all the same.
    cosine = kfac @ ekfac / np.linalg.norm(kfac) / np.linalg.norm(ekfac)
    assert cosine > 0.8


def test_the_inverse_of_the_damped_optimum_is_served_exactly():
    case = cases.DENSE
    exact = case.fisher_blocks()
    kfac, _ = full_blocks(case, updates=0)
    vectors = [np.random.RandomState(9).randn(*shape) for shape in case.shapes]

    with tf.Graph().as_default(), tf1.Session() as session:
        made = cases.build(case, "ekfac").estimator(cov_ema_decay=0.0)
        cov, inv = made.make_vars_and_create_op_thunks()
        products = made.multiply_inverse(
            [(tf.constant(a), v) for a, v in zip(vectors, made.variables, strict=True)]
        )
        updates, inverses = cases.update(cov)(), cases.update(inv)()
        session.run(tf1.global_variables_initializer())
        for op in (updates, inverses, updates):  # Without memory: the moments alone.
            session.run(op)
        products = session.run([t for t, _ in products])

    for group, kfac_block, exact_block in zip(case.groups, kfac, exact, strict=True):
        best = best_in_eigenbasis(kfac_block, exact_block, sides(case, group))
        vector = np.concatenate([vectors[i].ravel() for i in group])
        damped = best + cases.DAMPING * np.eye(len(best))
        actual = np.concatenate([products[i].ravel() for i in group])
        np.testing.assert_allclose(
            actual, np.linalg.solve(damped, vector), rtol=1e-8, atol=1e-10
        )
