"""`LayerCollection`: what an optimizer knows of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from kfac.python.ops import errors, report, utils
from kfac.python.ops.layer_collection import checks, default, parameters_dict
from kfac.python.ops.layer_collection.dense import DenseLayers
from kfac.python.ops.layer_collection.depthwise import DepthwiseLayers
from kfac.python.ops.layer_collection.elementwise import ElementwiseLayers
from kfac.python.ops.layer_collection.losses import LossRegistry
from kfac.python.ops.layer_collection.parameters_dict import identity

tf1 = tf.compat.v1


class LayerCollection(DenseLayers, DepthwiseLayers, ElementwiseLayers, LossRegistry):
    """The layers and losses of one model, for one optimizer or estimator.

    Register every layer and every loss, by hand or with `auto_register_layers`; the
    optimizer then finalises the collection, checks that every use of every variable is
    registered, and builds the curvature's factors through `make_or_get_factor`.

    A registration that raises leaves the collection as it was.

    Attributes:
      fisher_blocks: mapping from parameter groups to Fisher blocks.
      fisher_factors: mapping `(class, args)` -> Fisher factor, in creation order.
      loss_colocation_ops: loss -> tensor whose device computes it.
      loss_coeffs: loss -> coefficient.
      generic_reasons: `variable.ref()` -> why it has no layer-specific approximation.
    """

    def __init__(self, graph: tf.Graph | None = None, name: str = "LayerCollection"):
        """Makes an empty collection.

        Args:
          graph: the model's graph; the current one by default.
          name: of the variable scope that factors are constructed in, made unique.
        """
        super().__init__()
        self._graph = graph or tf1.get_default_graph()
        self._subgraph: utils.SubGraph | None = None
        self.fisher_factors = parameters_dict.FactorDict()
        self._factor_names: set[str] = set()
        with tf1.variable_scope(None, default_name=name) as scope:
            self._var_scope: str = scope.name

    @property
    def graph(self) -> tf.Graph:
        """The model's graph."""
        return self._graph

    def move_to_graph(self, graph: tf.Graph) -> None:
        """Says that the model is going to be built in another graph than the current.

        An optimizer may hold the collection of a model that is only built inside a
        conditional's branch, which has a graph of its own.

        Raises:
          ArgumentError: a layer or loss is registered already, or the collection is
            finalised.
        """
        self._check_open()
        if self.fisher_blocks or self._loss_dict:
            raise errors.ArgumentError(
                "Layers or losses of one graph are registered already; move a "
                "LayerCollection to another graph before registering anything."
            )
        self._graph = graph

    @property
    def subgraph(self) -> utils.SubGraph | None:
        """What the losses depend on; None before `finalize`."""
        return self._subgraph

    def as_default(self) -> AbstractContextManager[LayerCollection]:
        """Context manager that makes this the default collection; may be nested."""
        return default.default_layer_collection(self)

    def get_factors(self) -> tuple[Any, ...]:
        """All factors, in creation order."""
        return tuple(self.fisher_factors.values())

    def make_or_get_factor(
        self, cls: type, args: tuple, name: str | None = None
    ) -> Any:
        """The factor of this class and these arguments, made if there is none.

        Tensors in `args` count by identity, numbers and strings by value.

        Args:
          cls: factor class, called as `cls(*args)`.
          args: nested tuples of tensors, `PartitionedTensor`s, numbers and strings.
          name: stable name for a new factor, of which the names of its variables are
            made; a number is appended if another factor has it.

        Raises:
          TypeError: `(cls, args)` cannot be hashed.
        """
        key = (cls, args)
        if key in self.fisher_factors:
            return self.fisher_factors[key]
        with tf1.variable_scope(self._var_scope):
            factor = cls(*args)
        if name is not None:
            factor.set_name(self._new_factor_name(name))
        self.fisher_factors[key] = factor
        return factor

    def _new_factor_name(self, name: str) -> str:
        unique, number = name, 0
        while unique in self._factor_names:
            number += 1
            unique = f"{name}_{number}"
        self._factor_names.add(unique)
        return unique

    def auto_register_layers(
        self, var_list: Sequence[Any] | None = None, batch_size: int | None = None
    ) -> None:
        """Finds layers by looking at the graph behind the losses, and registers them.

        Variables that are registered already are left alone; linked parameters and
        default approximations are honoured.

        Args:
          var_list: variables to cover; all trainable ones of a v1 graph by default.
          batch_size: cases per replica and tower; needed for variables whose use is not
            recognised, and to tell uses or time steps folded into the batch axis.

        Raises:
          ArgumentError: no loss is registered, or `var_list` is missing in a function.
        """
        self._check_open()
        self._check_has_losses()
        if var_list is None:
            if getattr(self._graph, "building_function", False):
                raise errors.ArgumentError(
                    "Give var_list: a function's graph does not know the trainable "
                    "variables."
                )
            var_list = tf1.trainable_variables()
        from kfac.python.ops.tensormatch import graph_search  # Imports this package.

        graph_search.register_layers(self, var_list, batch_size=batch_size)

    def finalize(self) -> None:
        """Closes the collection to registrations and finds what the losses depend on.

        Raises:
          ArgumentError: no loss is registered, or one on something that is no tensor
            of a graph (the collection stays open); or it is finalised already.
        """
        if self._finalized:
            raise errors.ArgumentError(
                "This LayerCollection is finalised already; it may serve only one "
                "optimizer or estimator. Make another one."
            )
        self._create_subgraph()
        self._finalized = True

    def _create_subgraph(self) -> None:
        self._check_has_losses()
        inputs = tuple(tf.nest.flatten([loss.inputs for loss in self.losses]))
        for tensor in inputs:
            if not hasattr(tensor, "graph"):
                raise errors.ArgumentError(
                    f"A loss was registered with {tensor!r}, which is computed by no "
                    "graph; register the network's output tensor itself."
                )
        self._subgraph = utils.SubGraph(inputs)

    def check_registration(self, variables: Sequence[Any]) -> None:
        """Checks that every use of every variable is registered, and nothing else.

        Args:
          variables: those that are to be trained.

        Raises:
          ArgumentError: the collection is not finalised; a variable is not registered,
            or is with another number of uses than the losses' graph has; a registered
            variable is not listed. All problems are in the message.
        """
        if self._subgraph is None:
            raise errors.ArgumentError("Call finalize() before check_registration().")
        problems = []
        for variable in variables:
            name = checks.parameter_name(variable)
            registered = self._vars_to_uses[variable]
            if not registered:
                problems.append(f"{name!r} is not registered.")
            elif not math.isinf(registered):
                uses = self._subgraph.variable_uses(variable)
                if uses != registered:
                    problems.append(
                        f"{name!r} is registered with the wrong number of uses: "
                        f"{registered} registered, {uses} in the graph of the losses."
                    )
        listed = {identity(variable) for variable in variables}
        unlisted = [
            checks.parameter_name(variable)
            for variable, uses in self._vars_to_uses.items()
            if uses and identity(variable) not in listed
        ]
        if unlisted:
            problems.append(
                f"{len(unlisted)} registered variable(s) are not in the list of "
                f"variables: {unlisted}."
            )
        if problems:
            raise errors.ArgumentError(
                "The registration does not fit the variables to train:\n  "
                + "\n  ".join(problems)
            )

    def explain(
        self, print_fn: Callable[[str], Any] | None = print
    ) -> list[report.Row]:
        """Tells how every registered parameter is covered.

        Args:
          print_fn: gets the table as text; None for no printing.
        """
        rows = report.explain(self)
        if print_fn is not None:
            print_fn(report.format_table(rows))
        return rows

    def check_strict(self) -> None:
        """Refuses parameters without a layer-specific approximation.

        Raises:
          GenericParametersError: lists them, each with the reason.
        """
        report.check_strict(self)
