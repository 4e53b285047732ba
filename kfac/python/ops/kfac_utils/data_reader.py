"""Batches of varying size from a stream of large batches, with memory.

Delayed damping adaptation evaluates the loss on the previous batch again; a
`CachedDataReader` keeps it.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import state

tf1 = tf.compat.v1


def checked_batch_size(batch_size: Any, limit: int) -> tf.Tensor:
    """`batch_size` as an int32 tensor that fails to evaluate above `limit`.

    Raises:
      tf.errors.InvalidArgumentError: at once if it is static, else when run.
    """
    batch_size = tf.convert_to_tensor(batch_size, tf.int32)
    check = tf1.assert_less_equal(
        batch_size,
        limit,
        message="Read failure: the batch size is larger than allowed.",
    )
    # In a tf.function a static check leaves nothing to depend on.
    with tf.control_dependencies([check] if check is not None else []):
        return tf.identity(batch_size)


def reader_scope() -> Any:
    """A variable scope for one reader's state; a second reader gets another one.

    Readers are numbered within their graph, so that those of a new trace of a function
    get the same scopes (which `variable_scope(default_name=...)` would not give them).
    """
    counts = _num_readers.setdefault(tf1.get_default_graph(), collections.Counter())
    ambient = tf1.get_variable_scope().name
    number = counts[ambient]
    counts[ambient] += 1
    return tf1.variable_scope(
        f"cached_data_reader_{number}" if number else "cached_data_reader"
    )


_num_readers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def replace_after_reading(
    variables: Sequence[tf.Variable],
    values: Sequence[tf.Tensor],
    read_before: Sequence[tf.Tensor],
) -> tf.Operation:
    """Op that assigns the values once `read_before` have been computed."""
    # Identities make the order hold from inside a branch too: what is computed outside
    # becomes an input of the branch.
    with tf.control_dependencies([tf.identity(tensor) for tensor in read_before]):
        return tf.group(
            *(
                variable.assign(value)
                for variable, value in zip(variables, values, strict=True)
            )
        )


class VariableBatchReader:
    """The first rows of freshly drawn batches.

    Args:
      dataset: tensors that form one freshly shuffled batch at each step, all of at
        least `max_batch_size` rows.
      max_batch_size: upper limit of the batch size.
    """

    def __init__(self, dataset: Sequence[tf.Tensor], max_batch_size: int):
        self._dataset = [tf.convert_to_tensor(tensor) for tensor in dataset]
        self._max_batch_size = max_batch_size

    def __call__(self, batch_size: Any) -> list[tf.Tensor]:
        """The first `batch_size` rows of each tensor of the data set.

        Raises:
          tf.errors.InvalidArgumentError: `batch_size` exceeds `max_batch_size`; when
            run, or at once if it is static.
        """
        batch_size = checked_batch_size(batch_size, self._max_batch_size)
        return [component[:batch_size] for component in self._dataset]


class CachedDataReader(VariableBatchReader):
    """Also keeps the rows that were drawn last.

    In a step that draws, `cached_batch` is the batch before; in any other step it is
    the one drawn last.  It has no rows before the first draw.  The state lives in
    `cached_data_reader/cached_batch_storage_<i>`, `[max_batch_size, ...]`, and
    `cached_data_reader/cached_batch_size`.
    """

    def __init__(self, dataset: Sequence[tf.Tensor], max_batch_size: int):
        super().__init__(dataset, max_batch_size)
        with reader_scope():
            self._storage = [
                state.get_variable(
                    f"cached_batch_storage_{i}",
                    [max_batch_size, *component.shape.as_list()[1:]],
                    component.dtype,
                )
                for i, component in enumerate(self._dataset)
            ]
            self._batch_size = state.get_variable("cached_batch_size", (), tf.int32)
        size = tf.identity(self._batch_size)
        self._cached_batch = [
            tf.convert_to_tensor(stored)[:size] for stored in self._storage
        ]

    def __call__(self, batch_size: Any) -> list[tf.Tensor]:
        batch_size = checked_batch_size(batch_size, self._max_batch_size)
        store = replace_after_reading(
            [*self._storage, self._batch_size],
            [*(c[: self._max_batch_size] for c in self._dataset), batch_size],
            read_before=self._cached_batch,
        )
        with tf.control_dependencies([store]):
            return [component[:batch_size] for component in self._dataset]

    @property
    def cached_batch(self) -> list[tf.Tensor]:
        """The batch drawn last, as of before this step's draw."""
        return self._cached_batch
