"""Convolutions beyond a plain 2-D one: 1-D, 3-D, dilated, depthwise, transposed.

How they look in a graph:

* 1-D: `ExpandDims` of inputs and filter, `Conv2D`, `Squeeze`.
* Dilated: `SpaceToBatchND`, a convolution without padding, `BatchToSpaceND`; or an
  attribute of the operation.
* Keras reshapes the bias to `[1, ..., 1, channels]` and squeezes it again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from kfac.python.ops.tensormatch import graph_patterns as gp
from kfac.python.ops.tensormatch import tensorflow_graph_util as graph_util
from kfac.python.ops.tensormatch.layers import bias, parameters
from kfac.python.ops.tensormatch.layers.kind import LayerKind
from kfac.python.ops.tensormatch.records import (
    MatchRecord,
    RecordType,
    UnsupportedLayerError,
    convolution_data,
    frozen_weights_error,
    parameter_name,
)

_TYPES = ("Conv2D", "Conv3D")
_TAILS = ("Squeeze", "BatchToSpaceND")


def _with_tail(convolution: Any) -> tuple:
    """Pattern of a convolution's output, squeezed and moved back from the batch."""
    bare = gp.output_of(convolution, "bare")
    squeezed = gp.output_of((gp.Squeeze, ("In", bare)))
    return gp.output_of(
        (
            "?:choice",
            (
                gp.BatchToSpaceND("batch_to_space"),
                ("In", ("?:choice", squeezed, bare), gp.Tensor, gp.Tensor),
            ),
            (gp.Squeeze, ("In", bare)),
            convolution,
        ),
        "product",
    )


def _convolution_pattern() -> tuple:
    product = _with_tail(
        (
            gp.one_of(*_TYPES, name="linear_op"),
            ("In", gp.Tensor("in"), parameters.Parameter("weights")),
        )
    )
    return "?:choice", gp.output_of(bias.added_to(product), "out"), product


def _convolution_record(
    bindings: Mapping[str, Any], consumed: Any, tensors_to_variables: Mapping[Any, Any]
) -> MatchRecord | None:
    weights, view = parameters.find(bindings, "weights", tensors_to_variables)
    biases, is_bias = bias.find(bindings, tensors_to_variables)
    if weights is None and biases is None:
        return None
    if not is_bias:
        return None
    op = bindings["linear_op"]
    if weights is None:
        raise frozen_weights_error(biases, op)
    spatial = weights.shape.rank - 2
    product = bindings["product"]
    if product.shape.rank not in (None, spatial + 2):
        return None  # An inner part of a larger match, e.g. before the squeeze.
    params = weights if biases is None else (weights, biases)
    data = convolution_data(op)
    refuse = functools.partial(_refuse, weights, op)
    if view.is_transposed:
        refuse("transposes its filter")
    inputs, dilations = _undilated(refuse, bindings, data, weights)
    outputs = bindings.get("out", product)
    data |= {"inputs": inputs, "outputs": outputs}
    if spatial == 2:
        if dilations is not None:
            data["dilations"] = (1, *dilations, 1)
        return MatchRecord(RecordType.conv2d, params, consumed, data)
    kind = RecordType.conv1d if spatial == 1 else RecordType.convolution
    if spatial == 1:
        data["strides"] = (1, data["strides"][2], 1)
    if dilations is not None:
        data["dilations"] = (1, *dilations, 1)
    elif spatial == 1 and "dilations" in data:
        data["dilations"] = (1, data["dilations"][2], 1)
    return MatchRecord(kind, params, consumed, data)


def _undilated(
    refuse: Any, bindings: Mapping[str, Any], data: dict[str, Any], weights: Any
) -> tuple[Any, tuple[int, ...] | None]:
    """The convolution's own input, and its dilations if the batch carries them.

    Sets `data["padding"]` to that of the dilated convolution.
    """
    source = bindings["in"]
    expanded = weights.shape.rank == 3
    if expanded and source.op.type == "ExpandDims":
        source, expanded = graph_util.reduce_identity_ops(source.op.inputs[0]), False
    if "batch_to_space" not in bindings:
        if expanded:  # Made elsewhere, e.g. by a depthwise convolution before.
            return functools.partial(tf.squeeze, source, axis=1), None
        return source, None
    if source.op.type != "SpaceToBatchND":
        refuse("is dilated in an unknown way")
    dilations = _static_ints(source.op.inputs[1])
    inner = graph_util.reduce_identity_ops(source.op.inputs[0])
    padding = _padding_of_dilated(inner, bindings["product"], weights, dilations)
    if dilations is None or padding is None or expanded:
        refuse("is dilated, but its dilations or paddings are not known statically")
    data["padding"] = padding
    return inner, dilations


