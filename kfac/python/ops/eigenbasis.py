"""Kronecker eigenbases: coordinates of layers, and operators diagonal in them.

A layer's parameters are a matrix `V` `[d_in, d_out]`, flattened row-major.  Two
orthogonal matrices `U_A` `[d_in, d_in]` and `U_G` `[d_out, d_out]` (eigenvectors as
columns) make the orthogonal matrix `U = U_A (x) U_G` of the layer, which never is
built: the coordinates of `V` are `U_Aᵀ V U_G`.

Where a function takes a basis, None stands for the identity.
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from kfac.python.ops.rules import scalars

Basis = Any  # tf.Tensor, tf.Variable or None.


def to_eigenbasis(
    matrix: tf.Tensor, input_basis: Basis, output_basis: Basis
) -> tf.Tensor:
    """Coordinates `U_Aᵀ V U_G`.

    Args:
      matrix: `[..., d_in, d_out]`.
      input_basis: `[d_in, d_in]`.
      output_basis: `[d_out, d_out]`.
    """
    if input_basis is not None:
        matrix = tf.matmul(input_basis, matrix, transpose_a=True)
    return matrix if output_basis is None else tf.matmul(matrix, output_basis)


def from_eigenbasis(
    coordinates: tf.Tensor, input_basis: Basis, output_basis: Basis
) -> tf.Tensor:
    """The matrix `U_A C U_Gᵀ` of coordinates C; inverse of `to_eigenbasis`."""
    if input_basis is not None:
        coordinates = tf.matmul(input_basis, coordinates)
    if output_basis is None:
        return coordinates
    return tf.matmul(coordinates, output_basis, transpose_b=True)


def diagonal_after_rotation(
    diagonal: tf.Tensor, input_rotation: Basis, output_rotation: Basis
) -> tf.Tensor:
    """Diagonal of `R diag(s) Rᵀ` for `R = R_A (x) R_G`.

    Args:
      diagonal: s, `[d_in, d_out]`.
      input_rotation: R_A, `[n_in, d_in]`.
      output_rotation: R_G, `[n_out, d_out]`.

    Returns:
      `[n_in, n_out]`; not negative if s is not, with the same sum if R is orthogonal.
    """
    return from_eigenbasis(
        diagonal,
        None if input_rotation is None else tf.square(input_rotation),
        None if output_rotation is None else tf.square(output_rotation),
    )


class LinearOperatorEigenbasis(tf.linalg.LinearOperator):
    """`U diag(s) Uᵀ` with `U = U_A (x) U_G` orthogonal.

    Products and solutions cost two rotations; trace and determinant cost nothing.
    """

    def __init__(
        self,
        eigenvalues: Any,
        input_basis: Basis = None,
        output_basis: Basis = None,
        is_positive_definite: bool | None = None,
        name: str = "LinearOperatorEigenbasis",
    ):
        """Makes the operator; no ops except conversions to tensors.

        Args:
          eigenvalues: s, `[d_in, d_out]`, of static shape.
          input_basis: U_A, `[d_in, d_in]`.
          output_basis: U_G, `[d_out, d_out]`.
          is_positive_definite: a promise that all s are positive.
          name: of the operator.

        Raises:
          ValueError: shapes are not static or do not fit.
        """
        parameters = dict(
            eigenvalues=eigenvalues,
            input_basis=input_basis,
            output_basis=output_basis,
            is_positive_definite=is_positive_definite,
            name=name,
        )
        self._eigenvalues = tf.convert_to_tensor(eigenvalues)
        self._input_basis = _to_tensor(input_basis)
        self._output_basis = _to_tensor(output_basis)
        self._check_shapes()
        super().__init__(
            dtype=self._eigenvalues.dtype,
            is_non_singular=True if is_positive_definite else None,
            is_self_adjoint=True,
            is_positive_definite=is_positive_definite,
            is_square=True,
            parameters=parameters,
            name=name,
        )

    def _check_shapes(self) -> None:
        shape = self._eigenvalues.shape
        if shape.rank != 2 or not shape.is_fully_defined():
            raise ValueError(
                f"eigenvalues must have a static shape [d_in, d_out], got {shape}."
            )
        for name, basis, side in (
            ("input_basis", self._input_basis, shape[0]),
            ("output_basis", self._output_basis, shape[1]),
        ):
            if basis is not None and not basis.shape.is_compatible_with([side, side]):
                raise ValueError(
                    f"{name} must be [{side}, {side}] to fit eigenvalues of shape "
                    f"{shape}, got {basis.shape}."
                )

    @property
    def eigenvalues(self) -> tf.Tensor:
        """s, `[d_in, d_out]`."""
        return self._eigenvalues

    @property
    def input_basis(self) -> tf.Tensor | None:
        """U_A, or None for the identity."""
        return self._input_basis

    @property
    def output_basis(self) -> tf.Tensor | None:
        """U_G, or None for the identity."""
        return self._output_basis

    def power(self, exponent: Any) -> LinearOperatorEigenbasis:
        """The operator with eigenvalues `s^exponent`.

        `power(0.5)` is the symmetric square root.
        """
        exponent = scalars.cast(exponent, self.dtype)
        return LinearOperatorEigenbasis(
            tf.pow(self._eigenvalues, exponent),
            self._input_basis,
            self._output_basis,
            is_positive_definite=self.is_positive_definite,
        )

    def _shape(self) -> tf.TensorShape:
        size = math.prod(self._eigenvalues.shape.as_list())
        return tf.TensorShape([size, size])

    def _shape_tensor(self) -> tf.Tensor:
        return tf.constant(self._shape().as_list(), tf.int32)

    def _matmul(
        self, x: tf.Tensor, adjoint: bool = False, adjoint_arg: bool = False
    ) -> tf.Tensor:
        del adjoint  # The operator is its own adjoint.
        return self._scaled_in_basis(x, self._eigenvalues, adjoint_arg)

    def _solve(
        self, rhs: tf.Tensor, adjoint: bool = False, adjoint_arg: bool = False
    ) -> tf.Tensor:
        del adjoint
        return self._scaled_in_basis(rhs, 1 / self._eigenvalues, adjoint_arg)

    def _scaled_in_basis(
        self, x: tf.Tensor, scale: tf.Tensor, adjoint_arg: bool
    ) -> tf.Tensor:
        """`U diag(scale) Uᵀ x` for `x` `[..., n, k]`, or `[..., k, n]` if adjoint."""
        rows = x if adjoint_arg else tf.linalg.matrix_transpose(x)
        leading = tf.shape(rows)[:-1]
        matrices = tf.reshape(rows, tf.concat([leading, tf.shape(scale)], axis=0))
        coordinates = to_eigenbasis(matrices, self._input_basis, self._output_basis)
        matrices = from_eigenbasis(
            scale * coordinates, self._input_basis, self._output_basis
        )
        product = tf.reshape(matrices, tf.concat([leading, [tf.size(scale)]], axis=0))
        product.set_shape(rows.shape)
        return tf.linalg.matrix_transpose(product)

    def _log_abs_determinant(self) -> tf.Tensor:
        return tf.reduce_sum(tf.math.log(tf.abs(self._eigenvalues)))

    def _determinant(self) -> tf.Tensor:
        return tf.reduce_prod(self._eigenvalues)

    def _trace(self) -> tf.Tensor:
        return tf.reduce_sum(self._eigenvalues)

    def _diag_part(self) -> tf.Tensor:
        diagonal = diagonal_after_rotation(
            self._eigenvalues, self._input_basis, self._output_basis
        )
        return tf.reshape(diagonal, [-1])

    def _eigvals(self) -> tf.Tensor:
        return tf.sort(tf.reshape(self._eigenvalues, [-1]))

    def _cond(self) -> tf.Tensor:
        magnitudes = tf.abs(self._eigenvalues)
        return tf.reduce_max(magnitudes) / tf.reduce_min(magnitudes)


def _to_tensor(basis: Basis) -> tf.Tensor | None:
    return None if basis is None else tf.convert_to_tensor(basis)
