"""Normalisation layers, and scales that are cast or reshaped.

Keras computes `out = in * inv + (shift - mean * inv)` with `inv = rsqrt * scale`, the
remainder as a difference (batch normalisation) or as a sum with `-mean` (layer and
group normalisation); TensorFlow has fused operations, too.  Either way the layer is a
scale and shift of `(in - mean) * rsqrt`, which the graph does not hold and which is
added to it.  That the statistics of a batch normalisation in training depend on all
cases makes no difference to the gradients of scale and shift.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops.tensormatch import graph_patterns as gp
from kfac.python.ops.tensormatch import tensorflow_graph_util as graph_util
from kfac.python.ops.tensormatch.layers import parameters
from kfac.python.ops.tensormatch.layers.kind import LayerKind
from kfac.python.ops.tensormatch.records import (
    MatchRecord,
    RecordType,
    UnsupportedLayerError,
    attribute,
    parameter_name,
    record_batch_norm_from_bindings,
)

_ADDITIONS = ("Add", "AddV2")


def _either_order(operation: Any, first: Any, second: Any) -> tuple:
    return (
        "?:choice",
        (operation, ("In", first, second)),
        (operation, ("In", second, first)),
    )


def _formula_pattern() -> tuple:
    scale, shift = parameters.Parameter("scale"), parameters.Parameter("shift")
    rsqrt = gp.output_of(gp.Rsqrt, "rsqrt")
    inv = gp.output_of(
        ("?:choice", _either_order(gp.Mul, rsqrt, scale), gp.Rsqrt), "inv"
    )
    product = gp.output_of((gp.Mul, ("In", gp.Tensor("in"), inv)))
    same_inv = gp.Tensor("inv")
    mean = gp.Tensor("mean")
    scaled_mean = gp.output_of((gp.Mul("mean_op"), ("In", mean, same_inv)))
    minus_mean = gp.output_of((gp.Neg("mean_op"), ("In", mean)))
    negated = (gp.Mul, ("In", minus_mean, same_inv))
    remainder = gp.output_of(
        (
            "?:choice",
            (gp.Sub, ("In", shift, scaled_mean)),
            _either_order(gp.one_of(*_ADDITIONS), gp.output_of(negated), shift),
            negated,
        )
    )
    total = (gp.one_of(*_ADDITIONS), ("In", product, remainder))
    return (
        "?:choice",
        gp.output_of(total, "out"),
        # Group normalisation works on a reshaped input.
        gp.output_of(
            (gp.Reshape, ("In", gp.output_of(total, "grouped"), gp.Tensor)), "out"
        ),
        gp.BatchNorm,
    )


def _formula_record(
    bindings: Mapping[str, Any], consumed: Any, tensors_to_variables: Mapping[Any, Any]
) -> MatchRecord | None:
    if "mean" not in bindings:  # Scaled or shifted by something computed.
        return record_batch_norm_from_bindings(bindings, consumed, tensors_to_variables)
    views = [
        parameters.find(bindings, name, tensors_to_variables)
        for name in ("scale", "shift")
    ]
    known = [(variable, view) for variable, view in views if variable is not None]
    if not known:
        return None
    params = tuple(variable for variable, _ in known)
    rsqrt = bindings.get("rsqrt", bindings["inv"])
    inputs, out = bindings["in"], bindings["out"]
    grouped = bindings.get("grouped")
    if grouped is not None and (
        _all_aligned(known, grouped) or not _all_regrouped(known, bindings)
    ):
        return None  # The reshape is no part of the layer.
    if grouped is None and not _all_aligned(known, out):
        raise UnsupportedLayerError(
            params if len(params) > 1 else params[0],
            f"the parameters of the normalisation {out.op.name!r} are not broadcast "
            f"along the last axes of its output of shape {out.shape}",
        )
    # Not `bindings["mean"]`, which may be the handle of a moving average.
    mean = next(
        tensor
        for tensor in bindings["mean_op"].inputs
        if graph_util.reduce_identity_ops(tensor) is bindings["mean"]
    )
    normalized = functools.partial(_normalized, inputs, mean, rsqrt, out)
    return _scale_and_shift(views[0][0], params, normalized, out, consumed)


def _scale_and_shift(
    scale: Any, params: tuple, normalized: Any, out: tf.Tensor, consumed: Any
) -> MatchRecord:
    """Record of a normalisation whose parameters fit its output.

    Raises:
      UnsupportedLayerError: it has no scale.
    """
    if scale is None:
        raise UnsupportedLayerError(
            params[0],
            f"{parameter_name(params[0])!r} is the shift of the normalisation "
            f"{out.op.name!r} without scale, for which there is no block",
        )
    return MatchRecord(
        RecordType.scale_and_shift,
        params if len(params) > 1 else params[0],
        consumed,
        {"inputs": normalized, "outputs": out},
    )


def _normalized(
    inputs: tf.Tensor, mean: tf.Tensor, rsqrt: tf.Tensor, out: tf.Tensor
) -> tf.Tensor:
    """What scale and shift act on, in the shape of the layer's output."""
    normalized = tf.cast((inputs - mean) * rsqrt, out.dtype)
    if normalized.shape.rank != out.shape.rank:
        normalized = tf.reshape(normalized, tf.shape(out))
    normalized.set_shape(out.shape)
    return normalized


