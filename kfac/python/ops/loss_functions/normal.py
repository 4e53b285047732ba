"""Normal distributions: squared error, and predicted mean and variance."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops.errors import ArgumentError
from kfac.python.ops.loss_functions import helpers, sampling
from kfac.python.ops.loss_functions.base import (
    DistributionNegativeLogProbLoss,
    NaturalParamsNegativeLogProbLoss,
    import_distributions,
)


class NormalMeanNegativeLogProbLoss(
    DistributionNegativeLogProbLoss, NaturalParamsNegativeLogProbLoss
):
    """Independent normal targets around a predicted mean, with a fixed variance.

    The value is Σ (t - μ)² / (2 var) + ½ log(2π var); with `var=0.5` that is the
    squared error plus ½ log π per element.  F = I / var, B = I / √var.

    Args:
      mean: `[batch, ...]`.
      var: the variance of every element, a positive number.
      targets: shape of `mean`, any numeric dtype; None if only sampled.
      seed: see `NegativeLogProbLoss`.

    Raises:
      ArgumentError: `var` is not a number.
      ValueError: `var` is not positive and finite.
    """

    def __init__(
        self, mean: Any, var: float = 0.5, targets: Any = None, seed: Any = None
    ):
        super().__init__(seed=seed)
        self._mean = mean
        self._var = _positive_number(var)
        self._targets = targets

    @property
    def targets(self) -> Any:
        return self._targets

    @property
    def params(self) -> Any:
        return self._mean

    @property
    def dist(self) -> Any:
        mean = tf.convert_to_tensor(self._mean)
        return import_distributions().Normal(
            loc=mean, scale=tf.constant(math.sqrt(self._var), mean.dtype)
        )

    def sample(self, seed: Any = None) -> tf.Tensor:
        mean = tf.convert_to_tensor(self._mean)
        noise = sampling.normal(tf.shape(mean), mean.dtype, seed)
        return mean + math.sqrt(self._var) * noise

    def _evaluate(self, targets: Any) -> tf.Tensor:
        mean = tf.convert_to_tensor(self._mean)
        targets = helpers.targets_like(targets, mean, self, mean.dtype)
        return tf.reduce_sum(
            0.5 / self._var * tf.square(targets - mean)
            + 0.5 * math.log(2 * math.pi * self._var)
        )

    @helpers.vector_or_vecs
    def multiply_fisher(self, vector: Any) -> tf.Tensor:
        return self._vector(vector) / self._var

    @helpers.vector_or_vecs
    def multiply_fisher_factor(self, vector: Any) -> tf.Tensor:
        return self._vector(vector) / math.sqrt(self._var)

    @helpers.vector_or_vecs
    def multiply_fisher_factor_transpose(self, vector: Any) -> tf.Tensor:
        return self.multiply_fisher_factor(vector)

    def _vector(self, vector: Any) -> tf.Tensor:
        return tf.convert_to_tensor(vector, tf.as_dtype(self.dtype).base_dtype)


class NormalMeanVarianceNegativeLogProbLoss(DistributionNegativeLogProbLoss):
    """Independent normal targets with predicted mean and variance.

    `params` and products' results are pairs (mean part, variance part); inner vectors
    are `[batch, 2 n]`, all mean coordinates first.  Per case F is diag(1/v) on the
    mean and diag(1/(2v²)) on the variance, B its elementwise square root.  There is
    no Gauss-Newton matrix: mean and variance are not natural parameters.

    Args:
      mean: `[batch, n]`.
      variance: `[batch, n]`, positive.
      targets: `[batch, n]`, any numeric dtype; None if only sampled.
      seed: see `NegativeLogProbLoss`.

    Raises:
      ArgumentError: an argument is not a matrix, or the shapes differ.
    """

    def __init__(self, mean: Any, variance: Any, targets: Any = None, seed: Any = None):
        _check_matrix("mean", mean)
        _check_matrix("variance", variance)
        if not tf.TensorShape(mean.shape).is_compatible_with(variance.shape):
            raise ArgumentError(
                f"Mean and variance must have the same shape, got {mean.shape} and "
                f"{variance.shape}."
            )
        super().__init__(seed=seed)
        self._mean = mean
        self._variance = variance
        self._targets = targets

    @property
    def targets(self) -> Any:
        return self._targets

    @property
    def params(self) -> tuple[Any, Any]:
        return self._mean, self._variance

    @property
    def dist(self) -> Any:
        mean, variance = self._tensors()
        return import_distributions().Normal(loc=mean, scale=tf.sqrt(variance))

    def sample(self, seed: Any = None) -> tf.Tensor:
        mean, variance = self._tensors()
        noise = sampling.normal(tf.shape(mean), mean.dtype, seed)
        return mean + tf.sqrt(variance) * noise

    def _evaluate(self, targets: Any) -> tf.Tensor:
        mean, variance = self._tensors()
        targets = helpers.targets_like(targets, mean, self, mean.dtype)
        return tf.reduce_sum(
            0.5 * tf.square(targets - mean) / variance
            + 0.5 * tf.math.log(2 * math.pi * variance)
        )

    @helpers.vector_or_vecs
    def multiply_fisher(self, vecs: Sequence[Any]) -> tuple[tf.Tensor, tf.Tensor]:
        of_mean, of_variance = self._pair(vecs)
        _, variance = self._tensors()
        return of_mean / variance, of_variance / (2 * tf.square(variance))

    @helpers.vector_or_vecs
    def multiply_fisher_factor(self, vecs: Any) -> tuple[tf.Tensor, tf.Tensor]:
        _, variance = self._tensors()
        inner = tf.convert_to_tensor(vecs, variance.dtype)
        of_mean, of_variance = tf.split(inner, 2, axis=-1)
        return (
            of_mean / tf.sqrt(variance),
            of_variance / (math.sqrt(2) * variance),
        )

    @helpers.vector_or_vecs
    def multiply_fisher_factor_transpose(self, vecs: Sequence[Any]) -> tf.Tensor:
        of_mean, of_variance = self._pair(vecs)
        _, variance = self._tensors()
        return tf.concat(
            [of_mean / tf.sqrt(variance), of_variance / (math.sqrt(2) * variance)],
            axis=-1,
        )

    @property
    def fisher_factor_inner_shape(self) -> tf.Tensor:
        return tf.shape(self._mean) * [1, 2]

    @property
    def fisher_factor_inner_static_shape(self) -> tf.TensorShape:
        batch, size = tf.TensorShape(self._mean.shape).as_list()
        return tf.TensorShape([batch, None if size is None else 2 * size])

    def multiply_ggn(self, vector: Any) -> Any:
        raise self._no_ggn()

    def multiply_ggn_factor(self, vector: Any) -> Any:
        raise self._no_ggn()

    def multiply_ggn_factor_transpose(self, vector: Any) -> Any:
        raise self._no_ggn()

    def multiply_ggn_factor_replicated_one_hot(self, index: Sequence[int]) -> Any:
        raise self._no_ggn()

    @property
    def ggn_factor_inner_shape(self) -> tf.Tensor:
        raise self._no_ggn()

    @property
    def ggn_factor_inner_static_shape(self) -> tf.TensorShape:
        raise self._no_ggn()

    def _no_ggn(self) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__} has no Gauss-Newton matrix, since mean and "
            "variance are not natural parameters. Use an estimation mode of the "
            "Fisher matrix: gradients, curvature_prop or exact."
        )

    def _tensors(self) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.convert_to_tensor(self._mean), tf.convert_to_tensor(self._variance)

    def _pair(self, vecs: Sequence[Any]) -> tuple[tf.Tensor, tf.Tensor]:
        dtype = tf.as_dtype(self.dtype).base_dtype
        of_mean, of_variance = vecs
        return (
            tf.convert_to_tensor(of_mean, dtype),
            tf.convert_to_tensor(of_variance, dtype),
        )


def _positive_number(given: Any) -> float:
    var = given
    if isinstance(var, (np.ndarray, tf.Tensor)) and len(var.shape) == 0:
        var = tf.get_static_value(tf.convert_to_tensor(var))
        var = None if var is None else var.item()
    if not isinstance(var, numbers.Real) or isinstance(var, bool):
        raise ArgumentError(
            "`var` must be a number (or a scalar tensor whose value is known while the "
            f"graph is built), got {given!r}. For a variance per element use "
            "NormalMeanVarianceNegativeLogProbLoss."
        )
    var = float(var)
    if not 0.0 < var < math.inf:
        raise ValueError(f"`var` must be positive and finite, got {var}.")
    return var


def _check_matrix(name: str, tensor: Any) -> None:
    shape = tf.TensorShape(tensor.shape)
    if shape.rank != 2:
        raise ArgumentError(f"Expect 2D {name} tensor. Got shape {shape}.")
