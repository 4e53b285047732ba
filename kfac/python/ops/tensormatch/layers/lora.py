"""Dense layers with a low-rank update of their weights: `x @ (W + s A B)`.

The update's second matrix `B` is a dense layer of its own, with inputs `s x A`, which
the graph does not hold and which are added to it.  If `W` is trained it is a dense
layer with inputs `x`; the bias goes with `W`, otherwise with `B`.  The gradient of `A`
needs that with respect to `x A`, which the graph does not hold either.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from kfac.python.ops.tensormatch import graph_patterns as gp
from kfac.python.ops.tensormatch.layers import bias, parameters
from kfac.python.ops.tensormatch.layers.kind import LayerKind
from kfac.python.ops.tensormatch.records import (
    DENSE_TYPES,
    MatchRecord,
    RecordType,
    is_transposed,
    parameter_name,
)


def _pattern() -> tuple:
    low_rank = gp.output_of(
        (
            gp.MatMul("low_rank_op"),
            ("In", parameters.Parameter("first"), parameters.Parameter("second")),
        )
    )
    factor = gp.Tensor("factor")
    update = (
        "?:choice",
        low_rank,
        gp.output_of((gp.Mul, ("In", factor, low_rank))),
        gp.output_of((gp.Mul, ("In", low_rank, factor))),
    )
    update = "?:choice", update, gp.output_of((gp.Cast, ("In", update)))
    base, add = parameters.Parameter("base"), gp.one_of("Add", "AddV2")
    weights = gp.output_of(
        ("?:choice", (add, ("In", base, update)), (add, ("In", update, base)))
    )
    product = (
        gp.one_of(*DENSE_TYPES, name="linear_op"),
        ("In", gp.Tensor("in"), weights),
    )
    term = bias.reshaped_or_summed(gp.output_of(product, "product"))
    return gp.output_of(("?:choice", bias.added_to(term), product), "out")


def _record(
    bindings: Mapping[str, Any], consumed: Any, tensors_to_variables: Mapping[Any, Any]
) -> list[MatchRecord]:
    bindings = {"product": bindings["out"], **bindings}
    base, first, second = (
        parameters.find(bindings, name, tensors_to_variables)[0]
        for name in ("base", "first", "second")
    )
    biases, is_bias = bias.find(bindings, tensors_to_variables)
    ops = bindings["linear_op"], bindings["low_rank_op"]
    if not is_bias or any(is_transposed(op) for op in ops):
        return []
    direct = bias.is_added_directly(bindings)
    data = {
        "outputs": bindings["out"] if direct else bindings["product"],
        "dense_inputs": True,
    }
    found = []
    if base is not None:
        found.append((_with_bias(base, biases), {"inputs": bindings["in"], **data}))
        biases = None
    if second is not None:
        inputs = functools.partial(
            _low_rank_inputs,
            bindings["in"],
            bindings["low_rank_op"].inputs[0],
            bindings.get("factor"),
        )
        # The rows of both inputs are the same cases and uses.
        data = {"inputs": inputs, "rows": bindings["in"], **data}
        found.append((_with_bias(second, biases), data))
    records = [
        MatchRecord(RecordType.fully_connected, params, consumed, data)
        for params, data in found
    ]
    if first is not None:
        reason = (
            f"{parameter_name(first)!r} is the first matrix of the low-rank update of "
            f"{ops[0].name!r}; the graph does not hold the product of the layer's "
            "inputs with it"
        )
        unsupported = MatchRecord(
            RecordType.unsupported, first, consumed, {"reason": reason}
        )
        records.append(unsupported)
    return records


def _with_bias(weights: Any, biases: Any) -> Any:
    return weights if biases is None else (weights, biases)


def _low_rank_inputs(
    inputs: tf.Tensor, first: tf.Tensor, factor: tf.Tensor | None
) -> tf.Tensor:
    """What the update's second matrix acts on: `factor * inputs @ first`."""
    product = tf.matmul(inputs, tf.cast(first, inputs.dtype))
    return product if factor is None else tf.cast(factor, inputs.dtype) * product


LORA = LayerKind(_pattern(), frozenset(DENSE_TYPES + bias.ADDITIONS), _record)
