"""Scalars in the working dtype, and counts as Python integers."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import tensorflow as tf


def cast(value: Any, dtype: tf.DType) -> tf.Tensor:
    """`value` as a tensor of `dtype`.

    Unlike `tf.cast`, a Python or NumPy number does not pass through float32 on its
    way to float64.

    Args:
      value: number, tensor, variable, or anything convertible to a tensor.
      dtype: floating dtype.
    """
    dtype = tf.as_dtype(dtype)
    if isinstance(value, (bool, int, float)) or hasattr(value, "__array_interface__"):
        return tf.constant(value, dtype)
    return tf.cast(tf.convert_to_tensor(value), dtype)


def whole(value: Any) -> Any:
    """A Python int for a whole number of Python or NumPy; anything else as it is."""
    if isinstance(value, np.ndarray) and not value.shape:
        value = value[()]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return int(value) if value == value // 1 else value
    return value


def refuse_unless_positive(name: str, value: Any, or_zero: bool = False) -> None:
    """Checks a number as far as it is known statically.

    Args:
      name: of the argument.
      value: number, or a scalar tensor, which may have no static value.
      or_zero: whether zero is legal.

    Raises:
      ValueError: it is not positive, or NaN.
    """
    static = tf.get_static_value(value)
    if static is None or static > 0 or (or_zero and static == 0):
        return
    expected = "positive or zero" if or_zero else "positive"
    raise ValueError(f"{name} must be {expected}, got {value!r}.")
