"""Factors of parameter gradients themselves, for parameters of unknown layers.

The gradient is that of the loss summed over the mini-batch, so these are "squares of
the sum": right in expectation for sampled targets, but of high variance.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import tensorflow as tf

from kfac.python.ops import errors, utils
from kfac.python.ops.fisher_factors import dense, diagonal, naming


class _NaiveFactor:
    """What both naive factors share: one batch size, no towers, no devices."""

    _params_grads: tuple[Any, ...]
    _batch_size: Any

    @property
    def _identity(self) -> Hashable:
        return naming.fingerprint((self._params_grads, self._batch_size))

    @property
    def _num_sources(self) -> int:
        return len(self._params_grads)

    @property
    def _num_towers(self) -> int:
        return 1

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        if source != 0 or tower != 0:
            raise errors.ArgumentError(
                f"{type(self).__name__} has one batch size, for source 0 and tower 0; "
                f"got source {source} and tower {tower}."
            )
        return self._batch_size

    def _shards(self) -> Iterable[tuple[int, int]]:
        return [(0, 0)]

    def _get_data_device(self, tower: int) -> None:
        return None


class NaiveFullFactor(_NaiveFactor, dense.DenseSquareMatrixFactor):
    """Outer product of the whole gradient of a group of parameters.

    Args:
      params_grads: one item per source: a tensor, or a sequence of tensors.
      batch_size: int or scalar tensor; number of cases the gradients are sums over.
    """

    def __init__(self, params_grads: Any, batch_size: Any):
        self._params_grads = tuple(
            utils.ensure_sequence(grads) for grads in params_grads
        )
        self._batch_size = batch_size
        super().__init__()

    @property
    def _var_scope(self) -> str:
        return "ff_naivefull_" + naming.scope_string_from_params(
            [self._params_grads, self._batch_size]
        )

    @property
    def _cov_shape(self) -> list[int]:
        size = sum(grad.shape.num_elements() for grad in self._params_grads[0])
        return [size, size]

    @property
    def _dtype(self) -> tf.DType:
        return self._params_grads[0][0].dtype

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        grads = [tf.convert_to_tensor(grad) for grad in self._params_grads[source]]
        column = utils.tensors_to_column(grads)
        batch_size = tf.cast(self._batch_size, column.dtype)
        return tf.matmul(column, column, transpose_b=True) / batch_size


class NaiveDiagonalFactor(_NaiveFactor, diagonal.DiagonalFactor):
    """Square of the gradient of one parameter.

    Args:
      params_grads: one tensor per source.
      batch_size: int or scalar tensor; number of cases the gradients are sums over.

    Raises:
      AttributeError: an item is a sequence of tensors.
    """

    def __init__(self, params_grads: Any, batch_size: Any):
        for grad in params_grads:
            if isinstance(grad, (tuple, list)):
                raise AttributeError(
                    "NaiveDiagonalFactor takes one tensor per source, got the sequence "
                    f"{grad}. Use one factor per parameter, or NaiveFullFactor."
                )
        self._params_grads = tuple(params_grads)
        self._batch_size = batch_size
        super().__init__()

    @property
    def _var_scope(self) -> str:
        return "ff_naivediag_" + naming.scope_string_from_params(
            [self._params_grads, self._batch_size]
        )

    @property
    def _cov_shape(self) -> list[int]:
        return self._params_grads[0].shape.as_list()

    @property
    def _dtype(self) -> tf.DType:
        return self._params_grads[0].dtype

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        grad = tf.convert_to_tensor(self._params_grads[source])
        return tf.square(grad) / tf.cast(self._batch_size, grad.dtype)
