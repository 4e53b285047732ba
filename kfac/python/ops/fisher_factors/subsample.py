"""Random sub-samples of cases and of patches."""

from __future__ import annotations

import math

import tensorflow as tf

from kfac.python.ops import config
from kfac.python.ops.fisher_factors import statistics


def _random_tensor_gather(
    array: tf.Tensor, num_ind: int | tf.Tensor, name: str | None = None
) -> tf.Tensor:
    """Random entries of axis 0, without replacement and in random order.

    Args:
      array: `[n, ...]`.
      num_ind: how many; all n, shuffled, if there are no more.
      name: of the name scope.

    Returns:
      `[min(num_ind, n), ...]`.
    """
    with tf.name_scope(name or "random_gather"):
        array = tf.convert_to_tensor(array)
        order = tf.random.shuffle(tf.range(statistics.num_rows(array)))
        return tf.gather(array, order[:num_ind])


def _subsample_patches(patches: tf.Tensor, name: str | None = None) -> tf.Tensor:
    """Random rows of a patch matrix, as many as estimating its second moment needs.

    That is `max_num_patches_per_dimension` rows per column, at most
    `max_num_patches` (see `config.Settings`).

    Args:
      patches: `[n, d]`.
      name: of the name scope.

    Returns:
      `[k, d]`, or `patches` itself if n <= k.

    Raises:
      ValueError: `patches` is not of rank 2.
    """
    with tf.name_scope(name or "subsample_patches"):
        patches = tf.convert_to_tensor(patches)
        if patches.shape.rank != 2:
            raise ValueError(f"Expected patches [n, d], got shape {patches.shape}.")
        settings = config.settings()
        columns = tf.compat.dimension_value(patches.shape[1])
        wanted = min(
            settings.max_num_patches,
            math.ceil(settings.max_num_patches_per_dimension * columns),
        )
        rows = statistics.num_rows(patches)
        if isinstance(rows, int):
            keep_all = rows <= wanted
            return patches if keep_all else _random_tensor_gather(patches, wanted)
        return tf.cond(
            rows <= wanted,
            lambda: patches,
            lambda: _random_tensor_gather(patches, wanted),
        )


def subsample_cases(inputs: tf.Tensor) -> tf.Tensor:
    """Random cases (axis 0), a fraction `inputs_to_extract_patches_factor` of them."""
    factor = config.settings().inputs_to_extract_patches_factor
    cases = statistics.num_rows(inputs)
    if isinstance(cases, int):
        wanted = math.ceil(cases * factor)
    else:
        wanted = tf.cast(tf.math.ceil(tf.cast(cases, tf.float64) * factor), tf.int32)
    return _random_tensor_gather(inputs, wanted)
