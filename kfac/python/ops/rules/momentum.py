"""Momentum and decoupled weight decay.

With gradient g, preconditioner P, decay mu and velocity v (zero at the start), the
momentum kinds are

    "regular"  v <- mu v + P g,        step direction r = v
    "adam"     v <- mu v + g,          r = P v
    "qmodel"   v <- mu* v - alpha* P g, r = v, (alpha*, mu*) from the quadratic model

There is no `1 - mu` factor, bias correction or Nesterov look-ahead.  The parameters
move by `-learning_rate * r`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops.rules import scalars


def accumulate(
    velocities: Sequence[tf.Tensor],
    vectors: Sequence[tf.Tensor],
    decay: Any,
    coefficient: Any = 1.0,
) -> list[tf.Tensor]:
    """`decay * v + coefficient * x` for each velocity v and vector x.

    Args:
      velocities: one tensor per parameter, of its shape and dtype.
      vectors: tensors (or `tf.IndexedSlices`) of the same shapes.
      decay: scalar; zero forgets the velocities.
      coefficient: scalar.

    Returns:
      The new velocities, in the dtypes of the old ones.
    """
    result = []
    for velocity, vector in zip(velocities, vectors, strict=True):
        velocity = tf.convert_to_tensor(velocity)
        dtype = velocity.dtype
        result.append(
            scalars.cast(decay, dtype) * velocity
            + scalars.cast(coefficient, dtype) * tf.convert_to_tensor(vector)
        )
    return result


def previous_updates(velocities: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The last steps, for kinds whose step is `-v`; zeros before the first one."""
    return [-tf.convert_to_tensor(velocity) for velocity in velocities]


def add_weight_decay(
    updates: Sequence[tf.Tensor],
    parameters: Sequence[tf.Tensor],
    coefficient: Any,
) -> list[tf.Tensor]:
    """`r + coefficient * parameter`, after preconditioning (decoupled decay).

    The parameters are constants here: nothing is back-propagated through them.
    """
    result = []
    for update, parameter in zip(updates, parameters, strict=True):
        parameter = tf.stop_gradient(tf.convert_to_tensor(parameter))
        weight = scalars.cast(coefficient, parameter.dtype)
        result.append(tf.convert_to_tensor(update) + weight * parameter)
    return result
