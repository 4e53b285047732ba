"""Convolutions of any rank: how many locations, which patches, what is refused.

Strides and dilations come as `None` (ones), one entry a spatial dimension, or of full
rank with a batch and a channel entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import utils
from kfac.python.ops.fisher_blocks.base import is_sequence


def filter_of(params: Any) -> Any:
    """The filter of `filter`, `(filter,)` or `(filter, bias)`.

    Raises:
      ValueError: a sequence of another length.
    """
    if not is_sequence(params):
        return params
    if len(params) not in (1, 2):
        raise ValueError(
            "Convolution params must be a filter or (filter, bias), got a sequence of "
            f"{len(params)}."
        )
    return params[0]


def has_bias(params: Any) -> bool:
    """Whether `params` is `(filter, bias)`."""
    return is_sequence(params) and len(params) == 2


def static_shape(tensor: Any) -> tuple[int | None, ...]:
    """Static shape of known rank as a tuple."""
    return tuple(tf.TensorShape(tensor.shape).as_list())


def check_channels_last(data_format: str | None) -> None:
    """Raises `ValueError` for any other data format."""
    if not utils.is_data_format_channel_last(data_format):
        raise ValueError(
            f"data_format must be channels-last (such as 'NHWC'), got {data_format!r}."
        )


def check_length(name: str, values: Sequence[int], length: int) -> None:
    """Raises `ValueError` unless `values` has `length` entries."""
    if len(values) != length:
        raise ValueError(f"{name} must have {length} entries, got {tuple(values)}.")


def num_groups(filter_shape: Sequence[int], inputs: Any) -> int:
    """How many times the filter's channels `inputs` have; 1 if that is not known."""
    channels = static_shape(inputs)[-1]
    seen = filter_shape[-2]
    return channels // seen if channels and channels % seen == 0 else 1


def check_not_grouped(filter_shape: Sequence[int], inputs: Any) -> None:
    """Raises `ValueError` if `inputs` have several times the filter's channels."""
    for use in inputs if is_sequence(inputs) else (inputs,):
        groups = num_groups(filter_shape, use)
        if groups > 1:
            raise ValueError(
                f"Grouped convolution: inputs of shape {use.shape} fall into {groups} "
                f"groups for the filter {tuple(filter_shape)}, which this block cannot "
                "represent. Use approximation 'diagonal', without a patch mask, or "
                "register_generic."
            )


def spatial_entries(
    name: str, values: Sequence[int] | None, spatial_rank: int
) -> list[int]:
    """The spatial entries of strides or dilations.

    Raises:
      ValueError: neither spatial-only nor of full rank.
    """
    if values is None:
        return [1] * spatial_rank
    values = [int(value) for value in values]
    if len(values) == spatial_rank:
        return values
    if len(values) == spatial_rank + 2:
        return values[1:-1]
    raise ValueError(
        f"{name} must have {spatial_rank} (spatial) or {spatial_rank + 2} entries for "
        f"a convolution with {spatial_rank} spatial dimensions, got {tuple(values)}."
    )


def num_locations(
    inputs: Any,
    outputs: Any,
    filter_shape: Sequence[int],
    padding: str | None,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
) -> int:
    """How many locations of a case the filter is applied to.

    Damping functions use it, so it must not depend on data: it follows from the
    static spatial sizes of the input, or else of the output.

    Args:
      inputs: `[batch, spatial..., channels]`.
      outputs: the same of the layer's output.
      filter_shape: `[spatial..., channels in, channels out]`.
      padding: "SAME" (also `None`), "CAUSAL" or "VALID", in any case; for others the
        output decides.
      strides: see the module.
      dilations: see the module.

    Raises:
      ValueError: ranks differ, or the sizes are not static.
    """
    spatial_rank = len(filter_shape) - 2
    for name, tensor in (("inputs", inputs), ("outputs", outputs)):
        rank = tf.TensorShape(tensor.shape).rank
        if rank is not None and rank != len(filter_shape):
            raise ValueError(
                f"Filter {tuple(filter_shape)} and {name} {tensor.shape} must have the "
                "same rank."
            )
    if padding is None or padding.upper() in ("SAME", "VALID", "CAUSAL"):
        sizes = _spatial_sizes(inputs, spatial_rank)
        if None not in sizes:
            axes = zip(
                sizes,
                filter_shape[:-2],
                spatial_entries("strides", strides, spatial_rank),
                spatial_entries("dilations", dilations, spatial_rank),
                strict=True,
            )
            return math.prod(
                utils.num_conv_locations(
                    (None, size, None), (kernel, 1, 1), (stride,), padding, (dilation,)
                )
                for size, kernel, stride, dilation in axes
            )
    sizes = _spatial_sizes(outputs, spatial_rank)
    if None not in sizes:
        return math.prod(sizes)
    raise ValueError(
        f"The number of locations of a convolution with inputs {inputs.shape} and "
        f"outputs {outputs.shape} is not known statically, but its damping depends on "
        "it. Give one of them a static spatial shape (tf.ensure_shape)."
    )


def _spatial_sizes(tensor: Any, spatial_rank: int) -> list[int | None]:
    shape = tf.TensorShape(tensor.shape)
    return [None] * spatial_rank if shape.rank is None else shape.as_list()[1:-1]


def patches(
    inputs: tf.Tensor,
    filter_shape: Sequence[int],
    padding: str | None,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    patch_mask: Any = None,
) -> tf.Tensor:
    """What the filter sees, `[batch * locations, offsets, channels]`.

    Args:
      inputs: `[batch, spatial..., channels]`.
      filter_shape: `[spatial..., channels, channels out]`.
      padding: "SAME" or "VALID".
      strides: see the module.
      dilations: see the module.
      patch_mask: `[spatial..., channels]`, multiplies every patch.
    """
    spatial_rank = len(filter_shape) - 2
    *spatial, channels, _ = filter_shape
    result = utils.extract_convolution_patches(
        inputs,
        filter_shape,
        "SAME" if padding is None else padding.upper(),
        strides=spatial_entries("strides", strides, spatial_rank),
        dilation_rate=spatial_entries("dilations", dilations, spatial_rank),
    )
    result = tf.reshape(result, [-1, math.prod(spatial), channels])
    if patch_mask is None:
        return result
    mask = tf.cast(tf.convert_to_tensor(patch_mask), result.dtype)
    return result * tf.reshape(mask, [1, math.prod(spatial), channels])
