"""Parameters as they reach an operation: read, cast, reshaped or transposed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from kfac.python.ops.tensormatch import tensorflow_graph_util as graph_util
from kfac.python.ops.utils import subgraph

# They keep the order of the entries ...
_SHAPE_TYPES = frozenset(("Cast", "Reshape", "ExpandDims", "Squeeze"))
# ... and this one does not.
_TRANSPOSE = "Transpose"

# Operations that look at the shape of a tensor only.
SHAPE_QUERIES = frozenset(("Shape", "ShapeN", "Size", "Rank"))


@dataclasses.dataclass(frozen=True)
class ParameterView:
    """A variable seen through operations that only rearrange its entries.

    Attributes:
      root: handle, capture of a handle, or reference tensor of the variable.
      tensor: the variable's value as it is used; `root` if nothing comes in between.
      op_types: types of the operations in between, identities left out.
    """

    root: tf.Tensor
    tensor: tf.Tensor
    op_types: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the variable is used as it is."""
        return not self.op_types

    @property
    def is_transposed(self) -> bool:
        """Whether its axes are permuted."""
        return _TRANSPOSE in self.op_types

    def sizes(self, variable: Any) -> list[int | None] | None:
        """Static shape of the value as it is used."""
        shape = variable.shape if self.is_plain else self.tensor.shape
        return None if shape.rank is None else shape.as_list()


def trace(tensor: Any) -> ParameterView | None:
    """The parameter that `tensor` is the value of; None if it is something else."""
    if not isinstance(tensor, (tf.Tensor, tf.Variable)):
        return None
    op_types: list[str] = []
    node = graph_util.reduce_identity_ops(tensor)
    while not graph_util.is_var(node):
        outer = subgraph.captured_tensor(node)
        if outer is not None and hasattr(outer, "graph"):
            node = graph_util.reduce_identity_ops(outer)
            continue
        if node.op.type not in _SHAPE_TYPES and node.op.type != _TRANSPOSE:
            return None
        op_types.append(node.op.type)
        node = graph_util.reduce_identity_ops(node.op.inputs[0])
    return ParameterView(node, tensor, tuple(op_types))


def is_parameter(tensor: Any) -> bool:
    """Whether `tensor` is the value of a variable, rearranged or not."""
    return trace(tensor) is not None


def is_no_parameter(tensor: Any) -> bool:
    """Whether `tensor` is a tensor, but not the value of a variable."""
    return graph_util.is_tensor(tensor) and not is_parameter(tensor)


def Parameter(name: str | None = None) -> tuple:  # noqa: N802 - like other patterns.
    """Pattern of the value of a variable, rearranged or not."""
    return ("?", name, is_parameter)


def find(
    bindings: Mapping[str, Any], name: str, tensors_to_variables: Mapping[Any, Any]
) -> tuple[Any, ParameterView | None]:
    """The variable bound under `name`, and how it is used.

    Returns:
      `(variable, view)`. The variable is None if it is not of interest, both are None
      if nothing is bound.
    """
    if bindings.get(name) is None:
        return None, None
    view = trace(bindings[name])
    return tensors_to_variables.get(view.root), view


def feeds_only(tensor: tf.Tensor, op: tf.Operation) -> bool:
    """Whether nothing but `op` (and queries of its shape) consumes `tensor`."""
    return all(
        consumer is op or consumer.type in SHAPE_QUERIES
        for consumer in tensor.consumers()
    )


def is_made_of_parameters(tensor: Any, tensors_to_variables: Mapping[Any, Any]) -> bool:
    """Whether `tensor` is computed from variables of interest and numbers alone.

    Such a tensor is no layer's input, for it has no cases.  Constants that are not
    scalars may be a batch, and whatever depends on a shape may depend on its size.
    """
    seen: dict[int, Any] = {}
    stack, found = [graph_util.reduce_identity_ops(tensor)], False
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = node
        if tensors_to_variables.get(node) is not None:
            found = True
        elif graph_util.is_const(node):
            if node.shape.rank != 0:
                return False
        elif (
            graph_util.is_placeholder(node)
            or not node.op.inputs
            or node.op.type in SHAPE_QUERIES
            or node.op.op_def.is_stateful
        ):
            return False
        elif node.op.type in _SHAPE_TYPES or node.op.type == _TRANSPOSE:
            stack.append(graph_util.expand_inputs(node.op)[0])
        else:
            # Depth first along the first inputs, where the data usually come from.
            stack.extend(reversed(graph_util.expand_inputs(node.op)))
    return found
