"""Which of the overlapping matches are kept."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from kfac.python.ops.layer_collection.parameters_dict import (
    IdentityDict,
    as_tuple,
    identity,
)
from kfac.python.ops.tensormatch.records import (
    AmbiguousRegistrationError,
    MatchRecord,
    parameter_names,
)

RecordLists = Mapping[Any, list[MatchRecord]]


def filter_records(
    layer_collection: Any,
    record_list_dict: RecordLists,
    user_registered_variables: Collection[Any],
) -> RecordLists:
    """The records that remain for registration.

    Drops what the user registered, what contradicts linked parameters, and what is
    part of a larger match, in this order.

    Args:
      layer_collection: the `LayerCollection`, for its linked parameters.
      record_list_dict: params -> records.
      user_registered_variables: variables that have a block already.

    Returns:
      A new mapping.

    Raises:
      AmbiguousRegistrationError: a variable remains in two groups.
    """
    kept = filter_user_registered_records(record_list_dict, user_registered_variables)
    kept = filter_grouped_variable_records(layer_collection, kept)
    kept = filter_subgraph_records(kept)
    _check_groups_are_disjoint(kept)
    return kept


def filter_user_registered_records(
    record_list_dict: RecordLists, user_registered_variables: Collection[Any]
) -> RecordLists:
    """Drops groups that contain a variable that the user registered."""
    registered = _identities(user_registered_variables)
    return _copy(
        record_list_dict,
        lambda params: registered.isdisjoint(_identities(as_tuple(params))),
    )


def filter_grouped_variable_records(
    layer_collection: Any, record_list_dict: RecordLists
) -> RecordLists:
    """Drops groups that overlap a linked group without being equal to it."""
    linked = [_identities(group) for group in layer_collection.linked_parameters]

    def agrees(params):
        members = _identities(as_tuple(params))
        return all(group == members or group.isdisjoint(members) for group in linked)

    return _copy(record_list_dict, agrees)


def filter_subgraph_records(record_list_dict: RecordLists) -> RecordLists:
    """Drops records that are part of a larger record of one of their variables.

    A record is dropped if another one has a variable in common with it and consumed
    all that it consumed and more.
    """
    records = [record for group in record_list_dict.values() for record in group]
    by_variable = collections.defaultdict(list)
    for record in records:
        for member in _identities(as_tuple(record.params)):
            by_variable[member].append(record)
    superseded = set()
    for group in by_variable.values():
        superseded.update(_superseded(group))
    kept = IdentityDict()
    for record in records:
        if id(record) not in superseded:
            kept.setdefault(record.params, []).append(record)
    return kept


def _superseded(records: list[MatchRecord]) -> Iterable[int]:
    """Ids of the records whose tensors are a strict subset of another's.

    Only records that share a record's rarest tensor can contain it.  That is its
    output, which one other record at most has consumed; so a layer used T times takes
    O(T) comparisons, not O(T^2).
    """
    by_tensor = collections.defaultdict(list)
    for record in records:
        for tensor in record.tensor_set:
            by_tensor[tensor].append(record)
    for record in records:
        lists = (by_tensor[tensor] for tensor in record.tensor_set)
        candidates = min(lists, key=len, default=records)
        if any(record.tensor_set < other.tensor_set for other in candidates):
            yield id(record)


def _check_groups_are_disjoint(record_list_dict: RecordLists) -> None:
    first_group: dict[Any, Any] = {}
    conflicts = []
    for params in record_list_dict:
        for variable in as_tuple(params):
            other = first_group.setdefault(identity(variable), params)
            if other is not params:
                conflicts.append(
                    f"{parameter_names(variable)} is used in the layers "
                    f"{parameter_names(other)} and {parameter_names(params)}"
                )
    if conflicts:
        raise AmbiguousRegistrationError(
            "Variables occur in several groups of parameters. Decide with "
            "define_linked_parameters, or register one of the layers by hand.\n  "
            + "\n  ".join(conflicts)
        )


def _copy(record_list_dict: RecordLists, keep: Any) -> RecordLists:
    kept = IdentityDict()
    for params, records in record_list_dict.items():
        if keep(params):
            kept[params] = list(records)
    return kept


def _identities(variables: Iterable[Any]) -> set[Any]:
    return {identity(variable) for variable in variables}
