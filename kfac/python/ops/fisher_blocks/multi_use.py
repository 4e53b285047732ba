"""Blocks of weights that a case uses several times, uses taken as independent.

In the language of weight sharing (Eschenhagen et al. 2023, arXiv 2311.00636) this is
KFAC-expand: every use counts like a case of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac.python.ops import fisher_factors
from kfac.python.ops.fisher_blocks.conv_layer import KroneckerConvolutionLayer
from kfac.python.ops.fisher_blocks.fully_connected import (
    DenseGradients,
    diagonal_suffix,
    id_dtype_args,
)
from kfac.python.ops.fisher_blocks.kronecker import KroneckerProductFB
from kfac.python.ops.fisher_blocks.towers import InputOutputMultiTowerMultiUse


class FullyConnectedMultiIndepFB(
    DenseGradients, InputOutputMultiTowerMultiUse, KroneckerProductFB
):
    """`F ~ T A (x) G` for `T` uses of a dense layer, means over uses and cases.

    Towers: see `InputOutputMultiTowerMultiUse`; ids are `[batch]` a use, `[T, batch]`
    or `[T * batch]` and need the diagonal input factor.
    """

    _needs_order_of_uses = False

    def __init__(
        self,
        layer_collection: Any,
        has_bias: bool = False,
        num_uses: int | None = None,
        diagonal_approx_for_input: bool = False,
        diagonal_approx_for_output: bool = False,
    ):
        super().__init__(num_uses=num_uses, layer_collection=layer_collection)
        self._has_bias = has_bias
        self._diagonal_approx_for_input = diagonal_approx_for_input
        self._diagonal_approx_for_output = diagonal_approx_for_output

    @property
    def approximation(self) -> str:
        """Name of the approximation in registrations."""
        return "kron_indep" + diagonal_suffix(
            self._diagonal_approx_for_input, self._diagonal_approx_for_output
        )

    def instantiate_factors(self, grads_list: Sequence[Any], damping: Any) -> None:
        inputs, grads = self._process_data(grads_list)
        if self._diagonal_approx_for_input:
            dtype = id_dtype_args(inputs, grads)
            self._input_factor = self._make_or_get_factor(
                "input",
                fisher_factors.DiagonalMultiKF,
                ((inputs,), self._num_uses, self._has_bias, *dtype),
            )
        else:
            self._input_factor = self._make_or_get_factor(
                "input",
                fisher_factors.FullyConnectedMultiKF,
                ((inputs,), self._num_uses, self._has_bias),
            )
        self._output_factor = self._make_or_get_factor(
            "output",
            fisher_factors.DiagonalMultiKF
            if self._diagonal_approx_for_output
            else fisher_factors.FullyConnectedMultiKF,
            (grads, self._num_uses),
        )
        self._setup_damping(damping, normalization=self._num_uses)

    @property
    def _renorm_coeff(self) -> float:
        return float(self._num_uses)

    def configuration(self) -> dict[str, Any]:
        return {
            "has_bias": self._has_bias,
            "num_uses": self._uses_per_case(),
            "diagonal_approx_for_input": self._diagonal_approx_for_input,
            "diagonal_approx_for_output": self._diagonal_approx_for_output,
        }


class ConvKFCBasicMultiIndepFB(
    KroneckerConvolutionLayer, InputOutputMultiTowerMultiUse, KroneckerProductFB
):
    """`F ~ L T A (x) G` for `T` uses of a convolution with `L` locations.

    Towers: a list over uses of `[batch, spatial..., channels]`, or one tensor
    `[T * batch, spatial..., channels]`.
    """

    approximation = "kron_indep"

    def __init__(
        self,
        layer_collection: Any,
        params: Any,
        padding: str,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        extract_patches_fn: str | None = None,
        num_uses: int | None = None,
        sub_sample_inputs: bool | None = None,
        sub_sample_patches: bool | None = None,
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
          num_uses: number of uses, if no side is a list over uses.
          sub_sample_inputs: use a part of the cases.
          sub_sample_patches: use a part of the patches.
          patch_mask: multiplies every patch.
        """
        super().__init__(num_uses=num_uses, layer_collection=layer_collection)
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

    def instantiate_factors(self, grads_list: Sequence[Any], damping: Any) -> None:
        inputs, grads = self._process_data(grads_list)
        self._num_locations = self._count_locations()
        self._input_factor = self._make_or_get_factor(
            "input",
            fisher_factors.ConvInputMultiKF,
            (
                inputs,
                self._filter_shape,
                self._padding,
                self._num_uses,
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
            "output",
            fisher_factors.ConvOutputMultiKF,
            (grads, self._num_uses, self._data_format),
        )
        self._setup_damping(damping, normalization=self._replications)

    @property
    def _replications(self) -> int:
        return self._num_locations * self._num_uses

    @property
    def _renorm_coeff(self) -> float:
        return self._replications

    def configuration(self) -> dict[str, Any]:
        uses = InputOutputMultiTowerMultiUse._uses_per_case(self)
        return super().configuration() | {"num_uses": uses}

    def _uses_per_case(self) -> int | None:
        locations = super()._uses_per_case()
        uses = InputOutputMultiTowerMultiUse._uses_per_case(self)
        return None if None in (locations, uses) else locations * uses
