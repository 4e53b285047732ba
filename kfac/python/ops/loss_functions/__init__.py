"""Losses that are negative log-likelihoods of a predictive distribution.

A loss object wraps the network outputs that parameterise a distribution.  It
evaluates the negative log-likelihood summed over the batch, draws targets from the
model, and multiplies by the Fisher matrix F of the loss *with respect to those
outputs* and by a factor B with B Bᵀ = F.  Products are per case: block-diagonal over
the batch, not averaged, without damping and without the loss's coefficient.

See J. Martens, "New insights and perspectives on the natural gradient method" (2014),
sections 8 and 9, for F, its relation to the generalised Gauss-Newton matrix, and
N. Schraudolph, "Fast curvature matrix-vector products" (2002), for products by factors.
"""

from kfac.python.ops.loss_functions.base import (
    DistributionNegativeLogProbLoss,
    LossFunction,
    NaturalParamsNegativeLogProbLoss,
    NegativeLogProbLoss,
)
from kfac.python.ops.loss_functions.bernoulli import MultiBernoulliNegativeLogProbLoss
from kfac.python.ops.loss_functions.categorical import (
    CategoricalLogitsNegativeLogProbLoss,
    OnehotCategoricalLogitsNegativeLogProbLoss,
)
from kfac.python.ops.loss_functions.helpers import insert_slice_in_zeros
from kfac.python.ops.loss_functions.normal import (
    NormalMeanNegativeLogProbLoss,
    NormalMeanVarianceNegativeLogProbLoss,
)

__all__ = [
    "CategoricalLogitsNegativeLogProbLoss",
    "DistributionNegativeLogProbLoss",
    "LossFunction",
    "MultiBernoulliNegativeLogProbLoss",
    "NaturalParamsNegativeLogProbLoss",
    "NegativeLogProbLoss",
    "NormalMeanNegativeLogProbLoss",
    "NormalMeanVarianceNegativeLogProbLoss",
    "OnehotCategoricalLogitsNegativeLogProbLoss",
    "insert_slice_in_zeros",
]
