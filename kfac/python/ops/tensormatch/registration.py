"""From records to registrations: all are planned first and carried out then."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops.layer_collection.approximations import BLOCK_TYPES
from kfac.python.ops.layer_collection.parameters_dict import as_tuple, same_variables
from kfac.python.ops.tensormatch import uses as uses_lib
from kfac.python.ops.tensormatch.records import (
    AmbiguousRegistrationError,
    MatchRecord,
    RecordType,
    UnsupportedLayerError,
    ensure_sequence,
    parameter_name,
    parameter_names,
)


@dataclasses.dataclass(frozen=True)
class Registration:
    """A call of one of the collection's methods.

    Attributes:
      method: its name.
      args: positional arguments, the parameters first.
      options: keyword arguments, without `reuse`.
      reason: why the parameters have no layer-specific block, if they have not.
    """

    method: str
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    reason: str | None = None

    def carry_out(self, layer_collection: Any, reuse: Any) -> None:
        """Makes the call."""
        method = getattr(layer_collection, self.method)
        method(*self.args, reuse=reuse, **self.options)
        reasons = getattr(layer_collection, "generic_reasons", None)
        if self.reason is not None and reasons is not None:
            for param in ensure_sequence(self.args[0]):
                reasons[param.ref()] = self.reason


def generic(params: Any, batch_size: Any, reason: str) -> Registration:
    """The registration of parameters without layer-specific approximation."""
    return Registration("register_generic", (params, batch_size), {}, reason)


def register_records(
    layer_collection: Any,
    record_list_dict: Mapping[Any, list[MatchRecord]],
    reuse: Any = False,
    batch_size: Any = None,
) -> None:
    """Registers layers with a collection, in the order of their names.

    Groups of several parameters come before single ones. Nothing is registered unless
    everything can be.

    Args:
      layer_collection: the `LayerCollection`.
      record_list_dict: params -> records of their uses, in the order of time.
      reuse: passed to every registration.
      batch_size: cases per replica and tower, an int or a scalar tensor; tells uses
        folded into the batch axis, and is needed for generic registrations.

    Raises:
      ValueError: a group has mixed record types; uses do not divide into the batch, or
        their number is not known; or a layer cannot be represented.
      AmbiguousRegistrationError: a generic registration needs `batch_size`.
    """
    plan: list[Registration] = []
    problems = []
    for params in sorted(record_list_dict, key=_order):
        records = record_list_dict[params]
        try:
            plan += plan_registration(layer_collection, params, records, batch_size)
        except ValueError as error:
            problems.append(f"{parameter_names(params)}: {error}")
    if problems:
        raise ValueError(
            "Layers that were found in the graph cannot be registered:\n  "
            + "\n  ".join(problems)
        )
    for registration in plan:
        registration.carry_out(layer_collection, reuse)


def plan_registration(
    layer_collection: Any,
    params: Any,
    records: Sequence[MatchRecord],
    batch_size: Any,
) -> list[Registration]:
    """How the layer with these parameters is to be registered.

    Raises:
      UnsupportedLayerError: no block can represent it, but a generic one can.
      ValueError: mixed record types, or a number of uses that is unknown or does not
        fit `batch_size`.
      AmbiguousRegistrationError: only a generic block can represent it, and there is
        no `batch_size`.
    """
    kinds = sorted({record.record_type.name for record in records})
    if len(kinds) > 1:
        raise ValueError(
            f"mixed record types: used as {' and as '.join(kinds)}; register these "
            "parameters by hand"
        )
    plan = _PLANNERS[records[0].record_type]
    return plan(layer_collection, params, records, batch_size)


def _order(params: Any) -> tuple:
    names = tuple(parameter_name(param) for param in ensure_sequence(params))
    return not isinstance(params, tuple), names


def _fully_connected(layer_collection, params, records, batch_size):
    kinds = {record.data.get("dense_inputs", True) for record in records}
    if len(kinds) > 1:
        raise UnsupportedLayerError(
            params, "used both as a table that rows are looked up in and as a matrix"
        )
    dense_inputs = kinds.pop()
    rank = 2 if dense_inputs else 1
    uses = [_uses_of(record, rank, batch_size) for record in records]
    ranks = [_rank(record.inputs) - 1 + _feature_axes(record) for record in records]
    is_multi = len(records) > 1 or uses[0].count > 1 or ranks[0] > rank
    options = {"dense_inputs": dense_inputs, "approx": None}
    if not dense_inputs and layer_collection._get_linked_approx(params) is None:
        # Exact, for the second moment of one-hot vectors is diagonal.
        options["approx"] = "kron_indep_in_diag" if is_multi else "kron_in_diag"
    data = _inputs_and_outputs(records)
    if not is_multi:
        return [Registration("register_fully_connected", (params, *data), options)]
    # Data with more axes than [uses, batch, features] must have the cases first.
    many_axes = max(ranks) > rank + 1 or any(_feature_axes(r) > 1 for r in records)
    if len(records) == 1 or many_axes or any(use.count > 1 for use in uses):
        _check_sequences(params, records, uses, many_axes)
        options["num_uses"] = sum(use.count for use in uses)
    if uses[0].batch_major or many_axes:
        options["batch_major"] = True
    elif len(records) == 1:
        tf.get_logger().warning(
            "The inputs of %s hold %d uses; [time, batch] order is assumed.",
            parameter_names(params),
            uses[0].count,
        )
    return [Registration("register_fully_connected_multi", (params, *data), options)]


def _check_sequences(
    params: Any,
    records: Sequence[MatchRecord],
    uses: Sequence[uses_lib.Uses],
    many_axes: bool,
) -> None:
    """Refuses data of several uses per tensor that blocks cannot take.

    Raises:
      UnsupportedLayerError: as said.
    """
    if len(set(uses)) > 1 or len({_rank(record.outputs) for record in records}) > 1:
        raise UnsupportedLayerError(
            params,
            f"used {len(records)} times, on sequences of different lengths "
            f"({[use.count for use in uses]})",
        )
    if (
        uses[0].count > 1
        and not uses[0].batch_major
        and (many_axes or len(records) > 1)
    ):
        raise UnsupportedLayerError(
            params, "the cases are not known to be the first axis of its data"
        )


def _uses_of(record: MatchRecord, rank: int, batch_size: Any) -> uses_lib.Uses:
    rows = record.data.get("rows", record.inputs)
    features = None
    if record.data.get("dense_inputs", True):
        weights = ensure_sequence(record.params)[0]
        outputs = record.outputs.shape[-_feature_axes(record) :].num_elements()
        total = weights.shape.num_elements()
        features = total // outputs if total and outputs else None
        if features is not None and rows is record.inputs:
            # A dynamic reshape forgets what the product needs.
            rows.set_shape([*rows.shape.as_list()[:-1], features])
    return uses_lib.uses_of_rows(rows, features, rank, batch_size)


def _feature_axes(record: MatchRecord) -> int:
    """Number of axes that the features of a dense layer's outputs have."""
    return record.data.get("feature_axes", 1)


