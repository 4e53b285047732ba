"""Explicit float64 curvature matrices, built from Jacobians, to test against.

Slow and obviously right: eager TensorFlow computes Jacobians one example at a time,
NumPy does the rest.  Parameters are flattened row-major and concatenated in order.

    losses = [oracle.Categorical(), oracle.Normal(var=0.5, coeff=2.0)]
    F = oracle.fisher(net, params, x, losses)     # [P, P], mean over the batch
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

Net = Callable[..., object]


@dataclasses.dataclass(frozen=True)
class Categorical:
    """Softmax cross-entropy of logits."""

    coeff: float = 1.0

    def fisher(self, logits: np.ndarray) -> np.ndarray:
        p = np.exp(logits - logits.max())
        p /= p.sum()
        return np.diag(p) - np.outer(p, p)

    def score(self, logits: np.ndarray, target) -> np.ndarray:
        """Gradient of the negative log-likelihood with respect to the logits."""
        p = np.exp(logits - logits.max())
        p /= p.sum()
        return p - np.eye(len(p))[int(target)]


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Sigmoid cross-entropy of logits."""

    coeff: float = 1.0

    def fisher(self, logits: np.ndarray) -> np.ndarray:
        p = 1 / (1 + np.exp(-logits))
        return np.diag(p * (1 - p))

    def score(self, logits: np.ndarray, target) -> np.ndarray:
        return 1 / (1 + np.exp(-logits)) - target


@dataclasses.dataclass(frozen=True)
class Normal:
    """Normal mean with a fixed variance; 0.5 is squared error."""

    var: float = 0.5
    coeff: float = 1.0

    def fisher(self, mean: np.ndarray) -> np.ndarray:
        return np.eye(len(mean)) / self.var

    def score(self, mean: np.ndarray, target) -> np.ndarray:
        return (mean - target) / self.var


@dataclasses.dataclass(frozen=True)
class NormalMeanVariance:
    """Normal with predicted mean and variance, concatenated: `[2 n]`."""

    coeff: float = 1.0

    def fisher(self, mean_and_variance: np.ndarray) -> np.ndarray:
        _, v = np.split(mean_and_variance, 2)
        return np.diag(np.concatenate([1 / v, 0.5 / v**2]))

    def score(self, mean_and_variance: np.ndarray, target) -> np.ndarray:
        m, v = np.split(mean_and_variance, 2)
        return np.concatenate(
            [(m - target) / v, 0.5 / v - 0.5 * (target - m) ** 2 / v**2]
        )


def jacobians(
    net: Net, params: Sequence[np.ndarray], x: np.ndarray
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Per example and per loss: flattened outputs `[n]` and Jacobian `[n, P]`.

    `net(params, x)` maps tensors to the loss inputs: one tensor `[1, ...]`, or a list
    with one entry a loss; an entry that is a tuple is flattened and concatenated.
    """
    result = []
    for example in np.asarray(x):
        variables = [tf.Variable(p, dtype=tf.float64) for p in params]
        with tf.GradientTape() as tape:
            outputs = net(variables, tf.constant(example[None]))
            outputs = outputs if isinstance(outputs, list) else [outputs]
            flat = [
                tf.concat([tf.reshape(t, [-1]) for t in tf.nest.flatten(o)], 0)
                for o in outputs
            ]
            joined = tf.concat(flat, 0)
        jacobian = tape.jacobian(joined, variables, unconnected_gradients="zero")
        dense = np.concatenate(
            [
                np.reshape(tf.convert_to_tensor(j), [joined.shape[0], -1])
                for j in jacobian
            ],
            axis=1,
        )
        splits = np.cumsum([f.shape[0] for f in flat])[:-1]
        result.append(
            list(zip([f.numpy() for f in flat], np.split(dense, splits), strict=True))
        )
    return result


def fisher(net: Net, params, x, losses) -> np.ndarray:
    """Exact Fisher matrix (= GGN for these losses) `[P, P]`, mean over the batch."""
    per_example = jacobians(net, params, x)
    return sum(
        loss.coeff * jacobian.T @ loss.fisher(output) @ jacobian
        for example in per_example
        for loss, (output, jacobian) in zip(losses, example, strict=True)
    ) / len(per_example)


def example_gradients(net: Net, params, x, losses, targets) -> np.ndarray:
    """Gradient of the coefficient-weighted loss of every example `[B, P]`.

    `targets` has one array `[B, ...]` a loss.
    """
    rows = []
    for i, example in enumerate(jacobians(net, params, x)):
        rows.append(
            sum(
                loss.coeff
                * jacobian.T
                @ loss.score(output, np.ravel(target[i]).squeeze())
                for loss, target, (output, jacobian) in zip(
                    losses, targets, example, strict=True
                )
            )
        )
    return np.stack(rows)


def matrix_power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """Power of a symmetric positive definite matrix."""
    eigenvalues, eigenvectors = np.linalg.eigh(matrix)
    return (eigenvectors * eigenvalues**exponent) @ eigenvectors.T


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
