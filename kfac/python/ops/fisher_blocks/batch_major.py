"""Data of several uses with the cases first, as factors want it.

Layers on sequences hold `[batch, uses, features]`, factors want the uses first.
Rearranged data are deferred tensors, so nothing is moved on steps that do not use
them; the same data give the same object, so that layers can share a factor.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from kfac.python.ops import deferred
from kfac.python.ops.fisher_blocks.base import is_sequence

_rearranged: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def rows(
    data: Any, num_uses: int, features: int | None = None
) -> deferred.DeferredTensor:
    """The data as `[batch * uses, features]`, in the order that costs nothing.

    Args:
      data: `[batch, <uses>, features]` or folded `[batch * uses, features]`; ids
        without the last axis; or a tuple of such tensors.
      num_uses: number of uses of all tensors together.
      features: number of features, where they may have several axes (attention
        heads); the size of the last axis by default.
    """
    del num_uses  # For the interface of `use_major`.
    parts = _parts(data)
    features = _features(parts[0], features)
    sizes = [_num_rows(part, features) for part in parts]
    total = None if None in sizes else sum(sizes)

    def fold():
        folded = [tf.reshape(tf.convert_to_tensor(p), [-1, *features]) for p in parts]
        return folded[0] if len(folded) == 1 else tf.concat(folded, axis=0)

    return _deferred(parts, ("rows", *features), fold, [total, *features])


def use_major(
    data: Any, num_uses: int, features: int | None = None
) -> deferred.DeferredTensor:
    """The data as `[uses, batch, features]`; several tensors one after the other.

    Args:
      data: see `rows`.
      num_uses: number of uses of all tensors together.
      features: see `rows`.
    """
    parts = _parts(data)
    uses = num_uses // len(parts)
    features = _features(parts[0], features)
    size = _num_rows(parts[0], features)
    batch = None if size is None else size // uses

    def rearrange():
        moved = []
        for part in parts:
            part = tf.reshape(tf.convert_to_tensor(part), [-1, uses, *features])
            moved.append(tf.transpose(part, [1, 0, *range(2, 2 + len(features))]))
        return moved[0] if len(moved) == 1 else tf.concat(moved, axis=0)

    how = ("use-major", uses, *features)
    return _deferred(parts, how, rearrange, [num_uses, batch, *features])


def _deferred(
    parts: tuple[Any, ...], how: tuple, resolve: Callable, shape: list[int | None]
) -> deferred.DeferredTensor:
    key = (*(id(part) for part in parts), *how)
    if key not in _rearranged:
        first = parts[0]
        # The closure of `resolve` keeps the parts alive, and so their ids unique.
        result = deferred.DeferredTensor(
            resolve,
            shape,
            first.dtype,
            first.name,
            getattr(first, "device", None) or "",
            one_hot_depth=getattr(first, "one_hot_depth", None),
        )
        _rearranged[key] = result
        return result
    return _rearranged[key]


def _parts(data: Any) -> tuple[Any, ...]:
    return tuple(data) if is_sequence(data) else (data,)


def _features(tensor: Any, features: int | None) -> list[int]:
    """Shape of a row: no axis for ids, otherwise one."""
    if getattr(tensor, "one_hot_depth", None) is not None:
        return []
    return [features or tf.compat.dimension_value(tensor.shape[-1])]


def _num_rows(tensor: Any, features: list[int]) -> int | None:
    total = tensor.shape.num_elements()
    return None if total is None else total // math.prod(features)
