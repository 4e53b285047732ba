"""What products make of zeros, coefficients, missing connections and bad arguments."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import curvature_matrix_vector_products as cmvp
from kfac.python.ops import errors, loss_functions
from kfac.tests import graph_kinds
from kfac.tests.ops.curvature_scenarios import BATCH, SCENARIOS, Losses

tf1 = tf.compat.v1


def _flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


def _in_function(build):
    return graph_kinds.Run(graph_kinds.FUNCTION, build)()


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_what_is_not_connected_counts_as_zero():
    """A parameter without influence, a loss without parameters, a linear loss."""
    x, w, v = _normal(0, BATCH, 3), _normal(1, 3, 2), _normal(2, 3, 2)

    def build():
        weight = graph_kinds.variable(w, "w")
        unused = graph_kinds.variable(np.ones([2]), "unused")
        logits = tf.matmul(tf.constant(x), weight)
        bernoulli = loss_functions.MultiBernoulliNegativeLogProbLoss
        normal = loss_functions.NormalMeanNegativeLogProbLoss
        targets = np.zeros([BATCH, 2])
        alone = bernoulli(logits, targets=targets)
        constant = normal(tf.constant(targets), targets=targets)
        vectors = [v, np.ones([2])]
        results = []
        for losses in (Losses((alone, 1.0)), Losses((constant, 1.0), (alone, 1.0))):
            computer = cmvp.CurvatureMatrixVectorProductComputer(
                losses, [weight, unused]
            )
            fisher, none = computer.multiply_fisher(vectors)
            assert none is None
            hessian, zero = computer.multiply_hessian(vectors)
            inner = computer.multiply_fisher_factor_transpose(vectors)
            results.append((fisher, hessian, zero, inner[-1], inner[0]))
        return results

    (fisher, hessian, zero, inner, _), with_constant = _in_function(build)
    np.testing.assert_allclose(fisher, hessian, rtol=1e-12)
    np.testing.assert_array_equal(zero, [0, 0])
    np.testing.assert_array_equal(with_constant[0], fisher)
    np.testing.assert_array_equal(with_constant[3], inner)
    np.testing.assert_array_equal(with_constant[4], np.zeros([BATCH, 2]))


def test_missing_vectors_count_as_zero():
    scenario = SCENARIOS["two losses"]
    v, zeros = scenario.vector(), [np.zeros_like(p) for p in scenario.params]

    def build():
        computer = scenario.computer()
        inner = computer.multiply_fisher_factor_transpose(v)
        pairs = [
            (computer.multiply_fisher([v[0], None]), [v[0], zeros[1]]),
            (computer.multiply_fisher([None, None]), zeros),
        ]
        return {
            "fisher": [(got, computer.multiply_fisher(v)) for got, v in pairs],
            "hessian": (
                computer.multiply_hessian([None, v[1]]),
                computer.multiply_hessian([zeros[0], v[1]]),
                computer.multiply_hessian([None, None]),
            ),
            "factor": (
                computer.multiply_fisher_factor([None, inner[1]]),
                computer.multiply_fisher_factor([tf.zeros_like(inner[0]), inner[1]]),
            ),
        }

    result = _in_function(build)
    for got, expected in result["fisher"]:
        np.testing.assert_allclose(_flat(got), _flat(expected), atol=1e-14)
    got, expected, nothing = result["hessian"]
    np.testing.assert_allclose(_flat(got), _flat(expected), atol=1e-14)
    assert not np.any(_flat(nothing))
    got, expected = result["factor"]
    np.testing.assert_array_equal(_flat(got), _flat(expected))


def test_a_collection_without_losses_yields_none():
    def build():
        weight = graph_kinds.variable(np.ones([2]), "w")
        computer = cmvp.CurvatureMatrixVectorProductComputer(Losses(), [weight])
        v = [np.ones([2])]
        assert computer.multiply_fisher(v) == [None]
        assert computer.multiply_hessian(v) == [None]
        assert computer.multiply_fisher_factor([]) == [None]
        assert computer.multiply_fisher_factor_transpose(v) == ()
        return tf.constant(0)

    _in_function(build)


def test_losses_registered_later_are_seen():
    def build():
        weight = graph_kinds.variable(np.ones([1, 2]), "w")
        loss = loss_functions.NormalMeanNegativeLogProbLoss(2.0 * weight, var=1.0)
        losses = Losses((loss, 1.0))
        computer = cmvp.CurvatureMatrixVectorProductComputer(losses, [weight])
        before = computer.multiply_fisher([np.ones([1, 2])])
        other = loss_functions.NormalMeanNegativeLogProbLoss(3.0 * weight, var=1.0)
        losses.__init__((loss, 1.0), (other, 1.0))
        return before, computer.multiply_fisher([np.ones([1, 2])])

    (before,), (after,) = _in_function(build)
    np.testing.assert_allclose(before, [[4.0, 4.0]])
    np.testing.assert_allclose(after, [[13.0, 13.0]])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_roots_of_coefficients_are_taken_in_the_dtype_of_the_model(as_tensor):
    """Also for integers; a detour over float32 would leave an error of 1e-8."""

    def build():
        mean = graph_kinds.variable(np.ones([1, 1]), "mean")
        products = []
        for coeff in (0.1, 3, np.float64(0.1), np.int64(3)):
            if as_tensor:
                dtype = tf.float64 if coeff < 1 else tf.int32
                coeff = tf1.placeholder_with_default(tf.constant(coeff, dtype), [])
            loss = loss_functions.NormalMeanNegativeLogProbLoss(mean, var=1.0)
            computer = cmvp.CurvatureMatrixVectorProductComputer(
                Losses((loss, coeff)), [mean]
            )
            one = np.ones([1, 1])
            products.append(computer.multiply_fisher_factor_transpose([one])[0])
            products.append(computer.multiply_fisher_factor([one])[0])
            products.append(tf.sqrt(computer.multiply_fisher([one])[0]))
        return products

    products = np.ravel(_in_function(build))
    expected = np.repeat(np.sqrt([0.1, 3, 0.1, 3]), 3)
    np.testing.assert_allclose(products, expected, rtol=1e-15)


def test_negative_coefficients_have_no_factor():
    def build(coeff):
        mean = graph_kinds.variable(np.ones([1, 1]), "mean")
        loss = loss_functions.NormalMeanNegativeLogProbLoss(mean, var=1.0)
        computer = cmvp.CurvatureMatrixVectorProductComputer(
            Losses((loss, coeff() if callable(coeff) else coeff)), [mean]
        )
        return computer.multiply_fisher_factor_transpose([np.ones([1, 1])])

    with pytest.raises(ValueError, match="negative"):
        _in_function(lambda: build(-1.0))
    with pytest.raises(tf.errors.InvalidArgumentError, match="negative"):
        _in_function(lambda: build(lambda: tf1.placeholder_with_default(-1.0, [])))


def test_wrong_vectors_are_refused():
    scenario = SCENARIOS["dense"]
    v = scenario.vector()

    def build():
        computer = scenario.computer()
        inner = np.zeros([BATCH, 3])
        for product in (computer.multiply_fisher, computer.multiply_hessian):
            with pytest.raises(ValueError, match="3 parameters is expected, got 2"):
                product(v[:2])
            with pytest.raises(ValueError, match="must have shape"):
                product([v[0].T, *v[1:]])
            with pytest.raises(TypeError, match="float64"):
                product([v[0].astype("f4"), *v[1:]])
        for factor in (computer.multiply_fisher_factor, computer.multiply_ggn_factor):
            with pytest.raises(ValueError, match="1 losses is expected, got 2"):
                factor([inner, inner])
            with pytest.raises(ValueError, match="must have shape"):
                factor([inner[:, :2]])
            with pytest.raises(TypeError, match="float64"):
                factor([inner.astype("f4")])
        return tf.constant(0)

    _in_function(build)


def test_hessian_products_need_targets():
    def build():
        mean = graph_kinds.variable(np.ones([1, 1]), "mean")
        loss = loss_functions.NormalMeanNegativeLogProbLoss(mean)
        computer = cmvp.CurvatureMatrixVectorProductComputer(
            Losses((loss, 1.0)), [mean]
        )
        with pytest.raises(errors.MissingTargetsError, match="unspecified targets"):
            computer.multiply_hessian([np.ones([1, 1])])
        return computer.multiply_fisher([np.ones([1, 1])])

    _in_function(build)


def test_mean_and_variance_losses_have_no_gauss_newton_products():
    scenario = SCENARIOS["mean and variance"]
    v = scenario.vector()

    def build():
        computer = scenario.computer()
        for product in (computer.multiply_ggn, computer.multiply_ggn_factor_transpose):
            with pytest.raises(NotImplementedError, match="natural"):
                product(v)
        with pytest.raises(NotImplementedError, match="natural"):
            computer.multiply_ggn_factor([None])
        return tf.constant(0)

    _in_function(build)


def test_products_are_refused_eagerly():
    mean = tf.Variable([[1.0]])
    loss = loss_functions.NormalMeanNegativeLogProbLoss(mean)
    computer = cmvp.CurvatureMatrixVectorProductComputer(Losses((loss, 1.0)), [mean])
    for product in (computer.multiply_fisher, computer.multiply_hessian):
        with pytest.raises(RuntimeError, match="tf.function"):
            product([[[1.0]]])
