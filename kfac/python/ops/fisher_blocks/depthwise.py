"""Blocks of depthwise convolutions: one filter group a channel, no bias.

A depthwise filter `[kh, kw, c, m]` is the ordinary filter `[kh, kw, c, c m]` that is
zero unless output channel `j m + q` belongs to input channel `j`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import fisher_factors
from kfac.python.ops.fisher_blocks import conv_geometry as geometry
from kfac.python.ops.fisher_blocks.base import Vector, is_sequence
from kfac.python.ops.fisher_blocks.convolution import ConvDiagonalFB, ConvKFCBasicFB


def depthwise_conv2d_filter_to_conv2d_filter(
    filter: tf.Tensor, name: str | None = None
) -> tf.Tensor:
    """The ordinary filter that does the same as a depthwise one.

    Args:
      filter: `[kh, kw, c, m]`, any dtype.
      name: name scope.

    Returns:
      `[kh, kw, c, c * m]`, zero where input and output channel differ in group.
    """
    with tf.name_scope(name or "depthwise_conv2d_filter_to_conv2d_filter"):
        filter = tf.convert_to_tensor(filter)
        height, width, channels, multiplier = filter.shape.as_list()
        own = np.eye(channels, dtype=bool)[:, :, np.newaxis]
        # Not a product with zeros and ones: 0 * inf is not 0.
        blocks = tf.where(
            own, filter[:, :, :, tf.newaxis, :], tf.zeros([], filter.dtype)
        )
        return tf.reshape(blocks, [height, width, channels, channels * multiplier])


def conv2d_filter_to_depthwise_conv2d_filter(
    filter: tf.Tensor, name: str | None = None
) -> tf.Tensor:
    """Left inverse of `depthwise_conv2d_filter_to_conv2d_filter`.

    Args:
      filter: `[kh, kw, c, o]`, any dtype; entries between different groups are
        discarded.
      name: name scope.

    Returns:
      `[kh, kw, c, o / c]`.

    Raises:
      ValueError: `o` is not a multiple of `c`.
    """
    with tf.name_scope(name or "conv2d_filter_to_depthwise_conv2d_filter"):
        filter = tf.convert_to_tensor(filter)
        height, width, channels, outputs = filter.shape.as_list()
        if outputs % channels:
            raise ValueError(
                f"A filter of shape {filter.shape} has {outputs} output channels; a "
                f"depthwise filter needs a multiple of its {channels} input channels."
            )
        multiplier = outputs // channels
        blocks = tf.reshape(filter, [height, width, channels * channels, multiplier])
        return tf.gather(blocks, np.arange(channels) * (channels + 1), axis=2)


class _DepthwiseLayer:
    """What both blocks know of their layer.

    Towers: `inputs [batch, height, width, c]`, `outputs [batch, ..., c m]`.
    """

    @staticmethod
    def _check_arguments(
        params: Any,
        strides: Sequence[int],
        rate: Sequence[int] | None,
        data_format: str | None,
    ) -> tuple[int, int, int, int]:
        """Raises the documented errors; returns the dilations."""
        if is_sequence(params):
            raise NotImplementedError(
                "Depthwise convolutions with a bias are not supported; register the "
                "bias on its own (register_generic or register_scale_and_shift)."
            )
        shape = geometry.static_shape(params)
        geometry.check_length("The filter's shape", shape, 4)
        geometry.check_length("strides", strides, 4)
        rate = (1, 1) if rate is None else tuple(rate)
        geometry.check_length("rate", rate, 2)
        geometry.check_channels_last(data_format)
        return (1, *rate, 1)

    def _set_filter(self, params: Any) -> None:
        """Notes the depthwise filter's shape and that of the ordinary one."""
        height, width, channels, multiplier = geometry.static_shape(params)
        self._depthwise_shape = (height, width, channels, multiplier)
        self._filter_shape = (height, width, channels, channels * multiplier)

    @property
    def _weights_shape(self) -> tuple[int, ...]:
        height, width, _, outputs = self._filter_shape
        return height, width, 1, outputs

    def _tower_gradient(self, inputs: Any, grads: Any) -> tf.Tensor:
        # The stored order of [kh, kw, 1, c m] and [kh, kw, c, m] is the same.
        gradient = super()._tower_gradient(inputs, grads)
        return tf.reshape(gradient, self._depthwise_shape)


