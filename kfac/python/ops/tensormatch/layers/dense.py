"""Dense layers beyond `x @ variable + variable`.

Their weights may be cast (mixed precision), reshaped (attention projections) or
transposed (tied decoders, which are refused by name), their inputs may have any rank;
for the bias see `bias`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfac.python.ops.tensormatch import graph_patterns as gp
from kfac.python.ops.tensormatch.layers import bias, parameters
from kfac.python.ops.tensormatch.layers.kind import LayerKind
from kfac.python.ops.tensormatch.records import (
    DENSE_TYPES,
    MAX_DENSE_RANK,
    MatchRecord,
    RecordType,
    UnsupportedLayerError,
    frozen_weights_error,
    is_transposed,
    parameter_name,
    transposed_error,
)


def _pattern() -> tuple:
    product = (
        gp.one_of(*DENSE_TYPES, name="linear_op"),
        ("In", gp.Tensor("in"), parameters.Parameter("weights")),
    )
    term = bias.reshaped_or_summed(gp.output_of(product, "product"))
    return gp.output_of(("?:choice", bias.added_to(term), product), "out")


def _record(
    bindings: Mapping[str, Any], consumed: Any, tensors_to_variables: Mapping[Any, Any]
) -> MatchRecord | None:
    bindings = {"product": bindings["out"], **bindings}
    weights, view = parameters.find(bindings, "weights", tensors_to_variables)
    biases, is_bias = bias.find(bindings, tensors_to_variables)
    if weights is None and biases is None:
        return None
    op = bindings["linear_op"]
    is_basic = view.is_plain and (bindings["in"].shape.rank or 2) <= MAX_DENSE_RANK
    if not is_bias or ("bias_op" not in bindings and is_basic):
        return None  # The product alone makes a record of its own.
    if weights is None:
        raise frozen_weights_error(biases, op)
    if is_transposed(op) or view.is_transposed:
        raise transposed_error(weights, op)
    sizes = view.sizes(weights)
    if sizes is None or len(sizes) != 2:
        raise UnsupportedLayerError(
            weights,
            f"{op.name!r} multiplies by {parameter_name(weights)!r} as a tensor of "
            f"shape {sizes}, one matrix for each entry of the leading axes",
        )
    direct = bias.is_added_directly(bindings)
    return MatchRecord(
        RecordType.fully_connected,
        weights if biases is None else (weights, biases),
        consumed,
        {
            "inputs": bindings["in"],
            "outputs": bindings["out"] if direct else bindings["product"],
            "dense_inputs": True,
        },
    )


DENSE = LayerKind(_pattern(), frozenset(DENSE_TYPES + bias.ADDITIONS), _record)
