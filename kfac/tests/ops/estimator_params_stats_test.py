"""First-order statistics."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.tests import estimator_cases as cases
from kfac.tests import graph_kinds

CASE = cases.TWO_LOSSES


def params_stats(mode, kind=graph_kinds.V1_ON, case=CASE, **options):
    def build():
        model = cases.build(case)
        made = model.estimator(
            estimation_mode=mode,
            compute_params_stats=True,
            batch_size=len(case.x),
            **options,
        )
        updates, _ = made.make_vars_and_create_op_thunks()
        return cases.after(cases.update_all(updates), lambda: list(made.params_stats))

    return graph_kinds.Run(kind, build)()


def flattened(values):
    return np.concatenate([np.ravel(value) for value in values])


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_empirical_ones_are_the_gradient_of_the_weighted_mean_loss(kind):
    actual = flattened(params_stats("empirical", kind))
    expected = CASE.example_gradients(square_root=False).mean(axis=0)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def test_without_coefficients_they_come_from_the_same_backward_pass():
    actual = flattened(params_stats("empirical", case=cases.DENSE_SOFTMAX))
    expected = cases.DENSE_SOFTMAX.example_gradients(square_root=False).mean(axis=0)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def test_exact_ones_are_the_sum_over_all_coordinates():
    case = cases.CONV_SIGMOID
    variables = [tf.Variable(p) for p in case.params]
    with tf.GradientTape() as tape:
        (out,) = case.net(variables, case.x)
        p = tf.stop_gradient(tf.sigmoid(out))
        # Bernoulli: column j of the factor is √(p (1 - p)) at j; coefficient 1/2.
        total = tf.reduce_sum(tf.sqrt(0.5 * p * (1 - p)) * out) / len(case.x)
    expected = flattened(tape.gradient(total, variables))
    actual = flattened(params_stats("exact", case=case))
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_they_are_taken_from_the_sub_batch():
    actual = flattened(params_stats("empirical", cov_batch_fraction=0.5))
    part = CASE.first(2)
    expected = part.example_gradients(square_root=False).mean(axis=0)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)
