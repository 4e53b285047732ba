"""The algebra of Kronecker-factored blocks.

A block is `c A (x) G` with row-major vec: `A` over the inputs (bias last), `G` over
the outputs.  A vector is the matrix `V` `[d_A, d_G]` (the leading dimensions of the
weights are rows, the bias is the last row), so that a product is `c A V G`.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kfac.python.ops import utils
from kfac.python.ops.fisher_blocks import damping as damping_lib
from kfac.python.ops.fisher_blocks.base import FisherBlock, Vector, is_sequence


class KroneckerProductFB(FisherBlock):
    """`F ~ c A (x) G`, damped as `c (A + d_A I) (x) (G + d_G I)`.

    Subclasses set `_input_factor` and `_output_factor` and call `_setup_damping` in
    `instantiate_factors`.
    """

    _input_factor: Any = None
    _output_factor: Any = None

    @property
    def input_factor(self) -> Any:
        """The factor of `A`."""
        return self._input_factor

    @property
    def output_factor(self) -> Any:
        """The factor of `G`."""
        return self._output_factor

    @property
    def damping(self) -> Any:
        """Normalised damping as of `instantiate_factors`; for monitoring."""
        return self._damping

    @property
    def _renorm_coeff(self) -> float:
        """The coefficient `c`."""
        return 1.0

    def _setup_damping(self, damping: Any, normalization: int | None = None) -> None:
        """Makes the damping functions `pi sqrt(l)` and `sqrt(l) / pi` of the factors.

        Covariances and settings are read when a function is called.

        Args:
          damping: damping of the block; float, scalar tensor or variable.
          normalization: number of replications that `damping` is normalised by.
        """

        def normalized():
            if normalization is None:
                return damping
            return damping_lib.normalize_damping(damping, normalization)

        def adjusted(side):
            return damping_lib.compute_pi_adjusted_damping(
                self._input_factor.get_cov_as_linear_operator(),
                self._output_factor.get_cov_as_linear_operator(),
                normalized() ** 0.5,
            )[side]

        def func_id(side):
            return (
                "compute_pi_adjusted_damping",
                "cov",
                self._input_factor.name,
                "cov",
                self._output_factor.name,
                *(
                    (damping,)
                    if normalization is None
                    else ("normalize_damping", damping, normalization)
                ),
                "power",
                0.5,
                "ref",
                side,
            )

        self._damping = normalized()
        self._input_damping_func = damping_lib._package_func(
            lambda: adjusted(0), func_id(0)
        )
        self._output_damping_func = damping_lib._package_func(
            lambda: adjusted(1), func_id(1)
        )

    def register_matpower(self, exp: float) -> None:
        self._input_factor.register_matpower(exp, self._input_damping_func)
        self._output_factor.register_matpower(exp, self._output_damping_func)

    def register_cholesky(self) -> None:
        self._input_factor.register_cholesky(self._input_damping_func)
        self._output_factor.register_cholesky(self._output_damping_func)

    def register_cholesky_inverse(self) -> None:
        self._input_factor.register_cholesky_inverse(self._input_damping_func)
        self._output_factor.register_cholesky_inverse(self._output_damping_func)

    def multiply_matpower(self, vector: Vector, exp: float) -> Vector:
        return self._multiply_factored_matrix(
            self._input_factor.get_matpower(exp, self._input_damping_func),
            self._output_factor.get_matpower(exp, self._output_damping_func),
            vector,
            extra_scale=self._renorm_coeff**exp,
        )

    def multiply_cholesky(self, vector: Vector, transpose: bool = False) -> Vector:
        # (K_A (x) K_G) vec(V) = vec(K_A V K_G^T).
        return self._multiply_factored_matrix(
            self._input_factor.get_cholesky(self._input_damping_func),
            self._output_factor.get_cholesky(self._output_damping_func),
            vector,
            extra_scale=self._renorm_coeff**0.5,
            transpose_left=transpose,
            transpose_right=not transpose,
        )

    def multiply_cholesky_inverse(
        self, vector: Vector, transpose: bool = False
    ) -> Vector:
        return self._multiply_factored_matrix(
            self._input_factor.get_cholesky_inverse(self._input_damping_func),
            self._output_factor.get_cholesky_inverse(self._output_damping_func),
            vector,
            extra_scale=self._renorm_coeff**-0.5,
            transpose_left=transpose,
            transpose_right=not transpose,
        )

    def full_fisher_block(self) -> tf.Tensor:
        """The dense, undamped block `c A (x) G`, `[d_A d_G, d_A d_G]`."""
        product = utils.kronecker_product(
            self._left_operator(
                self._input_factor.get_cov_as_linear_operator()
            ).to_dense(),
            self._output_factor.get_cov_as_linear_operator().to_dense(),
        )
        return product if self._renorm_coeff == 1.0 else self._renorm_coeff * product

    def _factors(self) -> tuple[Any, ...]:
        if self._output_factor is None:
            return ()
        return self._input_factor, self._output_factor

    def _left_operator(self, operator: Any) -> Any:
        """An input factor's operator in the order of the parameters' rows."""
        return operator

    def _multiply_factored_matrix(
        self,
        left_factor: Any,
        right_factor: Any,
        vector: Vector,
        extra_scale: float = 1.0,
        transpose_left: bool = False,
        transpose_right: bool = False,
    ) -> Vector:
        """`extra_scale * op(left) V op(right)`, shaped like `vector`.

        Args:
          left_factor: linear operator of side `d_A`.
          right_factor: linear operator of side `d_G`.
          vector: like the parameters, or the `tf.IndexedSlices` of a matrix.
          extra_scale: number.
          transpose_left: whether `op` transposes the left operator.
          transpose_right: whether `op` transposes the right operator.
        """
        matrix = to_matrix(vector, columns=right_factor.domain_dimension)
        product = right_factor.matmul_right(matrix, adjoint=transpose_right)
        product = self._left_operator(left_factor).matmul(
            product, adjoint=transpose_left
        )
        if extra_scale != 1.0:
            product = _scale(product, extra_scale)
        return from_matrix(vector, product)


def to_matrix(vector: Vector, columns: Any = None) -> Any:
    """`[d_A, d_G]`, bias last; sparse slices stay as they are.

    Args:
      vector: like the parameters, or sparse slices.
      columns: `d_G`, where it may be the product of several last axes of the weights
        (attention heads and their features); by default the last axis.
    """
    if is_sequence(vector) and len(vector) == 1:
        vector = vector[0]
    if columns is not None and is_sequence(vector):
        vector = (tf.reshape(vector[0], [-1, columns]), vector[1])
    elif columns is not None and not isinstance(vector, tf.IndexedSlices):
        vector = tf.reshape(vector, [-1, columns])
    return utils.layer_params_to_mat2d(vector)


def _scale(matrix: Any, scale: float) -> Any:
    if isinstance(matrix, tf.IndexedSlices):
        return tf.IndexedSlices(
            matrix.values * scale, matrix.indices, matrix.dense_shape
        )
    return matrix * scale


def from_matrix(template: Vector, matrix: Any) -> Vector:
    """Inverse of `to_matrix`; a list or tuple gives a tuple.

    Args:
      template: has the static shapes of the result.
      matrix: `[d_A, d_G]`, or sparse slices.
    """
    if not is_sequence(template):
        return utils.mat2d_to_layer_params(template, matrix)
    if len(template) == 1:
        return (utils.mat2d_to_layer_params(template[0], matrix),)
    weights, bias = utils.mat2d_to_layer_params(template, matrix)
    return weights, tf.reshape(bias, template[1].shape.as_list())
