"""Preconditioned conjugate gradients over lists of tensors.

Solves `A x = b` for a symmetric positive definite A that is known by its products only
(Hestenes & Stiefel 1952; Nocedal & Wright, "Numerical optimization", algorithm 5.3).

TensorFlow's own `tf.linalg.experimental.conjugate_gradient` takes one vector and a
`LinearOperator`, has a warm start and returns the iteration and the residual: use it
where the matrix is an operator, as those of `curvature_operator` are.  Gradients are
lists of tensors of many shapes.  Through it each product and each preconditioning
would concatenate and split all parameters once more, a product without positive
curvature (rounding is enough) would turn the result into NaN, and a bad warm start
would be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from kfac.python.ops import utils
from kfac.python.ops.rules import scalars

Vector = Sequence[tf.Tensor]
LinearMap = Callable[[list[tf.Tensor]], Sequence[tf.Tensor]]


class Solution(NamedTuple):
    """What the iteration arrived at.

    Attributes:
      x: the last iterate, tensors shaped like `b`.
      iterations: int32 scalar, products with A that made progress.
      residual: scalar, `|b - A x| / |b|` as the recurrence has it; 0 where b is.
    """

    x: list[tf.Tensor]
    iterations: tf.Tensor
    residual: tf.Tensor


class _State(NamedTuple):
    iterations: tf.Tensor
    running: tf.Tensor
    gamma: tf.Tensor  # <r, M r>
    squared_norm: tf.Tensor  # <r, r>
    x: list[tf.Tensor]
    r: list[tf.Tensor]
    p: list[tf.Tensor]


def solve(
    product: LinearMap,
    b: Vector,
    *,
    preconditioner: LinearMap | None = None,
    start: Vector | None = None,
    max_iterations: Any = 100,
    tolerance: Any = 1e-5,
) -> Solution:
    """Approximates `A^-1 b`.

    From zero or from an accepted start, every iterate lowers `1/2 x' A x - b' x` below
    its value 0 at zero, so that `b' x > 0`: for a gradient b, -x is a direction of
    descent however early the iteration ends.

    Args:
      product: `p -> A p` for lists of tensors like `b`; called inside the body of a
        `tf.while_loop`.
      b: tensors of one floating dtype.
      preconditioner: `r -> M r` with a symmetric positive definite M, roughly the
        inverse of A; the identity by default.
      start: where to begin; ignored (at run time) if zero is a better start.
      max_iterations: most products with A, besides one for the start; an int or an
        int32 scalar.
      tolerance: ends the iteration when `|b - A x| <= tolerance |b|`.

    Returns:
      See `Solution`.  The iteration also ends, with the last good iterate, where the
      curvature `p' A p` is not positive or not finite.

    Raises:
      ValueError: `b` is empty, or `start` has another length.
    """
    b = [tf.convert_to_tensor(part) for part in b]
    target = utils.ip(b, b)
    tolerance = scalars.cast(tolerance, target.dtype)
    threshold = tf.square(tolerance) * target
    precondition = preconditioner or (lambda r: r)
    x, r = _accepted_start(product, b, start)
    p = _like(b, precondition(r))
    squared_norm = utils.ip(r, r)
    state = _State(
        iterations=tf.constant(0, tf.int32),
        running=squared_norm > threshold,
        gamma=utils.ip(r, p),
        squared_norm=squared_norm,
        x=x,
        r=r,
        p=p,
    )

    def proceed(state: _State) -> tf.Tensor:
        return state.running & (state.iterations < max_iterations)

    def body(state: _State) -> tuple[_State]:
        image = _like(b, product(state.p))
        curvature = utils.ip(state.p, image)
        sound = (curvature > 0) & tf.math.is_finite(curvature)
        alpha = tf.math.divide_no_nan(state.gamma, curvature)
        # What is not finite must not get in, not even times zero.
        x, r = (
            [
                tf.where(sound, moved, part)
                for moved, part in zip(_plus(*step), step[0], strict=True)
            ]
            for step in ((state.x, alpha, state.p), (state.r, -alpha, image))
        )
        z = _like(b, precondition(r))
        gamma = utils.ip(r, z)
        beta = tf.math.divide_no_nan(gamma, state.gamma)
        squared_norm = utils.ip(r, r)
        return (
            _State(
                iterations=state.iterations + tf.cast(sound, tf.int32),
                running=sound & (squared_norm > threshold),
                gamma=gamma,
                squared_norm=squared_norm,
                x=x,
                r=r,
                p=_plus(z, beta, state.p),
            ),
        )

    (state,) = tf.while_loop(proceed, body, (state,), parallel_iterations=1)
    residual = tf.sqrt(tf.math.divide_no_nan(state.squared_norm, target))
    return Solution(list(state.x), state.iterations, residual)


def _accepted_start(
    product: LinearMap, b: list[tf.Tensor], start: Vector | None
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Where to begin, and the residual there."""
    zero = [tf.zeros_like(part) for part in b]
    if start is None:
        return zero, b
    x = _like(b, start)
    r = _plus(b, tf.constant(-1, b[0].dtype), _like(b, product(x)))
    # Twice the decrease of the quadratic against zero: 2 b'x - x'Ax = x'(b + r).
    gain = utils.ip(x, list(utils.sum_(b, r)))
    better = (gain > 0) & tf.math.is_finite(gain)
    pairs = [(x, zero), (r, b)]
    x, r = (
        [tf.where(better, a, other) for a, other in zip(*pair, strict=True)]
        for pair in pairs
    )
    return x, r


def _plus(
    xs: Sequence[tf.Tensor], scale: tf.Tensor, ys: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """`x + scale y` for each pair."""
    return [x + scale * y for x, y in zip(xs, ys, strict=True)]


def _like(b: list[tf.Tensor], vector: Sequence[Any]) -> list[tf.Tensor]:
    """Dense tensors with the static shapes of `b`, which the loop relies on."""
    if len(vector) != len(b):
        raise ValueError(
            f"A vector of {len(b)} tensors is expected, like the right-hand side; got "
            f"{len(vector)}."
        )
    result = []
    for part, value in zip(b, vector, strict=True):
        value = tf.convert_to_tensor(value)
        value.set_shape(part.shape)
        result.append(value)
    return result
