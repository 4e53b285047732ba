"""Blocks of shared weights that look at the sum of all uses.

KFAC-reduce (Eschenhagen et al. 2023, arXiv 2311.00636, section 3.3): `A` is the second
moment of the *mean* input over uses, `G` that of the *sum* of output gradients.  Exact
for a deep linear network whose uses are averaged, or summed, before the loss, where
KFAC-expand is not; and cheaper, for it squares one row a case instead of one a use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac.python.ops import fisher_factors
from kfac.python.ops.fisher_blocks.conv_layer import KroneckerConvolutionLayer
from kfac.python.ops.fisher_blocks.fully_connected import DenseGradients
from kfac.python.ops.fisher_blocks.kronecker import KroneckerProductFB
from kfac.python.ops.fisher_blocks.towers import (
    InputOutputMultiTower,
    InputOutputMultiTowerMultiUse,
)


class FullyConnectedReduceFB(
    DenseGradients, InputOutputMultiTowerMultiUse, KroneckerProductFB
):
    """`F ~ A (x) G` for several uses of a dense layer, uses reduced first.

    Towers: see `InputOutputMultiTowerMultiUse`.
    """

    approximation = "kron_reduce"

    def __init__(
        self,
        layer_collection: Any,
        has_bias: bool = False,
        num_uses: int | None = None,
    ):
        super().__init__(num_uses=num_uses, layer_collection=layer_collection)
        self._has_bias = has_bias

    def instantiate_factors(self, grads_list: Sequence[Any], damping: Any) -> None:
        inputs, grads = self._process_data(grads_list)
        factor = fisher_factors.FullyConnectedReduceKroneckerFactor
        self._input_factor = self._make_or_get_factor(
            "input", factor, ((inputs,), self._num_uses, "mean", self._has_bias)
        )
        self._output_factor = self._make_or_get_factor(
            "output", factor, (grads, self._num_uses, "sum", False)
        )
        self._setup_damping(damping)

    def configuration(self) -> dict[str, Any]:
        return {"has_bias": self._has_bias, "num_uses": self._uses_per_case()}


class ConvKFCReduceFB(
    KroneckerConvolutionLayer, InputOutputMultiTower, KroneckerProductFB
):
    """`F ~ A (x) G` for a convolution, locations reduced first.

    Towers: `inputs [batch, spatial..., c_in]`, `outputs [batch, spatial..., c_out]`.
    """

    approximation = "kron_reduce"

    def __init__(
        self,
        layer_collection: Any,
        params: Any,
        padding: str,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        extract_patches_fn: str | None = None,
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
          patch_mask: multiplies every patch.
        """
        super().__init__(layer_collection)
        self._set_layer(
            params,
            padding,
            strides=strides,
            dilation_rate=dilation_rate,
            data_format=data_format,
            extract_patches_fn=extract_patches_fn,
            patch_mask=patch_mask,
        )

    def instantiate_factors(self, grads_list: Sequence[Any], damping: Any) -> None:
        inputs, grads = self._process_data(grads_list)
        self._num_locations = self._count_locations()
        self._input_factor = self._make_or_get_factor(
            "input",
            fisher_factors.ConvInputReduceKroneckerFactor,
            (
                inputs,
                self._filter_shape,
                self._padding,
                self._strides,
                self._dilation_rate,
                self._data_format,
                self._extract_patches_fn,
                self._has_bias,
                None,  # Whether to use a part of the cases: as the settings say.
                self._patch_mask,
            ),
        )
        self._output_factor = self._make_or_get_factor(
            "output", fisher_factors.ConvOutputReduceKroneckerFactor, (grads,)
        )
        self._setup_damping(damping)
