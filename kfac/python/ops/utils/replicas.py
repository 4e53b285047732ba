"""Assignments, conditionals and reductions under `tf.distribute`.

Outside a strategy everything here is the plain TensorFlow operation.  An object with
`num_replicas_in_sync`, `current_replica_id`, `all_sum` and `map_gather` may be
installed in place of `tf.distribute` (`set_global_constants(tf_replicator=...)`).
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import config, placement_decision, state
from kfac.python.ops.utils import collectives, packing

tf1 = tf.compat.v1

_REPLICATOR_MEMBERS = (
    "num_replicas_in_sync",
    "current_replica_id",
    "all_sum",
    "map_gather",
)

DistributedVarOp = collections.namedtuple(
    "DistributedVarOp", ["name", "graph", "traceback", "type"]
)
DistributedVarOp.__doc__ = "Facts about the op of a variable that has several copies."


class MirroredVariableWrapper:
    """Hashable stand-in for a variable that has several copies."""

    def __init__(self, var: Any):
        self._var = var

    def __getattr__(self, name: str) -> Any:
        return getattr(self._var, name)

    @property
    def op(self) -> DistributedVarOp:
        op = self._var.op
        return DistributedVarOp(op.name, op.graph, op.traceback, op.type)


def set_global_constants(
    posdef_inv_method: str | None = None,
    tf_replicator: Any = None,
    posdef_eig_method: str | None = None,
) -> None:
    """Replaces the settings that are given; None leaves one alone.

    Raises:
      TypeError: `tf_replicator` lacks one of its members.
    """
    if tf_replicator is not None:
        missing = [m for m in _REPLICATOR_MEMBERS if not hasattr(tf_replicator, m)]
        if missing:
            raise TypeError(
                f"tf_replicator {tf_replicator!r} has no {', '.join(missing)}. "
                "TF-Replicator is gone; use a tf.distribute strategy instead."
            )
    config.replace(
        posdef_inv_method=posdef_inv_method,
        tf_replicator=tf_replicator,
        posdef_eig_method=posdef_eig_method,
    )


def get_tf_replicator() -> Any:
    """The installed replicator object, or None."""
    return config.settings().tf_replicator


def is_tpu_replicated() -> bool:
    """Whether this is a replica of a TPU strategy."""
    return is_in_replica() and isinstance(
        tf.distribute.get_strategy(),
        (tf.distribute.TPUStrategy, tf1.distribute.experimental.TPUStrategy),
    )


def is_replicated() -> bool:
    """Whether several replicas train in synchrony."""
    return get_tf_replicator() is not None or (
        tf.distribute.has_strategy()
        and tf.distribute.get_strategy().num_replicas_in_sync > 1
    )


def get_num_replicas() -> int:
    """Number of replicas in synchrony; 1 outside a strategy."""
    replicator = get_tf_replicator()
    if replicator is not None:
        return replicator.num_replicas_in_sync
    return tf.distribute.get_strategy().num_replicas_in_sync


def get_replica_id() -> Any:
    """Index of this replica; 0 outside a replica context."""
    replicator = get_tf_replicator()
    if replicator is not None:
        return replicator.current_replica_id
    if not is_in_replica():
        return 0
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def is_in_replica() -> bool:
    """Whether this code builds a replica of a `tf.distribute` strategy."""
    return tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()


def preferred_int_dtype() -> tf.DType:
    """int64, or int32 on a TPU."""
    return tf.int32 if is_tpu_replicated() else tf.int64


def all_sum(structure: Any, name: str | None = None) -> Any:
    """Sums over replicas of all tensors of a structure, in one collective per dtype.

    Unchanged outside replicas; in cross-replica context only per-replica values are
    reduced, since a plain tensor there is one value already.

    Args:
      structure: nested structure of tensors, equal in shape on all replicas.
      name: what it is, for the record of collectives (`collectives.record`).
    """
    replicator = get_tf_replicator()
    if replicator is not None:
        return replicator.all_sum(structure, name=name)
    if not _in_several_replicas():
        return _reduced_from_outside(structure, tf.distribute.ReduceOp.SUM)
    tensors = [tf.convert_to_tensor(t) for t in tf.nest.flatten(structure)]
    sums = collectives.sums(tensors, name or "sum")
    return tf.nest.pack_sequence_as(structure, sums)


def all_average(
    structure: Any,
    name: str | None = None,
    weight: Any = None,
    layouts: Sequence[packing.Layout] | None = None,
) -> Any:
    """Means over replicas, like `all_sum`.

    Args:
      structure: nested structure of floating-point tensors.
      name: what it is.
      weight: how much this replica counts, a nonnegative scalar: the number of cases
        of a mean over cases. A replica of weight zero is left out whatever it
        computed. None weights all replicas alike.
      layouts: which entries of each (flattened) tensor have to travel.
    """
    replicator = get_tf_replicator()
    if replicator is not None:
        sums = replicator.all_sum(structure, name=name)
        count = replicator.num_replicas_in_sync
        return tf.nest.map_structure(lambda total: total / count, sums)
    if not _in_several_replicas():
        return _reduced_from_outside(structure, tf.distribute.ReduceOp.MEAN)
    tensors = [tf.convert_to_tensor(t) for t in tf.nest.flatten(structure)]
    name = name or "average"
    if weight is None:
        sums = collectives.sums(tensors, name, layouts)
        count = get_num_replicas()
        means = [total / tf.cast(count, total.dtype) for total in sums]
    else:
        means = _weighted_means(tensors, weight, name, layouts)
    return tf.nest.pack_sequence_as(structure, means)


def _weighted_means(tensors, weight, name, layouts):
    # The weights travel with what they weight.
    weights = {t.dtype: tf.cast(weight, t.dtype) for t in tensors}
    weighted = [
        tf.where(weights[t.dtype] > 0, weights[t.dtype] * t, tf.zeros_like(t))
        for t in tensors
    ]
    layouts = list(layouts or [packing.Layout.FULL] * len(tensors))
    totals = collectives.sums(
        [*weighted, *weights.values()],
        name,
        [*layouts, *(packing.Layout.FULL for _ in weights)],
    )
    total_weights = dict(zip(weights, totals[len(tensors) :], strict=True))
    return [
        tf.math.divide_no_nan(total, total_weights[total.dtype])
        for total in totals[: len(tensors)]
    ]


def _in_several_replicas() -> bool:
    return is_in_replica() and tf.distribute.get_strategy().num_replicas_in_sync > 1


def _reduced_from_outside(structure: Any, op: tf.distribute.ReduceOp) -> Any:
    if not (tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context()):
        return structure
    strategy = tf.distribute.get_strategy()
    return tf.nest.map_structure(
        lambda value: (
            strategy.reduce(op, value, axis=None)
            if isinstance(value, tf.distribute.DistributedValues)
            else value
        ),
        structure,
    )


def map_gather(thunks: Sequence[Callable[[], Any]], name: str | None = None) -> tuple:
    """What each thunk returns.

    With a replicator, thunk i is computed on replica `i mod R` alone and shared; under
    a strategy every replica computes every thunk.
    """
    replicator = get_tf_replicator()
    if replicator is not None:
        return tuple(replicator.map_gather(thunks, name=name))
    return tuple(thunk() for thunk in thunks)


def shared_out(
    thunks: Sequence[Callable[[], Sequence[tf.Tensor]]],
    specs: Sequence[Sequence[packing.Spec]],
    costs: Sequence[float],
    name: str,
) -> list[list[tf.Tensor]]:
    """What all thunks return, each computed by one replica, evened out by cost.

    Outside of several replicas the thunks are simply called.

    Args:
      thunks: each returns a list of tensors.
      specs: per thunk the specs of what it returns, which travel in one collective.
      costs: per thunk the work it takes, in any unit.
      name: what it is, for the record of collectives.
    """
    if not _in_several_replicas():
        return [list(thunk()) for thunk in thunks]
    owner_of = placement_decision.largest_first(
        dict(enumerate(costs)), range(get_num_replicas())
    )
    return collectives.computed_by_owners(thunks, specs, owner_of, name)


def smart_assign(
    variable: tf.Variable,
    value: Any,
    assign_fn: Callable[[Any, Any], Any] = tf1.assign,
    force_cast: bool = False,
    force_sync: bool = True,
) -> Any:
    """`assign_fn(variable, value)` that also works inside a replica.

    Args:
      variable: variable to assign to.
      value: its new value (or whatever `assign_fn` makes of it).
      assign_fn: `tf.compat.v1.assign`, `assign_add`, ...
      force_cast: whether to cast `value` to the variable's dtype.
      force_sync: in a replica of a mirrored strategy, whether the value is replaced by
        its mean over replicas first; unset it only if all replicas hold the same value.

    Returns:
      What `assign_fn` returns; in a replica, for this replica's copy.
    """
    if force_cast:
        value = tf.cast(value, variable.dtype.base_dtype)
    if not is_in_replica():
        return assign_fn(variable, value)
    if force_sync and _is_mirrored():
        value = _mean_in_dtype(tf.convert_to_tensor(value))
    if variable.aggregation == tf.VariableAggregation.NONE:
        # Writes this replica's copy, also where no collective may run (a branch).
        return assign_fn(variable, value)
    return tf.distribute.get_replica_context().merge_call(
        lambda strategy, *args: strategy.extended.update(args[0], assign_fn, args[1:]),
        args=(variable, value),
    )


def _mean_in_dtype(value: tf.Tensor) -> tf.Tensor:
    if value.dtype.is_floating or value.dtype.is_complex:
        return all_average(value)
    return all_sum(value) // get_num_replicas()


def smart_cond(
    predicate: Any,
    true_fn: Callable[[], Any],
    false_fn: Callable[[], Any],
    name: str | None = None,
) -> Any:
    """`tf.cond` whose branches may contain collectives.

    In a replica of a mirrored strategy one conditional is built for all replicas, on
    the first replica's predicate, and each replica's own functions run inside it.  The
    functions are then called for their effects: the result is a dummy constant.
    """
    if not (is_in_replica() and _is_mirrored()):
        return tf.cond(predicate, true_fn, false_fn, name=name)

    def run_branch(strategy, function):
        results = strategy.extended.call_for_each_replica(
            lambda branch: group_all(branch()), args=(function,)
        )
        with tf.control_dependencies(strategy.experimental_local_results(results)):
            return tf.constant(True)

    def merged(strategy, predicate, true_fn, false_fn):
        predicate = strategy.experimental_local_results(predicate)[0]
        return tf.cond(
            predicate,
            lambda: run_branch(strategy, true_fn),
            lambda: run_branch(strategy, false_fn),
            name=name,
        )

    context = tf.distribute.get_replica_context()
    # The branches run in threads of their own, which know no variable store.
    true_fn, false_fn = state.carried(true_fn), state.carried(false_fn)
    return context.merge_call(merged, args=(predicate, true_fn, false_fn))


def group_all(structure: Any) -> tf.Operation:
    """One op that runs every op and tensor of a structure, in which None is nothing."""
    return tf.group(*(x for x in tf.nest.flatten(structure) if x is not None))


def _is_mirrored() -> bool:
    return isinstance(
        tf.distribute.get_strategy(),
        (
            tf.distribute.MirroredStrategy,
            tf.distribute.MultiWorkerMirroredStrategy,
            tf1.distribute.MirroredStrategy,
        ),
    )
