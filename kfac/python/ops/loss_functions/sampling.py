"""Random draws by stateful ops (int seed or None) or stateless ones (tensor seed).

A stateful op is a stream: with an int seed its first draw depends on the graph-level
seed and that int only, and every execution advances it.  XLA ignores the seeds of
stateful ops, and a checkpoint does not hold their position.  A seed that is an integer
tensor of shape [2] selects the stateless ops instead: the draw is a function of that
tensor, so it must change from step to step (for example `[seed, step]`), and two
losses that share it must be told apart with `tf.random.split` or a third number.
"""

from __future__ import annotations

import numbers
from typing import Any

import tensorflow as tf


def normal(shape: tf.Tensor, dtype: tf.DType, seed: Any) -> tf.Tensor:
    """Standard normal numbers."""
    if _is_stateless(seed):
        return tf.random.stateless_normal(shape, seed, dtype=dtype)
    return tf.random.normal(shape, dtype=dtype, seed=seed)


def uniform(shape: tf.Tensor, dtype: tf.DType, seed: Any) -> tf.Tensor:
    """Numbers in [0, 1)."""
    if _is_stateless(seed):
        return tf.random.stateless_uniform(shape, seed, dtype=dtype)
    return tf.random.uniform(shape, dtype=dtype, seed=seed)


def categorical(logits: tf.Tensor, seed: Any) -> tf.Tensor:
    """One int32 class per row of logits `[rows, classes]`: `[rows]`."""
    if _is_stateless(seed):
        draw = tf.random.stateless_categorical(logits, 1, seed, dtype=tf.int32)
    else:
        draw = tf.random.categorical(logits, 1, dtype=tf.int32, seed=seed)
    # Rows of NaN draw the class after the last one, which is no target; a diverging
    # training should show its NaN loss, not fail here.
    return tf.minimum(tf.squeeze(draw, axis=1), tf.shape(logits)[1] - 1)


def _is_stateless(seed: Any) -> bool:
    if seed is None or isinstance(seed, numbers.Integral):
        return False
    seed = tf.convert_to_tensor(seed)
    if seed.dtype not in (tf.int32, tf.int64) or not seed.shape.is_compatible_with([2]):
        raise ValueError(
            "A seed is None, an int, or an int32/int64 tensor of shape [2] for "
            f"stateless sampling; got a tensor of shape {seed.shape} and dtype "
            f"{seed.dtype.name}."
        )
    return True
