"""Registers the layers that it finds in the graph behind the losses.

Every output of an operation that the losses depend on is matched against patterns of
layers.  A match makes a record; records that are part of larger ones, that the user
registered already or that contradict linked parameters are dropped, and what remains
is registered.  Variables without a record become generic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import utils
from kfac.python.ops.layer_collection.parameters_dict import (
    IdentityDict,
    as_tuple,
    identity,
    same_variables,
)
from kfac.python.ops.tensormatch import (
    graph_matcher,
    graph_patterns,
    layers,
    reasons,
    registration,
    screening,
)
from kfac.python.ops.tensormatch import tensorflow_graph_util as graph_util
from kfac.python.ops.tensormatch.filters import (
    filter_grouped_variable_records,
    filter_records,
    filter_subgraph_records,
    filter_user_registered_records,
)
from kfac.python.ops.tensormatch.records import (
    GATHER_TYPES,
    AmbiguousRegistrationError,
    MatchRecord,
    RecordType,
    UnsupportedLayerError,
    ensure_sequence,
    parameter_name,
    parameter_names,
    record_affine_from_bindings,
    record_batch_norm_from_bindings,
    record_scale_and_shift_from_bindings,
)
from kfac.python.ops.tensormatch.registration import register_records
from kfac.python.ops.utils import subgraph as subgraph_lib

__all__ = [
    "AmbiguousRegistrationError",
    "MatchRecord",
    "RecordType",
    "UnsupportedLayerError",
    "ensure_sequence",
    "filter_grouped_variable_records",
    "filter_records",
    "filter_subgraph_records",
    "filter_user_registered_records",
    "record_affine_from_bindings",
    "record_batch_norm_from_bindings",
    "record_scale_and_shift_from_bindings",
    "register_layers",
    "register_records",
    "register_subgraph_layers",
]

tf1 = tf.compat.v1

_ADDITIONS = ("Add", "AddV2")

# The patterns that are all tried on an output, each giving a record of its own.
_BASIC_KINDS = (
    layers.LayerKind(
        graph_patterns.Affine,
        frozenset((*_ADDITIONS, "BiasAdd", "Conv2D", "MatMul", "BatchMatMulV2")),
        record_affine_from_bindings,
    ),
    layers.LayerKind(
        graph_patterns.ScaleAndShift,
        frozenset((*_ADDITIONS, "Mul")),
        record_scale_and_shift_from_bindings,
    ),
    layers.LayerKind(
        graph_patterns.Embed, frozenset(GATHER_TYPES), record_affine_from_bindings
    ),
)


def register_layers(
    layer_collection: Any, varlist: Sequence[Any], batch_size: Any = None
) -> Any:
    """Finds the layers behind all registered losses and registers them.

    Every loss must be registered, as often as there are towers (replicas of the model
    in the graph, each on its part of the batch); towers after the first extend the
    blocks of the first one.

    Args:
      layer_collection: the `LayerCollection`. Variables that it has blocks for are
        left alone; its linked parameters and default approximations are honoured.
      varlist: `tf.Variable`s (or Keras variables) to cover.
      batch_size: cases per replica and tower, an int or a scalar tensor. Needed for
        variables without recognised layer, and to tell uses folded into the batch.

    Returns:
      Dictionary of the blocks that were added, params -> block.

    Raises:
      ValueError: there is no loss, the losses have different numbers of towers, or a
        layer that was found cannot be registered.
      AmbiguousRegistrationError: a variable is used in several groups of parameters,
        or is in no recognised layer and there is no `batch_size`.
    """
    losses = layer_collection.towers_by_loss if layer_collection.losses else ()
    if not losses:
        raise ValueError(
            "No losses are registered; register them all before the layers, which are "
            "found by looking at what the losses depend on."
        )
    num_towers = {len(towers) for towers in losses}
    if len(num_towers) > 1:
        raise ValueError(
            "All losses must be registered for the same number of towers; they are "
            f"registered for {[len(towers) for towers in losses]}."
        )
    registered = _variables_of_blocks(layer_collection)
    before = {_key(params) for params in layer_collection.fisher_blocks}
    for tower in range(num_towers.pop()):
        inputs = tf.nest.flatten([loss_towers[tower].inputs for loss_towers in losses])
        with tf1.variable_scope(f"tower_{tower}"):
            register_subgraph_layers(
                layer_collection,
                varlist,
                utils.SubGraph(inputs),
                user_registered_variables=registered,
                reuse=tower > 0,
                batch_size=batch_size,
            )
    added = type(layer_collection.fisher_blocks)()
    for params, block in layer_collection.fisher_blocks.items():
        if _key(params) not in before:
            added[params] = block
    return added


def register_subgraph_layers(
    layer_collection: Any,
    varlist: Sequence[Any],
    subgraph: Any,
    user_registered_variables: Collection[Any] = frozenset(),
    reuse: Any = False,
    batch_size: Any = None,
) -> None:
    """Registers the layers of one tower; see `register_layers`.

    Args:
      layer_collection: the `LayerCollection`.
      varlist: variables to cover.
      subgraph: `utils.SubGraph` of what the losses of the tower depend on.
      user_registered_variables: variables to leave alone.
      reuse: passed to every registration.
      batch_size: cases per replica and tower.

    Raises:
      ValueError: see `register_layers`.
      AmbiguousRegistrationError: see `register_layers`.
    """
    graph = layer_collection.graph
    variables = [subgraph_lib.unwrap_variable(variable) for variable in varlist]
    tensors_to_variables = _tensors_to_variables(variables, graph)
    found = IdentityDict()
    for record in _find_records(graph, subgraph, tensors_to_variables):
        found.setdefault(record.params, []).append(record)
    kept = filter_records(layer_collection, found, user_registered_variables)
    kept, refused = _set_aside_unsupported(layer_collection, kept, subgraph, batch_size)
    covered = {identity(v) for params in kept for v in as_tuple(params)}
    covered |= {identity(v) for v in user_registered_variables}
    left_over = [
        _generic(layer_collection, variable, subgraph, refused, batch_size)
        for variable in variables
        if identity(variable) not in covered
    ]
    register_records(layer_collection, kept, reuse=reuse, batch_size=batch_size)
    for plan in left_over:
        plan.carry_out(layer_collection, reuse)


def _tensors_to_variables(
    variables: Sequence[Any], graph: tf.Graph
) -> Mapping[Any, Any]:
    """Handles, their captures by functions, and reference tensors -> variables."""
    graphs = tuple(subgraph_lib.enclosing_graphs(graph))
    found = IdentityDict()
    for variable in variables:
        for tensor in subgraph_lib.tensors_of(variable, graphs):
            found[tensor] = variable
    return found


def _find_records(
    graph: tf.Graph, subgraph: Any, tensors_to_variables: Mapping[Any, Any]
) -> Iterator[MatchRecord]:
    """Records of all matches, in the order in which the graph was constructed."""
    graphs = reversed(tuple(subgraph_lib.enclosing_graphs(graph)))
    operations = [op for each in graphs for op in each.get_operations()]
    for op in operations:
        if graph_util.is_identity(op):
            continue
        for output in filter(subgraph.is_member, op.outputs):
            records = [
                record
                for kind, match in _matchers(_BASIC_KINDS, op.type)
                for record in _records(output, kind, match, tensors_to_variables)
            ]
            if all(map(_is_unsupported, records)):
                records = _further_records(output, tensors_to_variables) or records
            yield from records


def _further_records(
    output: tf.Tensor, tensors_to_variables: Mapping[Any, Any]
) -> list[MatchRecord]:
    """Records by the first of the further kinds that makes any."""
    for kind, match in _matchers(layers.KINDS, output.op.type):
        records = list(_records(output, kind, match, tensors_to_variables))
        if records:
            return records
    return []


@functools.cache
def _matchers(kinds: tuple[layers.LayerKind, ...], op_type: str) -> list[tuple]:
    """Kinds of layers whose output can come from an operation, and their matchers."""
    return [(kind, _matcher(kind)) for kind in kinds if op_type in kind.root_types]


@functools.cache
def _matcher(kind: layers.LayerKind) -> Callable:
    return graph_matcher.matcher_with_consumed(kind.pattern)


def _records(
    output: tf.Tensor,
    kind: layers.LayerKind,
    match: Callable,
    tensors_to_variables: Mapping[Any, Any],
) -> Iterator[MatchRecord]:
    """Records of an output; of type `unsupported` where something speaks against."""
    result = match(output)
    if not result:
        return
    bindings, consumed = result
    try:
        made = kind.record(bindings, consumed, tensors_to_variables)
    except UnsupportedLayerError as error:
        yield _unsupported(error.params, consumed, str(error))
        return
    for record in made if isinstance(made, list) else [made]:
        if record is None:
            continue
        reason = screening.reason_against(record, bindings, tensors_to_variables)
        if reason is None:
            yield record
        else:
            yield _unsupported(ensure_sequence(record.params)[0], consumed, reason)


def _unsupported(params: Any, consumed: Any, reason: str) -> MatchRecord:
    return MatchRecord(RecordType.unsupported, params, consumed, {"reason": reason})


def _is_unsupported(record: MatchRecord) -> bool:
    return record.record_type is RecordType.unsupported


def _set_aside_unsupported(
    layer_collection: Any,
    record_list_dict: Mapping[Any, list[MatchRecord]],
    subgraph: Any,
    batch_size: Any,
) -> tuple[Mapping[Any, list[MatchRecord]], Mapping[Any, str]]:
    """Splits off the layers that can only be registered as generic.

    Returns:
      The other records, and variable -> reason for the parameters of those layers.

    Raises:
      ValueError: there are such layers, but no `batch_size`; or a layer's number of
        uses is unknown or does not fit.
    """
    kept, refused, problems = IdentityDict(), IdentityDict(), []
    for params, records in record_list_dict.items():
        reason = _reason_for_generic(
            layer_collection, params, records, subgraph, batch_size
        )
        if reason is None:
            kept[params] = records
            continue
        for variable in as_tuple(params):
            refused[variable] = reason
        problems.append(f"{parameter_names(params)}: {reason}.")
    if problems and batch_size is None:
        raise ValueError(
            "Layers were found that have no Fisher block of their own. Register their "
            "parameters by hand, or pass batch_size to have them registered as "
            "generic.\n  " + "\n  ".join(problems)
        )
    return kept, refused


def _reason_for_generic(
    layer_collection: Any,
    params: Any,
    records: Sequence[MatchRecord],
    subgraph: Any,
    batch_size: Any,
) -> str | None:
    for record in filter(_is_unsupported, records):
        return record.data["reason"]
    try:
        registration.plan_registration(layer_collection, params, records, batch_size)
    except UnsupportedLayerError as error:
        return str(error)
    except ValueError:
        return None  # `register_records` reports it together with all others.
    if batch_size is None or _is_linked(layer_collection, params):
        return None
    for variable in as_tuple(params):
        uses = subgraph.variable_uses(variable)
        if uses > len(records):
            return _partly_recognised(layer_collection, variable, records, subgraph)
    return None


def _is_linked(layer_collection: Any, params: Any) -> bool:
    """Whether the user said that these parameters are one layer."""
    linked = layer_collection.linked_parameters
    return any(same_variables(group, as_tuple(params)) for group in linked)


def _partly_recognised(
    layer_collection: Any, variable: Any, records: Sequence[MatchRecord], subgraph: Any
) -> str:
    ops = reasons.consumers(variable, layer_collection.graph, subgraph)
    others = [op for op in ops if not any(op in r.tensor_set for r in records)]
    calls = [op for op in others if reasons.calls_functions(op)]
    if calls:
        return reasons.why_used_in(calls[0])
    uses = ", ".join(f"{op.name!r} ({op.type})" for op in others)
    return (
        f"only {len(records)} of its {subgraph.variable_uses(variable)} uses are "
        f"recognised, not {uses}"
    )


def _generic(
    layer_collection: Any,
    variable: Any,
    subgraph: Any,
    refused: Mapping[Any, str],
    batch_size: Any,
) -> registration.Registration:
    """How a variable without record is to be registered.

    Raises:
      ValueError: it is linked with others.
      AmbiguousRegistrationError: there is no `batch_size`.
    """
    name = parameter_name(variable)
    reason = refused.get(variable)
    if reason is None:
        reason = reasons.why_unmatched(variable, layer_collection.graph, subgraph)
    for group in layer_collection.linked_parameters:
        if len(group) > 1 and any(variable is member for member in group):
            raise ValueError(
                f"{name!r} is in linked group {group}, which was not matched by any "
                f"layer ({reason}). Register the group by hand."
            )
    if batch_size is None:
        raise AmbiguousRegistrationError(
            f"{name!r} is part of no recognised layer: {reason}. Register it by hand, "
            "or pass batch_size to have it registered as generic."
        )
    tf.get_logger().warning("Registering %s as generic: %s.", name, reason)
    return registration.generic(variable, batch_size, reason)


def _variables_of_blocks(layer_collection: Any) -> list[Any]:
    return [v for params in layer_collection.fisher_blocks for v in as_tuple(params)]


def _key(params: Any) -> tuple:
    return tuple(identity(member) for member in as_tuple(params))
