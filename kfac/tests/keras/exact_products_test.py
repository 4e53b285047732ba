"""The quadratic model of optimizers whose preconditioner is no estimate."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.keras.fishleg import FishLeg
from kfac.python.keras.natural_gradient import NaturalGradient
from kfac.tests import oracle
from kfac.tests.keras import keras_cases as cases

CASES, DAMPING, L2 = 12, 0.25, 0.0625  # Exact in single precision.


def _net(params, x):
    w1, b1, w2, b2 = params
    return [tf.matmul(tf.tanh(tf.matmul(x, w1) + b1), w2) + b2]


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (FishLeg, {"warmup_steps": 3}),
        (NaturalGradient, {}),
        (NaturalGradient, {"curvature": "empirical_fisher"}),
    ],
)
def test_the_predicted_change_is_that_of_the_exact_quadratic(optimizer_class, options):
    """`u' g + 1/2 u' (C + l2 I) u`: the rest of the damping is not in the loss."""
    x, y = cases.data(cases=CASES)
    x = x.astype(np.float64)
    with cases.dtype_policy("float64"):
        model = cases.sequential()
        optimizer = optimizer_class(
            learning_rate=0.125,
            damping=DAMPING,
            model=model,
            momentum_type="regular",
            adapt_damping=True,
            damping_adaptation_interval=1,
            invert_every=1,
            l2_reg=L2,
            **options,
        )
        model.compile(optimizer=optimizer, loss=cases.sparse_logits())
        params = cases.weights(model)
        model.train_on_batch(x, y)
    losses = [oracle.Categorical()]
    rows = oracle.example_gradients(_net, params, x, losses, [y])
    curvature = rows.T @ rows / CASES
    if options.get("curvature") is None:
        curvature = oracle.fisher(_net, params, x, losses)
    moved = [
        np.ravel(new - old)
        for new, old in zip(cases.weights(model), params, strict=True)
    ]
    u = np.concatenate(moved)
    expected = u @ rows.mean(0) + 0.5 * u @ (curvature @ u + L2 * u)
    predicted = float(optimizer.state_variable("kfac/qmodel_change"))
    # The learning rate and the prediction itself are single-precision numbers.
    np.testing.assert_allclose(predicted, expected, rtol=1e-5)
