"""Kronecker factors of convolution layers (KFC: arXiv 1602.01407, section 3)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import config, utils
from kfac.python.ops.fisher_factors import (
    conv_patches,
    dense,
    naming,
    statistics,
    subsample,
)


class ConvInputKroneckerFactor(dense.DenseSquareMatrixFactor):
    """Second moment of the input patches, averaged over cases and locations.

    Args:
      inputs: indexed by tower: `[batch, *spatial, channels_in]`.
      filter_shape: `[*filter_spatial, channels_in, channels_out]`.
      padding: "SAME" or "VALID".
      strides: None, or as `extract_patches_fn` asks.
      dilation_rate: None, or as `extract_patches_fn` asks.
      data_format: None or channels last.
      extract_patches_fn: see `conv_patches.extract`.
      has_bias: append a constant 1 to each patch.
      sub_sample_inputs: use a random part of the cases; None for the setting's value
        at construction.
      sub_sample_patches: use a random part of the patches; None likewise.
      patch_mask: `[*filter_spatial, channels_in]`, multiplies each patch.

    Raises:
      ValueError: channels first, or a number of channels that does not fit.
      ArgumentError: a mask of another shape.
    """

    def __init__(
        self,
        inputs: Any,
        filter_shape: Sequence[int],
        padding: str,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        extract_patches_fn: str | None = None,
        has_bias: bool = False,
        sub_sample_inputs: bool | None = None,
        sub_sample_patches: bool | None = None,
        patch_mask: Any = None,
    ):
        filter_shape = tuple(int(size) for size in filter_shape)
        conv_patches.check_channels_last(data_format)
        for tower, data in enumerate(inputs):
            conv_patches.check_channels(data, filter_shape[-2], f"inputs[{tower}]")
        conv_patches.check_mask(patch_mask, filter_shape)
        settings = config.settings()
        self._inputs = inputs
        self._filter_shape = filter_shape
        self._padding = padding
        self._strides = strides
        self._dilation_rate = dilation_rate
        self._data_format = data_format
        self._extract_patches_fn = extract_patches_fn
        self._has_bias = has_bias
        self._sub_sample_inputs = (
            settings.sub_sample_inputs
            if sub_sample_inputs is None
            else sub_sample_inputs
        )
        self._sub_sample_patches = (
            settings.sub_sample_patches
            if sub_sample_patches is None
            else sub_sample_patches
        )
        self._patch_mask = patch_mask
        super().__init__()

    @property
    def _var_scope(self) -> str:
        return "ff_convinkron_" + naming.scope_string_from_params(
            [
                *self._inputs,
                self._filter_shape,
                self._strides,
                self._padding,
                self._dilation_rate,
                self._data_format,
                self._has_bias,
                self._patch_mask,
            ]
        )

    @property
    def _identity(self) -> Hashable:
        return naming.fingerprint(
            (
                self._inputs,
                self._patch_mask,
                self._extract_patches_fn,
                self._sub_sample_inputs,
                self._sub_sample_patches,
            )
        )

    @property
    def _cov_shape(self) -> list[int]:
        size = math.prod(self._filter_shape[:-1]) + int(self._has_bias)
        return [size, size]

    @property
    def _num_sources(self) -> int:
        return 1

    @property
    def _num_towers(self) -> int:
        return len(self._inputs)

    @property
    def _dtype(self) -> tf.DType:
        return self._inputs[0].dtype

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        statistics.check_only_source(source)
        return statistics.num_rows(self._inputs[tower])

    def _extract_patches(self, tower: int) -> tf.Tensor:
        """`[batch, locations, filter_size * channels_in]`, of the cases in use."""
        if config.settings().use_patches_second_moment_op:
            raise NotImplementedError(
                "There is no fused second-moment kernel for patches; leave "
                "use_patches_second_moment_op at False."
            )
        inputs = tf.convert_to_tensor(self._inputs[tower])
        if self._sub_sample_inputs:
            inputs = subsample.subsample_cases(inputs)
        return conv_patches.extract(
            inputs,
            self._filter_shape,
            padding=self._padding,
            strides=self._strides,
            dilation_rate=self._dilation_rate,
            data_format=self._data_format,
            method=self._extract_patches_fn,
            mask=self._patch_mask,
        )

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        statistics.check_only_source(source)
        rows = statistics.fold_uses(self._extract_patches(tower))
        if self._sub_sample_patches:
            rows = subsample._subsample_patches(rows)
        return statistics.second_moment(rows, self._has_bias)

    def _get_data_device(self, tower: int) -> str | None:
        return self._inputs[tower].device


class ConvInputMultiKF(ConvInputKroneckerFactor):
    """`ConvInputKroneckerFactor` of a layer used several times per case.

    Args:
      inputs: indexed by tower: `[num_uses * batch, *spatial, channels_in]`, use-major.
      filter_shape: see base class; so are the other arguments.
      padding: "SAME" or "VALID".
      num_uses: number of uses.
      strides: None, or as `extract_patches_fn` asks.
      dilation_rate: None, or as `extract_patches_fn` asks.
      data_format: None or channels last.
      extract_patches_fn: see `conv_patches.extract`.
      has_bias: append a constant 1 to each patch.
      sub_sample_inputs: use a random part of the cases.
      sub_sample_patches: use a random part of the patches.
      patch_mask: `[*filter_spatial, channels_in]`, multiplies each patch.
    """

    def __init__(
        self,
        inputs: Any,
        filter_shape: Sequence[int],
        padding: str,
        num_uses: int,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        extract_patches_fn: str | None = None,
        has_bias: bool = False,
        sub_sample_inputs: bool | None = None,
        sub_sample_patches: bool | None = None,
        patch_mask: Any = None,
    ):
        self._num_uses = num_uses
        super().__init__(
            inputs,
            filter_shape,
            padding,
            strides=strides,
            dilation_rate=dilation_rate,
            data_format=data_format,
            extract_patches_fn=extract_patches_fn,
            has_bias=has_bias,
            sub_sample_inputs=sub_sample_inputs,
            sub_sample_patches=sub_sample_patches,
            patch_mask=patch_mask,
        )

    @property
    def _identity(self) -> Hashable:
        return super()._identity, self._num_uses

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        return super()._partial_batch_size(source, tower) // self._num_uses


class ConvOutputKroneckerFactor(dense.DenseSquareMatrixFactor):
    """Second moment of the output gradients, averaged over cases and locations.

    Args:
      outputs_grads: indexed by source, then by tower:
        `[batch, *spatial, channels_out]`.
      data_format: None or channels last.

    Raises:
      ValueError: channels first.
    """

    def __init__(self, outputs_grads: Any, data_format: str | None = None):
        conv_patches.check_channels_last(data_format)
        self._outputs_grads = outputs_grads
        self._out_channels = statistics.num_features(outputs_grads[0][0])
        super().__init__()

    @property
    def _var_scope(self) -> str:
        return "ff_convoutkron_" + naming.scope_string_from_params(
            tf.nest.flatten(self._outputs_grads)
        )

    @property
    def _identity(self) -> Hashable:
        return naming.fingerprint(self._outputs_grads)

    @property
    def _cov_shape(self) -> list[int]:
        return [self._out_channels, self._out_channels]

    @property
    def _num_sources(self) -> int:
        return len(self._outputs_grads)

    @property
    def _num_towers(self) -> int:
        return len(self._outputs_grads[0])

    @property
    def _dtype(self) -> tf.DType:
        return self._outputs_grads[0][0].dtype

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        return statistics.num_rows(self._outputs_grads[source][tower])

    def _located_grads(self, source: int, tower: int) -> tf.Tensor:
        """`[batch, locations, channels_out]`."""
        grads = tf.convert_to_tensor(self._outputs_grads[source][tower])
        batch, *spatial, channels = utils.get_shape(grads)
        return tf.reshape(grads, [batch, math.prod(spatial), channels])

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        return statistics.second_moment(
            statistics.fold_uses(self._located_grads(source, tower))
        )

    def _get_data_device(self, tower: int) -> str | None:
        return self._outputs_grads[0][tower].device


class ConvOutputMultiKF(ConvOutputKroneckerFactor):
    """`ConvOutputKroneckerFactor` of a layer used several times per case.

    Args:
      outputs_grads: indexed by source, then by tower:
        `[num_uses * batch, *spatial, channels_out]`, use-major.
      num_uses: number of uses.
      data_format: None or channels last.
    """

    def __init__(
        self, outputs_grads: Any, num_uses: int, data_format: str | None = None
    ):
        self._num_uses = num_uses
        super().__init__(outputs_grads, data_format=data_format)

    @property
    def _identity(self) -> Hashable:
        return super()._identity, self._num_uses

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        return super()._partial_batch_size(source, tower) // self._num_uses
