"""Independent binary targets: sigmoid cross-entropy."""

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


class MultiBernoulliNegativeLogProbLoss(
    DistributionNegativeLogProbLoss, NaturalParamsNegativeLogProbLoss
):
    """Sigmoid cross-entropy of logits with binary (or fractional) targets.

    The value is Σ softplus(z) - t z.  With p = sigmoid(z), F = diag(p (1 - p)) and
    B is its elementwise square root.

    Args:
      logits: `[batch, ...]`.
      targets: shape of `logits`, any numeric dtype; None if only sampled.
      seed: see `NegativeLogProbLoss`.
    """

    def __init__(self, logits: Any, targets: Any = None, seed: Any = None):
        super().__init__(seed=seed)
        self._logits = logits
        self._targets = targets
        self._deviation = deferred.PerContextCache(self._compute_deviation)

    @property
    def targets(self) -> Any:
        return self._targets

    @property
    def params(self) -> Any:
        return self._logits

    @property
    def dist(self) -> Any:
        return import_distributions().Bernoulli(
            logits=tf.convert_to_tensor(self._logits)
        )

    def sample(self, seed: Any = None) -> tf.Tensor:
        """Zeros and ones, int32, shape of the logits."""
        logits = tf.convert_to_tensor(self._logits)
        # Half-precision uniform numbers are too coarse for rare outcomes.
        wide = tf.float64 if logits.dtype == tf.float64 else tf.float32
        uniform = sampling.uniform(tf.shape(logits), wide, seed)
        return tf.cast(uniform < tf.sigmoid(tf.cast(logits, wide)), tf.int32)

    def _evaluate(self, targets: Any) -> tf.Tensor:
        logits = tf.convert_to_tensor(self._logits)
        targets = helpers.targets_like(targets, logits, self, logits.dtype)
        return tf.reduce_sum(
            tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=logits)
        )

    @helpers.vector_or_vecs
    def multiply_fisher(self, vector: Any) -> tf.Tensor:
        deviation = self._deviation.get()
        return tf.square(deviation) * tf.convert_to_tensor(vector, deviation.dtype)

    @helpers.vector_or_vecs
    def multiply_fisher_factor(self, vector: Any) -> tf.Tensor:
        deviation = self._deviation.get()
        return deviation * tf.convert_to_tensor(vector, deviation.dtype)

    @helpers.vector_or_vecs
    def multiply_fisher_factor_transpose(self, vector: Any) -> tf.Tensor:
        return self.multiply_fisher_factor(vector)

    def _compute_deviation(self) -> tf.Tensor:
        """√(p (1 - p)) = exp(½ (log p + log(1 - p))), exact for large |logits| too."""
        logits = tf.convert_to_tensor(self._logits)
        return tf.exp(-0.5 * (tf.nn.softplus(logits) + tf.nn.softplus(-logits)))
