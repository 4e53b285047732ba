"""Blocks of convolutions, channels last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import fisher_factors
from kfac.python.ops.fisher_blocks import conv_geometry as geometry
from kfac.python.ops.fisher_blocks.base import maybe_tuple
from kfac.python.ops.fisher_blocks.conv_layer import (
    ConvolutionLayer,
    KroneckerConvolutionLayer,
)
from kfac.python.ops.fisher_blocks.damping import _package_func, normalize_damping
from kfac.python.ops.fisher_blocks.full_and_diagonal import DiagonalFB
from kfac.python.ops.fisher_blocks.kronecker import KroneckerProductFB
from kfac.python.ops.fisher_blocks.towers import InputOutputMultiTower


class ConvDiagonalFB(ConvolutionLayer, InputOutputMultiTower, DiagonalFB):
    """Diagonal of a 2-D convolution: mean squared gradient of a case.

    Towers: `inputs [batch, height, width, c_in]`, `outputs [batch, ..., c_out]`. Inputs
    with a multiple of the filter's channels make it a grouped convolution.
    """

    def __init__(
        self,
        layer_collection: Any,
        params: Any,
        strides: Sequence[int],
        padding: str,
        data_format: str | None = None,
        dilations: Sequence[int] | None = None,
        patch_mask: Any = None,
    ):
        """Makes the block.

        Args:
          layer_collection: the `LayerCollection`.
          params: filter `[kh, kw, c_in, c_out]`, or `(filter, bias)`.
          strides: 4 ints.
          padding: "SAME" or "VALID".
          data_format: channels last.
          dilations: 4 ints; ones by default.
          patch_mask: `[kh, kw, c_in]`, multiplies every patch.

        Raises:
          ValueError: strides, dilations, data format or filter are not as said.
        """
        super().__init__(layer_collection)
        geometry.check_length("strides", strides, 4)
        dilations = (1, 1, 1, 1) if dilations is None else dilations
        geometry.check_length("dilations", dilations, 4)
        geometry.check_channels_last(data_format)
        self._filter_shape = geometry.static_shape(geometry.filter_of(params))
        geometry.check_length("The filter's shape", self._filter_shape, 4)
        self._has_bias = geometry.has_bias(params)
        self._strides = maybe_tuple(strides)
        self._padding = padding
        self._data_format = data_format
        self._dilations = maybe_tuple(dilations)
        self._patch_mask = patch_mask

    def validate_tower(self, inputs: Any, outputs: Any) -> None:
        """Refuses what the factor would refuse later.

        Raises:
          ValueError: a grouped convolution with a patch mask.
        """
        super().validate_tower(inputs, outputs)
        if self._patch_mask is not None:
            geometry.check_not_grouped(self._filter_shape, inputs)

    @property
    def _factor_implementation(self) -> type:
        return fisher_factors.ConvDiagonalFactor

    def instantiate_factors(self, grads_list: Sequence[Any], damping: Any) -> None:
        inputs, grads = self._process_data(grads_list)
        self._num_locations = self._count_locations()
        self._factor = self._make_or_get_factor(
            "diagonal", *self._factor_of(inputs, grads)
        )
        self._set_damping(damping)

    def _factor_of(self, inputs: tuple, grads: tuple) -> tuple[type, tuple]:
        """The factor's class and arguments."""
        geometry_args = (
            self._strides,
            self._padding,
            self._data_format,
            self._dilations,
            self._has_bias,
        )
        groups = geometry.num_groups(self._filter_shape, inputs[0])
        if groups > 1:
            return fisher_factors.GroupedConvDiagonalFactor, (
                inputs,
                grads,
                self._filter_shape,
                groups,
                *geometry_args,
            )
        return self._factor_implementation, (
            inputs,
            grads,
            self._filter_shape,
            *geometry_args,
            self._patch_mask,
        )

    def _set_damping(self, damping: Any) -> None:
        locations = self._num_locations
        self._damping_func = _package_func(
            lambda: locations * normalize_damping(damping, locations),
            (locations, "mult", "normalize_damping", damping, locations),
        )


