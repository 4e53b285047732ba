"""Blocks of recurrent weights that model the correlation between time steps.

The steps of inputs and of output gradients are taken as linear-Gaussian chains
(Martens, Ba & Johnson 2018, "Kronecker-factored curvature approximations for
recurrent neural networks", section 3.5).  Only products with the inverse exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import fisher_factors
from kfac.python.ops.fisher_blocks.base import Vector
from kfac.python.ops.fisher_blocks.fully_connected import DenseGradients
from kfac.python.ops.fisher_blocks.kronecker import (
    KroneckerProductFB,
    from_matrix,
    to_matrix,
)
from kfac.python.ops.fisher_blocks.towers import InputOutputMultiTowerMultiUse


class SeriesFBApproximation:
    """Options of `FullyConnectedSeriesFB`.

    Attributes:
      option1: cross-covariances of neighbouring steps are symmetric.
      option2: sequences are infinitely long.
    """

    option1 = 1
    option2 = 2


class NoMatrixError(NotImplementedError, AssertionError):
    """The block has no explicit matrix."""


class FullyConnectedSeriesFB(
    DenseGradients, InputOutputMultiTowerMultiUse, KroneckerProductFB
):
    """Dense layer used at `T` steps of sequences of equal length, without padding.

    Towers: see `InputOutputMultiTowerMultiUse`, uses in temporal order.
    """

    def __init__(
        self,
        layer_collection: Any,
        has_bias: bool = False,
        num_uses: int | None = None,
        option: int = SeriesFBApproximation.option2,
    ):
        super().__init__(num_uses=num_uses, layer_collection=layer_collection)
        self._has_bias = has_bias
        self._option = option

    @property
    def approximation(self) -> str:
        """Name of the approximation in registrations."""
        return f"kron_series_{self._option}"

    @property
    def _num_timesteps(self) -> int | None:
        return self._num_uses

    def instantiate_factors(self, grads_list: Sequence[Any], damping: Any) -> None:
        inputs, grads = self._process_data(grads_list)
        self._input_factor = self._make_or_get_factor(
            "input",
            fisher_factors.FullyConnectedMultiKF,
            ((inputs,), self._num_uses, self._has_bias),
        )
        self._output_factor = self._make_or_get_factor(
            "output", fisher_factors.FullyConnectedMultiKF, (grads, self._num_uses)
        )
        self._input_factor.register_cov_dt1()
        self._output_factor.register_cov_dt1()
        self._setup_damping(damping, normalization=self._num_uses)

    def configuration(self) -> dict[str, Any]:
        return {
            "has_bias": self._has_bias,
            "num_uses": self._uses_per_case(),
            "option": self._option,
        }

    def register_matpower(self, exp: float) -> None:
        """Asks for what products with the inverse need.

        Raises:
          NotImplementedError: `exp` is not -1.
          ValueError: the option is unknown.
        """
        self._check_exponent(exp)
        for factor, damping_func in (
            (self._input_factor, self._input_damping_func),
            (self._output_factor, self._output_damping_func),
        ):
            if self._option == SeriesFBApproximation.option1:
                factor.register_option1quants(damping_func, signed=True)
            elif self._option == SeriesFBApproximation.option2:
                factor.register_option2quants(damping_func)
            else:
                raise self._unknown_option()

    def multiply_matpower(self, vector: Vector, exp: float) -> Vector:
        """Product of the inverse with `vector`.

        Raises:
          NotImplementedError: `exp` is not -1.
          ValueError: the option is unknown.
        """
        self._check_exponent(exp)
        if self._option == SeriesFBApproximation.option1:
            multiply = self._multiply_inverse_option1
        elif self._option == SeriesFBApproximation.option2:
            multiply = self._multiply_inverse_option2
        else:
            raise self._unknown_option()
        # The formulas are for weights that map columns, as in the paper.
        columns = self._output_factor._cov_shape[0]
        product = multiply(tf.transpose(to_matrix(vector, columns)))
        return from_matrix(vector, tf.transpose(product))

    def multiply_cholesky(self, vector: Vector, transpose: bool = False) -> Vector:
        """Not available."""
        raise self._inverse_only("Cholesky factor")

    def multiply_cholesky_inverse(
        self, vector: Vector, transpose: bool = False
    ) -> Vector:
        """Not available."""
        raise self._inverse_only("Cholesky factor")

    def register_cholesky(self) -> None:
        """Not available."""
        raise self._inverse_only("Cholesky factor")

    def register_cholesky_inverse(self) -> None:
        """Not available."""
        raise self._inverse_only("Cholesky factor")

    def full_fisher_block(self) -> tf.Tensor:
        """Not available.

        Raises:
          NoMatrixError: always.
        """
        raise NoMatrixError("The series approximations have no explicit matrix.")

    @property
    def _renorm_coeff(self) -> float:
        raise NoMatrixError("The series approximations are not a Kronecker product.")

    def _multiply_inverse_option1(self, z: tf.Tensor) -> tf.Tensor:
        left, left_psi = self._output_factor.get_option1quants(
            self._output_damping_func
        )
        right, right_psi = self._input_factor.get_option1quants(
            self._input_damping_func
        )
        scale = 1 / total_correlation(
            tf.tensordot(left_psi, right_psi, axes=0), self._num_uses
        )
        z = tf.matmul(left, tf.matmul(z, right), transpose_a=True)
        return tf.matmul(left, tf.matmul(z * scale, right, transpose_b=True))

    def _multiply_inverse_option2(self, z: tf.Tensor) -> tf.Tensor:
        left_p, left_k, left_mu = self._output_factor.get_option2quants(
            self._output_damping_func
        )
        right_p, right_k, right_mu = self._input_factor.get_option2quants(
            self._input_damping_func
        )
        z -= tf.matmul(left_p, tf.matmul(z, right_p, transpose_b=True))
        z = tf.matmul(left_k, tf.matmul(z, right_k), transpose_a=True)
        decay = 1 - tf.tensordot(left_mu, right_mu, axes=0)
        z /= tf.where(tf.equal(decay, 0), tf.ones_like(decay), decay)
        z = tf.matmul(left_k, tf.matmul(z, right_k, transpose_b=True))
        z -= tf.matmul(left_p, tf.matmul(z, right_p), transpose_a=True)
        return z / self._num_uses

    def _check_exponent(self, exp: float) -> None:
        if exp != -1:
            raise self._inverse_only(f"matrix power {exp}")

    def _inverse_only(self, what: str) -> NotImplementedError:
        return NotImplementedError(
            f"The series approximations serve the inverse only, no {what}. Use "
            "'kron_indep' for this layer."
        )

    def _unknown_option(self) -> ValueError:
        return ValueError(
            f"Unknown option {self._option!r} of {type(self).__name__}; use "
            "SeriesFBApproximation.option1 or option2."
        )


def total_correlation(step: tf.Tensor, length: int) -> tf.Tensor:
    """`sum_(s, t) x^|s - t|` over `length` steps, for every entry `x` of `step`.

    It equals `(T (1 - x^2) - 2 x (1 - x^T)) / (1 - x)^2`, the reciprocal of the
    paper's gamma, but is `T^2` at 1 instead of 0 / 0.  Computed by doubling the
    sequence, in a number of operations logarithmic in the length:
    with `S_n = sum_(i < n) x^i`, joining n and m steps gives
    `f_(n + m) = f_n + f_m + 2 x S_n S_m`.

    Args:
      step: correlations of neighbouring steps; clipped to [-0.99, 1], because steps
        of correlation -1 cancel and the total must stay positive.
      length: number of steps T.

    Returns:
      Positive tensor shaped like `step`.
    """
    x = tf.clip_by_value(step, -0.99, 1.0)
    total = powers = tf.ones_like(x)  # f_n and S_n for n = 1.
    last = x  # x^n.
    for bit in bin(length)[3:]:
        total = 2 * total + 2 * x * powers**2
        powers *= 1 + last
        last = last**2
        if bit == "1":
            total += 1 + 2 * x * powers
            powers = 1 + x * powers
            last *= x
    return total