def _conv2d(layer_collection, params, records, batch_size):
    data = _common_data(params, records)
    if _rank(records[0].inputs) > 4:
        raise UnsupportedLayerError(
            params,
            f"the inputs of the convolution have rank {_rank(records[0].inputs)}",
        )
    args = (params, data["strides"], data["padding"], *_inputs_and_outputs(records))
    options = {"data_format": data["data_format"]}
    if "dilations" in data:
        options["dilations"] = data["dilations"]
    if _is_grouped(records):
        _single_use(params, records, batch_size)
        if layer_collection._get_linked_approx(params) is None:
            # Kronecker factors would mix the groups.
            options["approx"] = "diagonal"
        return [Registration("register_conv2d", args, options)]
    if len(records) == 1:
        uses = uses_lib.uses_of_images(records[0].inputs, batch_size)
        if uses.count == 1:
            return [Registration("register_conv2d", args, options)]
        options["num_uses"] = uses.count
    return [Registration("register_conv2d_multi", args, options)]


def _is_grouped(records: Sequence[MatchRecord]) -> bool:
    """Whether the filter sees a part of the channels at a time."""
    seen = ensure_sequence(records[0].params)[0].shape.as_list()[-2]
    channels = [record.inputs.shape.as_list()[-1] for record in records]
    return any(None not in (n, seen) and n != seen for n in channels)


