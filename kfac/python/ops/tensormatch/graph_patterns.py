"""Patterns of graph nodes and of common layers.

Besides what is defined here there is a factory for every raw TensorFlow operation
(`MatMul`, `Conv2D`, `Relu`, ...): `MatMul(name=None)` matches operations of that type.
They are made when asked for.  Names are capitalised like the operations they match,
and all arguments have defaults, so that `Tensor` and `Affine` serve as patterns as
they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from kfac.python.ops.tensormatch import tensorflow_graph_util as graph_util


def Op(name: str | None = None) -> tuple:
    """Any operation."""
    return ("?", name, graph_util.is_op)


def Tensor(name: str | None = None) -> tuple:
    """Any tensor, variables included."""
    return ("?", name, graph_util.is_tensor)


def Variable(name: str | None = None) -> tuple:
    """A variable: its handle, the capture of its handle, or its reference tensor."""
    return ("?", name, graph_util.is_var)


def Const(name: str | None = None) -> tuple:
    """A constant tensor."""
    return ("?", name, graph_util.is_const)


def Placeholder(name: str | None = None) -> tuple:
    """A placeholder's tensor."""
    return ("?", name, graph_util.is_placeholder)


@functools.cache
def _operation(typename: str) -> Callable[..., tuple]:
    return graph_util.make_op_pattern(typename)


@functools.cache
def _raw_operations() -> frozenset[str]:
    return frozenset(name for name in dir(tf.raw_ops) if not name.startswith("_"))


def __getattr__(name: str) -> Callable[..., tuple]:
    if name.startswith("_") or name not in _raw_operations():
        raise AttributeError(
            f"module {__name__!r} has no pattern {name!r}, and TensorFlow has no raw "
            "operation of that name"
        )
    return _operation(name)


def __dir__() -> list[str]:
    return sorted(_raw_operations() | set(globals()))


def one_of(*typenames: str, name: str | None = None) -> tuple:
    """An operation of one of these types."""
    return ("?:choice", *(_operation(typename)(name) for typename in typenames))


def output_of(operation: Any, name: str | None = None) -> tuple:
    """An output tensor of an operation that matches."""
    return (Tensor(name), ("In", operation))


Unstack = _operation("Unpack")
Nonlinearity = one_of("Relu", "Tanh")
_IN = Tensor("in")


def Affine(
    in_pattern: Any = _IN,
    linear_op_name: str = "linear_op",
    weights_name: str = "weights",
    biases_name: str = "biases",
    output_name: str = "pre_activations",
) -> tuple:
    """Output of a matrix product or convolution, with its bias if one is added."""
    linear = (
        one_of("Conv2D", "MatMul", "BatchMatMulV2", name=linear_op_name),
        ("In", in_pattern, Variable(weights_name)),
    )
    add = one_of("Add", "BiasAdd", "AddV2")
    biases = Variable(biases_name)
    return output_of(
        (
            "?:choice",
            (add, ("In", output_of(linear), biases)),
            (add, ("In", biases, output_of(linear))),
            linear,
        ),
        output_name,
    )


def ScaleAndShift(
    in_pattern: Any = _IN,
    scale_name: str = "scale",
    shift_name: str = "shift",
    output_name: str = "out",
) -> tuple:
    """Output of an elementwise product with a variable, shifted if a shift is added."""
    scale = Variable(scale_name)
    shift = Variable(shift_name)
    multiply = _operation("Mul")
    scaled = (
        "?:choice",
        (multiply, ("In", in_pattern, scale)),
        (multiply, ("In", scale, in_pattern)),
    )
    add = one_of("Add", "AddV2")
    return output_of(
        (
            "?:choice",
            (add, ("In", output_of(scaled), shift)),
            (add, ("In", shift, output_of(scaled))),
            scaled,
        ),
        output_name,
    )


def BatchNorm(
    in_pattern: Any = _IN,
    scale_name: str = "scale",
    offset_name: str = "offset",
    output_name: str = "out",
) -> tuple:
    """Output of `in * inv + (offset - mean * inv)`, as unfused batch normalisation is.

    `inv` is a reciprocal square root, or its product with the scale.
    """
    multiply = _operation("Mul")
    rsqrt = _operation("Rsqrt")
    scaled_rsqrt = (multiply, ("In", output_of(rsqrt), Tensor(scale_name)))
    inv = output_of(("?:choice", rsqrt, scaled_rsqrt), "inv")
    scaled_mean = (multiply, ("In", Tensor, Tensor("inv")))
    remainder = (
        "?:choice",
        (_operation("Sub"), ("In", Tensor(offset_name), output_of(scaled_mean))),
        scaled_mean,
    )
    return output_of(
        (
            _operation("AddV2"),
            (
                "In",
                output_of((multiply, ("In", in_pattern, inv))),
                output_of(remainder),
            ),
        ),
        output_name,
    )


def FusedBatchNormOutput(
    in_pattern: Any = _IN,
    scale_name: str = "scale",
    offset_name: str = "offset",
    output_name: str = "out",
) -> tuple:
    """An output of a fused batch normalisation operation."""
    return output_of(
        (
            one_of("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"),
            (
                "In",
                in_pattern,
                Tensor(scale_name),
                Tensor(offset_name),
                Tensor,
                Tensor,
            ),
        ),
        output_name,
    )


def Embed(
    in_pattern: Any = _IN,
    linear_op_name: str = "linear_op",
    weights_name: str = "weights",
    axis_name: str = "axis",
    output_name: str = "pre_activations",
) -> tuple:
    """Rows of a variable, looked up by indices."""
    weights = Variable(weights_name)
    return output_of(
        (
            "?:choice",
            (
                one_of("Gather", "ResourceGather", name=linear_op_name),
                ("In", weights, in_pattern),
            ),
            (
                _operation("GatherV2")(linear_op_name),
                ("In", weights, in_pattern, Tensor(axis_name)),
            ),
        ),
        output_name,
    )


def Layer(in_pattern: Any = _IN, **kwargs: Any) -> tuple:
    """`activations`: a nonlinearity of `Affine(in_pattern, **kwargs)`."""
    return output_of(
        (Nonlinearity, ("In", Affine(in_pattern, **kwargs))), "activations"
    )


def LayerWithBatchNorm(in_pattern: Any = _IN) -> tuple:
    """`final_activations`: a nonlinearity of `BatchNorm(Affine(in_pattern))`."""
    return output_of(
        (Nonlinearity, ("In", BatchNorm(Affine(in_pattern)))), "final_activations"
    )
