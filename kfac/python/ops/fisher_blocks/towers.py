"""Layers as captured inputs and outputs, one pair a tower, and what factors get.

Cooperative mix-ins, listed before the class with the algebra.  Factors take inputs
as a tuple over towers and output gradients as a tuple over sources of tuples over
towers; under the "concat" tower strategy one `PartitionedTensor` stands for all
towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac.python.ops import config, utils
from kfac.python.ops.errors import ArgumentError
from kfac.python.ops.fisher_blocks import batch_major
from kfac.python.ops.fisher_blocks.base import is_sequence


class InputOutputMultiTower:
    """Towers of single-use layers: one input and one output tensor each."""

    # `FisherBlock.use_sub_batch` replaces it.
    _map_tensor = staticmethod(lambda tensor: tensor)

    def __init__(self, *args: Any, **kwargs: Any):
        self.__inputs: list[Any] = []
        self.__outputs: list[Any] = []
        super().__init__(*args, **kwargs)

    def validate_tower(self, inputs: Any, outputs: Any) -> None:
        """Raises `ValueError` if such a tower cannot be served; changes nothing."""

    def register_additional_tower(self, inputs: Any, outputs: Any) -> None:
        """Adds a tower.

        Args:
          inputs: the layer's input, batch first.
          outputs: the layer's output before any nonlinearity, batch first.

        Raises:
          ValueError: see the class; the tower is then not added.
        """
        self.validate_tower(inputs, outputs)
        self.__inputs.append(inputs)
        self.__outputs.append(outputs)

    @property
    def _inputs(self) -> list[Any]:
        return self.__inputs

    @property
    def _outputs(self) -> list[Any]:
        return self.__outputs

    @property
    def num_registered_towers(self) -> int:
        """Number of registered towers."""
        if len(self._inputs) != len(self._outputs):
            raise ArgumentError(
                f"{type(self).__name__} has {len(self._inputs)} inputs but "
                f"{len(self._outputs)} outputs."
            )
        return len(self._inputs)

    def tensors_to_compute_grads(self) -> tuple[Any, ...]:
        """The outputs of all towers."""
        return tuple(self._outputs)

    def _process_data(self, grads_list: Sequence[Any]) -> tuple[tuple, tuple]:
        """`(inputs, grads_list)` in the layout of the tower strategy in force.

        Args:
          grads_list: `grads_list[i][j]` is source `i`'s gradient with respect to the
            output of tower `j`.

        Raises:
          ValueError: the strategy is unknown.
        """
        inputs = tuple(self._mapped_inputs())
        if _concatenates_towers():
            return (utils.PartitionedTensor(inputs),), tuple(
                (utils.PartitionedTensor(tuple(grads)),) for grads in grads_list
            )
        return inputs, tuple(grads_list)

    def _inputs_and_grads(self, source_grads: Sequence[Any]) -> list[tuple[Any, Any]]:
        """Over towers, of the sub-batch if there is one."""
        return list(zip(self._mapped_inputs(), source_grads, strict=True))

    def _mapped_inputs(self) -> list[Any]:
        """Inputs over towers, of the sub-batch if there is one."""
        return [
            tuple(self._map_tensor(use) for use in tower)
            if is_sequence(tower)
            else self._map_tensor(tower)
            for tower in self._inputs
        ]


class InputOutputMultiTowerMultiUse(InputOutputMultiTower):
    """Towers of layers whose weights are used several times in a case.

    A tower's inputs, and independently its output gradients, are either a list or
    tuple over uses of tensors `[batch, ...]`, or one tensor `[uses * batch, ...]`
    with the use as the slower index (for dense layers also `[uses, batch, n]`).
    Dense layers may have data with the cases first instead, see
    `use_batch_major_data`.
    """

    # Whether factors tell apart which use and which case a row belongs to.
    _needs_order_of_uses = True

    def __init__(self, num_uses: int | None = None, *args: Any, **kwargs: Any):
        """Makes the mix-in.

        Args:
          num_uses: number of uses; inferred where a side is a list over uses.
          *args: for the next class.
          **kwargs: for the next class.
        """
        self._num_uses = num_uses
        self._batch_major = False
        self._output_features: int | None = None
        super().__init__(*args, **kwargs)

    def use_batch_major_data(self, output_features: int | None = None) -> None:
        """Takes tensors with the cases first: `[batch, <uses>, n]`, or those folded.

        A tower's data is then one such tensor, or a tuple of them if the layer is
        applied to several sequences; `num_uses` counts the uses of all together.

        Args:
          output_features: number of features of the outputs, where they may have
            several axes; the size of the last axis by default.
        """
        self._batch_major = True
        self._output_features = output_features

    def _process_data(self, grads_list: Sequence[Any]) -> tuple[tuple, tuple]:
        """`(inputs, grads_list)` for the factors; sets `_num_uses`.

        Raises:
          ValueError: the number of uses is unknown or inconsistent, or the tower
            strategy is unknown.
        """
        inputs = tuple(self._mapped_inputs())
        if self._batch_major:
            grads = (self._rearranged(g, self._output_features) for g in grads_list)
            return self._rearranged(inputs), tuple(grads)
        if is_sequence(inputs[0]):
            self._set_num_uses("inputs", inputs)
            inputs = _partition_uses(inputs)
        grads_list = tuple(tuple(grads) for grads in grads_list)
        if is_sequence(grads_list[0][0]):
            self._set_num_uses(
                "outputs", [tower for grads in grads_list for tower in grads]
            )
            grads_list = tuple(_partition_uses(grads) for grads in grads_list)
        if self._num_uses is None:
            raise ValueError(
                f"{type(self).__name__}: num_uses is unknown. Inputs and outputs are "
                "single tensors with the uses folded in, so pass num_uses when "
                "registering the layer."
            )
        return inputs, grads_list

    def _rearranged(
        self, towers: Sequence[Any], features: int | None = None
    ) -> tuple[Any, ...]:
        """Batch-major data over towers, as the factors want it."""
        rearrange = (
            batch_major.use_major if self._needs_order_of_uses else batch_major.rows
        )
        return tuple(rearrange(tower, self._num_uses, features) for tower in towers)

    def _inputs_and_grads(self, source_grads: Sequence[Any]) -> list[tuple[Any, Any]]:
        pairs = super()._inputs_and_grads(source_grads)
        if not self._batch_major:
            return pairs
        inputs, grads = zip(*pairs, strict=True)
        grads = self._rearranged(grads, self._output_features)
        return list(zip(self._rearranged(inputs), grads, strict=True))

    def _set_num_uses(self, side: str, towers: Sequence[Sequence[Any]]) -> None:
        counts = [len(tower) for tower in towers]
        if len(set(counts)) > 1:
            raise ValueError(
                f"{type(self).__name__}: the {side} of all towers must have the same "
                f"number of uses, got {counts}."
            )
        if self._num_uses not in (None, counts[0]):
            raise ValueError(
                f"{type(self).__name__}: num_uses is {self._num_uses}, but the {side} "
                f"have {counts[0]} uses."
            )
        self._num_uses = counts[0]

    def _uses_per_case(self) -> int | None:
        if self._num_uses is None and self._inputs and not self._batch_major:
            for tower in (self._inputs[0], self._outputs[0]):
                if is_sequence(tower):
                    return len(tower)
        return self._num_uses


def _partition_uses(towers: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """One partitioned tensor a tower, or one over all, always use-major."""
    if _concatenates_towers():
        by_use = zip(*towers, strict=True)
        return (utils.PartitionedTensor(tuple(t for use in by_use for t in use)),)
    return tuple(utils.PartitionedTensor(tuple(tower)) for tower in towers)


def _concatenates_towers() -> bool:
    strategy = config.settings().tower_strategy
    if strategy not in ("concat", "separate"):
        raise ValueError(
            f"Unknown TOWER_STRATEGY {strategy!r}; use 'concat' or 'separate' "
            "(fisher_factors.set_global_constants)."
        )
    return strategy == "concat"
