"""Like `data_reader`, for a data set that is in memory as a whole.

Batches are drawn by gathering random rows, and only the rows' numbers are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import state
from kfac.python.ops.kfac_utils import data_reader


class VariableBatchReader:
    """Random batches, without repetition within a batch.

    Args:
      dataset: constant tensors of `num_examples` rows: the whole data set.
      num_examples: number of rows.
    """

    def __init__(self, dataset: Sequence[tf.Tensor], num_examples: int):
        self._dataset = [tf.convert_to_tensor(tensor) for tensor in dataset]
        self._num_examples = num_examples

    def __call__(self, batch_size: Any) -> list[tf.Tensor]:
        """`batch_size` random rows of each tensor, the same rows of all.

        Raises:
          tf.errors.InvalidArgumentError: `batch_size` exceeds the number of examples;
            when run, or at once if it is static.
        """
        batch_size = data_reader.checked_batch_size(batch_size, self._num_examples)
        return self._rows(self._permutation()[:batch_size])

    def _permutation(self) -> tf.Tensor:
        return tf.random.shuffle(tf.range(self._num_examples))

    def _rows(self, indices: tf.Tensor) -> list[tf.Tensor]:
        return [tf.gather(component, indices) for component in self._dataset]


class CachedDataReader(VariableBatchReader):
    """Also keeps which rows were drawn last.

    In a step that draws, `cached_batch` is the batch before; in any other step it is
    the one drawn last.  It has no rows before the first draw.  The state lives in
    `cached_data_reader/cached_batch_indices`, `[num_examples]`, and
    `cached_data_reader/cached_batch_size`.
    """

    def __init__(self, dataset: Sequence[tf.Tensor], num_examples: int):
        super().__init__(dataset, num_examples)
        with data_reader.reader_scope():
            self._indices = state.get_variable(
                "cached_batch_indices", [num_examples], tf.int32
            )
            self._batch_size = state.get_variable("cached_batch_size", (), tf.int32)
        size = tf.identity(self._batch_size)
        self._cached_batch = self._rows(tf.convert_to_tensor(self._indices)[:size])

    def __call__(self, batch_size: Any) -> list[tf.Tensor]:
        batch_size = data_reader.checked_batch_size(batch_size, self._num_examples)
        permutation = self._permutation()
        store = data_reader.replace_after_reading(
            [self._indices, self._batch_size],
            [permutation, batch_size],
            read_before=self._cached_batch,
        )
        with tf.control_dependencies([store]):
            return self._rows(permutation[:batch_size])

    @property
    def cached_batch(self) -> list[tf.Tensor]:
        """The batch drawn last, as of before this step's draw."""
        return self._cached_batch
