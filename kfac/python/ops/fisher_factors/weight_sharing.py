"""Factors for weight sharing in the "reduce" setting (arXiv 2311.00636, section 3.3).

Where a layer is used several times within one case (over the tokens of a sequence,
the locations of an image) and the uses are then averaged or summed, the sum over uses
of input ⊗ output gradient is approximated by (mean input) ⊗ (summed output gradient).
The Kronecker product of these factors therefore needs no further scale: unlike that
of the ordinary ("expand") factors, it is not multiplied by the number of uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops.fisher_factors import (
    convolution,
    fully_connected,
    naming,
    statistics,
)


class FullyConnectedReduceKroneckerFactor(
    fully_connected.FullyConnectedKroneckerFactor
):
    """Second moment of a layer's inputs or output gradients, reduced over uses.

    Args:
      tensors: indexed by source, then by tower: `[uses, batch, features]`, or
        `[uses * batch, features]` (use-major).
      num_uses: number of uses; may be None for data that are not folded.
      reduction: "mean" for inputs, "sum" for output gradients.
      has_bias: append the constant 1 of a bias; for inputs.

    Raises:
      ValueError: another reduction, a bias with "sum", or data that do not fit
        `num_uses`.
    """

    def __init__(
        self,
        tensors: Any,
        num_uses: int | None,
        reduction: str,
        has_bias: bool = False,
    ):
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}.')
        if has_bias and reduction == "sum":
            raise ValueError(
                "The constant 1 of a bias belongs to the inputs, which are reduced by "
                '"mean"; got has_bias=True with "sum".'
            )
        self._num_uses = num_uses
        self._reduction = reduction
        super().__init__(tensors, has_bias=has_bias)

    @property
    def _var_scope(self) -> str:
        return "ff_fc_reduce_" + naming.scope_string_from_params(
            [
                *tf.nest.flatten(self._tensors),
                self._num_uses,
                self._reduction,
                self._has_bias,
            ]
        )

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        return statistics.num_cases(self._tensors[source][tower], self._num_uses)

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        data = tf.convert_to_tensor(self._tensors[source][tower])
        data = statistics.to_canonical(data, self._num_uses)
        reduce = tf.reduce_mean if self._reduction == "mean" else tf.reduce_sum
        return statistics.second_moment(reduce(data, axis=0), self._has_bias)


class ConvInputReduceKroneckerFactor(convolution.ConvInputKroneckerFactor):
    """Second moment over cases of the mean input patch of each case.

    Args:
      inputs: see `ConvInputKroneckerFactor`; so are the other arguments.
      filter_shape: `[*filter_spatial, channels_in, channels_out]`.
      padding: "SAME" or "VALID".
      strides: None, or as `extract_patches_fn` asks.
      dilation_rate: None, or as `extract_patches_fn` asks.
      data_format: None or channels last.
      extract_patches_fn: see `conv_patches.extract`.
      has_bias: append a constant 1 to each mean patch.
      sub_sample_inputs: use a random part of the cases.
      patch_mask: `[*filter_spatial, channels_in]`, multiplies each patch.
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
        patch_mask: Any = None,
    ):
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
            sub_sample_patches=False,
            patch_mask=patch_mask,
        )

    @property
    def _var_scope(self) -> str:
        return "reduce_" + super()._var_scope

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        statistics.check_only_source(source)
        mean_patches = tf.reduce_mean(self._extract_patches(tower), axis=1)
        return statistics.second_moment(mean_patches, self._has_bias)


class ConvOutputReduceKroneckerFactor(convolution.ConvOutputKroneckerFactor):
    """Second moment over cases of the output gradients summed over locations.

    Args:
      outputs_grads: indexed by source, then by tower:
        `[batch, *spatial, channels_out]`.
      data_format: None or channels last.
    """

    @property
    def _var_scope(self) -> str:
        return "reduce_" + super()._var_scope

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        summed = tf.reduce_sum(self._located_grads(source, tower), axis=1)
        return statistics.second_moment(summed)
