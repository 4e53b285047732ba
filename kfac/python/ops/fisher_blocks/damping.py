"""Damping of Fisher blocks: normalisation, the pi split, functions with identity."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import tensorflow as tf

from kfac.python.ops import config
from kfac.python.ops.rules import pi_damping

PI_OFF_NAME = "off"
PI_TRACENORM_NAME = "tracenorm"


def set_global_constants(
    normalize_damping_power: float | None = None, pi_type: str | None = None
) -> None:
    """Replaces `NORMALIZE_DAMPING_POWER` and `PI_TYPE`; `None` leaves one alone."""
    config.replace(normalize_damping_power=normalize_damping_power, pi_type=pi_type)


def normalize_damping(damping: Any, num_replications: int) -> Any:
    """`damping / num_replications**NORMALIZE_DAMPING_POWER`.

    A block that is `num_replications` times a Kronecker product gets the damping
    `damping` as a whole when its factors get the normalised one.  A power of 0 (or
    any false value) switches the normalisation off.

    Args:
      damping: float, scalar tensor or variable.
      num_replications: number of locations and uses of a weight per case.
    """
    power = config.settings().normalize_damping_power
    return damping / num_replications**power if power else damping


def compute_pi_tracenorm(left_cov: Any, right_cov: Any) -> tf.Tensor:
    """The trace-norm pi of two covariances, see `rules.pi_damping.pi_tracenorm`.

    Args:
      left_cov: linear operator with `trace()` and a static `domain_dimension`.
      right_cov: the same, for the right factor.
    """
    return pi_damping.pi_tracenorm(
        left_cov.trace(),
        tf.compat.dimension_value(left_cov.domain_dimension),
        right_cov.trace(),
        tf.compat.dimension_value(right_cov.domain_dimension),
    )


def compute_pi_adjusted_damping(
    left_cov: Any, right_cov: Any, damping: Any
) -> tuple[Any, Any]:
    """Dampings of the left and the right factor, as `PI_TYPE` says.

    Args:
      left_cov: linear operator, see `compute_pi_tracenorm`.
      right_cov: linear operator.
      damping: *square root* of the block's damping.

    Returns:
      `(damping * pi, damping / pi)` in the covariances' dtype for "tracenorm"; for
      "off" twice the `damping` as given.

    Raises:
      ValueError: `PI_TYPE` is neither of the two.
    """
    pi_type = config.settings().pi_type
    if pi_type == PI_TRACENORM_NAME:
        return pi_damping.split(damping, compute_pi_tracenorm(left_cov, right_cov))
    if pi_type == PI_OFF_NAME:
        return damping, damping
    raise ValueError(
        f"Unknown PI_TYPE {pi_type!r}; use {PI_TRACENORM_NAME!r} or {PI_OFF_NAME!r} "
        "(fisher_blocks.set_global_constants)."
    )


class PackagedFunc:
    """A function without arguments that carries an identity.

    Factors keep one inverse per damping *id*, so functions of equal ids must return
    equal values.
    """

    def __init__(self, func: Callable[[], Any], func_id: Any):
        """Makes a `PackagedFunc`.

        Args:
          func: function without arguments.
          func_id: a hashable, a function without arguments that returns one, or a
            list or tuple of those.
        """
        self._func = func
        self._func_id = (
            tuple(func_id) if isinstance(func_id, (list, tuple)) else (func_id,)
        )

    def __call__(self) -> Any:
        return self._func()

    @property
    def func_id(self) -> tuple[Hashable, ...]:
        """The identity; its functions are called now."""
        return tuple(part() if callable(part) else part for part in self._func_id)


def _package_func(func: Callable[[], Any], func_id: Any) -> PackagedFunc:
    return PackagedFunc(func, func_id)
