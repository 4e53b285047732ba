"""Between parameter lists, column vectors and matrices; sparse gradients pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def get_shape(tensor: Any) -> tuple:
    """Shape as a tuple: ints where it is static, scalar int32 tensors elsewhere.

    Raises:
      ValueError: unknown rank.
    """
    static = tf.TensorShape(tensor.shape)
    if static.rank is None:
        raise ValueError(
            f"{tensor} has an unknown rank; give it one with set_shape or "
            "tf.ensure_shape."
        )
    sizes = static.as_list()
    if None not in sizes:
        return tuple(sizes)
    dynamic = tf.shape(tf.convert_to_tensor(tensor))
    return tuple(dynamic[i] if d is None else d for i, d in enumerate(sizes))


def tensors_to_column(tensors: Any) -> tf.Tensor:
    """One tensor, or a sequence of them, flattened row-major to `[total, 1]`."""
    if isinstance(tensors, (list, tuple)):
        return tf.concat([tf.reshape(t, [-1, 1]) for t in tensors], axis=0)
    return tf.reshape(tensors, [-1, 1])


def column_to_tensors(tensors_template: Any, colvec: tf.Tensor) -> Any:
    """Inverse of `tensors_to_column`.

    Args:
      tensors_template: tensor, or sequence of tensors, of static shape.
      colvec: `[total, 1]`.

    Returns:
      A tensor for a tensor, a tuple for a sequence, shaped like the template.
    """
    if not isinstance(tensors_template, (list, tuple)):
        return tf.reshape(colvec, tensors_template.shape.as_list())
    shapes = [template.shape.as_list() for template in tensors_template]
    sizes = [tf.TensorShape(shape).num_elements() for shape in shapes]
    pieces = tf.split(tf.reshape(colvec, [-1]), sizes)
    return tuple(
        tf.reshape(piece, shape) for piece, shape in zip(pieces, shapes, strict=True)
    )


def layer_params_to_mat2d(vector: Any) -> Any:
    """Parameters of a layer as the matrix that a Kronecker-factored block acts on.

    Args:
      vector: `(weights, bias)`, a single tensor, or `tf.IndexedSlices`.

    Returns:
      `[fan_in + 1, out]` with the bias as the last row, `[fan_in, out]`, or the
      `tf.IndexedSlices` unchanged.
    """
    if isinstance(vector, (list, tuple)):
        weights, bias = vector
        matrix = _flatten_to_last_axis(weights)
        return tf.concat([matrix, tf.reshape(bias, [1, -1])], axis=0)
    if isinstance(vector, tf.IndexedSlices):
        return vector
    return _flatten_to_last_axis(vector)


def _flatten_to_last_axis(tensor: Any) -> tf.Tensor:
    return tf.reshape(tensor, [-1, tensor.shape.as_list()[-1]])


def mat2d_to_layer_params(vector_template: Any, mat2d: Any) -> Any:
    """Inverse of `layer_params_to_mat2d`.

    Raises:
      TypeError: a sparse template with a dense matrix.
    """
    if isinstance(vector_template, (list, tuple)):
        weights, bias = mat2d[:-1], mat2d[-1]
        return tf.reshape(weights, vector_template[0].shape.as_list()), bias
    if isinstance(vector_template, tf.IndexedSlices):
        if not isinstance(mat2d, tf.IndexedSlices):
            raise TypeError(
                "The template is a tf.IndexedSlices, so the matrix must be one too; "
                f"got {type(mat2d).__name__}."
            )
        return mat2d
    return tf.reshape(mat2d, vector_template.shape.as_list())


def kronecker_product(mat1: tf.Tensor, mat2: tf.Tensor) -> tf.Tensor:
    """`mat1 ⊗ mat2` of matrices of static shape.

    Args:
      mat1: `[m1, n1]`.
      mat2: `[m2, n2]`.

    Returns:
      `[m1 * m2, n1 * n2]`, entry `(i1 m2 + i2, j1 n2 + j2)` being
      `mat1[i1, j1] mat2[i2, j2]`.
    """
    shapes: Sequence[Sequence[int]] = [mat1.shape.as_list(), mat2.shape.as_list()]
    (m1, n1), (m2, n2) = shapes
    outer = tf.reshape(mat1, [m1, 1, n1, 1]) * tf.reshape(mat2, [1, m2, 1, n2])
    return tf.reshape(outer, [m1 * m2, n1 * n2])
