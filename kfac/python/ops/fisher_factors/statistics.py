"""Mini-batch statistics that Fisher factors average: pure functions of tensors.

One layout serves every kind of layer:

* *canonical data* `[uses, batch, features]`: activations or output gradients of all
  uses of a layer's parameters. A dense layer has one use per case, a convolution one
  per output location, a shared or recurrent layer one per step.
* *rows* `[uses * batch, features]`: canonical data with the leading axes folded,
  which is all that second moments need. Folding is use-major: row `t * batch + b`.

Layers differ only in how their data reach that layout.  Where a function takes
`has_bias`, a constant 1 (the homogeneous coordinate) counts as the last feature; its
rows and columns are the mean and a 1, so it is never appended to the data.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kfac.python.ops import errors, utils
from kfac.python.ops.rules import scalars

# Largest number of elements (64 MiB of float32) of the per-example gradients that
# `sum_of_squared_example_gradients` holds at a time.
MAX_CHUNK_ELEMENTS = 1 << 24


def num_rows(data: Any) -> int | tf.Tensor:
    """Size of axis 0: an int where known statically, else a scalar int32 tensor."""
    static = tf.compat.dimension_value(data.shape[0])
    return tf.shape(tf.convert_to_tensor(data))[0] if static is None else static


def num_features(data: Any) -> int:
    """Size of the last axis.

    Raises:
      ValueError: it is not known statically.
    """
    shape = tf.TensorShape(data.shape)
    size = tf.compat.dimension_value(shape[-1]) if shape.rank else None
    if size is None:
        raise ValueError(
            f"The number of features of {data.name!r}, the last axis of its shape "
            f"{shape}, is not known statically, but the curvature's variables are of "
            "that size. Register a tensor of known shape (tf.ensure_shape)."
        )
    return size


def num_cases(
    data: Any, num_uses: int | None, feature_rank: int = 1
) -> int | tf.Tensor:
    """Batch size of data of several uses, with their leading axes folded or not.

    Args:
      data: `[uses, batch, <feature axes>]` or `[uses * batch, <feature axes>]`.
      num_uses: number of uses; needed for folded data.
      feature_rank: number of feature axes, 0 for ids.

    Raises:
      TypeError: the data are folded and `num_uses` is None.
    """
    if data.shape.rank == feature_rank + 2:
        static = tf.compat.dimension_value(data.shape[1])
        return tf.shape(tf.convert_to_tensor(data))[1] if static is None else static
    if num_uses is None:
        raise TypeError(
            f"num_uses must be an int for data of shape {data.shape}, whose uses are "
            "folded into the batch; got None."
        )
    return num_rows(data) // num_uses


def check_only_source(source: int) -> None:
    """Raises `ArgumentError` unless this is source 0: inputs have no other."""
    if source != 0:
        raise errors.ArgumentError(
            f"Inputs have one source, number 0; got source {source}."
        )


def append_homog(tensor: tf.Tensor, homog_value: Any = None) -> tf.Tensor:
    """Appends one entry, the homogeneous coordinate, to the last axis.

    Args:
      tensor: `[..., features]`, of known rank.
      homog_value: Python number or scalar tensor; 1 by default.

    Returns:
      `[..., features + 1]`, in the dtype of `tensor`.

    Raises:
      ValueError: the rank is unknown.
    """
    tensor = tf.convert_to_tensor(tensor)
    if tensor.shape.rank is None:
        raise ValueError(f"append_homog needs a tensor of known rank, got {tensor}.")
    value = scalars.cast(1 if homog_value is None else homog_value, tensor.dtype)
    shape = [*utils.get_shape(tensor)[:-1], 1]
    return tf.concat([tensor, tf.fill(shape, value)], axis=-1)


def compute_cov(
    tensor: tf.Tensor,
    tensor_right: tf.Tensor | None = None,
    normalizer: Any = None,
) -> tf.Tensor:
    """Uncentred second moment of rows.

    Args:
      tensor: `[n, p]`.
      tensor_right: `[n, q]`, or None for `tensor` itself.
      normalizer: what the sum over rows is divided by; n by default.

    Returns:
      `tensorᵀ tensor / normalizer` `[p, p]`, exactly symmetric; or, with
      `tensor_right`, `tensorᵀ tensor_right / normalizer` `[p, q]`.
    """
    tensor = tf.convert_to_tensor(tensor)
    normalizer = scalars.cast(
        num_rows(tensor) if normalizer is None else normalizer, tensor.dtype
    )
    if tensor_right is not None:
        return tf.matmul(tensor, tensor_right, transpose_a=True) / normalizer
    return symmetrized(tf.matmul(tensor, tensor, transpose_a=True) / normalizer)


def symmetrized(matrix: tf.Tensor) -> tf.Tensor:
    """The symmetric part of a matrix."""
    return (matrix + tf.linalg.matrix_transpose(matrix)) / 2


def second_moment(rows: tf.Tensor, has_bias: bool = False) -> tf.Tensor:
    """Second moment of rows, optionally with the homogeneous coordinate.

    Args:
      rows: `[n, features]`.
      has_bias: count a constant 1 as the last feature.

    Returns:
      Mean outer product `[p, p]`, where p = features (+ 1).
    """
    moment = compute_cov(rows)
    if not has_bias:
        return moment
    mean = tf.reduce_mean(rows, axis=0)
    return _bordered(moment, mean, mean, 1)


def _bordered(
    matrix: tf.Tensor, last_column: tf.Tensor, last_row: tf.Tensor, corner: Any
) -> tf.Tensor:
    """`[[matrix, last_column], [last_row, corner]]`."""
    corner = tf.cast(corner, matrix.dtype)
    top = tf.concat([matrix, last_column[:, tf.newaxis]], axis=1)
    bottom = tf.concat([last_row, corner[tf.newaxis]], axis=0)
    return tf.concat([top, bottom[tf.newaxis, :]], axis=0)


def second_moment_diagonal(rows: tf.Tensor, has_bias: bool = False) -> tf.Tensor:
    """Diagonal of `second_moment(rows, has_bias)`: `[features (+ 1)]`."""
    diagonal = tf.reduce_mean(tf.square(rows), axis=0)
    return append_homog(diagonal) if has_bias else diagonal


def one_hot_frequencies(
    ids: tf.Tensor, depth: int, dtype: tf.DType, has_bias: bool = False
) -> tf.Tensor:
    """`second_moment_diagonal` of the one-hot rows that integer ids stand for.

    Counting costs O(n + depth), against O(n * depth) for building the rows.

    Args:
      ids: `[n]` integers. Ids outside `0 .. depth - 1` count in n but nowhere else.
      depth: number of classes.
      dtype: of the result.
      has_bias: append a 1.

    Returns:
      Relative frequencies `[depth (+ 1)]`.
    """
    known = tf.logical_and(ids >= 0, ids < tf.cast(depth, ids.dtype))
    # One segment more than classes collects the foreign ids, on every device alike.
    segments = tf.where(known, ids, tf.cast(depth, ids.dtype))
    ones = tf.ones_like(ids, dtype=dtype)
    counts = tf.math.unsorted_segment_sum(ones, segments, depth + 1)[:depth]
    frequencies = counts / tf.cast(num_rows(ids), dtype)
    return append_homog(frequencies) if has_bias else frequencies


def shifted_cross_moment(data: tf.Tensor, has_bias: bool = False) -> tf.Tensor:
    """Second moment between each use and the one before it.

    Args:
      data: canonical `[uses, batch, features]`, uses in temporal order.
      has_bias: count a constant 1 as the last feature.

    Returns:
      `Σ_t Σ_b x[t + 1, b] x[t, b]ᵀ / (uses * batch)` `[p, p]`: later step on the
      left, not symmetric. The sum has `uses - 1` terms but is divided by `uses`,
      as if the sequences were padded with zeros, which keeps the Toeplitz matrix of
      these moments positive semi-definite.
    """
    uses, batch, features = utils.get_shape(data)
    later = tf.reshape(data[1:], [-1, features])
    earlier = tf.reshape(data[:-1], [-1, features])
    total = tf.cast(uses * batch, data.dtype)
    cross = compute_cov(later, earlier, normalizer=total)
    if not has_bias:
        return cross
    pairs = tf.cast(uses - 1, data.dtype) / tf.cast(uses, data.dtype)
    return _bordered(
        cross,
        tf.reduce_sum(later, axis=0) / total,
        tf.reduce_sum(earlier, axis=0) / total,
        pairs,
    )


def to_canonical(data: tf.Tensor, num_uses: int | None) -> tf.Tensor:
    """`[uses * batch, features]` (use-major) or canonical data, made canonical.

    Raises:
      ValueError: the data are folded but `num_uses` is None, do not divide into
        `num_uses`, are canonical with another number of uses, or have neither rank.
    """
    if data.shape.rank == 3:
        uses = tf.compat.dimension_value(data.shape[0])
        if None not in (num_uses, uses) and num_uses != uses:
            raise ValueError(
                f"Data of shape {data.shape} have {uses} uses along axis 0, but "
                f"num_uses = {num_uses} was given."
            )
        return data
    if data.shape.rank != 2 or num_uses is None:
        raise ValueError(
            f"Data of shape {data.shape} with num_uses = {num_uses}: expected "
            "[uses, batch, features], or [uses * batch, features] with num_uses."
        )
    rows, features = utils.get_shape(data)
    if isinstance(rows, int) and rows % num_uses:
        raise ValueError(f"{rows} rows do not divide into num_uses = {num_uses}.")
    return tf.reshape(data, [num_uses, rows // num_uses, features])


def fold_uses(data: tf.Tensor, feature_rank: int = 1) -> tf.Tensor:
    """Folds the leading axes of data so that one axis precedes the feature axes.

    Args:
      data: `[uses, batch, <feature axes>]` or `[rows, <feature axes>]`.
      feature_rank: number of feature axes, 0 for ids.
    """
    rank = data.shape.rank
    if rank == feature_rank + 1:
        return data
    features = utils.get_shape(data)[rank - feature_rank :]
    return tf.reshape(data, [-1, *features])


def sum_of_squared_example_gradients(
    inputs: tf.Tensor, grads: tf.Tensor, groups: int = 1, offsets: int = 1
) -> tf.Tensor:
    """Sum over cases of the squared weight gradient of each case.

    The gradient of case b is `Σ_u inputs[b, u] ⊗ grads[b, u]`. Cases lead here, so
    that it is one matrix product per case; cases are taken in chunks so that no more
    than about `MAX_CHUNK_ELEMENTS` entries of these products exist at a time.

    Args:
      inputs: `[batch, uses, offsets * channels]`, channels fastest.
      grads: `[batch, uses, outputs]`.
      groups: channels and outputs fall into so many consecutive groups, and an output
        sees only the channels of its own group.
      offsets: number of kernel offsets; matters only if there are groups.

    Returns:
      `[offsets * channels / groups, outputs]`.
    """
    uses, size = utils.get_shape(inputs)[1:]
    outputs = utils.get_shape(grads)[-1]
    inner, outer = size // (offsets * groups), outputs // groups

    def chunk_sum(inputs, grads):
        inputs = tf.reshape(inputs, [-1, uses, offsets, groups, inner])
        grads = tf.reshape(grads, [-1, uses, groups, outer])
        # b: case, u: use, k: offset, g: group, i / o: channel in / out of the group.
        weight = tf.einsum("bukgi,bugo->bkigo", inputs, grads)
        squares = tf.reduce_sum(tf.square(weight), axis=0)
        return tf.reshape(squares, [offsets * inner, outputs])

    return sum_over_chunks(chunk_sum, (inputs, grads), offsets * inner * outputs)


def append_bias_row(squares: tf.Tensor, bias_grads: tf.Tensor) -> tf.Tensor:
    """Appends the squared gradients of a bias to those of the weights.

    Args:
      squares: `[features_in, outputs]`, summed over cases.
      bias_grads: `[batch, outputs]`, each case's gradient with respect to the bias.

    Returns:
      `[features_in + 1, outputs]`.
    """
    row = tf.reduce_sum(tf.square(bias_grads), axis=0, keepdims=True)
    return tf.concat([squares, row], axis=0)


def sum_over_chunks(
    function: Any, tensors: tuple[tf.Tensor, ...], elements_per_case: int
) -> tf.Tensor:
    """`function(*tensors)` for a sum over cases, in chunks that fit in memory.

    Args:
      function: takes tensors like `tensors`, returns a sum over their axis 0 to which
        cases of zeros contribute nothing.
      tensors: each `[batch, ...]`.
      elements_per_case: entries that `function` holds per case. A chunk has as many
        cases as stay below `MAX_CHUNK_ELEMENTS`.
    """
    batch = num_rows(tensors[0])
    limit = max(1, MAX_CHUNK_ELEMENTS // max(1, elements_per_case))
    if isinstance(batch, int):
        if batch <= limit:
            return function(*tensors)
        chunks = -(-batch // limit)
    else:
        chunks = tf.maximum(-(-batch // limit), 1)
    size = -(-batch // chunks)
    # Padding with cases of zeros gives all chunks one size, which XLA asks for.
    padding = chunks * size - batch

    def split(tensor):
        rest = utils.get_shape(tensor)[1:]
        widths = [[0, padding]] + [[0, 0]] * len(rest)
        return tf.reshape(tf.pad(tensor, widths), [chunks, size, *rest])

    stacks = [split(tensor) for tensor in tensors]

    def add_chunk(index, total):
        return index + 1, total + function(*(stack[index] for stack in stacks))

    first = function(*(stack[0] for stack in stacks))
    _, total = tf.while_loop(
        lambda index, _: index < chunks, add_chunk, (tf.constant(1), first)
    )
    return total
