"""Dense layers written as `tf.einsum(equation, inputs, weights)`.

Keras' einsum layers and attention projections are `Einsum` operations where sizes are
unknown, and reshaped matrix products otherwise (see `dense`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from kfac.python.ops.tensormatch import graph_patterns as gp
from kfac.python.ops.tensormatch.layers import bias, parameters
from kfac.python.ops.tensormatch.layers.kind import LayerKind
from kfac.python.ops.tensormatch.records import (
    MatchRecord,
    RecordType,
    UnsupportedLayerError,
    attribute,
    frozen_weights_error,
    parameter_name,
)


@dataclasses.dataclass(frozen=True)
class Equation:
    """Roles of the labels of `inputs,weights->outputs`.

    Attributes:
      inputs: labels of the data operand.
      leading: labels of cases and uses, in the outputs' order.
      contracted: labels that are summed over, in the weights' order.
      created: labels of the layer's features, in the weights' order.
    """

    inputs: str
    leading: str
    contracted: str
    created: str


def parse(equation: str, weights_first: bool = False) -> Equation | None:
    """Reads the equation of a dense layer.

    Args:
      equation: of two operands.
      weights_first: whether the weights are the first operand.

    Returns:
      The roles; None if the layer is not `outputs = inputs @ weights` for weights whose
      leading axes are contracted: an axis is shared by all three operands (each entry
      has weights of its own), summed over in one operand only, or out of order.
    """
    operands, _, outputs = equation.replace(" ", "").partition("->")
    first, _, second = operands.partition(",")
    inputs, weights = (second, first) if weights_first else (first, second)
    if "." in equation or "," in second:
        return None
    leading = "".join(label for label in outputs if label in inputs)
    contracted = "".join(label for label in weights if label in inputs)
    created = "".join(label for label in weights if label not in inputs)
    is_dense = (
        weights == contracted + created
        and outputs == leading + created
        and set(inputs) == set(leading + contracted)
        and not set(leading) & set(contracted)
        and contracted
        and created
    )
    return Equation(inputs, leading, contracted, created) if is_dense else None


def as_rows(equation: Equation, inputs: tf.Tensor) -> tf.Tensor:
    """`inputs` with the contracted axes last and folded: `[*leading, d_in]`."""
    order = [
        equation.inputs.index(label) for label in equation.leading + equation.contracted
    ]
    if order != sorted(order):
        inputs = tf.transpose(inputs, order)
    if len(equation.contracted) == 1:
        return inputs
    count = len(equation.leading)
    sizes = inputs.shape.as_list()
    features = tf.TensorShape(sizes[count:]).num_elements()
    leading = tf.shape(inputs)[:count]
    rows = tf.reshape(inputs, tf.concat([leading, [features or -1]], axis=0))
    rows.set_shape([*sizes[:count], features])
    return rows


def _pattern() -> tuple:
    einsum = gp.Einsum("linear_op")
    inputs, weights = gp.Tensor("in"), parameters.Parameter("weights")
    product = (
        "?:choice",
        (einsum, ("In", inputs, weights)),
        (einsum, ("In", weights, inputs)),
    )
    term = bias.reshaped_or_summed(gp.output_of(product, "product"))
    return gp.output_of(("?:choice", bias.added_to(term), product), "out")


def _record(
    bindings: Mapping[str, Any], consumed: Any, tensors_to_variables: Mapping[Any, Any]
) -> MatchRecord | None:
    bindings = {"product": bindings["out"], **bindings}
    weights, view = parameters.find(bindings, "weights", tensors_to_variables)
    op = bindings["linear_op"]
    text = attribute(op, "equation")
    weights_first = parameters.trace(op.inputs[0]) is not None
    equation = parse(text, weights_first)
    feature_axes = 1 if equation is None else len(equation.created)
    biases, is_bias = bias.find(bindings, tensors_to_variables, feature_axes)
    if weights is None and biases is None:
        return None
    if not is_bias:
        return None
    if weights is None:
        raise frozen_weights_error(biases, op)
    if equation is None or view.is_transposed:
        raise UnsupportedLayerError(
            weights,
            f"the equation {text!r} of {op.name!r} is not inputs @ weights with "
            f"{parameter_name(weights)!r} as a matrix",
        )
    direct = bias.is_added_directly(bindings)
    return MatchRecord(
        RecordType.fully_connected,
        weights if biases is None else (weights, biases),
        consumed,
        {
            "inputs": functools.partial(as_rows, equation, bindings["in"]),
            "outputs": bindings["out"] if direct else bindings["product"],
            "dense_inputs": True,
            "feature_axes": feature_axes,
        },
    )


EINSUM = LayerKind(_pattern(), frozenset(("Einsum", *bias.ADDITIONS)), _record)
