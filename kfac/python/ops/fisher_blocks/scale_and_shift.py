"""Blocks of elementwise layers `out = scale * in + shift` with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import fisher_factors
from kfac.python.ops.fisher_blocks import layer_gradients
from kfac.python.ops.fisher_blocks.base import maybe_tuple
from kfac.python.ops.fisher_blocks.full_and_diagonal import DiagonalFB, FullFB
from kfac.python.ops.fisher_blocks.towers import InputOutputMultiTower


class _ScaleAndShiftFB(InputOutputMultiTower):
    """What the full and the diagonal block share.

    Towers: `inputs [batch, ...]` and `outputs` of the same shape.
    """

    _factor_implementation: type
    approximation: str

    def __init__(
        self,
        layer_collection: Any,
        broadcast_dims_scale: Sequence[int],
        broadcast_dims_shift: Sequence[int] | None = None,
        has_shift: bool = True,
    ):
        """Makes the block.

        Args:
          layer_collection: the `LayerCollection`.
          broadcast_dims_scale: axes of the input, without the batch's, along which
            scale is broadcast.
          broadcast_dims_shift: the same for shift.
          has_shift: whether there is a shift.
        """
        super().__init__(layer_collection)
        self._broadcast_dims_scale = maybe_tuple(broadcast_dims_scale)
        self._broadcast_dims_shift = maybe_tuple(broadcast_dims_shift)
        self._has_shift = has_shift

    def instantiate_factors(self, grads_list: Sequence[Any], damping: Any) -> None:
        """See the base class."""
        inputs, grads = self._process_data(grads_list)
        self._factor = self._make_or_get_factor(
            self.approximation,
            self._factor_implementation,
            (
                inputs,
                grads,
                self._broadcast_dims_scale,
                self._broadcast_dims_shift,
                self._has_shift,
            ),
        )
        self._set_damping(damping)

    def configuration(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "broadcast_dims_scale": self._broadcast_dims_scale,
            "broadcast_dims_shift": self._broadcast_dims_shift,
            "has_shift": self._has_shift,
        }

    def rebuild_gradient(self, source_grads: Any) -> Any:
        """Sums over cases and broadcast axes of input times output gradient."""
        towers = zip(self._mapped_inputs(), source_grads, strict=True)
        return self._shaped_like_params(
            layer_gradients.sum_over_towers(
                [
                    layer_gradients.scale_and_shift(
                        tf.convert_to_tensor(inputs),
                        tf.convert_to_tensor(grads),
                        self._broadcast_dims_scale,
                        self._broadcast_dims_shift,
                        self._has_shift,
                    )
                    for inputs, grads in towers
                ]
            )
        )

    def _uses_per_case(self) -> int:
        return 1


class ScaleAndShiftFullFB(_ScaleAndShiftFB, FullFB):
    """Dense matrix over scale and shift; exact given exact output gradients."""

    approximation = FullFB.approximation
    _factor_implementation = fisher_factors.ScaleAndShiftFullFactor


class ScaleAndShiftDiagonalFB(_ScaleAndShiftFB, DiagonalFB):
    """Diagonal over scale and shift."""

    approximation = DiagonalFB.approximation
    _factor_implementation = fisher_factors.ScaleAndShiftDiagonalFactor
