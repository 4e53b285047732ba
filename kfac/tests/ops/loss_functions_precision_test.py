"""Logits far out: finite, and precise where probabilities are not."""

import itertools

import numpy as np
import tensorflow as tf

from kfac.tests.ops import loss_cases
from kfac.tests.ops.loss_cases import in_function


def test_extreme_logits_give_finite_products_and_values():
    extremes = [1e4, 3e38, 40.0, 0.0]
    logits = np.array(list(itertools.product(extremes, [-1e4, -3e38, 0.0])), "f4")

    def build():
        results = {}
        for name in ("categorical", "one-hot categorical", "Bernoulli"):
            case = loss_cases.BY_NAME[name]
            loss = case.loss(params=[tf.constant(logits)])
            vector = np.ones_like(logits)
            results[name] = {
                "F": loss.multiply_fisher(vector),
                "B": loss.multiply_fisher_factor(vector),
                "Bt": loss.multiply_fisher_factor_transpose(vector),
                "column": loss.multiply_fisher_factor_replicated_one_hot((1,)),
                "nll": loss.evaluate_on_sample(seed=1),
            }
        return results

    result = in_function(build)
    for name, products in result.items():
        for key, value in products.items():
            assert np.all(np.isfinite(value)), (name, key)
    saturated = np.all(np.abs(logits) > 1e3, axis=1)
    assert np.all(result["Bernoulli"]["F"][saturated] == 0)
    assert np.all(result["categorical"]["F"][saturated] == 0)


def test_ruled_out_classes_do_no_harm():
    """A logit of minus infinity has probability, target and gradient zero."""
    logits = np.array([[0.0, -np.inf, 1.0]])
    targets = np.array([[1.0, 0.0, 0.0]])

    def build():
        z = tf.constant(logits)
        loss = loss_cases.BY_NAME["one-hot categorical"].loss(
            params=[z], targets=targets
        )
        gradient = tf.gradients(loss.evaluate(), z)[0]
        return loss.evaluate(), gradient, loss.multiply_fisher(np.ones([1, 3]))

    value, gradient, product = in_function(build)
    p = 1 / (1 + np.e)
    np.testing.assert_allclose(value, -np.log(p))
    np.testing.assert_allclose(gradient, [[p - 1, 0, 1 - p]], atol=1e-15)
    np.testing.assert_allclose(product, 0, atol=1e-15)


def test_factors_keep_their_precision_where_probabilities_lose_theirs():
    """√p of a class with p ~ e⁻¹²⁰, below float32; √(p (1 - p)) of logit ±60."""
    logits = np.array([[0.0, -120.0]], "f4")

    def build():
        softmax = loss_cases.BY_NAME["categorical"].loss(params=[tf.constant(logits)])
        bernoulli = loss_cases.BY_NAME["Bernoulli"].loss(
            params=[tf.constant([[60.0, -60.0]])]
        )
        return (
            softmax.multiply_fisher_factor_replicated_one_hot((1,)),
            bernoulli.multiply_fisher_factor(np.ones([1, 2], "f4")),
        )

    column, deviation = in_function(build)
    # Exponents of about 60 are rounded to 2⁻¹⁹ in float32.
    np.testing.assert_allclose(column[0, 1], np.exp(-60), rtol=1e-5)
    np.testing.assert_allclose(deviation, np.full([1, 2], np.exp(-30)), rtol=1e-5)
