"""What a "node" of a TensorFlow graph is to the pattern matcher.

Nodes are tensors, variables and operations.  The inputs of an operation are tensors,
the input of a tensor is the operation that made it.  Identity-like operations are
invisible: a variable that is read through a `ReadVariableOp` is seen as its handle, a
reference variable as its reference tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import tensorflow as tf

_IDENTITY_TYPES = frozenset(("Identity", "ReadVariableOp", "Enter", "IdentityN"))
_VARIABLE_PRODUCERS = ("VarHandleOp", "Placeholder")
# Operations that take a variable, but not its value.
_UPKEEP_PREFIXES = ("Assign", "VarIsInitialized", "IsVariableInitialized")


def is_op(node: Any) -> bool:
    """Whether `node` is a `tf.Operation`."""
    return isinstance(node, tf.Operation)


def is_tensor(node: Any) -> bool:
    """Whether `node` is a tensor or a variable; Python values are not."""
    return isinstance(node, (tf.Tensor, tf.Variable))


def is_var(node: Any) -> bool:
    """Whether `node` is a variable, its handle, or the capture of its handle.

    Inside a function's graph any captured resource (a table, an iterator) looks like
    a captured variable; compare with the variables that you know.
    """
    if isinstance(node, tf.Variable):
        return True
    op_type = _producer_type(node)
    if op_type is None:
        return False
    return op_type.startswith("Variable") or (
        node.dtype == tf.resource and op_type in _VARIABLE_PRODUCERS
    )


def is_const(node: Any) -> bool:
    """Whether `node` is the output of a `Const`."""
    return _producer_type(node) == "Const"


def is_placeholder(node: Any) -> bool:
    """Whether `node` is the output of a `Placeholder`."""
    return _producer_type(node) == "Placeholder"


def is_leaf(node: Any) -> bool:
    """Whether matching stops at `node`: a variable, a constant or a placeholder."""
    return is_var(node) or is_const(node) or is_placeholder(node)


def is_identity(node: Any) -> bool:
    """Whether `node` is an operation that hands its input on unchanged."""
    return is_op(node) and (
        node.type in _IDENTITY_TYPES or "convert_gradient_to_tensor" in node.type
    )


def op_type_is(typename: str) -> Callable[[Any], bool]:
    """Predicate: is an operation of exactly this type."""

    def op_type_matches(node: Any) -> bool:
        return is_op(node) and node.type == typename

    return op_type_matches


def reduce_identity_ops(node: Any) -> Any:
    """Follows `node` upstream through identity-like operations.

    Stops at an `IdentityN` of different tensors: that is how a function with a custom
    gradient looks, and what is upstream of it has another gradient.
    """
    while isinstance(node, tf.Tensor) and is_identity(_producer(node)):
        inputs = node.op.inputs
        if len(inputs) == 1:
            node = inputs[0]
        elif node.op.type == "IdentityN" and inputs[0] is inputs[1]:
            node = inputs[node.value_index]
        else:
            break
    return node


def expand_inputs(node: Any) -> list[Any] | None:
    """Data inputs of an operation, or the operation that made a tensor.

    Args:
      node: an operation, a tensor, or a list of tensors with one producer.

    Returns:
      A list of nodes, identity-like operations removed; None for a leaf tensor and
      for anything that is no node.

    Raises:
      ValueError: a list of tensors with several producers.
    """
    if is_op(node):
        return [reduce_identity_ops(tensor) for tensor in node.inputs]
    if isinstance(node, list):
        return _common_producer(node)
    if not is_tensor(node) or is_leaf(node):
        return None
    producer = _producer(reduce_identity_ops(node))
    return None if producer is None else [producer]


def expand_outputs(node: Any) -> list[Any] | None:
    """Output tensors of an operation, or the operations that consume a tensor.

    The consumers of a variable are those of its value.  None for anything else.
    """
    if is_op(node):
        return list(node.outputs)
    if isinstance(node, tf.Variable):
        return _variable_consumers(node)
    if isinstance(node, tf.Tensor) and _producer(node) is not None:
        return list(node.consumers())
    return None


def make_op_pattern(typename: str) -> Callable[..., tuple]:
    """Factory of element patterns that match operations of one type."""

    def op_pattern(name: str | None = None) -> tuple:
        return ("?", name, op_type_is(typename))

    op_pattern.__name__ = str(typename)
    op_pattern.__doc__ = f"Pattern of a `{typename}` operation."
    return op_pattern


def import_ops_no_clobber(
    dct: MutableMapping[str, Any], op_names: Iterable[str]
) -> None:
    """Adds an operation pattern factory for each name that `dct` does not have."""
    for name in op_names:
        if name not in dct:
            dct[name] = make_op_pattern(name)


def _producer(node: Any) -> tf.Operation | None:
    """The operation that made a symbolic tensor; None for everything else."""
    if isinstance(node, tf.Tensor) and hasattr(node, "graph"):
        return node.op
    return None


def _producer_type(node: Any) -> str | None:
    producer = _producer(node)
    return None if producer is None else producer.type


def _common_producer(tensors: list[Any]) -> list[tf.Operation] | None:
    if not tensors or not all(is_tensor(tensor) for tensor in tensors):
        return None
    producers = [_producer(reduce_identity_ops(tensor)) for tensor in tensors]
    if any(producer is not producers[0] for producer in producers):
        raise ValueError(
            "A list of tensors is matched through its producer, but these tensors come "
            f"from several operations: {[p and p.name for p in producers]}."
        )
    return None if producers[0] is None else [producers[0]]


def _variable_consumers(variable: tf.Variable) -> list[tf.Operation]:
    """Operations that consume the variable's value, in creation order."""
    if tf.executing_eagerly() or _producer(_root(variable)) is None:
        return []
    consumers: list[tf.Operation] = []
    pending = [_root(variable)]
    while pending:
        for op in pending.pop(0).consumers():
            if is_identity(op):
                pending.extend(op.outputs)
            elif not (
                op.type.startswith(_UPKEEP_PREFIXES)
                or any(op is other for other in consumers)
            ):
                consumers.append(op)
    return consumers


def _root(variable: tf.Variable) -> tf.Tensor:
    """Handle of a resource variable, reference tensor of a reference variable."""
    return variable.handle if hasattr(variable, "handle") else variable.op.outputs[0]
