"""Diagonal factors of convolution layers, also of grouped and depthwise ones."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import utils
from kfac.python.ops.fisher_factors import (
    base,
    conv_patches,
    diagonal,
    naming,
    statistics,
)


class ConvDiagonalFactor(diagonal.DiagonalFactor):
    """Mean over cases of the squared gradient of a filter (and bias).

    The average has shape `[kh * kw * channels_in (+ 1), channels_out]`: flattened
    row-major it lines up with the filter followed by the bias. A case's gradient is
    the sum over locations of patch ⊗ output gradient.

    Args:
      inputs: indexed by tower: `[batch, height, width, channels_in]`.
      outputs_grads: indexed by source, then by tower:
        `[batch, height', width', channels_out]`.
      filter_shape: `[kh, kw, channels_in, channels_out]`.
      strides: of length 4.
      padding: "SAME" or "VALID".
      data_format: None or channels last.
      dilations: None or of length 4.
      has_bias: whether the layer has a bias.
      patch_mask: `[kh, kw, channels_in]`, multiplies each patch.

    Raises:
      ValueError: shapes, strides or dilations that do not fit, or channels first.
      ArgumentError: a mask of another shape.
    """

    # Channels fall into so many groups, each seen by its own outputs only.
    _groups = 1

    def __init__(
        self,
        inputs: Any,
        outputs_grads: Any,
        filter_shape: Sequence[int],
        strides: Sequence[int],
        padding: str,
        data_format: str | None = None,
        dilations: Sequence[int] | None = None,
        has_bias: bool = False,
        patch_mask: Any = None,
    ):
        filter_shape = tuple(int(size) for size in filter_shape)
        conv_patches.check_channels_last(data_format)
        channels = filter_shape[-2] * self._groups
        for tower, data in enumerate(inputs):
            conv_patches.check_channels(data, channels, f"inputs[{tower}]", rank=4)
        for source, towers in enumerate(outputs_grads):
            for grads in towers:
                what = f"The output gradient of source {source}"
                conv_patches.check_channels(grads, filter_shape[-1], what, rank=4)
        for what, values in (("strides", strides), ("dilations", dilations)):
            if values is not None and len(values) != 4:
                raise ValueError(f"{what} must have length 4, got {tuple(values)}.")
        conv_patches.check_mask(patch_mask, filter_shape)
        self._inputs = inputs
        self._outputs_grads = outputs_grads
        self._filter_shape = filter_shape
        self._strides = strides
        self._padding = padding
        self._data_format = data_format
        self._dilations = (1, 1, 1, 1) if dilations is None else dilations
        self._has_bias = has_bias
        self._patch_mask = patch_mask
        self._patches: list[tf.Tensor | None] | None = None
        super().__init__()

    @property
    def _var_scope(self) -> str:
        return "ff_convdiag_" + naming.scope_string_from_params(
            [*self._inputs, *tf.nest.flatten(self._outputs_grads)]
        )

    @property
    def _identity(self) -> Hashable:
        return naming.fingerprint(
            (
                self._inputs,
                self._outputs_grads,
                self._filter_shape,
                self._strides,
                self._padding,
                self._dilations,
                self._has_bias,
                self._patch_mask,
                self._groups,
            )
        )

    @property
    def _cov_shape(self) -> list[int]:
        size = math.prod(self._filter_shape[:-1]) + int(self._has_bias)
        return [size, self._filter_shape[-1]]

    @property
    def _num_sources(self) -> int:
        return len(self._outputs_grads)

    @property
    def _num_towers(self) -> int:
        return len(self._inputs)

    @property
    def _dtype(self) -> tf.DType:
        return self._inputs[0].dtype

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        return statistics.num_rows(self._outputs_grads[source][tower])

    def _compute_local_new_cov(self) -> tf.Tensor:
        """See base class; extracts the patches once for all sources."""
        self._patches = []
        for tower, inputs in enumerate(self._inputs):
            with base.maybe_place_on_device(self._get_data_device(tower)):
                fits = self._patches_fit(tower)
                self._patches.append(
                    self._extract(tf.convert_to_tensor(inputs)) if fits else None
                )
        return super()._compute_local_new_cov()

    def _elements_per_case(self) -> int:
        """Number of entries of the patches of one case, as far as known statically."""
        spatial = self._outputs_grads[0][0].shape.as_list()[1:3]
        locations = math.prod(size or 1 for size in spatial)
        return locations * math.prod(self._filter_shape[:-1]) * self._groups

    def _patches_fit(self, tower: int) -> bool:
        """Whether the patches of a tower may be held all at a time."""
        cases = tf.compat.dimension_value(self._inputs[tower].shape[0]) or 1
        return cases * self._elements_per_case() <= statistics.MAX_CHUNK_ELEMENTS

    def _extract(self, inputs: tf.Tensor) -> tf.Tensor:
        """Masked patches `[batch, locations, kh * kw * channels_in]`."""
        height, width, inner, outputs = self._filter_shape
        return conv_patches.extract(
            inputs,
            (height, width, inner * self._groups, outputs),
            padding=self._padding,
            strides=self._strides,
            dilation_rate=self._dilations,
            mask=self._patch_mask,
        )

    def _convdiag_sum_of_squares(
        self, patches: tf.Tensor, outputs_grad: tf.Tensor
    ) -> tf.Tensor:
        """Sum over cases of the squared filter gradient of each case.

        Args:
          patches: `[batch, <locations>, kh * kw * channels_in]`.
          outputs_grad: `[batch, <locations>, channels_out]`.

        Returns:
          `[kh * kw * channels_in / groups, channels_out]`.
        """
        patches = _locations_folded(patches)
        outputs_grad = _locations_folded(outputs_grad)
        if not patches.shape[:2].is_compatible_with(outputs_grad.shape[:2]):
            raise ValueError(
                f"The filter {tuple(self._filter_shape)} of {self.name!r} is applied "
                f"at {patches.shape[1]} locations of its inputs, by padding "
                f"{self._padding!r}, strides {self._strides} and dilations "
                f"{self._dilations}; its outputs have {outputs_grad.shape[1]}. "
                "Register the layer as it is computed."
            )
        return statistics.sum_of_squared_example_gradients(
            patches,
            outputs_grad,
            groups=self._groups,
            offsets=self._filter_shape[0] * self._filter_shape[1],
        )

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        held = self._patches[tower]
        grads = tf.convert_to_tensor(self._outputs_grads[source][tower])
        if held is not None:
            squares = self._convdiag_sum_of_squares(held, grads)
        else:
            squares = statistics.sum_over_chunks(
                lambda images, grads: self._convdiag_sum_of_squares(
                    self._extract(images), grads
                ),
                (tf.convert_to_tensor(self._inputs[tower]), grads),
                self._elements_per_case(),
            )
        if self._has_bias:
            bias_grads = tf.reduce_sum(_locations_folded(grads), axis=1)
            squares = statistics.append_bias_row(squares, bias_grads)
        return squares / tf.cast(statistics.num_rows(grads), squares.dtype)

    def _get_data_device(self, tower: int) -> str | None:
        return self._inputs[tower].device


def _locations_folded(data: tf.Tensor) -> tf.Tensor:
    """`[batch, <locations>, features]` as `[batch, locations, features]`."""
    batch, *locations, features = utils.get_shape(data)
    return tf.reshape(data, [batch, math.prod(locations), features])


class GroupedConvDiagonalFactor(ConvDiagonalFactor):
    """`ConvDiagonalFactor` of a grouped convolution, each group by itself.

    Args:
      inputs: indexed by tower: `[batch, height, width, channels_in]`.
      outputs_grads: indexed by source, then by tower:
        `[batch, height', width', channels_out]`.
      filter_shape: `[kh, kw, channels_in / groups, channels_out]`.
      groups: number of groups; group g has the g-th block of input and of output
        channels.
      strides: of length 4.
      padding: "SAME" or "VALID".
      data_format: None or channels last.
      dilations: None or of length 4.
      has_bias: whether the layer has a bias.

    Raises:
      ValueError: see base class; also if `groups` does not divide the output channels.
    """

    def __init__(
        self,
        inputs: Any,
        outputs_grads: Any,
        filter_shape: Sequence[int],
        groups: int,
        strides: Sequence[int],
        padding: str,
        data_format: str | None = None,
        dilations: Sequence[int] | None = None,
        has_bias: bool = False,
    ):
        if filter_shape[-1] % groups:
            raise ValueError(
                f"{filter_shape[-1]} output channels do not divide into {groups} "
                "groups."
            )
        self._groups = groups
        super().__init__(
            inputs,
            outputs_grads,
            filter_shape,
            strides,
            padding,
            data_format=data_format,
            dilations=dilations,
            has_bias=has_bias,
        )


class DepthwiseConvDiagonalFactor(GroupedConvDiagonalFactor):
    """Mean over cases of the squared gradient of a depthwise filter (and bias).

    The average has shape `[kh * kw (+ 1), channels_in * multiplier]`: flattened
    row-major it lines up with the filter `[kh, kw, channels_in, multiplier]` followed
    by the bias. Costs a channels-th part of the equivalent full convolution.

    Args:
      inputs: indexed by tower: `[batch, height, width, channels_in]`.
      outputs_grads: indexed by source, then by tower:
        `[batch, height', width', channels_in * multiplier]`.
      filter_shape: `[kh, kw, channels_in, multiplier]`.
      strides: of length 4.
      padding: "SAME" or "VALID".
      data_format: None or channels last.
      dilations: None or of length 4.
      has_bias: whether the layer has a bias.
    """

    def __init__(
        self,
        inputs: Any,
        outputs_grads: Any,
        filter_shape: Sequence[int],
        strides: Sequence[int],
        padding: str,
        data_format: str | None = None,
        dilations: Sequence[int] | None = None,
        has_bias: bool = False,
    ):
        height, width, channels, multiplier = (int(size) for size in filter_shape)
        super().__init__(
            inputs,
            outputs_grads,
            (height, width, 1, channels * multiplier),
            channels,
            strides,
            padding,
            data_format=data_format,
            dilations=dilations,
            has_bias=has_bias,
        )
