"""How many uses of its weights a layer's rows hold, and in which order.

Where a layer has more than one leading axis (sequence positions, attention heads), or
had before its input was reshaped to rows, all but the batch's are uses.  Which one is
the batch is told by being the only one of unknown size, or by the batch size; without
evidence the order of registrations, `[uses, batch, ...]`, is taken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops.tensormatch import tensorflow_graph_util as graph_util


@dataclasses.dataclass(frozen=True)
class Uses:
    """Uses per case in one tensor.

    Attributes:
      count: their number.
      batch_major: whether the cases are the slower index.
    """

    count: int
    batch_major: bool


ONE_USE = Uses(1, batch_major=False)


def uses_of_rows(
    rows: tf.Tensor, features: int | None, limit: int, batch_size: Any
) -> Uses:
    """Uses in the inputs of a dense layer or lookup.

    Args:
      rows: `[..., features]`, or ids `[...]`.
      features: size of the last axis; None for ids.
      limit: rank of inputs with one use per case: 2, for ids 1.
      batch_size: cases, an int or a scalar tensor; None if not known.

    Raises:
      ValueError: rows do not divide into the batch size, or the number of uses is not
        known statically.
    """
    batch_size = _static(batch_size)
    sizes = rows.shape.as_list() if rows.shape.rank is not None else [None] * limit
    if len(sizes) > limit:
        return _uses_of_axes(rows, sizes[: len(sizes) + 1 - limit], batch_size)
    origin = _unfolded(rows, features, limit)
    if sizes[0] is not None and batch_size is not None:
        return _folded(rows, sizes[0], origin, batch_size)
    if origin is None:
        return ONE_USE
    evidence = _batch_axis(origin, batch_size)
    if evidence is None and None not in origin:
        return ONE_USE
    return _uses_of_axes(rows, origin, batch_size)


def uses_of_images(images: tf.Tensor, batch_size: Any) -> Uses:
    """Uses in the inputs `[uses * batch, height, width, channels]` of a convolution.

    Raises:
      ValueError: they do not divide into the batch size.
    """
    batch_size = _static(batch_size)
    size = tf.compat.dimension_value(images.shape[0]) if images.shape.rank else None
    if size is None or batch_size is None:
        return ONE_USE
    return _folded(images, size, None, batch_size)


def _static(size: Any) -> int | None:
    """A size that may be a tensor, as an int if it is known."""
    value = None if size is None else tf.get_static_value(size)
    return None if value is None else int(value)


def _folded(
    rows: tf.Tensor, size: int, origin: Sequence[int | None] | None, batch_size: int
) -> Uses:
    if size % batch_size:
        raise ValueError(
            f"{rows.name!r} has {size} rows, which do not divide into cases of the "
            f"batch of {batch_size}. Check batch_size (of one replica and one tower), "
            "or register the layer by hand."
        )
    axis = None if origin is None else _batch_axis(origin, batch_size)
    return Uses(size // batch_size, batch_major=axis == 0 and size != batch_size)


def _uses_of_axes(
    rows: tf.Tensor, axes: Sequence[int | None], batch_size: int | None
) -> Uses:
    axis = _batch_axis(axes, batch_size)
    batch_axis = len(axes) - 1 if axis is None else axis
    others = [size for index, size in enumerate(axes) if index != batch_axis]
    if None in others or batch_axis not in (0, len(axes) - 1):
        raise ValueError(
            f"The leading axes {list(axes)} of {rows.name!r} are cases and uses, but "
            "the number of uses per case is not known statically. Give sequences a "
            "static length (pad them, or set the input's shape), pass batch_size, or "
            "register the layer by hand with num_uses."
        )
    return Uses(math.prod(others), batch_major=batch_axis == 0)


def _batch_axis(axes: Sequence[int | None], batch_size: int | None) -> int | None:
    """Index of the batch among leading axes; None if nothing tells.

    The only unknown size is the batch's even if a known one equals the batch size:
    otherwise the number of uses would be unknown.
    """
    unknown = [index for index, size in enumerate(axes) if size is None]
    if len(unknown) == 1:
        return unknown[0]
    equal = [index for index, size in enumerate(axes) if size == batch_size]
    return equal[0] if batch_size is not None and len(equal) == 1 else None


def _unfolded(
    rows: tf.Tensor, features: int | None, limit: int
) -> list[int | None] | None:
    """Leading axes of what was reshaped to `rows`; None if it was not."""
    tensor: Any = graph_util.reduce_identity_ops(rows)
    if tensor.op.type != "Reshape":
        return None
    origin = graph_util.reduce_identity_ops(tensor.op.inputs[0]).shape
    if origin.rank is None or origin.rank <= limit:
        return None
    sizes = origin.as_list()
    if features is None:
        return sizes
    return sizes[:-1] if sizes[-1] == features else None
