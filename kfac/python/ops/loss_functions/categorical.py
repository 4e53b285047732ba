"""Categorical distributions over classes: softmax cross-entropy."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kfac.python.ops import deferred
from kfac.python.ops.loss_functions import helpers, sampling
from kfac.python.ops.loss_functions.base import (
    DistributionNegativeLogProbLoss,
    NaturalParamsNegativeLogProbLoss,
    import_distributions,
)


class CategoricalLogitsNegativeLogProbLoss(
    DistributionNegativeLogProbLoss, NaturalParamsNegativeLogProbLoss
):
    """Softmax cross-entropy of logits with class indices.

    With p = softmax(z) and q = √p, per case F = diag(p) - p pᵀ and
    B = diag(q) - p qᵀ.  Sums run over the last axis, all others are batch.

    Args:
      logits: `[batch, ..., n]`, or `[n]` for a single case.
      targets: class indices `[batch, ...]`: int32, int64, or floats that hold
        integers; None if only sampled. An index outside [0, n) fails at run time (on
        a CPU).
      seed: see `NegativeLogProbLoss`.
    """

    def __init__(self, logits: Any, targets: Any = None, seed: Any = None):
        super().__init__(seed=seed)
        self._logits = logits
        self._targets = targets
        self._probabilities = deferred.PerContextCache(self._compute_probabilities)

    @property
    def targets(self) -> Any:
        return self._targets

    @property
    def params(self) -> Any:
        return self._logits

    @property
    def dist(self) -> Any:
        return import_distributions().Categorical(
            logits=tf.convert_to_tensor(self._logits)
        )

    def sample(self, seed: Any = None) -> tf.Tensor:
        """Class indices, int32 `[batch, ...]`."""
        logits = tf.convert_to_tensor(self._logits)
        shape = tf.shape(logits)
        classes = sampling.categorical(tf.reshape(logits, [-1, shape[-1]]), seed)
        classes = tf.reshape(classes, shape[:-1])
        classes.set_shape(logits.shape[:-1])
        return classes

    def _evaluate(self, targets: Any) -> tf.Tensor:
        logits = tf.convert_to_tensor(self._logits)
        classes = helpers.targets_like(targets, logits[..., 0], self)
        if classes.dtype.is_floating:
            classes = tf.cast(classes, tf.int64)
        if classes.dtype not in (tf.int32, tf.int64):
            raise TypeError(
                "Class indices must be int32, int64 or floats that hold integers, got "
                f"{classes.dtype.name}. Cast them to int32."
            )
        return tf.reduce_sum(
            tf.nn.sparse_softmax_cross_entropy_with_logits(
                labels=classes, logits=logits
            )
        )

    @helpers.vector_or_vecs
    def multiply_fisher(self, vector: Any) -> tf.Tensor:
        p, _ = self._probabilities.get()
        vector = tf.convert_to_tensor(vector, p.dtype)
        return p * (vector - _sum_over_classes(p * vector))

    @helpers.vector_or_vecs
    def multiply_fisher_factor(self, vector: Any) -> tf.Tensor:
        p, q = self._probabilities.get()
        scaled = q * tf.convert_to_tensor(vector, q.dtype)
        return scaled - p * _sum_over_classes(scaled)

    @helpers.vector_or_vecs
    def multiply_fisher_factor_transpose(self, vector: Any) -> tf.Tensor:
        p, q = self._probabilities.get()
        vector = tf.convert_to_tensor(vector, p.dtype)
        return q * (vector - _sum_over_classes(p * vector))

    def _compute_probabilities(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Pair (p, √p); halving logarithms keeps √p where p underflows."""
        q = tf.exp(0.5 * tf.nn.log_softmax(tf.convert_to_tensor(self._logits)))
        return tf.square(q), q


class OnehotCategoricalLogitsNegativeLogProbLoss(CategoricalLogitsNegativeLogProbLoss):
    """Softmax cross-entropy of logits with one-hot or soft targets.

    The value is -Σ t log softmax(z): rows of `targets` may hold fractions.

    Args:
      logits: `[batch, ..., n]`, or `[n]` for a single case.
      targets: shape of `logits`, any numeric dtype; None if only sampled.
      seed: see `NegativeLogProbLoss`.
    """

    @property
    def dist(self) -> Any:
        return import_distributions().OneHotCategorical(
            logits=tf.convert_to_tensor(self._logits)
        )

    def sample(self, seed: Any = None) -> tf.Tensor:
        """One-hot rows, int32, shape of the logits."""
        logits = tf.convert_to_tensor(self._logits)
        one_hot = tf.one_hot(super().sample(seed), tf.shape(logits)[-1], dtype=tf.int32)
        one_hot.set_shape(logits.shape)
        return one_hot

    def _evaluate(self, targets: Any) -> tf.Tensor:
        logits = tf.convert_to_tensor(self._logits)
        targets = helpers.targets_like(targets, logits, self, logits.dtype)
        # A class that is ruled out (logit -inf) and has no target counts as zero. The
        # fused cross-entropy op would do that too, but its gradient takes it for
        # granted that every row of targets sums to one.
        return tf.reduce_sum(
            tf.math.multiply_no_nan(-tf.nn.log_softmax(logits), targets)
        )


def _sum_over_classes(tensor: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tensor, axis=-1, keepdims=True)
