"""Derivatives in graphs, across the boundaries of functions and branches.

A variable enters the graph of a `tf.function`, and again every branch graph in it,
as a captured placeholder of its handle.  `tf.gradients` asked inside a branch for the
derivative of something computed outside it looks for the branch's own placeholder
only, and misses the uses outside.  `gradients` looks for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops.utils import containers, subgraph

tf1 = tf.compat.v1


def gradients(
    ys: Any,
    xs: Any,
    grad_ys: Any = None,
    stop_gradients: Any = None,
    colocate_gradients_with_ops: bool = True,
) -> list[tf.Tensor | tf.IndexedSlices | None]:
    """`tf.gradients` that finds variables in the current graph and all outer ones.

    Args:
      ys: tensor or sequence of tensors to differentiate.
      xs: tensor, variable or sequence of them.
      grad_ys: cotangents, one for each y; ones by default.
      stop_gradients: tensors and variables to treat as constants beyond which nothing
        is differentiated.
      colocate_gradients_with_ops: whether gradient ops share their op's device.

    Returns:
      One entry for each x, None where no y depends on it.
    """
    sources = [subgraph.tensors_of(x) for x in containers._as_list(xs)]
    stops = [
        t
        for x in containers._as_list(stop_gradients or [])
        for t in subgraph.tensors_of(x)
    ]
    flat = tf1.gradients(
        containers._as_list(ys),
        [tensor for group in sources for tensor in group],
        grad_ys=None if grad_ys is None else list(containers._as_list(grad_ys)),
        stop_gradients=stops or None,
        colocate_gradients_with_ops=colocate_gradients_with_ops,
    )
    remaining = iter(flat)
    return [_add([next(remaining) for _ in group]) for group in sources]


def _add(terms: Sequence[Any]) -> Any:
    terms = [term for term in terms if term is not None]
    if len(terms) <= 1:
        return terms[0] if terms else None
    return tf.add_n([tf.convert_to_tensor(term) for term in terms])


def fwd_gradients(
    ys: Any,
    xs: Any,
    grad_xs: Any = None,
    stop_gradients: Any = None,
    colocate_gradients_with_ops: bool = True,
    unconnected_gradients: tf.UnconnectedGradients = tf.UnconnectedGradients.NONE,
) -> list[tf.Tensor | None]:
    """Jacobian-vector product, by differentiating a vector-Jacobian product.

    `u -> Jᵀ u` is linear, and its transpose applied to v is `J v`; so two reverse
    passes give a forward one.  (Works in every graph; `tf.autodiff` needs one that
    has not been built yet.)

    Args:
      ys: tensor or sequence of tensors.
      xs: tensor, variable or sequence of them.
      grad_xs: the vector, shaped like `xs`; ones by default.
      stop_gradients: tensors and variables to hold constant; with `xs` themselves the
        derivatives are partial where one x depends on another.
      colocate_gradients_with_ops: whether gradient ops share their op's device.
      unconnected_gradients: what a y gets that depends on none of the xs: None, or
        zeros.

    Returns:
      One entry for each y: `sum_j (dy/dx_j) grad_xs_j`, shaped like y.
    """
    ys = containers._as_list(ys)
    xs = containers._as_list(xs)
    grad_xs = [None] * len(xs) if grad_xs is None else containers._as_list(grad_xs)
    if len(grad_xs) != len(xs):
        raise ValueError(
            f"One vector for each x is expected: got {len(grad_xs)} for {len(xs)} xs."
        )
    cotangents = [_unknown_zeros_like(y) for y in ys]
    pulled_back = gradients(
        ys, xs, cotangents, stop_gradients, colocate_gradients_with_ops
    )
    connected = [
        # A sparse gradient has no well-defined second derivative in TensorFlow.
        (tf.convert_to_tensor(pulled), vector)
        for pulled, vector in zip(pulled_back, grad_xs, strict=True)
        if pulled is not None
    ]
    vectors = [
        tf.ones_like(pulled)
        if vector is None
        else tf.convert_to_tensor(vector, dtype_hint=pulled.dtype)
        for pulled, vector in connected
    ]
    return tf1.gradients(
        [pulled for pulled, _ in connected],
        cotangents,
        grad_ys=vectors,
        colocate_gradients_with_ops=colocate_gradients_with_ops,
        unconnected_gradients=unconnected_gradients,
    )


def _unknown_zeros_like(y: tf.Tensor) -> tf.Tensor:
    # Some gradient functions leave out terms when they can see that a cotangent is
    # zero.  They cannot see through a placeholder with a default.
    return tf1.placeholder_with_default(tf.zeros_like(y), y.shape)


def generate_random_signs(
    shape: Any, dtype: tf.DType = tf.float32, seed: Any = None
) -> tf.Tensor:
    """Independent values of +1 and -1 with equal probability.

    Args:
      shape: static or dynamic.
      dtype: of the result.
      seed: an int seeds a stream that advances with every evaluation; an int tensor of
        shape `[2]` determines the values (stateless).
    """
    dtype = tf.as_dtype(dtype)
    if seed is None or isinstance(seed, int):
        bits = tf.random.uniform(shape, maxval=2, dtype=tf.int32, seed=seed)
    else:
        bits = tf.random.stateless_uniform(
            shape, seed, minval=0, maxval=2, dtype=tf.int32
        )
    return tf.cast(2 * bits - 1, dtype)
