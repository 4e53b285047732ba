"""A second copy of part of a graph, with some of its sources replaced.

Used to evaluate the forward pass again on some of the cases only.  The copy is made
in whichever graph or control-flow branch asks for it, so it runs only when that
branch runs.  What does not depend on a replaced source (weights, and whatever is
computed from them alone) is shared with the original, not copied.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence

import tensorflow as tf

from kfac.python.ops import deferred, private_tf

tf1 = tf.compat.v1

Key = tuple[str, int]
Substitution = Callable[[tf.Tensor], Callable[[], tf.Tensor] | None]
NewShape = Callable[[tf.Operation], Sequence[int] | None]

# What an operation is to the copy.
_SOURCE = "source"  # Brings data in; each output is replaced or shared.
_DEPENDENT = "dependent"  # Computed from a replaced source: copied.
_CONSTANT = "constant"  # Constant: copied, so that shape inference sees its value.
_SHARED = "shared"  # Everything else.

_PLACEHOLDERS = frozenset(["Placeholder", "PlaceholderV2", "PlaceholderWithDefault"])
_VARIABLE_OPS = frozenset(
    ["VarHandleOp", "ReadVariableOp", "ResourceGather", "ResourceGatherNd"]
    + ["Variable", "VariableV2", "VariableShape"]
)
_CONSTANTS = ("Const", "Fill")
_V1_LOOP_OPS = frozenset(
    ["Enter", "RefEnter", "Exit", "RefExit", "NextIteration", "RefNextIteration"]
)
_V1_COND_OPS = frozenset(["Switch", "RefSwitch", "Merge", "RefMerge"])
_COPY_COUNT = itertools.count()


class GraphClone:
    """Copies of the tensors of `graph` that depend on replaced sources.

    A source is an operation that brings data into the graph: a placeholder or
    function argument, an iterator's or queue's output, a random number.
    """

    def __init__(
        self,
        graph: tf.Graph,
        substitution: Substitution,
        new_shape: NewShape | None = None,
    ):
        """Describes the copy; nothing is built yet.

        Args:
          graph: graph of the tensors to be copied.
          substitution: called with an output of a source; returns a function that
            builds its replacement in the current context, or None to share it.
          new_shape: called with a `Reshape` that is copied; returns the shape that the
            copy is to have, whose first entry its input must have too, or None to
            leave it.  If it is given, constants are sources as well.
        """
        self._graph = graph
        self._substitution = substitution
        self._new_shape = new_shape
        self._substitutes: dict[Key, Callable[[], tf.Tensor] | None] = {}
        self._roles: dict[str, str] = {}
        self._copied_gradients: dict[str, str] = {}
        # Per graph and control-flow context: original's key -> copy.
        self._copies = deferred.PerContextCache(dict)

    def tensor(self, tensor: tf.Tensor) -> tf.Tensor:
        """The copy of `tensor` in the current context, or itself if it is shared.

        Raises:
          ValueError: `tensor` was computed by v1 control flow, or the copied part
            does not accept the replacements (shape inference fails).
        """
        if not self.depends(tensor):
            return tensor
        copies = self._copies.get()
        key = _key(self._own(tensor))
        if key not in copies:
            self._extend([self._own(tensor)], copies)
        return copies[key]

    def depends(self, tensor: tf.Tensor) -> bool:
        """Whether `tensor` depends on a replaced source."""
        return self._is_dependent(self._own(tensor))

    def _own(self, tensor: tf.Tensor) -> tf.Tensor:
        """`tensor` as the graph of the copied model sees it."""
        if tensor.graph is self._graph:
            return tensor
        return self._graph.capture(tensor)  # An outer tensor, used in a function.

    # Analysis.

    def _is_dependent(self, tensor: tf.Tensor) -> bool:
        role = self._role(tensor.op)
        if role == _SOURCE:
            return self._substitute(tensor) is not None
        return role == _DEPENDENT

    def _substitute(self, tensor: tf.Tensor) -> Callable[[], tf.Tensor] | None:
        key = _key(tensor)
        if key not in self._substitutes:
            self._substitutes[key] = self._substitution(tensor)
        return self._substitutes[key]

    def _role(self, op: tf.Operation) -> str:
        """Classifies `op` and its ancestors, without recursion."""
        stack = [op]
        while stack:
            current = stack[-1]
            if current.name in self._roles:
                stack.pop()
                continue
            if current.type in _V1_LOOP_OPS:
                raise ValueError(_control_flow_message(current))
            unknown = [t.op for t in current.inputs if t.op.name not in self._roles]
            if unknown:
                stack.extend(unknown)
            else:
                self._roles[current.name] = self._role_by_inputs(current)
                stack.pop()
        return self._roles[op.name]

    def _role_by_inputs(self, op: tf.Operation) -> str:
        dependent = [t for t in op.inputs if self._is_dependent(t)]
        if _is_source(op) and all(t.op.type in _CONSTANTS for t in dependent):
            return _SOURCE
        if dependent:
            if op.type in _V1_COND_OPS:
                raise ValueError(_control_flow_message(op))
            return _DEPENDENT
        if self._is_replaced_constant(op):
            return _SOURCE
        if op.type == "Const" or (
            op.inputs and all(self._roles[t.op.name] == _CONSTANT for t in op.inputs)
        ):
            return _CONSTANT
        return _SHARED

    def _is_replaced_constant(self, op: tf.Operation) -> bool:
        return (
            self._new_shape is not None
            and op.type in _CONSTANTS
            and self._substitute(op.outputs[0]) is not None
        )

    # Copying.

    def _extend(self, targets: Sequence[tf.Tensor], copies: dict) -> None:
        """Adds the copies of `targets`, and of what they need, to `copies`."""
        ops = self._missing_ops(targets, copies)
        if not ops:
            return
        inside = {op.name for op in ops}
        graph_def = tf1.GraphDef()
        graph_def.versions.CopyFrom(self._graph.graph_def_versions)
        fed, reshaped = {}, {}
        for op in ops:
            node = self._node(op)
            shape = self._shape_of_copy(op)
            inputs = list(op.inputs)
            if shape is not None:
                reshaped[_key(inputs[0])] = shape[0]
                graph_def.node.append(_shape_node(op, shape))
                node.input[1] = f"{graph_def.node[-1].name}:0"
                inputs.pop()
            graph_def.node.append(node)
            for t in inputs:
                if t.op.name not in inside:
                    fed[_input_name(t)] = self._fed(t, copies)
        if any(_calls_function(op) for op in ops):
            graph_def.library.CopyFrom(self._graph.as_graph_def().library)
        outputs = [t for op in ops for t in op.outputs]
        with _without_control_dependencies():
            imported = tf1.import_graph_def(
                graph_def,
                input_map=fed,
                return_elements=[_input_name(t) for t in outputs],
                name="clone",
            )
        for original, copy in zip(outputs, imported, strict=True):
            copies[_key(original)] = copy
        for key, rows in reshaped.items():
            if tf.compat.dimension_value(copies[key].shape[0]) != rows:
                raise ValueError(
                    f"{key[0]!r} is reshaped into {rows} rows, but its copy has the "
                    f"shape {copies[key].shape}."
                )
        for op in ops:
            _check_call(op, [copies.get(_key(t), t) for t in op.inputs])

    def _shape_of_copy(self, op: tf.Operation) -> Sequence[int] | None:
        if self._new_shape is None or op.type != "Reshape":
            return None
        return self._new_shape(op) if self._is_dependent(op.inputs[0]) else None

    def _missing_ops(self, targets, copies) -> list[tf.Operation]:
        """Operations to copy, inputs first; replaced sources enter `copies`."""
        order: dict[str, tf.Operation] = {}
        stack = list(targets)
        while stack:
            tensor = stack[-1]
            op = tensor.op
            if _key(tensor) in copies or op.name in order:
                stack.pop()
                continue
            role = self._role(op)
            if role == _SOURCE and self._is_dependent(tensor):
                copies[_key(tensor)] = self._substitute(tensor)()
            if role in (_SOURCE, _SHARED):
                stack.pop()
                continue
            unseen = [
                t
                for t in op.inputs
                if _key(t) not in copies
                and t.op.name not in order
                and (self._is_dependent(t) or self._role(t.op) == _CONSTANT)
            ]
            if unseen:
                stack.extend(unseen)
            else:
                order[op.name] = op
                stack.pop()
        return list(order.values())

    def _fed(self, tensor: tf.Tensor, copies: dict) -> tf.Tensor:
        key = _key(tensor)
        if key not in copies:
            # Shared: the identity brings it into the current graph or branch.
            copies[key] = tf.identity(tensor)
        return copies[key]

    def _node(self, op: tf.Operation) -> tf1.NodeDef:
        node = tf1.NodeDef()
        node.CopyFrom(op.node_def)
        del node.input[:]  # Without control inputs: only the data is wanted again.
        node.input.extend(_input_name(t) for t in op.inputs)
        for attr in ("_class", "_output_shapes"):
            node.attr.pop(attr, None)
        if _calls_function(op) and "output_shapes" in node.attr:
            del node.attr["output_shapes"].list.shape[:]
        gradient_name = node.attr["_gradient_op_type"].s.decode()
        if gradient_name.startswith("CustomGradient-"):
            copied = self._copied_gradient(op, gradient_name)
            node.attr["_gradient_op_type"].s = copied.encode()
        elif not gradient_name:
            del node.attr["_gradient_op_type"]
        return node

    def _copied_gradient(self, op: tf.Operation, gradient_name: str) -> str:
        """Registers the gradient of the copy of a `tf.custom_gradient`.

        The user's gradient function is a closure over the original's tensors, so it
        is applied to the original, to a stand-in cotangent, and the result is
        copied with the stand-in replaced by the true cotangent.
        """
        if op.name in self._copied_gradients:
            return self._copied_gradients[op.name]
        original_gradient = private_tf.gradient_function(gradient_name)

        def gradient(copy, *cotangents):
            del copy
            copies = self._copies.get()
            with self._graph.as_default(), tf.control_dependencies(None):
                stand_ins = [
                    None if g is None else tf.zeros_like(t)
                    for t, g in zip(op.outputs, cotangents, strict=True)
                ]
                results = original_gradient(op, *stand_ins)
                results = [g if g is None else tf.convert_to_tensor(g) for g in results]
            for stand_in, cotangent in zip(stand_ins, cotangents, strict=True):
                if stand_in is not None:
                    self._roles[stand_in.op.name] = _DEPENDENT
                    copies[_key(stand_in)] = cotangent
            return [g if g is None else self.tensor(g) for g in results]

        name = f"{gradient_name}-copy-{next(_COPY_COUNT)}"
        tf.RegisterGradient(name)(gradient)
        self._copied_gradients[op.name] = name
        return name


def _importing() -> contextlib.AbstractContextManager:
    """Without control dependencies in a function's graph.

    There the import compares operations with tensors, which is an error under v2
    semantics.  (In a v1 graph, they say which branch is being built.)
    """
    if tf1.get_default_graph().building_function:
        return tf.control_dependencies(None)
    return contextlib.nullcontext()


def _key(tensor: tf.Tensor) -> Key:
    return tensor.op.name, tensor.value_index


def _input_name(tensor: tf.Tensor) -> str:
    return f"{tensor.op.name}:{tensor.value_index}"


def _shape_node(op: tf.Operation, shape: Sequence[int]) -> tf1.NodeDef:
    """A constant to reshape the copy of `op` with."""
    value = tf.make_tensor_proto(shape, op.inputs[1].dtype)
    node = tf1.NodeDef(name=f"{op.name}/shape_of_copy", op="Const")
    node.attr["dtype"].type = value.dtype
    node.attr["value"].tensor.CopyFrom(value)
    return node


def _is_source(op: tf.Operation) -> bool:
    """Whether `op`, none of whose inputs is replaced, brings data in."""
    if op.type in _PLACEHOLDERS:
        return True
    if op.type in _VARIABLE_OPS:
        return False
    return op.op_def.is_stateful or op.type.startswith("StatelessRandom")


def _without_control_dependencies() -> contextlib.AbstractContextManager:
    """Lifts ambient control dependencies while importing, where they cannot be had.

    Under tensor equality (v2 behaviour) TensorFlow compares control inputs with
    tensors while it imports, and fails.  The copies read nothing that the step
    changes before it has used them.  Inside a v1 branch nothing may be lifted, for
    that would leave the branch; there tensor equality is off.
    """
    if private_tf.control_flow_context(tf1.get_default_graph()) is not None:
        return contextlib.nullcontext()
    return tf.control_dependencies(None)


def _calls_function(op: tf.Operation) -> bool:
    attrs = op.node_def.attr.values()
    return any(a.HasField("func") or a.list.func for a in attrs)


def _check_call(op: tf.Operation, copied_inputs: Sequence[tf.Tensor]) -> None:
    """A function's body was traced for given shapes, and may rely on them."""
    if not _calls_function(op):
        return
    for original, copy in zip(op.inputs, copied_inputs, strict=True):
        if not original.shape.is_compatible_with(copy.shape):
            raise ValueError(
                f"{op.name!r} ({op.type}) calls a function traced for shape "
                f"{original.shape}, but its copy gets {copy.shape}. Feed the batch "
                "with an unknown leading dimension (None)."
            )


def _control_flow_message(op: tf.Operation) -> str:
    return (
        f"{op.name!r} ({op.type}) belongs to v1 control flow, which cannot be copied. "
        "Call tf.compat.v1.enable_control_flow_v2() before building the model."
    )
