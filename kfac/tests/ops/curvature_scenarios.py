"""Networks with losses, and their explicit curvature matrices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from kfac.python.ops import curvature_matrix_vector_products as cmvp
from kfac.python.ops import loss_functions
from kfac.tests import graph_kinds, oracle

BATCH = 4


class Losses:
    """The part of a layer collection that the products need."""

    def __init__(self, *losses_and_coeffs):
        self.losses = [loss for loss, _ in losses_and_coeffs]
        self.loss_coeffs = dict(losses_and_coeffs)
        self.loss_colocation_ops = {
            loss: tf.nest.flatten(loss.inputs)[0] for loss in self.losses
        }

    def total_loss(self):
        return tf.add_n(
            [
                tf.cast(self.loss_coeffs[loss], loss.dtype) * loss.evaluate()
                for loss in self.losses
            ]
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Scenario:
    """A network with losses.

    Attributes:
      net: `net(params, x)` -> list of loss inputs.
      losses: for each loss its class, its coefficient, the oracle and the targets.
    """

    net: Callable
    params: Sequence[np.ndarray]
    x: np.ndarray
    losses: Sequence[tuple[type, float, object, np.ndarray]]

    def computer(self):
        """The products' computer in the current graph."""
        params = [graph_kinds.variable(p, f"p{i}") for i, p in enumerate(self.params)]
        outputs = self.net(params, tf.constant(self.x))
        collection = Losses(
            *(
                (cls(*(z if isinstance(z, tuple) else (z,)), targets=targets), coeff)
                for z, (cls, coeff, _, targets) in zip(
                    outputs, self.losses, strict=True
                )
            )
        )
        return cmvp.CurvatureMatrixVectorProductComputer(collection, params)

    @functools.cached_property
    def fisher(self):
        """Of the summed loss."""
        oracles = [loss for _, _, loss, _ in self.losses]
        mean = oracle.fisher(self.net, self.params, self.x, oracles)
        return len(self.x) * mean

    def gradient(self, params):
        targets = [t for _, _, _, t in self.losses]
        oracles = [loss for _, _, loss, _ in self.losses]
        rows = oracle.example_gradients(self.net, params, self.x, oracles, targets)
        return rows.sum(0)

    def hessian_product(self, vector):
        """By central differences: relative error about 1e-10 / 1e-5 + 1e-10."""
        step = 1e-5
        ahead, behind = (
            self.gradient(
                [p + s * step * v for p, v in zip(self.params, vector, strict=True)]
            )
            for s in (1, -1)
        )
        return (ahead - behind) / (2 * step)

    def vector(self, seed=0):
        rng = np.random.default_rng(seed)
        return [rng.normal(size=p.shape) for p in self.params]


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def _dense():
    def net(params, x):
        w1, b1, w2 = params
        return [tf.matmul(tf.tanh(tf.matmul(x, w1) + b1), w2)]

    return Scenario(
        net,
        [_normal(0, 3, 4), _normal(1, 4), _normal(2, 4, 3)],
        _normal(3, BATCH, 3),
        [
            (
                loss_functions.CategoricalLogitsNegativeLogProbLoss,
                1.0,
                oracle.Categorical(),
                np.array([0, 2, 1, 1]),
            )
        ],
    )


def _convolution():
    def net(params, x):
        kernel, w = params
        hidden = tf.nn.softplus(tf.nn.conv2d(x, kernel, 1, "SAME"))
        return [tf.matmul(tf.reshape(hidden, [tf.shape(x)[0], 8]), w)]

    return Scenario(
        net,
        [_normal(0, 2, 2, 1, 2), _normal(1, 8, 2)],
        _normal(2, BATCH, 2, 2, 1),
        [
            (
                loss_functions.MultiBernoulliNegativeLogProbLoss,
                1.0,
                oracle.Bernoulli(),
                np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]),
            )
        ],
    )


def _two_losses():
    """The second head has a parameter that only one loss depends on."""

    def net(params, x):
        trunk, head = params
        hidden = tf.tanh(tf.matmul(x, trunk))
        return [hidden, tf.matmul(hidden, head)]

    return Scenario(
        net,
        [_normal(0, 3, 2), _normal(1, 2, 3)],
        _normal(2, BATCH, 3),
        [
            (
                loss_functions.NormalMeanNegativeLogProbLoss,
                # Not exact in binary, so rounding to float32 on the way would show.
                0.1,
                oracle.Normal(coeff=0.1),
                _normal(3, BATCH, 2),
            ),
            (
                loss_functions.CategoricalLogitsNegativeLogProbLoss,
                3,
                oracle.Categorical(coeff=3),
                np.array([0, 2, 1, 1]),
            ),
        ],
    )


def _mean_and_variance():
    def net(params, x):
        w, s = params
        mean = tf.matmul(x, w)
        return [(mean, tf.exp(tf.matmul(x, s)))]

    return Scenario(
        net,
        [_normal(0, 3, 2), 0.3 * _normal(1, 3, 2)],
        _normal(2, BATCH, 3),
        [
            (
                loss_functions.NormalMeanVarianceNegativeLogProbLoss,
                2.0,
                oracle.NormalMeanVariance(coeff=2.0),
                _normal(3, BATCH, 2),
            )
        ],
    )


def _embedding():
    """Every word is looked up once or twice, one of them never."""

    def net(params, x):
        table, w = params
        hidden = tf.tanh(tf.reduce_sum(tf.gather(table, x), 1))
        return [tf.matmul(hidden, w)]

    return Scenario(
        net,
        [_normal(0, 5, 3), _normal(1, 3, 3)],
        np.array([[0, 1], [1, 1], [3, 0], [2, 3]]),
        [
            (
                loss_functions.CategoricalLogitsNegativeLogProbLoss,
                1.0,
                oracle.Categorical(),
                np.array([0, 2, 1, 1]),
            )
        ],
    )


SCENARIOS = {
    "dense": _dense(),
    "convolution": _convolution(),
    "two losses": _two_losses(),
    "mean and variance": _mean_and_variance(),
    "embedding": _embedding(),
}
