"""Decayed weighted averages and their debiasing (Adam paper, section 3).

An average is a pair (`total`, `total_weight`).  After observations `x_1 .. x_T` with
decay `d` and weights `w_t` from a zero start it holds

    total        = sum_t d^(T - t) w_t x_t
    total_weight = sum_t d^(T - t) w_t

so `total / total_weight` is a proper weighted mean at every T, and `x_1` at T = 1.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kfac.python.ops.rules import scalars


def decayed(average: Any, value: Any, decay: Any, weight: Any) -> tf.Tensor:
    """`decay * average + weight * value`, in the dtype of `average`.

    Args:
      average: running total, any shape.
      value: new observation, same shape.
      decay: scalar, multiplies the past.
      weight: scalar, multiplies the observation.
    """
    average = tf.convert_to_tensor(average)
    value, decay, weight = (
        scalars.cast(scalar, average.dtype) for scalar in (value, decay, weight)
    )
    return decay * average + weight * value


def debiased(total: Any, total_weight: Any) -> tf.Tensor:
    """`total / total_weight`, and zeros while no weight has been accumulated."""
    total = tf.convert_to_tensor(total)
    return tf.math.divide_no_nan(total, tf.cast(total_weight, total.dtype))
