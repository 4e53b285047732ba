"""The Fisher estimator: statistics, inverses and products of the curvature."""

from kfac.python.ops.estimator.base import FisherEstimator
from kfac.python.ops.estimator.placed import (
    FisherEstimatorReplicaRoundRobin,
    FisherEstimatorRoundRobin,
    make_fisher_estimator,
)

__all__ = [
    "FisherEstimator",
    "FisherEstimatorReplicaRoundRobin",
    "FisherEstimatorRoundRobin",
    "make_fisher_estimator",
]
