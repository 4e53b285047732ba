"""On which steps statistics and inverses are due."""

from __future__ import annotations

from typing import Any


def statistics_due(step: Any, cov_update_every: int) -> Any:
    """Whether the covariances are updated in step number `step` (from 0).

    Args:
      step: Python int, or integer tensor, which makes a boolean tensor.
      cov_update_every: steps between updates.
    """
    return step % cov_update_every == 0


def inverses_due(step: Any, invert_every: int) -> Any:
    """Likewise for the inverses: every `invert_every` steps, at first more often.

    At the start the curvature changes fastest and is known from one batch only;
    inverses of the first batch's statistics, kept for a whole period, are what makes
    K-FAC diverge in its first steps.  They are therefore also due at 1, 2, 4, 8, ...
    """
    power_of_two = step & (step - 1) == 0
    return (step % invert_every == 0) | ((step < invert_every) & power_of_two)
