"""Normalisation layers written as formulas, and scales that are cast or reshaped.

Keras computes `out = in * inv + (shift - mean * inv)` with `inv = rsqrt * scale`, the
remainder as a difference (batch normalisation) or as a sum with `-mean` (layer and
group normalisation). Where every case has statistics of its own, the layer is a scale
and shift of `(in - mean) * rsqrt`, which the graph does not hold and which is added to
it. Statistics shared by the batch make it a batch normalisation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops.tensormatch import graph_patterns as gp
from kfac.python.ops.tensormatch.layers import parameters
from kfac.python.ops.tensormatch.layers.kind import LayerKind
from kfac.python.ops.tensormatch.records import (
    MatchRecord,
    RecordType,
    UnsupportedLayerError,
    parameter_name,
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
    scaled_mean = gp.output_of((gp.Mul, ("In", mean, same_inv)))
    negated = (gp.Mul, ("In", gp.output_of((gp.Neg, ("In", mean))), same_inv))
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
    )


def _formula_record(
    bindings: Mapping[str, Any], consumed: Any, tensors_to_variables: Mapping[Any, Any]
) -> MatchRecord | None:
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
    if _is_shared_by_cases(rsqrt, inputs):
        if "grouped" in bindings:
            return None
        return MatchRecord(
            RecordType.batch_norm,
            params if len(params) > 1 else params[0],
            consumed,
            {"inputs": inputs, "outputs": out},
        )
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
    if views[0][0] is None:
        raise UnsupportedLayerError(
            params[0],
            f"{parameter_name(params[0])!r} is the shift of the normalisation "
            f"{out.op.name!r} without scale, for which there is no block",
        )
    return MatchRecord(
        RecordType.scale_and_shift,
        params if len(params) > 1 else params[0],
        consumed,
        {
            "inputs": functools.partial(
                _normalized, inputs, bindings["mean"], rsqrt, out
            ),
            "outputs": out,
        },
    )


def _normalized(
    inputs: tf.Tensor, mean: tf.Tensor, rsqrt: tf.Tensor, out: tf.Tensor
) -> tf.Tensor:
    """What scale and shift act on, in the shape of the layer's output."""
    normalized = (inputs - mean) * rsqrt
    if normalized.shape.rank != out.shape.rank:
        normalized = tf.reshape(normalized, tf.shape(out))
    normalized.set_shape(out.shape)
    return normalized


def _is_shared_by_cases(statistic: tf.Tensor, inputs: tf.Tensor) -> bool:
    rank = statistic.shape.rank
    if rank is None or inputs.shape.rank is None or rank < inputs.shape.rank:
        return True
    return tf.compat.dimension_value(statistic.shape[0]) == 1


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
ELEMENTWISE = LayerKind(
    _elementwise_pattern(), frozenset((*_ADDITIONS, "Mul")), _elementwise_record
)
