"""The model's registration in a graph that never runs.

It tells how every parameter is covered, and makes all state, before the first step:
a training function then finds its variables and is traced no more often than with any
other optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from kfac.python.keras.batches import Batch
from kfac.python.keras.models import tf_variable
from kfac.python.keras.traced import TracedKfac
from kfac.python.ops import fisher_blocks, report, state, utils

tf1 = tf.compat.v1


class Prototype:
    """What is known of the training of one set of variables.

    Attributes:
      traced: the graph optimizer of the scratch graph; None if nothing is kept.
      kept: the variables that it trains.
      rows: how parameters are covered, as `LayerCollection.explain` tells it.
      outputs: structure of the model's outputs, tensors of the scratch graph.
      fallback_refs: `variable.ref()` of those that the fallback optimizer trains.
    """

    def __init__(
        self,
        make_traced: Callable[[Sequence[tf.Variable], Batch], TracedKfac],
        in_force: Callable[[], AbstractContextManager],
        paths: Mapping[Any, str],
        variables: Sequence[Any],
        specs: Batch,
        left_to_fallback: set[Any],
        fallback_name: str | None,
    ):
        """Registers the model and makes the state; must be called eagerly.

        Args:
          make_traced: makes the graph optimizer for variables and a batch.
          in_force: context in which state is found, by its names for parameters.
          paths: `variable.ref()` -> the parameters' names for the user.
          variables: what is trained.
          specs: what batches look like; only `x` must be known.
          left_to_fallback: `variable.ref()` of what a fallback optimizer trains.
          fallback_name: what the fallback optimizer is called, if there is one to
            which everything is left that no layer-specific block covers; or None.

        Raises:
          ValueError: see `LayerCollection.auto_register_layers`.
        """
        self.traced: TracedKfac | None = None
        self.kept: list[tf.Variable] = []
        self.rows: list[report.Row] = []
        self.outputs: Any = None
        self.fallback_refs = set(left_to_fallback)
        self._make_traced = make_traced
        self._in_force = in_force
        self._paths = paths
        self._variables = [tf_variable(variable) for variable in variables]
        self._unused_refs: set[Any] = set()
        self._fallback_name = fallback_name
        given = [v for v in self._variables if v.ref() in left_to_fallback]
        rows_left_out = [self._row_of(v, "given to the fallback") for v in given]
        while not self._trace(specs):
            rows_left_out += self.rows
        self.rows = [*self.rows, *rows_left_out]

    def _trace(self, specs: Batch) -> bool:
        """Whether all kept variables belong there; else `rows` has the others."""
        # A function's graph that is never called. (Tracing one here would build
        # everything twice, as functions do that make variables.)
        self._function = tf.function(lambda: None).get_concrete_function()
        with self._function.graph.as_default(), self._in_force():
            return self._register(
                specs.map(lambda spec: tf1.placeholder(spec.dtype, spec.shape))
            )

    def _register(self, batch: Batch) -> bool:
        left_out = self.fallback_refs | self._unused_refs
        self.kept = kept = [v for v in self._variables if v.ref() not in left_out]
        self.rows = []
        if not kept:
            return True
        traced = self._make_traced(kept, batch)
        collection = traced.register()
        self.outputs = traced.outputs
        unused = _unused(collection, kept)
        if unused:
            reason = "the losses do not depend on it"
            self.rows = [self._row_of(variable, reason, "-") for variable in unused]
            self._unused_refs |= {variable.ref() for variable in unused}
            return False
        naive = (fisher_blocks.NaiveDiagonalFB, fisher_blocks.NaiveFullFB)
        blocks = collection.fisher_blocks.items()
        generic = [params for params, block in blocks if isinstance(block, naive)]
        if generic and self._fallback_name is not None:
            reasons = collection.generic_reasons
            left = [v for params in generic for v in utils.ensure_sequence(params)]
            self.rows = [self._row_of(v, reasons.get(v.ref())) for v in left]
            self.fallback_refs |= {v.ref() for v in left}
            return False
        traced.create_state()
        self.rows = self._explain(collection)
        self.traced = traced
        return True

    def _explain(self, collection: Any) -> list[report.Row]:
        with state.parameter_names(self._paths):
            return report.explain(collection)

    def _row_of(
        self, variable: tf.Variable, reason: str | None, block: str | None = None
    ) -> report.Row:
        """What is said of a variable that Kfac does not precondition."""
        return report.Row(
            variables=(self._paths[variable.ref()],),
            shapes=(tuple(variable.shape.as_list()),),
            block=block or self._fallback_name or "-",
            approximation="-",
            factor_sides=(),
            uses=None,
            towers=0,
            reason=reason,
            factor_bytes=0,
            inverse_bytes=0,
        )


def _unused(collection: Any, variables: Sequence[tf.Variable]) -> list[tf.Variable]:
    """Variables that the registered losses do not depend on."""
    inputs = tf.nest.flatten([loss.inputs for loss in collection.losses])
    subgraph = utils.SubGraph(inputs)
    return [v for v in variables if not subgraph.variable_uses(v)]
