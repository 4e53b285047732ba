"""Laplace's approximation where everything is known: linear regression."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import estimator, laplace, layer_collection
from kfac.tests import graph_kinds
from kfac.tests.ops import ekfac_cases

tf1 = tf.compat.v1

CASES, FEATURES, VARIANCE, PRIOR = 12, 3, 0.25, 2.0
RNG = np.random.RandomState(0)
X = RNG.randn(CASES, FEATURES)
X_AND_ONE = np.concatenate([X, np.ones((CASES, 1))], axis=1)
Y = X @ RNG.randn(FEATURES, 1) + 0.3 + np.sqrt(VARIANCE) * RNG.randn(CASES, 1)

# For the prior N(0, I / PRIOR) and the noise's variance everything is normal.
PRECISION = X_AND_ONE.T @ X_AND_ONE / VARIANCE + PRIOR * np.eye(FEATURES + 1)
MEAN = np.linalg.solve(PRECISION, X_AND_ONE.T @ Y[:, 0] / VARIANCE)


def log_normal(x, covariance):
    return -0.5 * (
        x @ np.linalg.solve(covariance, x)
        + np.linalg.slogdet(covariance)[1]
        + len(x) * np.log(2 * np.pi)
    )


# p(y) is normal, with the prior's and the noise's covariance.
EVIDENCE = log_normal(
    Y[:, 0], X_AND_ONE @ X_AND_ONE.T / PRIOR + VARIANCE * np.eye(CASES)
)
LIKELIHOOD = log_normal(Y[:, 0] - X_AND_ONE @ MEAN, VARIANCE * np.eye(CASES))


def posterior(approx, prior=PRIOR, mean=MEAN):
    """The posterior around `mean`, in the current graph."""
    x = tf1.placeholder_with_default(X, X.shape)
    w = graph_kinds.variable(mean[:FEATURES, None], "w")
    b = graph_kinds.variable(mean[FEATURES:], "b")
    out = tf.matmul(x, w) + b
    collection = layer_collection.LayerCollection()
    if approx == "full":
        collection.register_generic((w, b), CASES, approx="full")
    else:
        collection.register_fully_connected((w, b), x, out, approx=approx)
    collection.register_normal_predictive_distribution(out, var=VARIANCE)
    made = estimator.make_fisher_estimator(
        variables=[w, b],
        cov_ema_decay=0.9,
        damping=0.1,
        layer_collection=collection,
        estimation_mode="exact",
    )
    cov, inv = made.make_vars_and_create_op_thunks()
    done = ekfac_cases.in_turn([ekfac_cases.update(cov), ekfac_cases.update(inv)])
    with tf.control_dependencies([done]):
        return laplace.LaplacePosterior(made, CASES, prior), (w, b)


# One linear layer with one output: Kronecker blocks are exact.
@pytest.mark.parametrize("approx", ["kron", "ekfac"])
@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_the_posterior_and_the_evidence_of_a_linear_model_are_exact(approx, kind):
    def build():
        result, _ = posterior(approx)
        return [
            result.mean,
            result.precision.to_dense(),
            result.log_evidence(LIKELIHOOD),
        ]

    mean, precision, evidence = graph_kinds.Run(kind, build)()
    np.testing.assert_allclose(mean, MEAN, rtol=1e-12)
    np.testing.assert_allclose(precision, PRECISION, rtol=1e-9)
    np.testing.assert_allclose(evidence, EVIDENCE, rtol=1e-10)


def test_the_diagonal_posterior_has_the_true_diagonal_precision():
    precision = graph_kinds.Run(
        graph_kinds.V1_ON, lambda: posterior("diagonal")[0].precision.to_dense()
    )()
    np.testing.assert_allclose(precision, np.diag(np.diag(PRECISION)), rtol=1e-9)


def test_samples_have_the_posterior_mean_and_covariance():
    count = 20000

    def build():
        result, variables = posterior("kron")
        samples = result.sample(count, seed=3)
        assert [v for _, v in samples] == list(variables)
        return [t for t, _ in samples]

    w, b = graph_kinds.Run(graph_kinds.V1_OFF, build)()
    assert w.shape == (count, FEATURES, 1) and b.shape == (count, 1)
    samples = np.concatenate([w[:, :, 0], b], axis=1)
    expected = np.linalg.inv(PRECISION)
    diagonal = np.diag(expected)
    assert np.all(np.abs(samples.mean(0) - MEAN) < 5 * np.sqrt(diagonal / count))
    covariance = np.cov(samples.T)
    error = np.sqrt((np.outer(diagonal, diagonal) + expected**2) / count)
    assert np.all(np.abs(covariance - expected) < 5 * error)


def test_the_evidence_prefers_the_prior_that_fits():
    """The best of three priors is the one with the largest true evidence."""
    found, expected = [], []
    for prior in (0.001, 1.0, 1000.0):
        precision = X_AND_ONE.T @ X_AND_ONE / VARIANCE + prior * np.eye(FEATURES + 1)
        mean = np.linalg.solve(precision, X_AND_ONE.T @ Y[:, 0] / VARIANCE)
        likelihood = log_normal(Y[:, 0] - X_AND_ONE @ mean, VARIANCE * np.eye(CASES))

        def build(prior=prior, mean=mean, likelihood=likelihood):
            return posterior("ekfac", prior, mean)[0].log_evidence(likelihood)

        found.append(graph_kinds.Run(graph_kinds.V1_ON, build)())
        expected.append(
            log_normal(
                Y[:, 0], X_AND_ONE @ X_AND_ONE.T / prior + VARIANCE * np.eye(CASES)
            )
        )
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert np.argmax(found) == 1


@pytest.mark.parametrize("name", ["num_cases", "prior_precision"])
@pytest.mark.parametrize("value", [0, -1.0])
def test_numbers_that_are_not_positive_are_refused(name, value):
    arguments = {"num_cases": CASES, "prior_precision": PRIOR, name: value}
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        laplace.LaplacePosterior(None, **arguments)