def _conv1d(layer_collection, params, records, batch_size):
    del layer_collection
    data = _single_use(params, records, batch_size).data
    args = (params, data["strides"], data["padding"], *_inputs_and_outputs(records))
    options = {"dilations": data["dilations"]} if "dilations" in data else {}
    return [Registration("register_conv1d", args, options)]


def _convolution(layer_collection, params, records, batch_size):
    del layer_collection
    data = _single_use(params, records, batch_size).data
    args = (params, *_inputs_and_outputs(records), data["padding"])
    options = {"strides": data["strides"][1:-1]}
    if "dilations" in data:
        options["dilation_rate"] = data["dilations"][1:-1]
    return [Registration("register_convolution", args, options)]


def _depthwise_conv2d(layer_collection, params, records, batch_size):
    del layer_collection
    data = _single_use(params, records, batch_size).data
    args = (params, *_inputs_and_outputs(records), data["strides"], data["padding"])
    options = {"rate": data["dilations"]} if "dilations" in data else {}
    return [Registration("register_depthwise_conv2d", args, options)]


def _scale_and_shift(layer_collection, params, records, batch_size):
    del layer_collection, batch_size
    if len(records) > 1:
        raise UnsupportedLayerError(
            params, f"scales (and shifts) {len(records)} tensors; blocks can have one"
        )
    args = (params, *_inputs_and_outputs(records))
    return [Registration("register_scale_and_shift", args, {})]


def _batch_norm(layer_collection, params, records, batch_size):
    del records
    if batch_size is None:
        raise AmbiguousRegistrationError(
            f"{parameter_names(params)} belongs to a batch normalisation and can only "
            "be registered as generic, for which batch_size is needed."
        )
    approx = layer_collection._get_linked_approx(params)
    if approx is None or _is_meant_for_others(layer_collection, params, approx):
        approx = layer_collection.default_generic_approximation
    reason = "scale or shift of a batch normalisation"
    groups = ensure_sequence(params) if approx == "diagonal" else (params,)
    return [generic(group, batch_size, reason) for group in groups]


def _is_meant_for_others(layer_collection: Any, params: Any, approx: str) -> bool:
    """Whether it is preferred for a larger layer, of which these are parameters.

    The collection ignores it for them.
    """
    linked = getattr(layer_collection, "linked_parameters", ())
    is_linked = any(same_variables(group, as_tuple(params)) for group in linked)
    return not is_linked and approx not in BLOCK_TYPES["generic"]


def _unsupported(layer_collection, params, records, batch_size):
    del layer_collection, batch_size
    raise UnsupportedLayerError(params, records[0].data["reason"])


_PLANNERS = {
    RecordType.fully_connected: _fully_connected,
    RecordType.conv2d: _conv2d,
    RecordType.conv1d: _conv1d,
    RecordType.convolution: _convolution,
    RecordType.depthwise_conv2d: _depthwise_conv2d,
    RecordType.scale_and_shift: _scale_and_shift,
    RecordType.batch_norm: _batch_norm,
    RecordType.unsupported: _unsupported,
}


def _single_use(
    params: Any, records: Sequence[MatchRecord], batch_size: Any
) -> MatchRecord:
    """The only record of a kind of layer without block for several uses."""
    uses = [uses_lib.uses_of_images(r.inputs, batch_size).count for r in records]
    if sum(uses) > 1:
        raise UnsupportedLayerError(
            params,
            f"used {sum(uses)} times; among the convolutions only 2-D ones without "
            "groups can be",
        )
    return records[0]


def _common_data(params: Any, records: Sequence[MatchRecord]) -> dict[str, Any]:
    """What the records of one convolution have in common."""
    names = ("strides", "padding", "data_format", "dilations")
    first = records[0].data
    for record in records:
        if any(record.data.get(name) != first.get(name) for name in names):
            raise UnsupportedLayerError(
                params, "used with different strides, paddings or dilations"
            )
    return first


def _inputs_and_outputs(records: Sequence[MatchRecord]) -> tuple[Any, Any]:
    """Tensors of the only use, or tuples over uses."""
    if len(records) == 1:
        return records[0].inputs, records[0].outputs
    return (
        tuple(record.inputs for record in records),
        tuple(record.outputs for record in records),
    )


def _rank(tensor: Any) -> int:
    return tensor.shape.rank or 0