class ConvKFCBasicFB(
    KroneckerConvolutionLayer, InputOutputMultiTower, KroneckerProductFB
):
    """Kronecker factors of a convolution (Grosse & Martens 2016).

    `F ~ L A (x) G` with `L` locations, `A` and `G` means over cases and locations;
    exact for a linear network whose locations are independent, and what "expand" is
    for weight sharing.

    Towers: `inputs [batch, spatial..., c_in]`, `outputs [batch, spatial..., c_out]`.
    """

    def __init__(
        self,
        layer_collection: Any,
        params: Any,
        padding: str,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        extract_patches_fn: str | None = None,
        sub_sample_inputs: bool | None = None,
        sub_sample_patches: bool | None = None,
        use_sua_approx_for_input_factor: bool = False,
        patch_mask: Any = None,
    ):
        """Makes the block; see `KroneckerConvolutionLayer`.

        Args:
          layer_collection: the `LayerCollection`.
          params: filter, or `(filter, bias)`.
          padding: "SAME" or "VALID".
          strides: spatial or full rank.
          dilation_rate: spatial or full rank.
          data_format: channels last.
          extract_patches_fn: how patches are made.
          sub_sample_inputs: use a part of the cases.
          sub_sample_patches: use a part of the patches.
          use_sua_approx_for_input_factor: activations of different offsets are
            uncorrelated. Only powers 1 and -1 exist then, and the input factor sees
            every pixel once, whatever strides, dilations and sub-sampling.
          patch_mask: multiplies every patch.

        Raises:
          ValueError: also for a patch mask with the SUA approximation, which has no
            patches.
        """
        super().__init__(layer_collection)
        self._set_layer(
            params,
            padding,
            strides=strides,
            dilation_rate=dilation_rate,
            data_format=data_format,
            extract_patches_fn=extract_patches_fn,
            sub_sample_inputs=sub_sample_inputs,
            sub_sample_patches=sub_sample_patches,
            patch_mask=patch_mask,
        )
        if use_sua_approx_for_input_factor and patch_mask is not None:
            raise ValueError(
                "patch_mask cannot be combined with the SUA approximation, which does "
                "not look at patches. Use 'kron' for this layer."
            )
        self._use_sua_approx_for_input_factor = use_sua_approx_for_input_factor

    @property
    def approximation(self) -> str:
        """Name of the approximation in registrations."""
        return "kron_sua" if self._use_sua_approx_for_input_factor else "kron"

    def instantiate_factors(self, grads_list: Sequence[Any], damping: Any) -> None:
        inputs, grads = self._process_data(grads_list)
        self._num_locations = self._count_locations()
        if self._use_sua_approx_for_input_factor:
            self._input_factor = self._make_or_get_factor(
                "input",
                fisher_factors.ConvInputSUAKroneckerFactor,
                (inputs, self._filter_shape, self._has_bias),
            )
        else:
            self._input_factor = self._make_or_get_factor(
                "input",
                fisher_factors.ConvInputKroneckerFactor,
                (
                    inputs,
                    self._filter_shape,
                    self._padding,
                    self._strides,
                    self._dilation_rate,
                    self._data_format,
                    self._extract_patches_fn,
                    self._has_bias,
                    self._sub_sample_inputs,
                    self._sub_sample_patches,
                    self._patch_mask,
                ),
            )
        self._output_factor = self._make_or_get_factor(
            "output", fisher_factors.ConvOutputKroneckerFactor, (grads,)
        )
        self._setup_damping(damping, normalization=self._num_locations)

    @property
    def _renorm_coeff(self) -> float:
        return self._num_locations

    def configuration(self) -> dict[str, Any]:
        return super().configuration() | {
            "use_sua_approx_for_input_factor": self._use_sua_approx_for_input_factor
        }

    def register_cholesky(self) -> None:
        self._refuse_sua_cholesky()
        super().register_cholesky()

    def register_cholesky_inverse(self) -> None:
        self._refuse_sua_cholesky()
        super().register_cholesky_inverse()

    def _refuse_sua_cholesky(self) -> None:
        if self._use_sua_approx_for_input_factor:
            raise NotImplementedError(
                "Cholesky factors do not exist for the SUA approximation; use 'kron'."
            )

    def _left_operator(self, operator: Any) -> Any:
        if self._use_sua_approx_for_input_factor:
            return _SpatialMajorOperator(operator, self._filter_shape, self._has_bias)
        return operator


class _SpatialMajorOperator:
    """The SUA factor's operator with its rows in the order of a filter's.

    The factor indexes by channel, then offset (`Sigma (x) I`), a filter by offset,
    then channel (`I (x) Sigma`); a bias is last in both.
    """

    def __init__(self, operator: Any, filter_shape: Sequence[int], has_bias: bool):
        *spatial, channels, _ = filter_shape
        offsets = math.prod(spatial)
        size = offsets * channels
        order = np.arange(size).reshape(offsets, channels).T.reshape(-1)
        order = np.append(order, size) if has_bias else order
        self._operator = operator
        self._to_channel_major = order
        self._to_spatial_major = np.argsort(order)

    def matmul(self, matrix: tf.Tensor, adjoint: bool = False) -> tf.Tensor:
        """Product with `[d_A, n]`."""
        product = self._operator.matmul(
            tf.gather(matrix, self._to_channel_major), adjoint=adjoint
        )
        return tf.gather(product, self._to_spatial_major)

    def to_dense(self) -> tf.Tensor:
        """`[d_A, d_A]`."""
        rows = tf.gather(self._operator.to_dense(), self._to_spatial_major)
        return tf.gather(rows, self._to_spatial_major, axis=1)
