"""A bias that is added to a product after the product was reshaped or summed up.

Adding a bias is an identity for gradients: the gradient with respect to the product is
that with respect to the sum, in the product's shape.  So the product's own output,
with uses folded into rows, can stand for the layer's output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from kfac.python.ops.tensormatch import graph_patterns as gp
from kfac.python.ops.tensormatch import tensorflow_graph_util as graph_util
from kfac.python.ops.tensormatch.layers import parameters
from kfac.python.ops.tensormatch.records import attribute

ADDITIONS = ("Add", "AddV2", "BiasAdd")
_DATA = ("?", None, parameters.is_no_parameter)


def added_to(term: Any) -> tuple:
    """Pattern of the operation `bias_op` that adds the parameter `biases` to `term`."""
    add = gp.one_of(*ADDITIONS, name="bias_op")
    bias = parameters.Parameter("biases")
    return "?:choice", (add, ("In", term, bias)), (add, ("In", bias, term))


def reshaped_or_summed(product: Any) -> tuple:
    """Pattern of `product`, perhaps reshaped, perhaps in a sum of up to three terms."""
    reshaped = (
        "?:choice",
        product,
        gp.output_of((gp.Reshape, ("In", product, gp.Tensor))),
    )
    return "?:choice", reshaped, _sum_with(reshaped), _sum_with(_sum_with(reshaped))


def _sum_with(term: Any) -> tuple:
    add = gp.one_of("Add", "AddV2")
    return gp.output_of(
        ("?:choice", (add, ("In", term, _DATA)), (add, ("In", _DATA, term)))
    )


def find(
    bindings: Mapping[str, Any],
    tensors_to_variables: Mapping[Any, Any],
    feature_axes: int = 1,
) -> tuple[Any, bool]:
    """The bias of a match that binds `product`, and perhaps `bias_op` and `biases`.

    Args:
      bindings: of the match.
      tensors_to_variables: see `records.record_affine_from_bindings`.
      feature_axes: number of last axes of the product that are its features.

    Returns:
      The variable, None if there is no bias of interest; and whether it is the bias of
      the product: one entry for each of its features, added to nothing but it.
    """
    bias, view = parameters.find(bindings, "biases", tensors_to_variables)
    if bias is None:
        return None, True
    sizes = view.sizes(bias)
    op = bindings["bias_op"]
    features = bindings["product"].shape[-feature_axes:].num_elements()
    if view.is_transposed or sizes is None or features is None:
        return bias, False
    while sizes and sizes[0] == 1 and len(sizes) > 1:
        sizes = sizes[1:]
    total = op.outputs[0].shape
    fits = (
        None not in sizes
        and math.prod(sizes) == features
        and total.rank is not None
        and total.as_list()[-len(sizes) :] == sizes
        and attribute(op, "data_format", "NHWC") == "NHWC"
    )
    return bias, fits and _leads_to(bindings["product"], op)


def is_added_directly(bindings: Mapping[str, Any]) -> bool:
    """Whether the bias, if there is one, is added to the product as it is."""
    op = bindings.get("bias_op")
    return op is None or any(
        graph_util.reduce_identity_ops(tensor) is bindings["product"]
        for tensor in op.inputs
    )


def _leads_to(tensor: tf.Tensor, op: tf.Operation) -> bool:
    """Whether `tensor` is used for `op` only, by way of other operations or not."""
    while True:
        consumers = [
            consumer
            for consumer in tensor.consumers()
            if consumer.type not in parameters.SHAPE_QUERIES
        ]
        if len(consumers) != 1:
            return False
        if consumers[0] is op:
            return True
        if not consumers[0].outputs:
            return False
        tensor = consumers[0].outputs[0]
