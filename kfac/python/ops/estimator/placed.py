"""Estimators with a placement strategy."""

from __future__ import annotations

from typing import Any

from kfac.python.ops import placement
from kfac.python.ops.estimator.base import FisherEstimator


def make_fisher_estimator(
    placement_strategy: str | None = None, **kwargs: Any
) -> FisherEstimator:
    """Makes an estimator.

    Args:
      placement_strategy: None or "round_robin", or "replica_round_robin".
      **kwargs: of the estimator and of the strategy's mix-in in `placement`.

    Raises:
      ValueError: unknown strategy.
    """
    if placement_strategy in (None, "round_robin"):
        return FisherEstimatorRoundRobin(**kwargs)
    if placement_strategy == "replica_round_robin":
        return FisherEstimatorReplicaRoundRobin(**kwargs)
    raise ValueError(
        f"Unimplemented placement strategy {placement_strategy!r}; use 'round_robin' "
        "or 'replica_round_robin'."
    )


class FisherEstimatorRoundRobin(placement.RoundRobinPlacementMixin, FisherEstimator):
    """Estimator whose work is dealt out over devices in turn; keywords only."""

    def __init__(self, *args: Any, **kwargs: Any):
        _refuse_positional(self, args)
        super().__init__(**kwargs)


class FisherEstimatorReplicaRoundRobin(
    placement.ReplicaRoundRobinPlacementMixin, FisherEstimator
):
    """Estimator whose inverses and products are dealt out over replicas in turn.

    Keywords only.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        _refuse_positional(self, args)
        super().__init__(**kwargs)


def _refuse_positional(estimator: FisherEstimator, args: tuple[Any, ...]) -> None:
    # They would bind to the options of the mix-in.
    if args:
        raise TypeError(
            f"{type(estimator).__name__} takes keyword arguments only, got {len(args)} "
            "positional one(s). Write variables=..., cov_ema_decay=..., damping=..., "
            "layer_collection=..., and so on."
        )
