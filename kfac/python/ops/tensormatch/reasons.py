"""Why a variable is not part of a recognised layer, in words."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kfac.python.ops.tensormatch import tensorflow_graph_util as graph_util
from kfac.python.ops.tensormatch.layers import parameters
from kfac.python.ops.utils import subgraph as subgraph_lib

_LOOPS = frozenset(("While", "StatelessWhile"))
_CONDITIONALS = frozenset(("If", "StatelessIf", "Case", "StatelessCase"))
_V1_CONDITIONALS = frozenset(("Switch", "RefSwitch"))
_V1_LOOPS = frozenset(("RefEnter",))  # `Enter` counts as an identity.
_VIEWS = frozenset(("Cast", "Reshape", "ExpandDims", "Squeeze"))
_ADDITIONS = frozenset(("Add", "AddV2", "BiasAdd"))


def consumers(variable: Any, graph: tf.Graph, subgraph: Any) -> list[tf.Operation]:
    """Operations between the variable and the losses that take its value.

    Reads, casts and reshapes are looked through.
    """
    graphs = tuple(subgraph_lib.enclosing_graphs(graph))
    pending = list(subgraph_lib.tensors_of(variable, graphs))
    found: dict[int, tf.Operation] = {}
    while pending:
        for op in pending.pop(0).consumers():
            if not subgraph.is_member(op) or op.type in parameters.SHAPE_QUERIES:
                continue
            if graph_util.is_identity(op) or op.type in _VIEWS:
                pending.extend(op.outputs)
            else:
                found[id(op)] = op
    return list(found.values())


def calls_functions(op: tf.Operation) -> bool:
    """Whether the operation runs functions, whose inside is not searched."""
    return any(
        value.HasField("func") or value.list.func for value in op.node_def.attr.values()
    )


def why_unmatched(variable: Any, graph: tf.Graph, subgraph: Any) -> str:
    """What keeps the variable from being part of a recognised layer."""
    ops = consumers(variable, graph, subgraph)
    if not ops:
        return "the losses do not depend on it"
    for op in ops:
        if calls_functions(op) or op.type in _V1_CONDITIONALS | _V1_LOOPS:
            return why_used_in(op)
    uses = ", ".join(sorted({f"{op.name!r} ({op.type})" for op in ops}))
    if all(op.type in _ADDITIONS for op in ops):
        return f"it is added in {uses}, but not to the output of a recognised layer"
    return f"no layer pattern covers {uses}"


def why_used_in(op: tf.Operation) -> str:
    """Reason against a variable that is used in an operation of control flow."""
    where = f"it is used inside {op.name!r} ({op.type})"
    if op.type in _LOOPS | _V1_LOOPS:
        return (
            f"{where}, a loop whose iterations the scanner does not see; unroll it "
            "(`unroll=True` for Keras' recurrent layers)"
        )
    if op.type in _CONDITIONALS | _V1_CONDITIONALS:
        return (
            f"{where}, a conditional whose branches the scanner does not see; move the "
            "layer out of it"
        )
    return (
        f"{where}, a nested function call that the scanner does not see into (Keras "
        "calls one for grouped convolutions); call the layer outside of tf.function, "
        "or register it by hand"
    )