def _fused_record(
    bindings: Mapping[str, Any], consumed: Any, tensors_to_variables: Mapping[Any, Any]
) -> MatchRecord | None:
    variables = [
        tensors_to_variables.get(bindings[name]) for name in ("scale", "offset")
    ]
    params = tuple(variable for variable in variables if variable is not None)
    out = bindings["out"]
    if not params or out is not out.op.outputs[0]:
        return None
    data_format = attribute(out.op, "data_format", "NHWC")
    if not data_format.endswith("C"):
        raise UnsupportedLayerError(
            params if len(params) > 1 else params[0],
            f"the batch normalisation {out.op.name!r} has its channels first "
            f"({data_format})",
        )
    normalized = functools.partial(_fused_normalized, bindings["in"], out)
    return _scale_and_shift(variables[0], params, normalized, out, consumed)


def _fused_normalized(inputs: tf.Tensor, out: tf.Tensor) -> tf.Tensor:
    """What scale and offset of a fused operation act on, from its own statistics."""
    _, _, _, mean, variance = out.op.inputs
    data = tf.cast(inputs, mean.dtype)
    if attribute(out.op, "is_training"):
        # Those among the outputs are rescaled for the moving averages.
        mean, variance = tf.nn.moments(data, list(range(inputs.shape.rank - 1)))
    rsqrt = tf.math.rsqrt(variance + attribute(out.op, "epsilon"))
    return _normalized(data, mean, rsqrt, out)


def _all_aligned(known: Sequence[tuple], out: tf.Tensor) -> bool:
    """Whether the parameters are used as NumPy would broadcast them against `out`."""
    return all(_aligned(variable, view, out) for variable, view in known)


def _aligned(variable: Any, view: parameters.ParameterView, out: tf.Tensor) -> bool:
    used, own = view.sizes(variable), variable.shape.as_list()
    if used is None or view.is_transposed or out.shape.rank is None:
        return False
    padding = [1] * (len(used) - len(own))
    return len(used) <= out.shape.rank and used == padding + own


def _all_regrouped(known: Sequence[tuple], bindings: Mapping[str, Any]) -> bool:
    """Whether the parameters, split into groups, are the output's last axis."""
    grouped, out = bindings["grouped"].shape, bindings["out"].shape
    if None in (grouped.rank, out.rank) or grouped.rank != out.rank + 1:
        return False
    channels = out.as_list()[-1]
    expected = [1] * (grouped.rank - 2) + grouped.as_list()[-2:]
    return grouped.as_list()[1:-2] == out.as_list()[1:-1] and all(
        variable.shape.as_list() == [channels]
        and view.sizes(variable) == expected
        and not view.is_transposed
        for variable, view in known
    )


def _elementwise_pattern() -> tuple:
    scaled = _either_order(
        gp.Mul,
        ("?", "in", parameters.is_no_parameter),
        parameters.Parameter("scale"),
    )
    shifted = _either_order(
        gp.one_of(*_ADDITIONS), gp.output_of(scaled), parameters.Parameter("shift")
    )
    return gp.output_of(("?:choice", shifted, scaled), "out")


def _elementwise_record(
    bindings: Mapping[str, Any], consumed: Any, tensors_to_variables: Mapping[Any, Any]
) -> MatchRecord | None:
    scale, scale_view = parameters.find(bindings, "scale", tensors_to_variables)
    shift, shift_view = parameters.find(bindings, "shift", tensors_to_variables)
    inputs, out = bindings["in"], bindings["out"]
    if scale is None or not inputs.shape.is_compatible_with(out.shape):
        return None
    if not _aligned(scale, scale_view, out):
        return None
    if shift is not None and not _aligned(shift, shift_view, out):
        return None
    return MatchRecord(
        RecordType.scale_and_shift,
        scale if shift is None else (scale, shift),
        consumed,
        {"inputs": inputs, "outputs": out},
    )


FORMULA = LayerKind(
    _formula_pattern(), frozenset((*_ADDITIONS, "Reshape")), _formula_record
)
FUSED = LayerKind(
    gp.FusedBatchNormOutput,
    frozenset(f"FusedBatchNorm{version}" for version in ("", "V2", "V3")),
    _fused_record,
)
ELEMENTWISE = LayerKind(
    _elementwise_pattern(), frozenset((*_ADDITIONS, "Mul")), _elementwise_record
)
