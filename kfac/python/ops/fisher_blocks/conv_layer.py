"""What convolution blocks of all kinds share: options, location count, gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops.fisher_blocks import conv_geometry as geometry
from kfac.python.ops.fisher_blocks import layer_gradients
from kfac.python.ops.fisher_blocks.base import is_sequence, maybe_tuple


class ConvolutionLayer:
    """What all convolution blocks know of their layer; a mix-in.

    Subclasses set `_filter_shape`, `_has_bias`, `_padding`, `_strides`, `_dilations`
    and `_patch_mask`.
    """

    _num_locations: int | None = None

    def configuration(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "filter_shape": self._filter_shape,
            "has_bias": self._has_bias,
            "padding": self._padding,
            "strides": self._strides,
            "dilations": self._dilations,
            "patch_mask": self._patch_mask,
        }

    def rebuild_gradient(self, source_grads: Any) -> Any:
        """Sum over towers, cases and locations of patch times output gradient."""
        towers = zip(self._mapped_inputs(), source_grads, strict=True)
        return self._shaped_like_params(
            layer_gradients.sum_over_towers(
                [self._tower_gradient(inputs, grads) for inputs, grads in towers]
            )
        )

    def _tower_gradient(self, inputs: Any, grads: Any) -> Any:
        inputs = layer_gradients.joined_uses(inputs)
        groups = inputs.shape.as_list()[-1] // self._weights_shape[-2]
        *offsets, channels, outputs = self._weights_shape
        patches = geometry.patches(
            inputs,
            (*offsets, channels * groups, outputs),
            self._padding,
            self._strides,
            self._dilations,
            self._patch_mask,
        )
        grads = layer_gradients.rows(grads)
        weights = tf.reshape(
            layer_gradients.convolution_filter(patches, grads, groups),
            self._weights_shape,
        )
        return (weights, tf.reduce_sum(grads, axis=0)) if self._has_bias else weights

    @property
    def _weights_shape(self) -> tuple[int, ...]:
        """`[spatial..., channels in a group, channels out]`, as they are stored."""
        return self._filter_shape

    def _count_locations(self) -> int:
        """Locations of a case, from the first tower."""
        inputs, outputs = self._inputs[0], self._outputs[0]
        return geometry.num_locations(
            inputs[0] if is_sequence(inputs) else inputs,
            outputs[0] if is_sequence(outputs) else outputs,
            self._filter_shape,
            self._padding,
            self._strides,
            self._dilations,
        )

    def _uses_per_case(self) -> int | None:
        if self._num_locations is None:
            return self._count_locations() if self._inputs else None
        return self._num_locations


class KroneckerConvolutionLayer(ConvolutionLayer):
    """Options of a Kronecker-factored convolution of any rank; a mix-in."""

    def validate_tower(self, inputs: Any, outputs: Any) -> None:
        """Refuses grouped convolutions.

        Raises:
          ValueError: the inputs have several times the filter's channels.
        """
        super().validate_tower(inputs, outputs)
        geometry.check_not_grouped(self._filter_shape, inputs)

    def _set_layer(
        self,
        params: Any,
        padding: str,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        extract_patches_fn: str | None = None,
        sub_sample_inputs: bool | None = None,
        sub_sample_patches: bool | None = None,
        patch_mask: Any = None,
    ) -> None:
        """Sets the options.

        Args:
          params: filter `[spatial..., c_in, c_out]`, or `(filter, bias)`.
          padding: "SAME" or "VALID".
          strides: one int a spatial dimension, or full rank; ones by default.
          dilation_rate: like `strides`.
          data_format: channels last.
          extract_patches_fn: how patches are made, see `ConvInputKroneckerFactor`.
          sub_sample_inputs: take the input statistic from a part of the cases;
            default of `fisher_factors`.
          sub_sample_patches: likewise from a part of the patches.
          patch_mask: `[spatial..., c_in]`, multiplies every patch.

        Raises:
          ValueError: data format or params are not as said.
        """
        geometry.check_channels_last(data_format)
        self._filter_shape = geometry.static_shape(geometry.filter_of(params))
        self._has_bias = geometry.has_bias(params)
        self._padding = padding
        self._strides = maybe_tuple(strides)
        self._dilation_rate = maybe_tuple(dilation_rate)
        self._data_format = data_format
        self._extract_patches_fn = extract_patches_fn
        self._sub_sample_inputs = sub_sample_inputs
        self._sub_sample_patches = sub_sample_patches
        self._patch_mask = patch_mask

    @property
    def _dilations(self) -> tuple[int, ...] | None:
        return self._dilation_rate
