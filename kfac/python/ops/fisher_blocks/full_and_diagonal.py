"""Blocks of one factor: a dense matrix or a diagonal over the flattened parameters.

A vector is the column of its row-major flattened components; a flat tensor of the
right size will do even where the parameters are a tuple.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kfac.python.ops import utils
from kfac.python.ops.fisher_blocks.base import FisherBlock, Vector, is_sequence
from kfac.python.ops.fisher_blocks.damping import _package_func


class _SingleFactorFB(FisherBlock):
    """What the dense and the diagonal algebra share.

    Subclasses set `_factor` and `_damping_func` in `instantiate_factors`.
    """

    _factor: Any = None

    def full_fisher_block(self) -> tf.Tensor:
        """The dense, undamped block `[P, P]`."""
        return self._factor.get_cov_as_linear_operator().to_dense()

    def _factors(self) -> tuple[Any, ...]:
        return () if self._factor is None else (self._factor,)

    def _set_damping(self, damping: Any) -> None:
        self._damping_func = _package_func(lambda: damping, (damping,))

    def _dense(self, vector: Vector) -> Vector:
        """Sparse gradients as tensors of a static shape."""
        if is_sequence(vector):
            return tuple(self._dense(part) for part in vector)
        if not isinstance(vector, tf.IndexedSlices):
            return vector
        dense = tf.convert_to_tensor(vector)
        params = getattr(self, "_params", self.registered_params)
        if not is_sequence(params) and params is not None:
            # The number of rows of a sparse gradient is often dynamic.
            dense = tf.reshape(dense, params.shape.as_list())
        return dense


class FullFB(_SingleFactorFB):
    """A dense block `F`; products with `F + damping I` and functions of it."""

    approximation = "full"

    def register_matpower(self, exp: float) -> None:
        self._factor.register_matpower(exp, self._damping_func)

    def register_cholesky(self) -> None:
        self._factor.register_cholesky(self._damping_func)

    def register_cholesky_inverse(self) -> None:
        self._factor.register_cholesky_inverse(self._damping_func)

    def multiply_matpower(self, vector: Vector, exp: float) -> Vector:
        return self._multiply_matrix(
            self._factor.get_matpower(exp, self._damping_func), vector
        )

    def multiply_cholesky(self, vector: Vector, transpose: bool = False) -> Vector:
        return self._multiply_matrix(
            self._factor.get_cholesky(self._damping_func), vector, transpose=transpose
        )

    def multiply_cholesky_inverse(
        self, vector: Vector, transpose: bool = False
    ) -> Vector:
        return self._multiply_matrix(
            self._factor.get_cholesky_inverse(self._damping_func),
            vector,
            transpose=transpose,
        )

    def _multiply_matrix(
        self, matrix: Any, vector: Vector, transpose: bool = False
    ) -> Vector:
        vector = self._dense(vector)
        column = utils.tensors_to_column(vector)
        return utils.column_to_tensors(vector, matrix.matmul(column, adjoint=transpose))


class DiagonalFB(_SingleFactorFB):
    """A diagonal block; everything is computed on demand from current statistics."""

    approximation = "diagonal"

    def register_matpower(self, exp: float) -> None:
        """Nothing to maintain."""

    def register_cholesky(self) -> None:
        """Nothing to maintain."""

    def register_cholesky_inverse(self) -> None:
        """Nothing to maintain."""

    def multiply_matpower(self, vector: Vector, exp: float) -> Vector:
        return self._multiply_matrix(
            self._factor.get_matpower(exp, self._damping_func), vector
        )

    def multiply_cholesky(self, vector: Vector, transpose: bool = False) -> Vector:
        del transpose  # A diagonal matrix is its own transpose.
        return self._multiply_matrix(
            self._factor.get_cholesky(self._damping_func), vector
        )

    def multiply_cholesky_inverse(
        self, vector: Vector, transpose: bool = False
    ) -> Vector:
        del transpose  # A diagonal matrix is its own transpose.
        return self._multiply_matrix(
            self._factor.get_cholesky_inverse(self._damping_func), vector
        )

    def _multiply_matrix(self, matrix: Any, vector: Vector) -> Vector:
        vector = self._dense(vector)
        column = utils.tensors_to_column(vector)
        return utils.column_to_tensors(vector, matrix.matmul(column))
