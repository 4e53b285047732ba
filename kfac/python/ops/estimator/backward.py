"""The statistics' backward pass, made where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import deferred, signals, sub_batch
from kfac.python.ops.utils import subgraph


class BackwardPass:
    """Signals with respect to the blocks' tensors, as deferred tensors.

    The structure (how many sources, which shapes) is known at once; the passes
    themselves are built in each graph and control-flow context that uses a leaf, once
    per context.
    """

    def __init__(
        self,
        signal: signals.Signal,
        layer_collection: Any,
        wrt: Sequence[Any],
        variables: Sequence[Any] = (),
        part: sub_batch.SubBatch | None = None,
        colocate: bool = True,
    ):
        """Describes the pass; builds nothing.

        Args:
          signal: what is propagated back.
          layer_collection: finalised collection.
          wrt: one nested structure of tensors and variables a block.
          variables: further variables, for first-order statistics.
          part: the part of the batch to use, or None for all of it.
          colocate: whether gradient ops share their op's device.

        Raises:
          ValueError: the losses do not depend on some of the tensors.
        """
        self._signal = signal
        self._layers = layer_collection
        self._wrt = list(wrt)
        self._flat_wrt = tf.nest.flatten(self._wrt)
        self._variables = list(variables)
        self._part = part
        self._colocate = colocate
        self._check_dependence()
        self._sources = deferred.PerContextCache(self._back_propagate)

    def grads_lists(self) -> list[tuple[Any, ...]]:
        """Per block, a tuple over sources of structures like the block's tensors."""
        num_sources = self._signal.num_sources(self._layers)
        positions = iter(range(len(self._flat_wrt)))
        result = []
        for structure in self._wrt:
            flat = [next(positions) for _ in tf.nest.flatten(structure)]
            result.append(
                tuple(
                    tf.nest.pack_sequence_as(
                        structure, [self._leaf(source, i) for i in flat]
                    )
                    for source in range(num_sources)
                )
            )
        return result

    def params_gradients(self) -> list[tf.Tensor]:
        """Per variable the first-order statistic, summed over cases, in this context.

        Raises:
          ValueError: no loss depends on a variable.
        """
        first_order = self._signal.params_gradients(
            self._losses(), self._variables, self._colocate
        )
        if first_order is not None:
            return [tf.convert_to_tensor(gradient) for gradient in first_order]
        start = len(self._flat_wrt)
        return [
            tf.add_n([source[start + i] for source in self._sources.get()])
            for i in range(len(self._variables))
        ]

    def _leaf(self, source: int, position: int) -> deferred.DeferredTensor:
        of = self._flat_wrt[position]
        dtype = of.dtype.base_dtype
        if dtype in deferred.AtLeastFloat32.HALF:
            dtype = tf.float32
        return deferred.DeferredTensor(
            lambda: tf.cast(self._sources.get()[source][position], dtype),
            shape=of.shape if self._part is None else self._part.static_shape(of),
            dtype=dtype,
            name=f"{of.name.split(':')[0]}/signal_{source}:0",
            device=of.device,
        )

    def _losses(self) -> Any:
        return self._layers if self._part is None else self._part.losses()

    def _back_propagate(self) -> list[list[tf.Tensor]]:
        """Per source the dense signals, in the current context."""
        losses = self._losses()  # First: one copy of nearly everything.
        wrt = [*self._flat_wrt, *self._variables]
        if self._part is not None:
            wrt = [self._part.tensor(t) for t in wrt]
        sources = self._signal.gradients(losses, wrt, self._colocate)
        missing = [
            of
            for i, of in enumerate(wrt)
            if all(source[i] is None for source in sources)
        ]
        if missing:
            raise ValueError(_independent_message(missing))
        return [
            [
                # A source comes from one loss, which need not depend on everything.
                tf.zeros_like(of)
                if gradient is None
                else tf.convert_to_tensor(gradient)
                for of, gradient in zip(wrt, source, strict=True)
            ]
            for source in sources
        ]

    def _check_dependence(self) -> None:
        """Fails early where not even a path leads from a tensor to the losses."""
        sub_graph = self._layers.subgraph
        loss_input = tf.nest.flatten(self._layers.losses[0].inputs)[0]
        graphs = tuple(subgraph.enclosing_graphs(loss_input.graph))
        missing = [
            of
            for of in self._flat_wrt
            if not any(sub_graph.is_member(t) for t in subgraph.tensors_of(of, graphs))
        ]
        if missing:
            raise ValueError(_independent_message(missing))


def _independent_message(tensors: Sequence[Any]) -> str:
    names = ", ".join(repr(tensor.name) for tensor in tensors)
    return (
        "The registered losses do not depend on these registered tensors, so nothing "
        f"is propagated back to them: {names}. Register the layer's output tensor "
        "itself (before the nonlinearity), and all losses."
    )
