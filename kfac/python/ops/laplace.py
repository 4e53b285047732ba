"""Laplace's approximation with the estimated curvature: posterior and evidence.

Around the trained parameters θ the posterior of a model with the prior N(0, I / τ) is
taken as normal, with precision `n F + τ I`: F is the mean curvature of a case's
negative log-likelihood, n the number of cases (MacKay 1992, "A practical Bayesian
framework for backpropagation networks"; Ritter, Botev & Barber 2018, "A scalable
Laplace approximation for neural networks").
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kfac.python.ops import curvature_operator
from kfac.python.ops.rules import scalars


class LaplacePosterior:
    """N(θ, (n F + τ I)⁻¹), θ the values of the variables now.

    Attributes:
      mean: θ, flattened `[P]` as in `curvature_operator`.
      precision: `n F + τ I`, a block-diagonal operator.
    """

    def __init__(self, estimator: Any, num_cases: Any, prior_precision: Any = 1.0):
        """Reads the statistics and the variables.

        Args:
          estimator: see `curvature_operator.curvature_operator`.  The registered losses
            must be negative log-likelihoods (with coefficient 1), the statistics those
            of the trained parameters: keep updating them for a while when the
            parameters have stopped to change.
          num_cases: n, the number of cases the model was trained on.
          prior_precision: τ, positive; L2 regularisation `c/2 |θ|²` of the *mean* loss
            is the prior of precision `n c`.

        Raises:
          ValueError: a number is not positive.
        """
        scalars.refuse_unless_positive("num_cases", num_cases)
        scalars.refuse_unless_positive("prior_precision", prior_precision)
        self._estimator = estimator
        self.mean = curvature_operator.flatten(
            estimator,
            [
                (tf.convert_to_tensor(variable), variable)
                for variable in curvature_operator.parameters(estimator)
            ],
        )
        self._prior_precision = scalars.cast(prior_precision, self.mean.dtype)
        self.precision = curvature_operator.shifted_operator(
            estimator, scale=num_cases, shift=self._prior_precision
        )

    def sample(
        self, num_samples: int, seed: int | None = None
    ) -> list[tuple[tf.Tensor, Any]]:
        """Draws parameters.

        Args:
          num_samples: how many.
          seed: for the same numbers every time.

        Returns:
          `(samples [num_samples, *shape], variable)` pairs, one per variable.
        """
        deviations = curvature_operator.sample(
            self.precision, num_samples, inverse=True, seed=seed
        )
        return curvature_operator.unflatten(self._estimator, self.mean + deviations)

    def log_evidence(self, log_likelihood: Any) -> tf.Tensor:
        """Approximate log marginal likelihood, for comparing models or priors.

        `log p(D|θ) - τ/2 |θ|² + P/2 log τ - 1/2 log det(n F + τ I)`.

        Args:
          log_likelihood: `log p(D|θ)`, summed over all n cases, at the mean.
        """
        size = tf.cast(tf.size(self.mean), self.mean.dtype)
        log_prior = 0.5 * (
            size * tf.math.log(self._prior_precision)
            - self._prior_precision * tf.reduce_sum(tf.square(self.mean))
        )
        return (
            scalars.cast(log_likelihood, self.mean.dtype)
            + log_prior
            - 0.5 * self.precision.log_abs_determinant()
        )
