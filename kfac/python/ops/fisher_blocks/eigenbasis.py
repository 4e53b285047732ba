"""EKFAC: Kronecker-factored blocks whose eigenvalues are measured (arXiv 1806.03884).

A block is `U diag(S) Uᵀ`, `U = U_A (x) U_G` the eigenvectors of K-FAC's factors, S the
second moments of the gradients of single examples in that basis; see
`fisher_factors.eigenbasis`.  It is damped exactly, `U diag(S + damping) Uᵀ`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import fisher_factors
from kfac.python.ops.errors import ArgumentError
from kfac.python.ops.fisher_blocks.base import Vector
from kfac.python.ops.fisher_blocks.convolution import ConvKFCBasicFB
from kfac.python.ops.fisher_blocks.damping import _package_func, normalize_damping
from kfac.python.ops.fisher_blocks.fully_connected import FullyConnectedKFACBasicFB
from kfac.python.ops.fisher_blocks.kronecker import (
    KroneckerProductFB,
    from_matrix,
    to_matrix,
)
from kfac.python.ops.fisher_blocks.multi_use import (
    ConvKFCBasicMultiIndepFB,
    FullyConnectedMultiIndepFB,
)
from kfac.python.ops.fisher_factors import example_gradients

_FACTORS = {
    "examples": fisher_factors.ExampleEigenbasisFactor,
    "product": fisher_factors.ProductEigenbasisFactor,
}
_APPROXIMATIONS = {"examples": "ekfac", "product": "ekfac_product"}


class EigenbasisProductFB(KroneckerProductFB):
    """The algebra of EKFAC blocks; listed before the K-FAC block of the layer.

    Every matrix function exists, of any exponent, without being registered, at the
    current moments and damping; only the basis is as old as the last inverse update.

    The "Cholesky factor" is not triangular but `K = U diag(√(S + damping))`: it has
    the property that one is used for, `K Kᵀ` is the damped block.  It maps coordinates
    in the eigenbasis to parameters.
    """

    _eigenbasis_factor: Any = None
    _scaling = "examples"

    def _set_scaling(self, scaling: str) -> None:
        """Sets where the eigenvalues come from.

        Args:
          scaling: "examples" for second moments of the gradients of single examples,
            "product" for the products of K-FAC.

        Raises:
          ArgumentError: another value.
        """
        if scaling not in _FACTORS:
            raise ArgumentError(
                f"scaling={scaling!r}; expected one of {sorted(_FACTORS)}."
            )
        self._scaling = scaling

    @property
    def approximation(self) -> str:
        """Name of the approximation in registrations."""
        return _APPROXIMATIONS[self._scaling]

    @property
    def eigenbasis_factor(self) -> Any:
        """The factor of the bases and the moments in them."""
        return self._eigenbasis_factor

    @abc.abstractmethod
    def _examples(self, inputs: tuple, grads: tuple) -> Any:
        """The layer's data, example by example.

        Args:
          inputs: as from `_process_data`, like `grads`.
          grads: as said.
        """

    def instantiate_factors(self, grads_list: Sequence[Any], damping: Any) -> None:
        super().instantiate_factors(grads_list, damping)
        self._eigenbasis_factor = self._make_or_get_factor(
            "eigenbasis",
            _FACTORS[self._scaling],
            (
                self._examples(*self._process_data(grads_list)),
                self._input_factor,
                self._output_factor,
            ),
        )
        # As K-FAC's factors have it: the block as a whole gets `damping`, unless the
        # normalisation of dampings is switched off.
        replications = self._renorm_coeff
        self._damping_func = _package_func(
            lambda: replications * normalize_damping(damping, replications),
            (replications, "mult", "normalize_damping", damping, replications),
        )

    def configuration(self) -> dict[str, Any]:
        return super().configuration() | {"scaling": self._scaling}

    def register_matpower(self, exp: float) -> None:
        """Nothing to maintain."""

    def register_cholesky(self) -> None:
        """Nothing to maintain."""

    def register_cholesky_inverse(self) -> None:
        """Nothing to maintain."""

    def multiply_matpower(self, vector: Vector, exp: float) -> Vector:
        factor = self._eigenbasis_factor
        vector, matrix = self._dense(vector)
        scale = factor.damped_power(exp, self._damping_func)
        coordinates = scale * factor.to_eigenbasis(matrix)
        return from_matrix(vector, factor.from_eigenbasis(coordinates))

    def multiply_cholesky(self, vector: Vector, transpose: bool = False) -> Vector:
        return self._multiply_root(vector, 0.5, into_basis=transpose)

    def multiply_cholesky_inverse(
        self, vector: Vector, transpose: bool = False
    ) -> Vector:
        return self._multiply_root(vector, -0.5, into_basis=not transpose)

    def _multiply_root(self, vector: Vector, exp: float, into_basis: bool) -> Vector:
        """`diag(s) Uᵀ vector` or `U diag(s) vector`, `s = (S + damping)^exp`."""
        factor = self._eigenbasis_factor
        vector, matrix = self._dense(vector)
        scale = factor.damped_power(exp, self._damping_func)
        if into_basis:
            return from_matrix(vector, scale * factor.to_eigenbasis(matrix))
        return from_matrix(vector, factor.from_eigenbasis(scale * matrix))

    def full_fisher_block(self) -> tf.Tensor:
        """The dense, undamped block `U diag(S) Uᵀ`, `[d_in d_out, d_in d_out]`."""
        return self.linear_operator(damped=False).to_dense()

    def linear_operator(self, damped: bool = True) -> tf.linalg.LinearOperator:
        """The block over the flattened parameters."""
        if damped:
            return self._eigenbasis_factor.get_matpower(1, self._damping_func)
        return self._eigenbasis_factor.get_cov_as_linear_operator()

    def _factors(self) -> tuple[Any, ...]:
        if self._eigenbasis_factor is None:
            return ()
        return *super()._factors(), self._eigenbasis_factor

    def _dense(self, vector: Vector) -> tuple[Vector, tf.Tensor]:
        """The vector, and as a matrix `[d_in, d_out]`; both dense."""
        d_in, d_out = self._eigenbasis_factor.sides
        if isinstance(vector, tf.IndexedSlices):
            # The number of rows of a sparse gradient is often dynamic.
            vector = tf.reshape(tf.convert_to_tensor(vector), [d_in, d_out])
        return vector, to_matrix(vector, columns=d_out)


class FullyConnectedEKFACFB(EigenbasisProductFB, FullyConnectedKFACBasicFB):
    """EKFAC of a dense layer; towers as in `FullyConnectedKFACBasicFB`, but no ids."""

    def __init__(
        self, layer_collection: Any, has_bias: bool = False, scaling: str = "examples"
    ):
        super().__init__(layer_collection, has_bias)
        self._set_scaling(scaling)

    def _examples(self, inputs: tuple, grads: tuple) -> example_gradients.Examples:
        return example_gradients.Examples(inputs, grads, self._has_bias)


class FullyConnectedMultiEKFACFB(EigenbasisProductFB, FullyConnectedMultiIndepFB):
    """EKFAC of a dense layer that a case uses several times; no ids.

    Towers: see `InputOutputMultiTowerMultiUse`.  Uses are taken as independent for the
    basis alone: the moments are those of the whole gradient of each case.
    """

    _needs_order_of_uses = True

    def __init__(
        self,
        layer_collection: Any,
        has_bias: bool = False,
        num_uses: int | None = None,
        scaling: str = "examples",
    ):
        super().__init__(layer_collection, has_bias, num_uses)
        self._set_scaling(scaling)

    def _examples(self, inputs: tuple, grads: tuple) -> example_gradients.Examples:
        return example_gradients.Examples(inputs, grads, self._has_bias, self._num_uses)


class _ConvolutionEKFACFB(EigenbasisProductFB):
    """What both convolution blocks share."""

    def __init__(
        self,
        layer_collection: Any,
        params: Any,
        padding: str,
        scaling: str = "examples",
        **options: Any,
    ):
        """Makes the block.

        Args:
          layer_collection: the `LayerCollection`.
          params: filter, or `(filter, bias)`.
          padding: "SAME" or "VALID".
          scaling: see `EigenbasisProductFB`.
          **options: of the K-FAC block. Sub-sampling concerns the basis only; the
            moments are taken from all cases and patches.

        Raises:
          ArgumentError: the SUA approximation is asked for.
        """
        if options.get("use_sua_approx_for_input_factor"):
            raise ArgumentError(
                "EKFAC needs the eigenvectors of the whole input factor; it cannot be "
                "combined with the SUA approximation."
            )
        super().__init__(layer_collection, params, padding, **options)
        self._set_scaling(scaling)

    def _examples(self, inputs: tuple, grads: tuple) -> example_gradients.Examples:
        return example_gradients.ConvolutionExamples(
            inputs,
            grads,
            self._filter_shape,
            self._padding,
            self._num_locations,
            self._strides,
            self._dilation_rate,
            self._data_format,
            self._extract_patches_fn,
            self._has_bias,
            self._patch_mask,
            self._num_filter_uses,
        )

    @property
    def _num_filter_uses(self) -> int:
        """How often a case uses the whole filter."""
        return 1


class ConvEKFACFB(_ConvolutionEKFACFB, ConvKFCBasicFB):
    """EKFAC of a convolution of any rank; towers as in `ConvKFCBasicFB`.

    Locations are taken as independent for the basis alone: the moments are those of
    the whole gradient of each case.
    """


class ConvMultiEKFACFB(_ConvolutionEKFACFB, ConvKFCBasicMultiIndepFB):
    """EKFAC of a convolution that a case uses several times.

    Towers: see `ConvKFCBasicMultiIndepFB`.
    """

    @property
    def _num_filter_uses(self) -> int:
        return self._num_uses
