"""Which ops run at which step, and printing from graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops.utils import replicas


def done(ops: Any) -> tf.Tensor:
    """A tensor that is True once `ops` (any structure of ops and tensors) have run.

    A branch returns it: a v1 session runs only what a result depends on.
    """
    with tf.control_dependencies([replicas.group_all(ops)]):
        return tf.constant(True)


def run_if(predicate: Any, thunk: Callable[[], Any]) -> tf.Operation:
    """An op that runs `thunk()`'s ops where `predicate` holds, and nothing elsewhere.

    The ops are built inside the branch, so none of them runs when it is not taken.
    Under v1 control flow they wait for the predicate but not for control dependencies
    around this call: compute the predicate under the same dependencies.

    Args:
      predicate: scalar boolean tensor.
      thunk: returns any structure of ops and tensors.
    """
    return tf.group(
        replicas.smart_cond(
            predicate, lambda: done(thunk()), lambda: tf.constant(False)
        )
    )


def batch_execute(
    global_step: Any,
    thunks: Sequence[Callable[[], Any]],
    batch_size: int,
    name: str | None = None,
) -> list[tf.Operation]:
    """Spreads the thunks' work over steps, round-robin.

    Args:
      global_step: int scalar.
      thunks: functions that build ops; what they return is run and then ignored.
      batch_size: number of thunks that do work at each step.
      name: name scope.

    Returns:
      One op for each thunk.  Thunk j of N works at step k iff
      `(batch_size - 1 + k batch_size - j) mod N < batch_size`.
    """
    if not thunks:
        return []
    with tf.name_scope(name or "batch_execute"):
        step = tf.cast(global_step, tf.int64)
        # Reduced first, so that the product cannot overflow.
        start = batch_size - 1 + (step % len(thunks)) * batch_size
        return [
            run_if(tf.math.floormod(start - j, len(thunks)) < batch_size, thunk)
            for j, thunk in enumerate(thunks)
        ]


def multiline_print(lists: Sequence[Sequence[Any]]) -> tf.Operation:
    """One op that prints a line for each sequence of items."""
    items: list[Any] = []
    for line_number, line in enumerate(lists):
        first, *rest = line
        if line_number == 0:
            items += [first, *rest]
        elif isinstance(first, str):
            items += ["\n" + first, *rest]
        else:
            items += ["\n", first, *rest]
    return tf.print(*items)
