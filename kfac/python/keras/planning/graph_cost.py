"""Operations and memory of the pieces of a traced graph, from its static shapes.

Counted are matrix products and convolutions, a multiplication and an addition as two
operations; element-wise work is left out.  Loops and other functions inside the graph
count as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable

import tensorflow as tf

# Ops whose result shares memory with an input, or takes none worth counting.
_ALIASES = frozenset(
    ("Reshape", "Identity", "ExpandDims", "Squeeze", "Shape", "StopGradient", "Const")
    + ("ReadVariableOp", "Placeholder", "NoOp")
)


def behind(
    tensors: Iterable[tf.Tensor | None], known: Collection[tf.Operation] = ()
) -> set[tf.Operation]:
    """The ops that must run for `tensors`, apart from `known` and what these need."""
    found: set[tf.Operation] = set()
    waiting = [t.op for t in tensors if t is not None]
    while waiting:
        op = waiting.pop()
        if op in found or op in known:
            continue
        found.add(op)
        waiting += [t.op for t in op.inputs]
        waiting += op.control_inputs
    return found


def flops(ops: Iterable[tf.Operation]) -> int:
    """Floating-point operations of one run of `ops`.

    Raises:
      ValueError: a shape is not static.
    """
    return sum(_COUNTS[op.type](op) for op in ops if op.type in _COUNTS)


def bytes_between(
    producers: Collection[tf.Operation], consumers: Collection[tf.Operation]
) -> int:
    """Memory of the tensors that `producers` make and `consumers` use."""
    tensors = {
        t.ref(): t
        for op in consumers
        for t in op.inputs
        if t.op in producers and t.op.type not in _ALIASES
    }
    return sum(_bytes(t) for t in tensors.values())


def loops(ops: Iterable[tf.Operation]) -> list[str]:
    """Names of the ops that run other functions, which `flops` cannot see into."""
    return [op.name for op in ops if op.type in ("While", "StatelessWhile", "Scan")]


def _bytes(tensor: tf.Tensor) -> int:
    elements = tensor.shape.num_elements()
    return 0 if elements is None else elements * tensor.dtype.size


def _elements(tensor: tf.Tensor) -> int:
    elements = tensor.shape.num_elements()
    if elements is None:
        raise ValueError(
            f"The shape {tensor.shape} of {tensor.name} is not static, so the cost of "
            "its op is unknown. Give every size of the input, with x=."
        )
    return elements


def _matmul(op: tf.Operation) -> int:
    transposed = "transpose_a" if op.type == "MatMul" else "adj_x"
    axis = -2 if op.get_attr(transposed) else -1
    return 2 * _elements(op.outputs[0]) * op.inputs[0].shape[axis]


def _conv(op: tf.Operation) -> int:
    """Every output element is a product with one filter's input patch."""
    return 2 * _elements(op.outputs[0]) * _elements(op.inputs[1]) // _channels_out(op)


def _channels_out(op: tf.Operation) -> int:
    return op.inputs[1].shape[-1]


def _conv_input_gradient(op: tf.Operation) -> int:
    """As many operations as the convolution: inputs are sizes, filter, gradient."""
    filters, gradient = op.inputs[1], op.inputs[2]
    return 2 * _elements(gradient) * _elements(filters) // filters.shape[-1]


def _conv_filter_gradient(op: tf.Operation) -> int:
    """As many operations as the convolution: the result is the filter's gradient."""
    filters, gradient = op.outputs[0], op.inputs[2]
    return 2 * _elements(gradient) * _elements(filters) // filters.shape[-1]


def _depthwise(op: tf.Operation) -> int:
    return 2 * _elements(op.outputs[0]) * math.prod(op.inputs[1].shape[:2])


def _depthwise_input_gradient(op: tf.Operation) -> int:
    return 2 * _elements(op.inputs[2]) * math.prod(op.inputs[1].shape[:2])


def _depthwise_filter_gradient(op: tf.Operation) -> int:
    return 2 * _elements(op.inputs[2]) * math.prod(op.outputs[0].shape[:2])


def _einsum(op: tf.Operation) -> int:
    """One multiplication and addition for every combination of the indices."""
    equation = op.get_attr("equation").decode().replace(" ", "")
    sides = equation.partition("->")[0].split(",")
    sizes = {
        label: size
        for labels, tensor in zip(sides, op.inputs, strict=True)
        for label, size in zip(labels, tensor.shape, strict=True)
    }
    return 2 * math.prod(sizes.values())


_COUNTS: dict[str, Callable[[tf.Operation], int]] = {
    "MatMul": _matmul,
    "BatchMatMul": _matmul,
    "BatchMatMulV2": _matmul,
    "BatchMatMulV3": _matmul,
    "Conv2D": _conv,
    "Conv3D": _conv,
    "Conv2DBackpropInput": _conv_input_gradient,
    "Conv3DBackpropInputV2": _conv_input_gradient,
    "Conv2DBackpropFilter": _conv_filter_gradient,
    "Conv3DBackpropFilterV2": _conv_filter_gradient,
    "DepthwiseConv2dNative": _depthwise,
    "DepthwiseConv2dNativeBackpropInput": _depthwise_input_gradient,
    "DepthwiseConv2dNativeBackpropFilter": _depthwise_filter_gradient,
    "Einsum": _einsum,
}
