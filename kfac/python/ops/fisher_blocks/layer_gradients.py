"""A layer's parameter gradient from its inputs and output gradients: pure functions.

Everything is brought to rows `[cases and uses, features]`; the gradient of the summed
loss is then one matrix product (or scatter) over the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops.fisher_blocks.base import is_sequence


def rows(data: Any, feature_rank: int = 1) -> tf.Tensor:
    """A tower's data with all but the last `feature_rank` axes folded into one.

    Args:
      data: tensor, or list or tuple of tensors, whose rows follow one another.
      feature_rank: 1 for features, 0 for integer ids.
    """

    def folded(part):
        part = tf.convert_to_tensor(part)
        features = part.shape.as_list()[part.shape.rank - feature_rank :]
        return tf.reshape(part, [-1, *features])

    if is_sequence(data):
        return tf.concat([folded(part) for part in data], axis=0)
    return folded(data)


def joined_uses(data: Any) -> tf.Tensor:
    """A tower's data as one tensor, uses along axis 0 (use-major)."""
    if is_sequence(data):
        return tf.concat([tf.convert_to_tensor(use) for use in data], axis=0)
    return tf.convert_to_tensor(data)


def one_hot_depth(data: Any) -> int | None:
    """Number of classes if a tower's data are integer ids, else None."""
    return getattr(data[0] if is_sequence(data) else data, "one_hot_depth", None)


def affine(inputs: tf.Tensor, grads: tf.Tensor, has_bias: bool) -> Any:
    """Gradient of `inputs @ weights (+ bias)`.

    Args:
      inputs: `[n, d_in]`.
      grads: `[n, d_out]`.
      has_bias: whether to return the bias's gradient too.

    Returns:
      `[d_in, d_out]`, or that and `[d_out]`.
    """
    weights = tf.matmul(inputs, grads, transpose_a=True)
    return (weights, tf.reduce_sum(grads, axis=0)) if has_bias else weights


def embedding(ids: tf.Tensor, grads: tf.Tensor, depth: int, has_bias: bool) -> Any:
    """Gradient of a table whose rows `ids` were looked up.

    Args:
      ids: integers `[n]`.
      grads: `[n, d_out]`.
      depth: number of rows of the table.
      has_bias: whether to return a bias's gradient too.

    Returns:
      Dense `[depth, d_out]`, or that and `[d_out]`.
    """
    table = tf.math.unsorted_segment_sum(grads, ids, depth)
    return (table, tf.reduce_sum(grads, axis=0)) if has_bias else table


def dense_layer(inputs: Any, grads: Any, has_bias: bool) -> Any:
    """Gradient of a dense or embedding layer from one tower's data, over all uses."""
    depth = one_hot_depth(inputs)
    if depth is not None:
        return embedding(rows(inputs, feature_rank=0), rows(grads), depth, has_bias)
    return affine(rows(inputs), rows(grads), has_bias)


def convolution_filter(patches: tf.Tensor, grads: tf.Tensor, groups: int) -> tf.Tensor:
    """Gradient of a filter whose channels fall into groups.

    Args:
      patches: `[n, offsets, channels]`.
      grads: `[n, d_out]`.
      groups: group `g` connects the `g`-th part of the channels with the `g`-th part
        of the outputs; 1 for an ordinary, `channels` for a depthwise convolution.

    Returns:
      `[offsets, channels / groups, d_out]`.
    """
    _, offsets, channels = patches.shape.as_list()
    outputs = grads.shape.as_list()[-1]
    patches = tf.reshape(patches, [-1, offsets, groups, channels // groups])
    grads = tf.reshape(grads, [-1, groups, outputs // groups])
    # n: case and location, k: offset, g: group, i / o: channel of the group.
    gradient = tf.einsum("nkgi,ngo->kigo", patches, grads)
    return tf.reshape(gradient, [offsets, channels // groups, outputs])


def scale_and_shift(
    inputs: tf.Tensor,
    grads: tf.Tensor,
    scale_axes: Sequence[int],
    shift_axes: Sequence[int] | None,
    has_shift: bool,
) -> Any:
    """Gradient of `scale * inputs + shift`.

    Args:
      inputs: `[batch, ...]`.
      grads: of the same rank.
      scale_axes: axes, without the batch's, along which scale is broadcast.
      shift_axes: the same for shift.
      has_shift: whether to return the shift's gradient too.

    Returns:
      The gradient of scale, without the broadcast axes, or that and the shift's.
    """
    scale = tf.reduce_sum(inputs * grads, axis=[0, *scale_axes])
    if not has_shift:
        return scale
    return scale, tf.reduce_sum(grads, axis=[0, *(shift_axes or ())])


def sum_over_towers(gradients: Sequence[Any]) -> Any:
    """Sum of equally structured gradients."""
    return tf.nest.map_structure(lambda *parts: tf.add_n(parts), *gradients)
