"""Adapts the damping to how well the quadratic model predicted the loss.

Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate
curvature", ICML 2015, section 6.5.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kfac.python.ops.rules import scalars


def decay_per_adaptation(decay: float, interval: int) -> float:
    """Factor of one adaptation that makes `decay` the factor per step."""
    return decay**interval


def reduction_ratio(loss_before: Any, loss_after: Any, predicted_change: Any) -> Any:
    """rho: actual change of the loss over the predicted one."""
    return (loss_after - loss_before) / predicted_change


def adapt(
    damping: tf.Tensor,
    loss_before: Any,
    loss_after: Any,
    predicted_change: Any,
    decay: Any,
    floor: Any,
    decrease_threshold: Any = 0.75,
    increase_threshold: Any = 0.25,
) -> tuple[tf.Tensor, tf.Tensor]:
    """One adaptation.

    The damping grows when the loss grew or is not finite any more, whatever was
    predicted, and when rho is below `increase_threshold`.  It shrinks when rho is
    above `decrease_threshold`, and when the loss fell although the model predicted
    growth.  An undefined comparison (no loss recorded yet, no finite prediction)
    leaves it alone.

    Args:
      damping: scalar; its dtype is used throughout.
      loss_before: scalar, same data as `loss_after`, before the step.
      loss_after: scalar.
      predicted_change: scalar change of the quadratic model, usually negative.
      decay: factor in (0, 1) of one adaptation.
      floor: lower bound of the result.
      decrease_threshold: on rho.
      increase_threshold: on rho.

    Returns:
      `(new damping, rho)`, scalars of the dtype of `damping`.
    """
    damping = tf.convert_to_tensor(damping)
    dtype = damping.dtype
    before = scalars.cast(loss_before, dtype)
    after = scalars.cast(loss_after, dtype)
    predicted = scalars.cast(predicted_change, dtype)
    decay = scalars.cast(decay, dtype)

    rho = reduction_ratio(before, after, predicted)
    comparable = tf.math.is_finite(rho)
    grew = (after > before) | ~tf.math.is_finite(after)
    fell_against_prediction = (after < before) & (predicted > 0)
    good = comparable & (rho > scalars.cast(decrease_threshold, dtype))
    bad = comparable & (rho < scalars.cast(increase_threshold, dtype))

    shrink = ~grew & (fell_against_prediction | good)
    grow = grew | (bad & ~shrink)
    factor = tf.where(shrink, decay, tf.where(grow, 1 / decay, tf.ones_like(decay)))
    return tf.maximum(damping * factor, scalars.cast(floor, dtype)), rho
