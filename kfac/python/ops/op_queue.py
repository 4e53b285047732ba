"""Hands out ops in endlessly reshuffled order, for asynchronous workers."""

from __future__ import annotations

import random
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import tensorflow as tf


class OpQueue:
    """Yields every op once per pass, in a new random order each pass.

    The order is a function of the set of names, the seed and the worker alone.  It is
    drawn in Python: no graph is touched.

    With a common seed and a `worker_index` each, workers share one order but start
    every pass at different points, so that they seldom work on the same op; without,
    workers with equal seeds walk in lock step.

    Args:
      ops: ops, tensors or functions with distinct names; every worker passes the same
        set.
      seed: of the order; by default the current graph's seed, or else none.
      worker_index: in `range(num_workers)`.
      num_workers: number of workers that share the ops.

    Raises:
      TypeError: `ops` has no length.
      ValueError: no ops, or different ops of one name.
    """

    def __init__(
        self,
        ops: Collection[Any],
        seed: int | None = None,
        worker_index: int = 0,
        num_workers: int = 1,
    ):
        if not hasattr(ops, "__len__"):
            raise TypeError(
                "A sized collection of ops is expected (every worker needs the whole "
                f"set), got {type(ops).__name__}; wrap it in list()."
            )
        if len(ops) == 0:
            raise ValueError("An OpQueue needs at least one op, got none.")
        if not 0 <= worker_index < num_workers:
            raise ValueError(
                f"worker_index must be in range(num_workers={num_workers}), got "
                f"{worker_index}."
            )
        self._ops: dict[str, Any] = {}
        for op in ops:
            if self._ops.setdefault(_name(op), op) is not op:
                raise ValueError(f"Two different ops are named {_name(op)!r}.")
        if seed is None:
            seed = tf.compat.v1.get_default_graph().seed
        self._seed = seed
        self._offset = worker_index * len(self._ops) // num_workers
        self._sequences: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._own_sequence = self._sequence()

    @property
    def ops(self) -> Collection[Any]:
        """The distinct ops, in the order given."""
        return self._ops.values()

    def next_op(self, sess: Any = None) -> Any:
        """The next op (which is not run).

        Args:
          sess: session whose position to use, each session starts a sequence of its
            own; None means the queue's own position.
        """
        if sess is None:
            return self._ops[next(self._own_sequence)]
        if sess not in self._sequences:
            self._sequences[sess] = self._sequence()
        return self._ops[next(self._sequences[sess])]

    def _sequence(self) -> Iterator[str]:
        generator = random.Random(self._seed)
        names = sorted(self._ops)
        while True:
            order = generator.sample(names, len(names))
            yield from order[self._offset :] + order[: self._offset]


def _name(op: Any) -> str:
    return op.name if hasattr(op, "name") else op.__name__
