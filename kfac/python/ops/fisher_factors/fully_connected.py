"""Factors of fully-connected layers that are used once per case."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import tensorflow as tf

from kfac.python.ops.fisher_factors import base, dense, diagonal, naming, statistics


class FullyConnectedKroneckerFactor(dense.DenseSquareMatrixFactor):
    """Second moment of a layer's inputs or of its output gradients.

    Martens & Grosse 2015 (arXiv 1503.05671), section 3.

    Args:
      tensors: indexed by source, then by tower: `[batch, features]`.
      has_bias: append the constant 1 of a bias.

    Raises:
      ValueError: the data are integer ids (they carry `one_hot_depth`).
    """

    def __init__(self, tensors: Any, has_bias: bool = False):
        if getattr(tensors[0][0], "one_hot_depth", None) is not None:
            raise ValueError(
                f"{type(self).__name__} takes dense data, got one-hot ids. Use a "
                "diagonal Kronecker factor, which is exact for the inputs of an "
                "embedding."
            )
        self._tensors = tensors
        self._has_bias = has_bias
        super().__init__()

    @property
    def _var_scope(self) -> str:
        return "ff_fckron_" + naming.scope_string_from_params(
            [*tf.nest.flatten(self._tensors), self._has_bias]
        )

    @property
    def _identity(self) -> Hashable:
        return naming.fingerprint((self._tensors, self._has_bias))

    @property
    def _vec_shape(self) -> list[int]:
        return [statistics.num_features(self._tensors[0][0]) + int(self._has_bias)]

    @property
    def _cov_shape(self) -> list[int]:
        return self._vec_shape * 2

    @property
    def _num_sources(self) -> int:
        return len(self._tensors)

    @property
    def _num_towers(self) -> int:
        return len(self._tensors[0])

    @property
    def _dtype(self) -> tf.DType:
        return self._tensors[0][0].dtype

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        return statistics.num_rows(self._tensors[source][tower])

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        rows = tf.convert_to_tensor(self._tensors[source][tower])
        return statistics.second_moment(rows, self._has_bias)

    def _get_data_device(self, tower: int) -> str | None:
        return self._tensors[0][tower].device


class FullyConnectedDiagonalFactor(diagonal.DiagonalFactor):
    """Mean over cases of the squared gradient of a layer's weights (and bias).

    The average has shape `[features_in (+ 1), features_out]`: flattened row-major it
    lines up with the weights followed by the bias.

    Args:
      inputs: indexed by tower: `[batch, features_in]`.
      outputs_grads: indexed by source, then by tower: `[batch, features_out]`.
      has_bias: whether the layer has a bias.
    """

    def __init__(self, inputs: Any, outputs_grads: Any, has_bias: bool = False):
        self._inputs = inputs
        self._outputs_grads = outputs_grads
        self._has_bias = has_bias
        self._squared_inputs: list[tf.Tensor] | None = None
        super().__init__()

    @property
    def _var_scope(self) -> str:
        return "ff_diagfc_" + naming.scope_string_from_params(
            [*self._inputs, *tf.nest.flatten(self._outputs_grads)]
        )

    @property
    def _identity(self) -> Hashable:
        return naming.fingerprint((self._inputs, self._outputs_grads, self._has_bias))

    @property
    def _cov_shape(self) -> list[int]:
        features_in = statistics.num_features(self._inputs[0])
        features_out = statistics.num_features(self._outputs_grads[0][0])
        return [features_in + int(self._has_bias), features_out]

    @property
    def _num_sources(self) -> int:
        return len(self._outputs_grads)

    @property
    def _num_towers(self) -> int:
        return len(self._inputs)

    @property
    def _dtype(self) -> tf.DType:
        return self._outputs_grads[0][0].dtype

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        return statistics.num_rows(self._outputs_grads[source][tower])

    def _compute_local_new_cov(self) -> tf.Tensor:
        """See base class; squares the inputs once for all sources."""
        self._squared_inputs = []
        for tower, inputs in enumerate(self._inputs):
            with base.maybe_place_on_device(self._get_data_device(tower)):
                self._squared_inputs.append(tf.square(tf.convert_to_tensor(inputs)))
        return super()._compute_local_new_cov()

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        grads = tf.convert_to_tensor(self._outputs_grads[source][tower])
        squares = tf.matmul(
            self._squared_inputs[tower], tf.square(grads), transpose_a=True
        )
        if self._has_bias:
            squares = statistics.append_bias_row(squares, grads)
        return squares / tf.cast(statistics.num_rows(grads), grads.dtype)

    def _get_data_device(self, tower: int) -> str | None:
        return self._inputs[tower].device
