"""Factors of layers `out = scale * in + shift` with broadcast parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import errors
from kfac.python.ops.fisher_factors import (
    base,
    dense,
    diagonal,
    naming,
    statistics,
)


class ScaleAndShiftFactor(base.FisherFactor):
    """Second moment of the gradient of a scale and, optionally, a shift.

    A case's gradient is `Σ in * grad` over the axes along which the scale is
    broadcast, followed by `Σ grad` over those of the shift, both flattened.

    Args:
      inputs: indexed by tower: `[batch, ...]`.
      outputs_grads: indexed by source, then by tower: `[batch, ...]`, of the rank of
        the inputs.
      broadcast_dims_scale: axes (>= 1) along which the scale is broadcast.
      broadcast_dims_shift: likewise for the shift.
      has_shift: whether there is one.
      approx: "full" or "diagonal".

    Raises:
      ArgumentError: inconsistent shapes or axes, another `approx`, or a shift without
        axes.
    """

    def __init__(
        self,
        inputs: Any,
        outputs_grads: Any,
        broadcast_dims_scale: Sequence[int],
        broadcast_dims_shift: Sequence[int] | None = None,
        has_shift: bool = True,
        approx: str = "full",
    ):
        if approx not in ("full", "diagonal"):
            raise errors.ArgumentError(
                f'approx must be "full" or "diagonal", got {approx!r}.'
            )
        if has_shift and broadcast_dims_shift is None:
            raise errors.ArgumentError(
                "A layer with a shift needs broadcast_dims_shift (an empty tuple if it "
                "is not broadcast), got None."
            )
        dims = itertools.chain(broadcast_dims_scale, broadcast_dims_shift or ())
        if any(dim < 1 for dim in dims):
            raise errors.ArgumentError(
                "Broadcast dimensions count from 1, never the batch; got "
                f"{tuple(broadcast_dims_scale)} for the scale and "
                f"{broadcast_dims_shift} for the shift."
            )
        for towers in outputs_grads:
            for data, grads in zip(inputs, towers, strict=True):
                _check_shapes(data, grads, broadcast_dims_scale)
        self._inputs = inputs
        self._outputs_grads = outputs_grads
        self._broadcast_dims_scale = broadcast_dims_scale
        self._broadcast_dims_shift = broadcast_dims_shift
        self._has_shift = has_shift
        self._approx = approx
        super().__init__()

    @property
    def _var_scope(self) -> str:
        return "ff_scaleshift_" + naming.scope_string_from_params(
            [
                self._inputs,
                self._outputs_grads,
                self._broadcast_dims_scale,
                self._broadcast_dims_shift,
                self._has_shift,
                self._approx,
            ]
        )

    @property
    def _identity(self) -> Hashable:
        return naming.fingerprint((self._inputs, self._outputs_grads))

    @property
    def _cov_shape(self) -> list[int]:
        size = _kept_size(self._inputs[0], self._broadcast_dims_scale)
        if self._has_shift:
            size += _kept_size(self._outputs_grads[0][0], self._broadcast_dims_shift)
        return [size, size] if self._approx == "full" else [size]

    @property
    def _num_sources(self) -> int:
        return len(self._outputs_grads)

    @property
    def _num_towers(self) -> int:
        return len(self._inputs)

    @property
    def _dtype(self) -> tf.DType:
        return self._inputs[0].dtype

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        return statistics.num_rows(self._outputs_grads[source][tower])

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        inputs = tf.convert_to_tensor(self._inputs[tower])
        grads = tf.convert_to_tensor(self._outputs_grads[source][tower])
        columns = [_summed(inputs * grads, self._broadcast_dims_scale)]
        if self._has_shift:
            columns.append(_summed(grads, self._broadcast_dims_shift))
        rows = tf.concat(columns, axis=1)
        # Where inputs of unknown shape hid it: what is known travels together.
        rows.set_shape([None, self._cov_shape[0]])
        if self._approx == "full":
            return statistics.compute_cov(rows)
        return statistics.second_moment_diagonal(rows)

    def _get_data_device(self, tower: int) -> str | None:
        return self._inputs[tower].device


def _check_shapes(inputs: Any, grads: Any, dims_scale: Sequence[int]) -> None:
    if None in (inputs.shape.rank, grads.shape.rank):
        return
    problem = _shape_problem(inputs.shape.as_list(), grads.shape.as_list(), dims_scale)
    if problem:
        raise errors.ArgumentError(
            f"Inputs of shape {inputs.shape} and output gradients of shape "
            f"{grads.shape} do not fit a scale broadcast along {tuple(dims_scale)}: "
            f"{problem}."
        )


def _shape_problem(
    sizes_in: list[int | None], sizes_out: list[int | None], dims_scale: Sequence[int]
) -> str | None:
    if len(sizes_in) != len(sizes_out):
        return "the ranks differ"
    pairs = zip(sizes_in[1:], sizes_out[1:], strict=True)
    for axis, (size_in, size_out) in enumerate(pairs, start=1):
        if None in (size_in, size_out) or size_in == size_out:
            continue
        if size_in != 1:
            return f"sizes along axis {axis} are neither equal nor 1 for the input"
        if axis not in dims_scale:
            return (
                f"the input is broadcast along axis {axis}, but the scale is not; "
                "broadcast the input before the layer"
            )
    return None


def _kept_size(data: Any, dims: Sequence[int]) -> int:
    """Number of entries per case once the axes `dims` are reduced."""
    sizes = enumerate(data.shape.as_list())
    return math.prod(size for axis, size in sizes if axis > 0 and axis not in dims)


def _summed(data: tf.Tensor, dims: Sequence[int]) -> tf.Tensor:
    """`[batch, entries]`: `data` summed over `dims`, one row per case."""
    summed = tf.reduce_sum(data, axis=list(dims))
    return tf.reshape(summed, [statistics.num_rows(data), -1])


class ScaleAndShiftFullFactor(ScaleAndShiftFactor, dense.DenseSquareMatrixFactor):
    """`ScaleAndShiftFactor` with the whole matrix.

    Args:
      inputs: see `ScaleAndShiftFactor`; so are the other arguments.
      outputs_grads: output gradients.
      broadcast_dims_scale: axes of the scale.
      broadcast_dims_shift: axes of the shift.
      has_shift: whether there is one.
    """

    def __init__(
        self,
        inputs: Any,
        outputs_grads: Any,
        broadcast_dims_scale: Sequence[int],
        broadcast_dims_shift: Sequence[int] | None = None,
        has_shift: bool = True,
    ):
        super().__init__(
            inputs,
            outputs_grads,
            broadcast_dims_scale,
            broadcast_dims_shift=broadcast_dims_shift,
            has_shift=has_shift,
            approx="full",
        )


class ScaleAndShiftDiagonalFactor(ScaleAndShiftFactor, diagonal.DiagonalFactor):
    """`ScaleAndShiftFactor` with the diagonal only.

    Args:
      inputs: see `ScaleAndShiftFactor`; so are the other arguments.
      outputs_grads: output gradients.
      broadcast_dims_scale: axes of the scale.
      broadcast_dims_shift: axes of the shift.
      has_shift: whether there is one.
    """

    def __init__(
        self,
        inputs: Any,
        outputs_grads: Any,
        broadcast_dims_scale: Sequence[int],
        broadcast_dims_shift: Sequence[int] | None = None,
        has_shift: bool = True,
    ):
        super().__init__(
            inputs,
            outputs_grads,
            broadcast_dims_scale,
            broadcast_dims_shift=broadcast_dims_shift,
            has_shift=has_shift,
            approx="diagonal",
        )
