"""Covariance updates: what a moving average takes in, and the replicas' part in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import deferred, utils
from kfac.python.ops.rules import scalars


def map_inputs(block: Any, part: Any, in_float32: deferred.AtLeastFloat32) -> None:
    """Lets a block take its layer's inputs on a part of the batch, in single precision.

    Args:
      block: whose factors are about to be made.
      part: `SubBatch`, or None for the whole batch.
      in_float32: shared by all blocks.
    """
    if part is not None:
        block.use_sub_batch(lambda t: in_float32(part.deferred(t)), part.count)
        return
    inputs = tf.nest.flatten(getattr(block, "_inputs", ()))
    if any(tensor.dtype in deferred.AtLeastFloat32.HALF for tensor in inputs):
        block.use_sub_batch(in_float32, lambda size: size)


def decay_and_weight(
    factor: Any, ema_decay: float, should_decay: Any
) -> tuple[Any, Any]:
    """Decay of the past and weight of the new statistics.

    Args:
      factor: whose average it is about.
      ema_decay: decay per update.
      should_decay: bool or boolean tensor; else a plain running mean is kept.
    """
    if not getattr(factor._cov, "_normalize_value", True):
        # Nothing divides by the accumulated weight, so weights must add up to 1, and
        # there is no plain running mean.
        return ema_decay, 1.0 - ema_decay
    if isinstance(should_decay, (bool, np.bool_)):
        return (ema_decay if should_decay else 1.0), 1.0
    decay = scalars.cast(ema_decay, tf.as_dtype(factor._dtype))
    return tf.where(should_decay, decay, tf.ones_like(decay)), 1.0


def update_together(
    factors: Sequence[Any],
    thunks: Sequence[Callable[[Any], tf.Operation]],
    should_decay: Any,
    ema_decay: float,
    checked: Callable[[Any], Any],
    weight: Any,
) -> list[tf.Operation]:
    """Ops that update all factors, with one exchange between replicas.

    Args:
      factors: all factors.
      thunks: per factor what updates it by itself.
      should_decay: see `decay_and_weight`.
      ema_decay: likewise.
      checked: factor -> context in which its statistics are to be built.
      weight: how much this replica's statistics count, see `utils.all_average`.
    """
    ops, together, statistics, layouts = [], [], [], []
    for factor, thunk in zip(factors, thunks, strict=True):
        if factor.averages_by_itself:
            ops.append(thunk(should_decay))
            continue
        with checked(factor):
            statistics.append([tf.identity(s) for s in factor.new_statistics()])
        layouts += factor.statistics_layouts()
        together.append(factor)
    averages = utils.all_average(statistics, "statistics", weight, layouts)
    for factor, of_factor in zip(together, averages, strict=True):
        decay, ema_weight = decay_and_weight(factor, ema_decay, should_decay)
        ops.append(factor.add_statistics(of_factor, decay, ema_weight))
    return ops
