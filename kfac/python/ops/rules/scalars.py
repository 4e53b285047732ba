"""Scalars in the working dtype."""

from __future__ import annotations

from typing import Any

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
