"""Sums over replicas in one packed collective, and a record of what was built.

Used inside replicas of a `tf.distribute` strategy only; `replicas` decides when.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops.utils.packing import Layout, Packing, Spec


@dataclasses.dataclass(frozen=True)
class Collective:
    """One all-reduce that a replica's graph contains.

    Attributes:
      purpose: what travels, e.g. "statistics".
      dtype: name of the dtype.
      num_elements: entries per replica, or None if the shape is not static.
      replica: index of the replica that built it, or None if it is dynamic (TPU).
    """

    purpose: str
    dtype: str
    num_elements: int | None
    replica: int | None

    @property
    def num_bytes(self) -> int | None:
        """Bytes per replica, one way."""
        if self.num_elements is None:
            return None
        return self.num_elements * tf.as_dtype(self.dtype).size


_records: list[list[Collective]] = []


@contextlib.contextmanager
def record() -> Iterator[list[Collective]]:
    """A list that fills with the collectives built while the context is open.

    Building is tracing: a branch that is not taken at run time counts, too.  Threads
    do not matter, since every replica is traced in a thread of its own.
    """
    record: list[Collective] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records[:] = [other for other in _records if other is not record]


def static_replica_id() -> int | None:
    """Index of this replica if the graph is built for it alone, else None (TPU)."""
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    value = tf.get_static_value(replica) if tf.is_tensor(replica) else replica
    return None if value is None else int(value)


def sums(
    tensors: Sequence[tf.Tensor],
    purpose: str,
    layouts: Sequence[Layout] | None = None,
) -> list[tf.Tensor]:
    """Sums over replicas, in one collective per dtype.

    Tensors without a static shape travel by themselves.

    Args:
      tensors: of equal shapes on all replicas.
      purpose: for the record.
      layouts: which entries have to travel; all by default.
    """
    layouts = layouts or [Layout.FULL] * len(tensors)
    static = [i for i, t in enumerate(tensors) if t.shape.is_fully_defined()]
    result = list(tensors)
    packing = Packing([Spec.of(tensors[i], layouts[i]) for i in static])
    vectors = _all_reduce(packing.pack([tensors[i] for i in static]), purpose)
    for i, total in zip(static, packing.unpack(vectors), strict=True):
        result[i] = total
    for i, tensor in enumerate(tensors):
        if i not in static:
            (result[i],) = _all_reduce([tensor], purpose)
    return result


def computed_by_owners(
    thunks: Sequence[Callable[[], Sequence[tf.Tensor]]],
    specs: Sequence[Sequence[Spec]],
    owner_of: Mapping[int, int],
    purpose: str,
) -> list[list[tf.Tensor]]:
    """Results of all thunks on every replica, each thunk run by one replica alone.

    The results are summed over replicas with zeros in the place of what a replica
    does not own.  (An all-gather would move half as much, but TensorFlow's one first
    gathers the lengths, so there are two collectives, and dynamic shapes.)

    Args:
      thunks: each returns a list of tensors.
      specs: per thunk the specs of what it returns.
      owner_of: index of a thunk -> index of its replica.
      purpose: for the record.
    """
    packing = Packing([spec for of_thunk in specs for spec in of_thunk])

    def share_of(replica: int) -> list[tf.Tensor]:
        tensors: list[Any] = []
        for j, (thunk, of_thunk) in enumerate(zip(thunks, specs, strict=True)):
            owned = owner_of[j] == replica
            tensors += list(thunk()) if owned else [None] * len(of_thunk)
        return packing.pack(tensors)

    replica = static_replica_id()
    if replica is not None:
        share = share_of(replica)
    else:  # One program serves all replicas.
        context = tf.distribute.get_replica_context()
        share = tf.switch_case(
            tf.cast(context.replica_id_in_sync_group, tf.int32),
            [lambda r=r: share_of(r) for r in range(context.num_replicas_in_sync)],
        )
    totals = iter(packing.unpack(_all_reduce(share, purpose)))
    return [[next(totals) for _ in of_thunk] for of_thunk in specs]


def _all_reduce(tensors: Sequence[tf.Tensor], purpose: str) -> list[tf.Tensor]:
    if not tensors:
        return []
    replica = static_replica_id()
    for tensor in tensors:
        static = tensor.shape.is_fully_defined()
        size = tensor.shape.num_elements() if static else None
        for record in _records:
            record.append(Collective(purpose, tensor.dtype.name, size, replica))
    context = tf.distribute.get_replica_context()
    return list(context.all_reduce(tf.distribute.ReduceOp.SUM, list(tensors)))
