"""Linear operators that also multiply from the right, and row-sparse matrices.

A Kronecker-factored block computes `left · V · right` for a matrix `V` that may be
the sparse gradient of an embedding (`tf.IndexedSlices` of rows).  A diagonal operator
times it from the left, or a full matrix from the right, keeps it sparse.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import errors, utils

linalg = tf.linalg


def matmul_right(
    operator: tf.linalg.LinearOperator,
    x: Any,
    adjoint: bool = False,
    adjoint_arg: bool = False,
) -> tf.Tensor:
    """`op(x) · op(A)` for any TensorFlow operator A, by `(Aᴴ xᴴ)ᴴ`.

    (What `inverse()`, `adjoint()` and the like return are plain TensorFlow operators.)

    Args:
      operator: A.
      x: dense `[..., k, m]`.
      adjoint: whether to use the conjugate transpose of A.
      adjoint_arg: whether to use the conjugate transpose of x.
    """
    transposed = operator.matmul(x, adjoint=not adjoint, adjoint_arg=not adjoint_arg)
    return tf.linalg.adjoint(transposed)


class LinearOperatorExtras:
    """Right-multiplication and `tf.IndexedSlices` for TensorFlow operators.

    Below, A is the operator's matrix and op(·) the conjugate transpose where the
    matching flag is set.
    """

    def matmul(
        self,
        x: Any,
        adjoint: bool = False,
        adjoint_arg: bool = False,
        name: str = "matmul",
    ) -> Any:
        """`op(A) · op(x)`.

        Args:
          x: tensor, array, nested list, `tf.IndexedSlices` of rows (diagonal operators
            only) or another operator (which is composed with this one).
          adjoint: whether to use the conjugate transpose of A.
          adjoint_arg: whether to use the conjugate transpose of x.
          name: name of the op.

        Raises:
          ValueError: statically incompatible shapes.
          TypeError: another dtype than the operator's.
          NotImplementedError: the product would not be row-sparse.
        """
        if isinstance(x, tf.IndexedSlices):
            self._check_sparse(x, adjoint_arg)
            with self._scope(name):
                return self._matmul_sparse(x, adjoint)
        if not isinstance(x, tf.linalg.LinearOperator):
            x = self._to_tensor(x)
        return super().matmul(x, adjoint=adjoint, adjoint_arg=adjoint_arg, name=name)

    def matmul_right(
        self,
        x: Any,
        adjoint: bool = False,
        adjoint_arg: bool = False,
        name: str = "matmul",
    ) -> Any:
        """`op(x) · op(A)`; arguments and errors like `matmul`.

        A `tf.IndexedSlices` is accepted by full matrices only.
        """
        if isinstance(x, tf.IndexedSlices):
            self._check_sparse(x, adjoint_arg)
            with self._scope(name):
                return self._matmul_right_sparse(x, adjoint)
        if isinstance(x, tf.linalg.LinearOperator):
            return x.matmul(self, adjoint=adjoint_arg, adjoint_arg=adjoint)
        with self._scope(name):
            x = self._to_tensor(x)
            contracted = x.shape[-2 if adjoint_arg else -1]
            rows = self.shape[-1 if adjoint else -2]
            if not tf.TensorShape([rows]).is_compatible_with([contracted]):
                raise ValueError(
                    f"x of shape {x.shape} (adjoint_arg={adjoint_arg}) cannot be "
                    f"multiplied by {self.name} of shape {self.shape} "
                    f"(adjoint={adjoint}) from the right."
                )
            return self._matmul_right(x, adjoint, adjoint_arg)

    def _scope(self, name: str) -> Any:
        return tf.name_scope(f"{self.name}/{name}")

    def _to_tensor(self, x: Any) -> tf.Tensor:
        # Only untyped values take the operator's dtype; typed ones must have it.
        typed = isinstance(x, np.generic) or hasattr(x, "dtype")
        x = tf.convert_to_tensor(x, dtype_hint=None if typed else self.dtype)
        self._check_dtype(x.dtype)
        return x

    def _check_dtype(self, dtype: tf.DType) -> None:
        if dtype != self.dtype:
            raise TypeError(
                f"x must have the operator's dtype {self.dtype.name}, got {dtype.name}."
            )

    def _check_sparse(self, x: tf.IndexedSlices, adjoint_arg: bool) -> None:
        if adjoint_arg:
            raise errors.ArgumentError(
                "adjoint_arg is not available for a tf.IndexedSlices, whose transpose "
                "has few non-zero columns instead of rows."
            )
        self._check_dtype(x.dtype)

    def _matmul_right(self, x: tf.Tensor, adjoint: bool, adjoint_arg: bool) -> Any:
        return matmul_right(self, x, adjoint, adjoint_arg)

    def _matmul_sparse(self, x: tf.IndexedSlices, adjoint: bool) -> Any:
        raise NotImplementedError(
            f"{self.name} times a tf.IndexedSlices is not available: the product is "
            "dense. Use tf.convert_to_tensor(x), or a LinearOperatorDiag."
        )

    def _matmul_right_sparse(self, x: tf.IndexedSlices, adjoint: bool) -> Any:
        raise NotImplementedError(
            f"A tf.IndexedSlices times {self.name} is not available. "
            "Use tf.convert_to_tensor(x), or a LinearOperatorFullMatrix."
        )


class LinearOperatorFullMatrix(
    LinearOperatorExtras, tf.linalg.LinearOperatorFullMatrix
):
    """A matrix, possibly rectangular, batched, or held in a variable."""

    def _matmul_right(
        self, x: tf.Tensor, adjoint: bool, adjoint_arg: bool
    ) -> tf.Tensor:
        return tf.matmul(x, self.to_dense(), adjoint_a=adjoint_arg, adjoint_b=adjoint)

    def _matmul_right_sparse(
        self, x: tf.IndexedSlices, adjoint: bool
    ) -> tf.IndexedSlices:
        matrix = tf.convert_to_tensor(self.to_dense())
        if adjoint:
            matrix = tf.linalg.adjoint(matrix)
        return utils.matmul_sparse_dense(x, matrix)


class LinearOperatorDiag(LinearOperatorExtras, tf.linalg.LinearOperatorDiag):
    """A diagonal matrix, possibly batched."""

    def _matmul_right(
        self, x: tf.Tensor, adjoint: bool, adjoint_arg: bool
    ) -> tf.Tensor:
        x = tf.linalg.adjoint(x) if adjoint_arg else x
        return x * self._diagonal(adjoint)[..., None, :]

    def _matmul_sparse(self, x: tf.IndexedSlices, adjoint: bool) -> tf.IndexedSlices:
        return utils.matmul_diag_sparse(self._diagonal(adjoint), x)

    def _diagonal(self, adjoint: bool) -> tf.Tensor:
        diagonal = tf.convert_to_tensor(self.diag)
        return tf.math.conj(diagonal) if adjoint else diagonal
