"""Lookups in a table that is cast first (mixed precision), by ids of any rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfac.python.ops.tensormatch import graph_patterns as gp
from kfac.python.ops.tensormatch.layers import parameters
from kfac.python.ops.tensormatch.layers.kind import LayerKind
from kfac.python.ops.tensormatch.records import (
    MatchRecord,
    RecordType,
    UnsupportedLayerError,
    parameter_name,
)


def _pattern() -> tuple:
    return gp.output_of(
        (
            gp.GatherV2("linear_op"),
            (
                "In",
                parameters.Parameter("weights"),
                gp.Tensor("in"),
                gp.Tensor("axis"),
            ),
        ),
        "out",
    )


def _record(
    bindings: Mapping[str, Any], consumed: Any, tensors_to_variables: Mapping[Any, Any]
) -> MatchRecord | None:
    weights, view = parameters.find(bindings, "weights", tensors_to_variables)
    if weights is None:
        return None
    op = bindings["linear_op"]
    if set(view.op_types) - {"Cast"}:
        raise UnsupportedLayerError(
            weights,
            f"{op.name!r} looks up parts of {parameter_name(weights)!r} after it was "
            "reshaped or transposed",
        )
    return MatchRecord(
        RecordType.fully_connected,
        weights,
        consumed,
        {"inputs": bindings["in"], "outputs": bindings["out"], "dense_inputs": False},
    )


EMBEDDING = LayerKind(_pattern(), frozenset(("GatherV2",)), _record)
