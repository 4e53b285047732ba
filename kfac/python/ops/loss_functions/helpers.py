"""Shapes and one-hot tensors that all losses need."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops.errors import ArgumentError

_OTHER_NAME = {"vector": "vecs", "vecs": "vector"}


def vector_or_vecs(method: Callable) -> Callable:
    """Lets a product be called with `vector=` or `vecs=`, whichever it declares."""
    declared = list(inspect.signature(method).parameters)[1]
    other = _OTHER_NAME[declared]

    @functools.wraps(method)
    def product(self, *args, **kwargs):
        if other in kwargs and declared not in kwargs:
            kwargs[declared] = kwargs.pop(other)
        return method(self, *args, **kwargs)

    return product


def insert_slice_in_zeros(
    slice_to_insert: Any, dim: int, dim_size: int, position: int
) -> tf.Tensor:
    """Widens axis `dim` from 1 to `dim_size`, the slice at `position`, else zeros.

    Args:
      slice_to_insert: tensor or array `[..., 1, ...]` of any rank and numeric dtype.
      dim: the axis of size 1; negative values count from the end.
      dim_size: its new size.
      position: where the slice goes, in `[0, dim_size)`.

    Returns:
      Tensor of the same dtype; all other axes are unchanged.

    Raises:
      ValueError: the rank is unknown, the axis does not exist, its static size is not
        1 (an unknown size is refused too), or `position` is out of range.
    """
    slice_to_insert = tf.convert_to_tensor(slice_to_insert)
    rank = slice_to_insert.shape.rank
    if rank is None:
        raise ValueError("insert_slice_in_zeros needs a slice of known rank.")
    if not -rank <= dim < rank:
        raise ValueError(f"Axis {dim} does not exist in {slice_to_insert.shape}.")
    axis = dim % rank
    size = slice_to_insert.shape.as_list()[axis]
    if size != 1:
        raise ValueError(
            f"Axis {dim} of the slice must have static size 1, found {size} "
            f"(shape {slice_to_insert.shape})."
        )
    if not 0 <= position < dim_size:
        raise ValueError(f"position={position} is outside [0, {dim_size}).")
    paddings = [[0, 0] for _ in range(rank)]
    paddings[axis] = [position, dim_size - position - 1]
    return tf.pad(slice_to_insert, paddings)


def replicated_one_hot(
    index: Sequence[int | tf.Tensor],
    shape: tf.Tensor,
    static_shape: tf.TensorShape,
    dtype: tf.DType,
) -> tf.Tensor:
    """For every case of the batch, 1 at `index` and 0 elsewhere.

    Args:
      index: one Python int or scalar integer tensor per axis but the batch axis. A
        rank-1 shape counts as a single case and takes one entry.
      shape: runtime shape `[batch, ...]`, int32 vector.
      static_shape: the same, as far as it is known; its rank must be known.
      dtype: of the result.

    Raises:
      ArgumentError: `index` has another length.
      ValueError: the rank is unknown or an int lies outside a known size. (A tensor
        out of range, or an int beyond a size known only at run time, is an
        `InvalidArgumentError` there, on a CPU.)
    """
    if static_shape.rank is None:
        raise ValueError("One-hot products need outputs of known rank.")
    batch_axes = 0 if static_shape.rank == 1 else 1
    sizes = static_shape.as_list()[batch_axes:]
    if len(index) != len(sizes):
        raise ArgumentError(
            f"A one-hot index for the inner shape {static_shape} needs {len(sizes)} "
            f"entries, got {len(index)}: {index}."
        )
    for entry, size in zip(index, sizes, strict=True):
        if isinstance(entry, numbers.Integral) and not (
            0 <= entry and (size is None or entry < size)
        ):
            raise ValueError(
                f"One-hot index {tuple(index)} is outside the inner shape "
                f"{static_shape} (the first {batch_axes} axes are the batch)."
            )
    position = tf.stack([tf.cast(entry, tf.int32) for entry in index])
    one_case = tf.scatter_nd([position], tf.ones([1], dtype), shape[batch_axes:])
    one_hot = tf.broadcast_to(one_case, shape)
    one_hot.set_shape(static_shape)
    return one_hot


def targets_like(
    targets: Any, expected: tf.Tensor, loss: Any, dtype: tf.DType | None = None
) -> tf.Tensor:
    """Targets as a tensor whose shape is that of `expected`; never broadcasts.

    Args:
      targets: tensor, array or nested list.
      expected: tensor that has the right shape.
      loss: for messages.
      dtype: to cast to; None keeps the targets' own.

    Raises:
      ValueError: the static shapes cannot be equal.
      tf.errors.InvalidArgumentError: the shapes differ at run time.
    """
    targets = tf.convert_to_tensor(targets, dtype_hint=dtype)
    message = (
        f"Targets of {type(loss).__name__} must have the shape {expected.shape} of "
        f"what they are compared with, got {targets.shape}. Reshape them; they are "
        "not broadcast."
    )
    if not targets.shape.is_compatible_with(expected.shape):
        raise ValueError(message)
    if not (targets.shape.is_fully_defined() and expected.shape.is_fully_defined()):
        same_shape = tf.debugging.assert_equal(
            tf.shape(targets), tf.shape(expected), message=message
        )
        with tf.control_dependencies([same_shape]):
            targets = tf.identity(targets)
    return targets if dtype is None else tf.cast(targets, dtype)
