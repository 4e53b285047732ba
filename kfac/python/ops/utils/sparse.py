"""Products with matrices that have few non-zero rows (`tf.IndexedSlices`).

Repeated indices are kept: they mean a sum of rows, and these products are linear.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def matmul_sparse_dense(
    A: tf.IndexedSlices,
    B: Any,
    name: str | None = None,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> tf.IndexedSlices:
    """`A B` for a row-sparse A.

    Args:
      A: rows of an `[m, n]` matrix: indices `[k]`, values `[k, n]`.
      B: `[n, p]` (`[p, n]` with `transpose_b`).
      name: name of the op.
      transpose_a: not available, the transpose of a row-sparse matrix is not one.
      transpose_b: whether to use the transpose of B.

    Returns:
      Rows of the `[m, p]` product, with the same indices.

    Raises:
      ValueError: `transpose_a`, or operands of another rank.
    """
    if transpose_a:
        raise ValueError(
            "transpose_a is not available: the transpose of an IndexedSlices has few "
            "non-zero columns, which an IndexedSlices cannot represent."
        )
    _check_row_sparse(A)
    B = tf.convert_to_tensor(B)
    if B.shape.rank != 2:
        raise ValueError(f"B must be a matrix, got shape {B.shape}.")
    with tf.name_scope(name or "matmul_sparse_dense"):
        values = tf.matmul(A.values, B, transpose_b=transpose_b)
        dense_shape = None
        if A.dense_shape is not None:
            columns = tf.shape(B, out_type=A.dense_shape.dtype)[0 if transpose_b else 1]
            dense_shape = tf.stack([A.dense_shape[0], columns])
        return tf.IndexedSlices(values, A.indices, dense_shape)


def matmul_diag_sparse(
    A_diag: Any, B: tf.IndexedSlices, name: str | None = None
) -> tf.IndexedSlices:
    """`diag(A_diag) B` for a row-sparse B.

    Args:
      A_diag: `[m]`.
      B: rows of an `[m, n]` matrix.
      name: name of the op.

    Raises:
      ValueError: operands of another rank.
    """
    A_diag = tf.convert_to_tensor(A_diag)
    if A_diag.shape.rank != 1:
        raise ValueError(f"A_diag must be a vector, got shape {A_diag.shape}.")
    _check_row_sparse(B)
    with tf.name_scope(name or "matmul_diag_sparse"):
        scale = tf.gather(A_diag, B.indices)
        return tf.IndexedSlices(scale[:, None] * B.values, B.indices, B.dense_shape)


def _check_row_sparse(matrix: tf.IndexedSlices) -> None:
    if matrix.indices.shape.rank != 1 or matrix.values.shape.rank != 2:
        raise ValueError(
            "An IndexedSlices of rows is expected, with indices [k] and values [k, n]; "
            f"got indices {matrix.indices.shape} and values {matrix.values.shape}."
        )
