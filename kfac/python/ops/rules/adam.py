"""Adam's update of one parameter (Kingma & Ba 2015, algorithm 1)."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from kfac.python.ops.rules import scalars

_EPSILON = 1e-8


class Step(NamedTuple):
    """A parameter after a step, and the moments that the next step starts from."""

    value: tf.Tensor
    first: tf.Tensor
    second: tf.Tensor


def step(
    before: Step,
    gradient: tf.Tensor,
    count: Any,
    learning_rate: Any,
    beta1: Any = 0.9,
    beta2: Any = 0.999,
) -> Step:
    """One step.

    Args:
      before: the parameter and its moments, which are zero before the first step.
      gradient: shaped like the parameter.
      count: number of this step, from 1.
      learning_rate: scalar; the step is about that long in every coordinate.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
    """
    dtype = before.value.dtype
    rate, beta1, beta2, count = (
        scalars.cast(number, dtype) for number in (learning_rate, beta1, beta2, count)
    )
    first = beta1 * before.first + (1 - beta1) * gradient
    second = beta2 * before.second + (1 - beta2) * tf.square(gradient)
    debiased = first / (1 - beta1**count)
    deviation = tf.sqrt(second / (1 - beta2**count))
    value = before.value - rate * debiased / (deviation + _EPSILON)
    return Step(value, first, second)
