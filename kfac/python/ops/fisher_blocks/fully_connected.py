"""Blocks of dense and embedding layers whose weights a case uses once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import fisher_factors
from kfac.python.ops.fisher_blocks import layer_gradients
from kfac.python.ops.fisher_blocks.full_and_diagonal import DiagonalFB
from kfac.python.ops.fisher_blocks.kronecker import KroneckerProductFB
from kfac.python.ops.fisher_blocks.towers import InputOutputMultiTower


def diagonal_suffix(diagonal_input: bool, diagonal_output: bool) -> str:
    """Ending of an approximation's name that tells which factors are diagonal."""
    if diagonal_input and diagonal_output:
        return "_both_diag"
    if diagonal_input:
        return "_in_diag"
    return "_out_diag" if diagonal_output else ""


def id_dtype_args(inputs: Any, grads: Any) -> tuple[tf.DType, ...]:
    """Extra argument of a diagonal factor whose data are ids: the gradients' dtype.

    Ids carry no floating-point type.  Nothing is passed where the factor's default
    is right, because arguments of another length would not share a factor.
    """
    dtype = grads[0][0].dtype
    is_ids = layer_gradients.one_hot_depth(inputs[0]) is not None
    return (dtype,) if is_ids and dtype != tf.float32 else ()


class DenseGradients:
    """Gradient rebuild of dense and embedding layers."""

    def rebuild_gradient(self, source_grads: Any) -> Any:
        """Sum over towers, uses and cases of input times output gradient."""
        return self._shaped_like_params(
            layer_gradients.sum_over_towers(
                [
                    layer_gradients.dense_layer(inputs, grads, self._has_bias)
                    for inputs, grads in self._inputs_and_grads(source_grads)
                ]
            )
        )


class FullyConnectedDiagonalFB(DenseGradients, InputOutputMultiTower, DiagonalFB):
    """Diagonal of a dense layer: mean over cases of `a^2 (g^2)^T`.

    Towers: `inputs [batch, d_in]`, `outputs [batch, d_out]`.
    """

    def __init__(self, layer_collection: Any, has_bias: bool = False):
        super().__init__(layer_collection)
        self._has_bias = has_bias

    def instantiate_factors(self, grads_list: Sequence[Any], damping: Any) -> None:
        inputs, grads = self._process_data(grads_list)
        self._factor = self._make_or_get_factor(
            "diagonal",
            fisher_factors.FullyConnectedDiagonalFactor,
            (inputs, grads, self._has_bias),
        )
        self._set_damping(damping)

    def configuration(self) -> dict[str, Any]:
        return {"has_bias": self._has_bias}

    def _uses_per_case(self) -> int:
        return 1


class FullyConnectedKFACBasicFB(
    DenseGradients, InputOutputMultiTower, KroneckerProductFB
):
    """Kronecker factors of a dense layer (Martens & Grosse 2015, section 3).

    Towers: `inputs [batch, d_in]`, or integer ids `[batch]` with an attribute
    `one_hot_depth`, for which the diagonal input factor is required and exact;
    `outputs [batch, d_out]`.
    """

    def __init__(
        self,
        layer_collection: Any,
        has_bias: bool = False,
        diagonal_approx_for_input: bool = False,
        diagonal_approx_for_output: bool = False,
    ):
        super().__init__(layer_collection)
        self._has_bias = has_bias
        self._diagonal_approx_for_input = diagonal_approx_for_input
        self._diagonal_approx_for_output = diagonal_approx_for_output

    @property
    def approximation(self) -> str:
        """Name of the approximation in registrations."""
        return "kron" + diagonal_suffix(
            self._diagonal_approx_for_input, self._diagonal_approx_for_output
        )

    def instantiate_factors(self, grads_list: Sequence[Any], damping: Any) -> None:
        inputs, grads = self._process_data(grads_list)
        if self._diagonal_approx_for_input:
            self._input_factor = self._make_or_get_factor(
                "input",
                fisher_factors.DiagonalKroneckerFactor,
                ((inputs,), self._has_bias, *id_dtype_args(inputs, grads)),
            )
        else:
            self._input_factor = self._make_or_get_factor(
                "input",
                fisher_factors.FullyConnectedKroneckerFactor,
                ((inputs,), self._has_bias),
            )
        self._output_factor = self._make_or_get_factor(
            "output",
            fisher_factors.DiagonalKroneckerFactor
            if self._diagonal_approx_for_output
            else fisher_factors.FullyConnectedKroneckerFactor,
            (grads,),
        )
        self._setup_damping(damping)

    def configuration(self) -> dict[str, Any]:
        return {
            "has_bias": self._has_bias,
            "diagonal_approx_for_input": self._diagonal_approx_for_input,
            "diagonal_approx_for_output": self._diagonal_approx_for_output,
        }

    def _uses_per_case(self) -> int:
        return 1
