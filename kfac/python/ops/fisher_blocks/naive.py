"""Generic blocks, from gradients of the parameters themselves.

They work for any parameter.  The statistic of a batch is the square (or the outer
product) of the *summed* gradient over the batch size, an estimate of high variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import fisher_factors
from kfac.python.ops.fisher_blocks.base import FisherBlock
from kfac.python.ops.fisher_blocks.full_and_diagonal import DiagonalFB, FullFB
from kfac.python.ops.rules import scalars


class _NaiveTowers(FisherBlock):
    """Towers that are only batch sizes."""

    def __init__(self, layer_collection: Any, params: Any):
        """Makes the block.

        Args:
          layer_collection: the `LayerCollection`.
          params: a variable or tensor, or a tuple or list of them.
        """
        super().__init__(layer_collection)
        self._params = params
        self._batch_sizes: list[Any] = []

    def register_additional_tower(self, batch_size: Any) -> None:
        """Adds a tower of `batch_size` cases; int, float or scalar tensor."""
        self._batch_sizes.append(batch_size)

    @property
    def num_registered_towers(self) -> int:
        return len(self._batch_sizes)

    @property
    def _batch_size(self) -> tf.Tensor:
        return tf.convert_to_tensor(self._total_batch())

    def tensors_to_compute_grads(self) -> Any:
        """The parameters."""
        return self._params

    def _total_batch(self) -> Any:
        """Cases in all towers: an int if all sizes are, otherwise a scalar tensor.

        A number, unlike a tensor, is the same factor argument every time.
        """
        sizes = [scalars.whole(size) for size in self._batch_sizes]
        if all(isinstance(size, int) for size in sizes):
            return sum(sizes)
        dtype = next((s.dtype for s in sizes if hasattr(s, "dtype")), tf.float32)
        return tf.add_n([tf.cast(size, dtype) for size in sizes])

    def _instantiate(
        self, role: str, cls: type, grads_list: Sequence[Any], damping: Any
    ) -> None:
        total = self._map_batch_size(self._total_batch())
        self._factor = self._make_or_get_factor(role, cls, (grads_list, total))
        self._set_damping(damping)


class NaiveDiagonalFB(_NaiveTowers, DiagonalFB):
    """Diagonal of one parameter: mean squared gradient of the summed loss."""

    def instantiate_factors(self, grads_list: Sequence[Any], damping: Any) -> None:
        self._instantiate(
            "diagonal", fisher_factors.NaiveDiagonalFactor, grads_list, damping
        )


class NaiveFullFB(_NaiveTowers, FullFB):
    """Dense matrix over a parameter group: outer product of summed gradients."""

    def instantiate_factors(self, grads_list: Sequence[Any], damping: Any) -> None:
        self._instantiate("full", fisher_factors.NaiveFullFactor, grads_list, damping)
