"""Checks that the registrations of all convolutions share."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import errors
from kfac.python.ops.layer_collection import checks
from kfac.python.ops.layer_collection.parameters_dict import as_tuple

# What `params` may hold, for messages.
MEMBERS = "the filter, or (filter, bias)"


def check_nhwc(data_format: str | None) -> None:
    """Refuses any data format but the default, channels last."""
    if data_format not in (None, "NHWC"):
        raise errors.ArgumentError(
            f"data_format={data_format!r}; expected None or 'NHWC'. Transpose to "
            "channels last."
        )


def check_padding(padding: Any) -> None:
    """Refuses anything but "SAME" and "VALID", in any case."""
    if not isinstance(padding, str) or padding.upper() not in ("SAME", "VALID"):
        raise errors.ArgumentError(
            f"padding={padding!r}; expected 'SAME' or 'VALID'. Inputs that are padded "
            "otherwise are registered as they are after it, with 'VALID'."
        )


def window(
    values: Any, spatial_rank: int, what: str, with_batch: bool, without: bool = False
) -> tuple[int, ...]:
    """Strides or dilations as a tuple of ints.

    Args:
      values: what was given.
      spatial_rank: number of spatial axes.
      what: "strides" or "dilations", for messages.
      with_batch: whether there may be entries for all axes of the data.
      without: whether there may be entries for the spatial axes alone.

    Raises:
      ArgumentError: they are of another number, not all integers from 1, or not 1 for
        the batch and the channels.
    """
    try:
        result = tuple(operator.index(value) for value in values)
    except TypeError:
        result = ()
    lengths = [spatial_rank] * without + [spatial_rank + 2] * with_batch
    spatial = result[1:-1] if len(result) == spatial_rank + 2 else result
    outer = result[:1] + result[-1:] if len(result) == spatial_rank + 2 else ()
    if len(result) not in lengths or min(spatial) < 1 or any(n != 1 for n in outer):
        expected = " or ".join(str(length) for length in lengths)
        raise errors.ArgumentError(
            f"{what}={values!r}; expected {expected} integers, at least 1"
            + (", and 1 for the batch and the channels." if with_batch else ".")
        )
    return result


def check_shapes(
    key: Any,
    rank: int | None,
    layout: str,
    inputs: Any,
    outputs: Any,
    may_be_grouped: bool = False,
) -> checks.Sizes:
    """Checks filter, bias, ranks, channels and batch sizes; returns filter sizes.

    Args:
      key: the filter, or `(filter, bias)`.
      rank: of the filter; None for any from 3.
      layout: of the filter, for messages.
      inputs: of the layer.
      outputs: of the layer.
      may_be_grouped: whether the inputs may have the channels of several groups.
    """
    checks.single_tensor(inputs, "inputs", "register_conv2d_multi")
    checks.single_tensor(outputs, "outputs", "register_conv2d_multi")
    sizes = filter_sizes(key, rank, layout)
    c_in = sizes[-2]
    if may_be_grouped:
        groups = number_of_groups(inputs, c_in)
        c_in *= groups if sizes[-1] % groups == 0 else 1
    check_channels(inputs, len(sizes), c_in, "inputs", "c_in")
    check_channels(outputs, len(sizes), sizes[-1], "outputs", "c_out")
    checks.same_batch(inputs, outputs)
    checks.same_dtype(inputs, outputs)
    return sizes


def filter_sizes(key: Any, rank: int | None, layout: str) -> checks.Sizes:
    """Checks filter and bias; returns the filter's sizes, all of which are known."""
    sizes = checks.weights_and_bias(
        key, lambda found: found == rank if rank else found >= 3, layout
    )
    return checks.known_sizes(as_tuple(key)[0], sizes, layout)


def number_of_groups(inputs: Any, c_in: int) -> int:
    """How many times `c_in` channels the inputs have; 1 if that is not known."""
    sizes = checks.static_sizes(inputs)
    channels = sizes[-1] if sizes else None
    return channels // c_in if channels and channels % c_in == 0 else 1


def check_channels(
    tensor: Any, rank: int, channels: int | None, what: str, channels_name: str
) -> None:
    """Checks the rank of inputs or outputs and their number of channels."""
    layout = f"[batch, {rank - 2} spatial axes, {channels_name}]"
    if checks.static_sizes(tensor) is None:
        raise errors.ArgumentError(
            f"The rank of the layer's {what} {checks.tensor_name(tensor)!r} is not "
            f"known statically; expected {layout}. Tell it by tf.ensure_shape."
        )
    checks.rank_and_last_axis(tensor, [rank], channels, what, layout)


def patch_mask_tensor(mask: Any, weights: Any) -> tf.Tensor | None:
    """The mask as a tensor, which factors can be identified by, of a checked shape."""
    if mask is None:
        return None
    if isinstance(mask, (np.ndarray, list, tuple)):
        mask = tf.constant(mask, dtype=tf.as_dtype(weights.dtype).base_dtype)
    if not tf.is_tensor(mask):
        raise errors.ArgumentError(
            f"patch_mask={mask!r}; expected an array or tensor [height, width, c_in]."
        )
    if not mask.shape.is_compatible_with(tf.TensorShape(weights.shape)[:-1]):
        raise errors.ArgumentError(
            f"patch_mask has shape {mask.shape}; the filter "
            f"{checks.parameter_name(weights)!r} of shape {weights.shape} needs "
            "[height, width, c_in]."
        )
    return mask