class DepthwiseConvDiagonalFB(_DepthwiseLayer, ConvDiagonalFB):
    """Diagonal of a depthwise convolution, from statistics of each channel alone."""

    def __init__(
        self,
        layer_collection: Any,
        params: Any,
        strides: Sequence[int],
        padding: str,
        rate: Sequence[int] | None = None,
        data_format: str | None = None,
    ):
        """Makes the block.

        Args:
          layer_collection: the `LayerCollection`.
          params: the filter `[kh, kw, c, m]`.
          strides: 4 ints.
          padding: "SAME" or "VALID".
          rate: dilation of height and width; ones by default.
          data_format: channels last.

        Raises:
          NotImplementedError: there is a bias.
          ValueError: filter, strides, rate or data format are not as said.
        """
        dilations = self._check_arguments(params, strides, rate, data_format)
        super().__init__(
            layer_collection,
            params,
            strides,
            padding,
            data_format=data_format,
            dilations=dilations,
        )
        self._set_filter(params)

    @property
    def _factor_implementation(self) -> type:
        return fisher_factors.DepthwiseConvDiagonalFactor

    def _factor_of(self, inputs: tuple, grads: tuple) -> tuple[type, tuple]:
        return self._factor_implementation, (
            inputs,
            grads,
            self._depthwise_shape,
            self._strides,
            self._padding,
            self._data_format,
            self._dilations,
        )


class DepthwiseConvKFCBasicFB(_DepthwiseLayer, ConvKFCBasicFB):
    """Kronecker factors of the ordinary convolution that does the same.

    A product is that of the vector embedded in the ordinary filter, without the
    entries between channels; so powers are not those of the depthwise block itself,
    and multiplying by power -1 does not undo multiplying by 1.  The factors have sides
    `kh kw c` and `c m`: inverting them costs as much as for an ordinary convolution of
    that many channels.
    """

    approximation = "kron_depthwise"

    def __init__(
        self,
        layer_collection: Any,
        params: Any,
        strides: Sequence[int],
        padding: str,
        rate: Sequence[int] | None = None,
        data_format: str | None = None,
    ):
        """Makes the block; arguments and errors as `DepthwiseConvDiagonalFB`.

        Args:
          layer_collection: the `LayerCollection`.
          params: the filter `[kh, kw, c, m]`.
          strides: 4 ints.
          padding: "SAME" or "VALID".
          rate: dilation of height and width; ones by default.
          data_format: channels last.
        """
        dilations = self._check_arguments(params, strides, rate, data_format)
        super().__init__(
            layer_collection,
            params,
            padding,
            strides=strides,
            dilation_rate=dilations,
            data_format=data_format,
            extract_patches_fn="extract_image_patches",
        )
        self._set_filter(params)

    def full_fisher_block(self) -> tf.Tensor:
        """The entries of `L A (x) G` between the depthwise filter's parameters."""
        height, width, channels, outputs = self._filter_shape
        ordinary = np.arange(height * width * channels * outputs)
        ordinary = ordinary.reshape(height * width, channels, channels, -1)
        own = ordinary[:, np.arange(channels), np.arange(channels)].reshape(-1)
        return tf.gather(tf.gather(super().full_fisher_block(), own), own, axis=1)

    def _multiply_factored_matrix(
        self,
        left_factor: Any,
        right_factor: Any,
        vector: Vector,
        extra_scale: float = 1.0,
        transpose_left: bool = False,
        transpose_right: bool = False,
    ) -> Vector:
        # Embedding the vector and multiplying matrices would cost `c` times as much.
        height, width, channels, multiplier = self._depthwise_shape
        offsets = height * width
        left = _dense(left_factor, transpose_left)
        right = _dense(right_factor, transpose_right)
        left = tf.reshape(left, [offsets, channels, offsets, channels])
        right = tf.reshape(right, [channels, multiplier, channels, multiplier])
        embedded = tf.reshape(vector, [offsets, channels, multiplier])
        # s: offset, c: channel, m: output of the channel; capitals are summed over.
        product = tf.einsum("scSC,SCM->scCM", left, embedded)
        product = tf.einsum("scCM,CMcm->scm", product, right)
        return tf.reshape(extra_scale * product, vector.shape.as_list())


def _dense(operator: Any, transpose: bool) -> tf.Tensor:
    matrix = tf.convert_to_tensor(operator.to_dense())
    return tf.linalg.matrix_transpose(matrix) if transpose else matrix
