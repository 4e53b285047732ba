"""Checks that the registrations of all convolutions share."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import errors
from kfac.python.ops.layer_collection import checks

# What `params` may hold, for messages.
MEMBERS = "the filter, or (filter, bias)"


def check_nhwc(data_format: str | None) -> None:
    """Refuses any data format but the default, channels last."""
    if data_format not in (None, "NHWC"):
        raise errors.ArgumentError(
            f"data_format={data_format!r}; expected None or 'NHWC'. Transpose to "
            "channels last."
        )


def check_shapes(
    key: Any, rank: int | None, layout: str, inputs: Any, outputs: Any
) -> checks.Sizes | None:
    """Checks filter, bias, ranks, channels and batch sizes; returns filter sizes."""
    checks.single_tensor(inputs, "inputs", "register_conv2d_multi")
    checks.single_tensor(outputs, "outputs", "register_conv2d_multi")
    sizes = checks.weights_and_bias(
        key, lambda found: found == rank if rank else found >= 3, layout
    )
    if sizes is not None:
        check_channels(inputs, len(sizes), sizes[-2], "inputs", "c_in")
        check_channels(outputs, len(sizes), sizes[-1], "outputs", "c_out")
        checks.same_batch(inputs, outputs)
    return sizes


def check_channels(
    tensor: Any, rank: int, channels: int | None, what: str, channels_name: str
) -> None:
    """Checks the rank of inputs or outputs and their number of channels."""
    layout = f"[batch, {rank - 2} spatial axes, {channels_name}]"
    checks.rank_and_last_axis(tensor, [rank], channels, what, layout)


def patch_mask_tensor(mask: Any, weights: Any) -> tf.Tensor | None:
    """The mask as a tensor, which factors can be identified by, of a checked shape."""
    if mask is None:
        return None
    if isinstance(mask, (np.ndarray, list, tuple)):
        mask = tf.constant(mask, dtype=tf.as_dtype(weights.dtype).base_dtype)
    if not mask.shape.is_compatible_with(tf.TensorShape(weights.shape)[:-1]):
        raise errors.ArgumentError(
            f"patch_mask has shape {mask.shape}; the filter "
            f"{checks.parameter_name(weights)!r} of shape {weights.shape} needs "
            "[height, width, c_in]."
        )
    return mask
