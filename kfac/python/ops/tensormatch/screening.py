"""Matches that look like layers but cannot be registered as such, and why.

What is said here keeps a layer from being registered with wrong statistics.  Every
check returns a reason, or None if there is nothing to say against the match.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from kfac.python.ops.tensormatch import tensorflow_graph_util as graph_util
from kfac.python.ops.tensormatch.layers import parameters
from kfac.python.ops.tensormatch.records import (
    DENSE_TYPES,
    MatchRecord,
    RecordType,
    attribute,
    ensure_sequence,
    parameter_name,
)

_CONVOLUTIONS = (
    RecordType.conv1d,
    RecordType.conv2d,
    RecordType.convolution,
    RecordType.depthwise_conv2d,
)
_ELEMENTWISE_TYPES = ("Add", "AddV2", "Sub", "Mul")
_UNIQUE_TYPES = ("Unique", "UniqueV2")


def reason_against(
    record: MatchRecord,
    bindings: Mapping[str, Any],
    tensors_to_variables: Mapping[Any, Any],
) -> str | None:
    """Why a matched layer must not be registered with its own kind of block."""
    if record.record_type is RecordType.unsupported:
        return record.data["reason"]
    inputs = bindings["in"]
    if parameters.is_made_of_parameters(inputs, tensors_to_variables):
        return (
            f"its value is combined with other parameters ({inputs.name!r}) before it "
            "meets any data"
        )
    if record.record_type is RecordType.scale_and_shift:
        return _against_scale_and_shift(record)
    op = bindings.get("linear_op")
    if op is None:
        return None
    if any(_is_in_v1_loop(tensor) for tensor in op.inputs):
        return (
            f"{op.name!r} runs inside a while loop, whose iterations cannot be told "
            "apart; unroll the loop"
        )
    weights = ensure_sequence(record.params)[0]
    if record.record_type in _CONVOLUTIONS:
        return _against_convolution(record, op, inputs, weights)
    if record.data.get("dense_inputs", True):
        return _against_dense(op, weights, parameters.trace(bindings.get("weights")))
    return _against_lookup(record, op, inputs, weights)


def _against_dense(
    op: tf.Operation, weights: Any, view: parameters.ParameterView | None
) -> str | None:
    is_product = op.type in DENSE_TYPES and view is not None and view.is_plain
    if is_product and weights.shape.rank not in (None, 2):
        return (
            f"{op.name!r} multiplies by {parameter_name(weights)!r} of shape "
            f"{weights.shape}, one matrix for each entry of the leading axes"
        )
    return None


def _against_lookup(
    record: MatchRecord, op: tf.Operation, inputs: tf.Tensor, weights: Any
) -> str | None:
    if weights.shape.rank not in (None, 2):
        return (
            f"{op.name!r} looks up entries of {parameter_name(weights)!r} of shape "
            f"{weights.shape}; tables have rows and columns"
        )
    axis = tf.get_static_value(op.inputs[2]) if len(op.inputs) > 2 else 0
    if axis not in (0, -2) or attribute(op, "batch_dims", 0) != 0:
        return f"{op.name!r} does not look up rows (axis={axis})"
    if inputs.op.type in _UNIQUE_TYPES:
        return (
            f"{op.name!r} looks up each distinct id once, as embedding_lookup_sparse "
            "does, so that its rows are not the cases"
        )
    if _is_broadcast_over_cases(record.outputs, inputs.shape.rank):
        return (
            f"{op.name!r} looks up rows that all cases share, as position embeddings "
            "do, so that its rows are not the cases"
        )
    return None


def _is_broadcast_over_cases(outputs: tf.Tensor, id_rank: int | None) -> bool:
    """Whether `[length, features]` is combined with `[batch, length, features]`."""
    if id_rank != 1:
        return False
    pending = list(outputs.consumers())
    while pending:
        op = pending.pop()
        if graph_util.is_identity(op) or op.type == "Cast":
            pending.extend(op.outputs[0].consumers())
        elif op.type in _ELEMENTWISE_TYPES and (op.outputs[0].shape.rank or 0) > 2:
            return True
    return False


def _against_convolution(
    record: MatchRecord, op: tf.Operation, inputs: tf.Tensor, weights: Any
) -> str | None:
    data_format = record.data["data_format"] or "NHWC"
    if not data_format.endswith("C"):
        return f"{op.name!r} has its channels first ({data_format})"
    if record.data["padding"] not in ("SAME", "VALID"):
        return (
            f"{op.name!r} has {record.data['padding']} padding; pad the inputs before "
            "the layer (tf.pad) and use VALID"
        )
    channels = tf.compat.dimension_value(inputs.shape[-1])
    filter_channels = weights.shape.as_list()[-2]
    grouped = None not in (channels, filter_channels) and channels != filter_channels
    if grouped and record.record_type is not RecordType.conv2d:
        return (
            f"{op.name!r} is a grouped convolution: its inputs have {channels} "
            f"channels, its filter {filter_channels}"
        )
    if inputs.op.type == "SpaceToBatchND" and record.record_type is RecordType.conv2d:
        if record.inputs is inputs:
            return f"{op.name!r} is dilated in an unknown way"
    return None


def _against_scale_and_shift(record: MatchRecord) -> str | None:
    """Shapes that `register_scale_and_shift` would misunderstand."""
    if callable(record.data["inputs"]):
        return None  # Made for the layer, with the right shape.
    inputs, outputs = record.inputs.shape, record.outputs.shape
    if not inputs.is_compatible_with(outputs):
        return (
            f"inputs of shape {inputs} are broadcast against it to outputs of shape "
            f"{outputs}"
        )
    for variable in ensure_sequence(record.params):
        shape = variable.shape
        if None in (shape.rank, outputs.rank):
            continue
        leading = tf.compat.dimension_value(shape[0]) if shape.rank else None
        if outputs.rank == 0 or (shape.rank >= outputs.rank and leading != 1):
            return (
                f"{parameter_name(variable)!r} of shape {shape} scales or shifts "
                f"something of shape {outputs}, which has no batch axis"
            )
    return None


def _is_in_v1_loop(tensor: tf.Tensor) -> bool:
    """Whether a value enters a loop of v1 control flow on its way here."""
    while graph_util.is_identity(tensor.op) and tensor.op.inputs:
        if tensor.op.type == "Enter":
            return True
        tensor = tensor.op.inputs[0]
    return False
