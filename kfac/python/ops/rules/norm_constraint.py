"""Clips a step to a bound on its length in the metric of the curvature.

For d = P g with P the inverse of the damped curvature, `<g, d>` is the squared length
of d in that curvature, so no further product is needed (Ba, Grosse & Martens,
"Distributed second-order optimization using Kronecker-factored approximations",
ICLR 2017, section 5).
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kfac.python.ops.rules import scalars


def clip_coefficient(
    squared_norm: tf.Tensor, learning_rate: Any, bound: Any
) -> tf.Tensor:
    """`min(1, sqrt(bound / (learning_rate^2 squared_norm)))`.

    Args:
      squared_norm: scalar `<g, P g>`.  Zero or, by rounding, negative values leave
        the step alone.
      learning_rate: scalar that multiplies the step.
      bound: positive scalar; the largest squared length of `learning_rate * P g`.

    Returns:
      Scalar in (0, 1] of `squared_norm`'s dtype.
    """
    squared_norm = tf.convert_to_tensor(squared_norm)
    learning_rate = scalars.cast(learning_rate, squared_norm.dtype)
    bound = scalars.cast(bound, squared_norm.dtype)
    squared_step = learning_rate**2 * squared_norm
    too_long = squared_step > bound
    ratio = bound / tf.where(too_long, squared_step, bound)
    return tf.where(too_long, tf.sqrt(ratio), tf.ones_like(ratio))