def _padding_of_dilated(
    inputs: tf.Tensor,
    outputs: tf.Tensor,
    weights: Any,
    dilations: tuple[int, ...] | None,
) -> str | None:
    """Padding that the sizes tell; None if they are not known or fit neither."""
    kernel = weights.shape.as_list()[:-2]
    ins = inputs.shape.as_list()[1 : 1 + len(kernel)]
    outs = outputs.shape.as_list()[1 : 1 + len(kernel)]
    if dilations is None or None in ins + outs:
        return None
    if outs == ins:
        return "SAME"
    sizes = zip(ins, kernel, dilations, strict=True)
    valid = [size - (width - 1) * rate for size, width, rate in sizes]
    return "VALID" if outs == valid else None


def _static_ints(tensor: tf.Tensor) -> tuple[int, ...] | None:
    value = tf.get_static_value(tensor)
    return None if value is None else tuple(int(entry) for entry in value)


def _depthwise_pattern() -> tuple:
    return _with_tail(
        (
            gp.DepthwiseConv2dNative("linear_op"),
            ("In", gp.Tensor("in"), parameters.Parameter("weights")),
        )
    )


def _depthwise_record(
    bindings: Mapping[str, Any], consumed: Any, tensors_to_variables: Mapping[Any, Any]
) -> MatchRecord | None:
    weights, view = parameters.find(bindings, "weights", tensors_to_variables)
    if weights is None:
        return None
    op = bindings["linear_op"]
    refuse = functools.partial(_refuse, weights, op)
    if view.is_transposed:
        refuse("transposes its filter")
    if weights.shape.rank != 4:
        refuse(
            f"is a depthwise convolution whose filter has rank {weights.shape.rank}; "
            "there are blocks for rank 4, images, only"
        )
    data = convolution_data(op)
    inputs, dilations = _undilated(refuse, bindings, data, weights)
    if dilations is None and "dilations" in data:
        dilations = data["dilations"][1:3]
    if dilations is not None:
        data["dilations"] = dilations
    data |= {"inputs": inputs, "outputs": bindings["product"]}
    return MatchRecord(RecordType.depthwise_conv2d, weights, consumed, data)


def _transposed_pattern() -> tuple:
    return gp.output_of(
        (
            gp.one_of(
                "Conv2DBackpropInput",
                "Conv2DBackpropInputV2",
                "Conv3DBackpropInputV2",
                "DepthwiseConv2dNativeBackpropInput",
                name="linear_op",
            ),
            ("In", gp.Tensor, parameters.Parameter("weights"), gp.Tensor("in")),
        ),
        "out",
    )


def _transposed_record(
    bindings: Mapping[str, Any], consumed: Any, tensors_to_variables: Mapping[Any, Any]
) -> None:
    del consumed
    weights, _ = parameters.find(bindings, "weights", tensors_to_variables)
    if weights is not None:
        _refuse(
            weights,
            bindings["linear_op"],
            "is a transposed convolution, for which there is no block",
        )


def _refuse(weights: Any, op: tf.Operation, why: str) -> None:
    raise UnsupportedLayerError(
        weights, f"{op.name!r} ({parameter_name(weights)}) {why}"
    )


CONVOLUTION = LayerKind(
    _convolution_pattern(),
    frozenset(_TYPES + _TAILS + bias.ADDITIONS),
    _convolution_record,
)
DEPTHWISE = LayerKind(
    _depthwise_pattern(),
    frozenset(("DepthwiseConv2dNative", *_TAILS)),
    _depthwise_record,
)
TRANSPOSED = LayerKind(
    _transposed_pattern(),
    frozenset(
        f"{kind}BackpropInput{version}"
        for kind in ("Conv2D", "Conv3D", "DepthwiseConv2dNative")
        for version in ("", "V2")
    ),
    _transposed_record,
)
