"""How convolution data become canonical: patches, masks and checks of shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import errors, utils


def extract(
    inputs: tf.Tensor,
    filter_shape: Sequence[int],
    padding: str,
    strides: Sequence[int] | None = None,
    dilation_rate: Sequence[int] | None = None,
    data_format: str | None = None,
    method: str | None = None,
    mask: Any = None,
) -> tf.Tensor:
    """The flattened input patch at every output location.

    Args:
      inputs: `[batch, *spatial, channels]`.
      filter_shape: `[*filter_spatial, channels, channels_out]`.
      padding: "SAME" or "VALID".
      strides: see `method`.
      dilation_rate: see `method`.
      data_format: None or channels last.
      method: "extract_convolution_patches" (the default: strides and dilations are
        None, one per spatial axis, or one per axis), "extract_image_patches" (2-D,
        strides of length 4 are required, dilations are None or of length 4), or
        "extract_pointwise_conv2d_patches" (1x1 kernels of stride 1).
      mask: `[*filter_spatial, channels]`, multiplies every patch; None for ones.

    Returns:
      `[batch, locations, filter_size * channels]`, channels fastest: the order of the
      kernel reshaped to `[-1, channels_out]`. Padding counts as zeros.

    Raises:
      NotImplementedError: another `method`.
      TypeError: image patches without strides.
      ArgumentError: strides or dilations that do not suit the method.
      ValueError: see `utils.extract_convolution_patches`.
    """
    if method in (None, "extract_convolution_patches"):
        pass
    elif method == "extract_image_patches":
        _check_image_arguments(filter_shape, strides, dilation_rate)
    elif method == "extract_pointwise_conv2d_patches":
        _check_pointwise_arguments(filter_shape, strides)
        strides = None
    else:
        raise NotImplementedError(
            f"Unknown extract_patches_fn {method!r}; choose None, "
            '"extract_convolution_patches", "extract_image_patches" or '
            '"extract_pointwise_conv2d_patches".'
        )
    patches = utils.extract_convolution_patches(
        inputs,
        filter_shape,
        padding=padding,
        strides=strides,
        dilation_rate=dilation_rate,
        data_format=data_format,
    )
    num_spatial = len(filter_shape) - 2
    batch, *rest = utils.get_shape(patches)
    size = math.prod(filter_shape[:-1])
    flat = tf.reshape(patches, [batch, math.prod(rest[:num_spatial]), size])
    if mask is None:
        return flat
    return flat * tf.reshape(tf.cast(mask, flat.dtype), [size])


def _check_image_arguments(filter_shape, strides, dilation_rate):
    if strides is None:
        raise TypeError('"extract_image_patches" needs strides of length 4, got None.')
    if len(filter_shape) != 4 or len(strides) != 4:
        raise errors.ArgumentError(
            '"extract_image_patches" is for 2-D convolutions with strides of length 4, '
            f"got filter shape {tuple(filter_shape)} and strides {tuple(strides)}."
        )
    if dilation_rate is not None and (
        len(dilation_rate) != 4 or (dilation_rate[0], dilation_rate[-1]) != (1, 1)
    ):
        raise errors.ArgumentError(
            '"extract_image_patches" needs dilations [1, height, width, 1], got '
            f"{tuple(dilation_rate)}."
        )


def _check_pointwise_arguments(filter_shape, strides):
    if len(filter_shape) != 4 or tuple(filter_shape[:2]) != (1, 1):
        raise ValueError(
            '"extract_pointwise_conv2d_patches" is for filters [1, 1, in, out], got '
            f"{tuple(filter_shape)}."
        )
    if strides is not None and any(stride != 1 for stride in strides):
        raise errors.ArgumentError(
            f'"extract_pointwise_conv2d_patches" is for stride 1, got {tuple(strides)}.'
        )


def check_channels_last(data_format: str | None) -> None:
    """Raises `ValueError` for a data format with channels first."""
    if not utils.is_data_format_channel_last(data_format):
        raise ValueError(
            f"The channel axis must be last, got data_format {data_format!r}; "
            "transpose the data."
        )


def check_channels(
    data: Any, channels: int, what: str, rank: int | None = None
) -> None:
    """Checks the static shape of convolution data, as far as it is known.

    Args:
      data: `[batch, *spatial, channels]`.
      channels: expected number.
      what: how messages call the data.
      rank: expected rank, or None for any.

    Raises:
      ValueError: another rank or another number of channels.
    """
    shape = tf.TensorShape(data.shape)
    if rank is not None and shape.rank not in (None, rank):
        raise ValueError(f"{what} must have rank {rank}, got shape {shape}.")
    found = None if shape.rank is None else tf.compat.dimension_value(shape[-1])
    if found not in (None, channels):
        raise ValueError(
            f"{what} must have {channels} channels to fit the filter, got shape "
            f"{shape}."
        )


def check_mask(mask: Any, filter_shape: Sequence[int]) -> None:
    """Raises `ArgumentError` unless `mask` is None or `filter_shape[:-1]` in shape."""
    if mask is None:
        return
    expected = tuple(filter_shape[:-1])
    if tuple(tf.TensorShape(mask.shape).as_list()) != expected:
        raise errors.ArgumentError(
            f"patch_mask must have the shape {expected} of the filter without its "
            f"output channels, got {mask.shape}."
        )
