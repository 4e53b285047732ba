"""The part of a graph that some outputs are computed from, and variables' uses in it.

Function graphs see what lies outside them through captured placeholders.  Here those
are transparent: an ancestor walk goes on to the outer graph, and a variable is looked
for under its handle and under every capture of it.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

tf1 = tf.compat.v1

# Ops that hand on a variable (its handle, reference or value) without using it.
_RELAY_OP_TYPES = frozenset(
    ("Identity", "ReadVariableOp", "Cast")
    + ("Enter", "RefEnter", "Switch", "RefSwitch", "RefIdentity")
)


class SubGraph:
    """`outputs` and all their ancestors.

    Ops are reached through data inputs; an op's other outputs and control inputs are
    not followed.

    Args:
      outputs: non-empty sequence of tensors of one graph.
    """

    def __init__(self, outputs: Sequence[tf.Tensor]):
        if not outputs:
            raise ValueError("A SubGraph needs at least one output tensor, got none.")
        self._graphs = tuple(enclosing_graphs(outputs[0].graph))
        # Tensors may be neither hashed nor compared; the values keep the ids valid.
        self._members: dict[int, Any] = {}
        frontier = collections.deque(outputs)
        while frontier:
            tensor = frontier.pop()
            if id(tensor) in self._members:
                continue
            self._members[id(tensor)] = tensor
            outer = captured_tensor(tensor)
            if outer is not None:
                if not _is_eager(outer):
                    frontier.append(outer)
            elif id(tensor.op) not in self._members:
                self._members[id(tensor.op)] = tensor.op
                frontier.extend(tensor.op.inputs)

    def is_member(self, node: tf.Tensor | tf.Operation) -> bool:
        """Whether the op or tensor belongs to the sub-graph."""
        return id(node) in self._members

    def filter_list(self, node_list: Iterable[Any]) -> list[Any]:
        """The members among some ops and tensors, in the same order."""
        return [node for node in node_list if self.is_member(node)]

    def variable_uses(self, var: Any) -> int:
        """Number of distinct member ops that consume the variable's value.

        An op that takes it through two inputs counts once.  Reads, casts and other ops
        that only hand the value on are looked through.

        Raises:
          ValueError: `var` is not a variable.
        """
        frontier = collections.deque(tensors_of(unwrap_variable(var), self._graphs))
        users: dict[int, tf.Operation] = {}
        seen: dict[int, tf.Tensor] = {}
        while frontier:
            tensor = frontier.pop()
            if id(tensor) in seen:
                continue
            seen[id(tensor)] = tensor
            for op in tensor.consumers():
                if not self.is_member(op):
                    continue
                if op.type in _RELAY_OP_TYPES:
                    frontier.extend(op.outputs)
                else:
                    users[id(op)] = op
        return len(users)


def without_wrapper(var: Any) -> Any:
    """The `tf.Variable` inside a Keras variable; anything else as it is."""
    value = None if isinstance(var, tf.Variable) else getattr(var, "value", None)
    return value if isinstance(value, tf.Variable) else var


def unwrap_variable(var: Any) -> tf.Variable:
    """The TensorFlow variable behind `var`, which may be a Keras variable.

    Raises:
      ValueError: it is not a variable.
    """
    var = without_wrapper(var)
    if not isinstance(var, tf.Variable) and not is_reference_variable(var):
        raise ValueError(f"A TensorFlow variable is expected, got {var!r}.")
    return var


def is_reference_variable(x: Any) -> bool:
    """Whether `x` is a TF1 reference variable (or says that it acts as one)."""
    if hasattr(x, "_should_act_as_ref_variable"):
        return True
    return isinstance(x, tf.Variable) and not hasattr(type(x), "handle")


def enclosing_graphs(graph: tf.Graph | None = None) -> Iterator[tf.Graph]:
    """`graph` (the current one by default) and the graphs around it, inside out."""
    graph = graph or tf1.get_default_graph()
    while graph is not None:
        yield graph
        graph = getattr(graph, "outer_graph", None)


def captured_tensor(tensor: tf.Tensor) -> tf.Tensor | None:
    """What a function graph's placeholder stands for outside; None if nothing."""
    if tensor.op.type != "Placeholder":
        return None
    for outer, inner in getattr(tensor.graph, "captures", ()):
        if inner is tensor:
            return outer
    return None


def tensors_of(x: Any, graphs: Sequence[tf.Graph] | None = None) -> list[tf.Tensor]:
    """The tensors by which a tensor or variable is known in some nested graphs.

    Args:
      x: tensor or variable.
      graphs: nested graphs, inside out; by default those around the current point.

    Returns:
      For a tensor, itself.  For a variable, its handle (or reference) where that is a
      tensor of one of the graphs, and the placeholders that capture it.  It may be
      empty if none of the graphs uses the variable.
    """
    if isinstance(x, tf.Tensor):
        return [x]
    origins = _handles(unwrap_variable(x))
    found = {id(origin): origin for origin in origins if not _is_eager(origin)}
    # Outside in, since an inner graph may capture an outer graph's placeholder.
    for graph in reversed(tuple(graphs or enclosing_graphs())):
        for outer, inner in getattr(graph, "captures", ()):
            if id(outer) in found or any(outer is origin for origin in origins):
                found[id(inner)] = inner
    return list(found.values())


def _handles(variable: Any) -> list[tf.Tensor]:
    """What graphs know a variable by; one of each copy, outside of replicas."""
    if is_reference_variable(variable):
        return [variable.op.outputs[0]]
    if (
        isinstance(variable, tf.distribute.DistributedValues)
        and tf.distribute.in_cross_replica_context()
    ):
        strategy = tf.distribute.get_strategy()
        return [v.handle for v in strategy.experimental_local_results(variable)]
    return [variable.handle]


def _is_eager(tensor: tf.Tensor) -> bool:
    return not hasattr(tensor, "graph")
