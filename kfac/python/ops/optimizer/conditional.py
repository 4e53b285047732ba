"""Side effects that only some steps have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from kfac.python.ops import utils


def done(ops: Any) -> tf.Tensor:
    """A tensor that is True once `ops` (an op, tensor or list of these) have run.

    A branch returns it: a v1 session runs only what a result depends on.
    """
    with tf.control_dependencies([tf.group(ops)]):
        return tf.constant(True)


def run_if(predicate: Any, thunk: Callable[[], Any]) -> tf.Operation:
    """An op that runs `thunk()`'s ops where `predicate` holds, and nothing elsewhere.

    The ops are built inside the branch, so none of them runs when it is not taken.
    Under v1 control flow they wait for the predicate but not for control dependencies
    around this call: compute the predicate under the same dependencies.

    Args:
      predicate: scalar boolean tensor.
      thunk: returns an op, a tensor or a list of these.
    """
    return tf.group(
        utils.smart_cond(predicate, lambda: done(thunk()), lambda: tf.constant(False))
    )
