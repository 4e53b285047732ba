"""On which steps statistics and inverses are due."""

from __future__ import annotations

from typing import Any


def statistics_due(step: Any, cov_update_every: int) -> Any:
    """Whether the covariances are updated in step number `step` (from 0).

    That is every `cov_update_every` steps, and more often at first: at 1, 2, 4, 8, ...
    At the start the curvature changes fastest and is known from one batch only.  Its
    inverses, kept for a whole period, are what makes K-FAC diverge in its first steps.

    Args:
      step: Python int, or integer tensor, which makes a boolean tensor.
      cov_update_every: steps between updates.
    """
    return _due(step, cov_update_every)


def inverses_due(step: Any, invert_every: int) -> Any:
    """Likewise for the inverses."""
    return _due(step, invert_every)


def _due(step: Any, period: int) -> Any:
    power_of_two = step & (step - 1) == 0
    return (step % period == 0) | ((step < period) & power_of_two)
