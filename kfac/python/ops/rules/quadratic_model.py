"""The local quadratic model that chooses step size and momentum.

With d = P g the proposed update, p the previous one, C the (damped, exact, mini-batch)
curvature and delta = alpha d + mu p,

    q(delta) - q(0) = 1/2 x' m x + c' x,   x = (alpha, mu),
    m = [[d' C d, p' C d], [p' C d, p' C p]],   c = [[g' d], [g' p]].

Everything here is 2 x 2: matrices are nested lists of scalars.  Martens & Grosse,
"Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015,
sections 6.4 and 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from kfac.python.ops import utils
from kfac.python.ops.rules import scalars

Matrix = list[list[Any]]

# With unit diagonal, a determinant below this many units of rounding is noise: the
# entries are sums over all parameters, each good to a few dozen roundings.
_DETERMINANT_ROUNDINGS = 100


class Terms(NamedTuple):
    """The model's quadratic part, linear part, and the damping's share of the former.

    Attributes:
      quadratic: m, 2 x 2, damping included.
      linear: c, 2 x 1.
      damping: b, 2 x 2.
    """

    quadratic: Matrix
    linear: Matrix
    damping: Matrix


class Solution(NamedTuple):
    """Coefficients of the proposed and of the previous update, and the model there."""

    alpha: tf.Tensor
    mu: tf.Tensor
    change: tf.Tensor


def gram(xs: Sequence[tf.Tensor], ys: Sequence[tf.Tensor], scale: Any = 1.0) -> Matrix:
    """`scale * [[<x,x>, <x,y>], [<x,y>, <y,y>]]` of two lists of tensors."""
    xx, xy, yy = utils.ip(xs, xs), utils.ip(xs, ys), utils.ip(ys, ys)
    scale = scalars.cast(scale, xx.dtype)
    return [[scale * xx, scale * xy], [scale * xy, scale * yy]]


def build_terms(
    updates: Sequence[tf.Tensor],
    previous: Sequence[tf.Tensor],
    gradients: Sequence[tf.Tensor],
    update_images: Sequence[tf.Tensor],
    previous_images: Sequence[tf.Tensor],
    damping: Any,
    batch_size: Any,
) -> Terms:
    """The model from its vectors.

    Args:
      updates: the proposal d, one tensor per parameter.
      previous: the previous update p, likewise.
      gradients: of the mean loss, likewise.
      update_images: B' J d, one tensor per loss, with B a square root of the loss's
        Fisher matrix (or GGN) summed over `batch_size` cases and J the Jacobian of
        its inputs.
      previous_images: B' J p.
      damping: multiple of the identity in C.
      batch_size: number of cases in the images.
    """
    damping_terms = gram(updates, previous, damping)
    dtype = damping_terms[0][0].dtype
    curvature = gram(
        update_images, previous_images, 1 / scalars.cast(batch_size, dtype)
    )
    quadratic = [
        [m + b for m, b in zip(*rows, strict=True)]
        for rows in zip(curvature, damping_terms, strict=True)
    ]
    linear = [[utils.ip(gradients, updates)], [utils.ip(gradients, previous)]]
    return Terms(quadratic, linear, damping_terms)


def two_by_two_solve(m: Matrix, vec: Matrix) -> tf.Tensor:
    """`m^-1 vec` as a `[2, 1]` tensor, by Cramer's rule.

    Infinite or NaN if `m` is singular; see `minimum` for a safe use.
    """
    (a, b), (c, d) = (tf.unstack(row) for row in tf.unstack(tf.convert_to_tensor(m)))
    x, y = tf.unstack(tf.reshape(tf.convert_to_tensor(vec), [2]))
    determinant = a * d - b * c
    return tf.convert_to_tensor(
        [[(d * x - b * y) / determinant], [(a * y - c * x) / determinant]]
    )


def evaluate_no_c(m: Matrix, vec: Matrix) -> tf.Tensor:
    """`1/2 vec' m vec` as a `[1, 1]` tensor."""
    vec = tf.convert_to_tensor(vec)
    m = tf.cast(tf.convert_to_tensor(m), vec.dtype)
    return 0.5 * tf.matmul(vec, tf.matmul(m, vec), transpose_a=True)


def evaluate(m: Matrix, c: Matrix, vec: Matrix) -> tf.Tensor:
    """`1/2 vec' m vec + c' vec` as a `[1, 1]` tensor."""
    vec = tf.convert_to_tensor(vec)
    c = tf.cast(tf.convert_to_tensor(c), vec.dtype)
    return evaluate_no_c(m, vec) + tf.matmul(c, vec, transpose_a=True)


def minimum(m: Matrix, c: Matrix) -> tuple[tf.Tensor, tf.Tensor]:
    """`(alpha, mu)` where the model is least; mu = 0 where it cannot be told.

    `m` is first scaled to a unit diagonal, so lengths of d and p do not matter.  If d
    and p are then collinear to working precision (or one of them is zero), only d is
    used; a zero d gives alpha = 0.
    """
    (m11, m12), (_, m22) = m
    (c1,), (c2,) = c
    s1, s2 = _inverse_root(m11), _inverse_root(m22)
    correlation = s1 * m12 * s2
    determinant = 1 - correlation**2
    noise = _DETERMINANT_ROUNDINGS * _rounding_unit(m11.dtype)
    separate = (m11 > 0) & (m22 > 0) & (determinant > noise)
    one = tf.ones_like(correlation)
    off = tf.where(separate, correlation, tf.zeros_like(correlation))
    solved = two_by_two_solve([[one, off], [off, one]], [[-s1 * c1], [-s2 * c2]])
    alpha_both, mu_both = s1 * solved[0, 0], s2 * solved[1, 0]
    alpha_alone = -tf.math.divide_no_nan(c1, m11)
    return (
        tf.where(separate, alpha_both, alpha_alone),
        tf.where(separate, mu_both, tf.zeros_like(mu_both)),
    )


def minimum_at_mu(m: Matrix, c: Matrix, mu: tf.Tensor) -> tf.Tensor:
    """The best alpha for a given mu."""
    return -tf.math.divide_no_nan(mu * m[0][1] + c[0][0], m[0][0])


def solve(
    m: Matrix,
    c: Matrix,
    b: Matrix,
    fixed_mu: Any = None,
    rescale: Any = 1.0,
    damping_share: Any = 0.0,
) -> Solution:
    """Coefficients of the step and the predicted change of the loss.

    Args:
      m: quadratic part.
      c: linear part.
      b: damping's part of `m`.
      fixed_mu: momentum to keep; None optimizes it.
      rescale: the step that will really be taken is `rescale (alpha d + mu p)`; only
        the change is affected.
      damping_share: fraction of the damping term to leave out of the change.  The
        damping expresses distrust in the model rather than part of the loss, except
        for the share that an l2 regularizer contributes.

    Returns:
      alpha, mu and the change, scalars of the dtype of `m`.
    """
    dtype = tf.convert_to_tensor(m[0][0]).dtype
    m, c, b = ([[scalars.cast(x, dtype) for x in row] for row in z] for z in (m, c, b))
    if fixed_mu is None:
        alpha, mu = minimum(m, c)
    else:
        mu = scalars.cast(fixed_mu, dtype)
        alpha = minimum_at_mu(m, c, mu)
    rescale = scalars.cast(rescale, dtype)
    step = tf.convert_to_tensor([[rescale * alpha], [rescale * mu]])
    without_damping = scalars.cast(damping_share, dtype) * evaluate_no_c(b, step)
    change = evaluate(m, c, step) - without_damping
    return Solution(alpha, mu, tf.squeeze(change))


def regular_change(
    squared_norm: tf.Tensor,
    slope: tf.Tensor,
    squared_length: tf.Tensor,
    surplus_damping: Any,
) -> tf.Tensor:
    """Predicted change for a step u whose curvature product is known.

    Args:
      squared_norm: `<u, (F + a I) u>` of the block-diagonal curvature.
      slope: `<u, g>`.
      squared_length: `<u, u>`.
      surplus_damping: the part of a to leave out (negative: to add).
    """
    surplus = scalars.cast(surplus_damping, squared_norm.dtype)
    return 0.5 * (squared_norm - surplus * squared_length) + slope


def adam_change(
    velocity_product: tf.Tensor,
    slope: tf.Tensor,
    learning_rate: Any,
    clip_coefficient: Any = 1.0,
) -> tf.Tensor:
    """Predicted change of the step `-learning_rate r` with `r = kappa P v`.

    Uses `P^-1 r = kappa v`, so no curvature product is needed.  The curvature is the
    preconditioner's: as old as the last inverse update, and with its damping.

    Args:
      velocity_product: `<r, v>`.
      slope: `<r, g>`.
      learning_rate: scalar.
      clip_coefficient: kappa.
    """
    rate = scalars.cast(learning_rate, velocity_product.dtype)
    kappa = scalars.cast(clip_coefficient, velocity_product.dtype)
    return 0.5 * rate**2 * kappa * velocity_product - rate * slope


def l2_complement(l2_reg: Any, damping: tf.Tensor) -> tf.Tensor:
    """`1 - l2_reg / damping`: the share of the damping that is not a regularizer."""
    l2_reg = scalars.cast(l2_reg, damping.dtype)
    return 1 - tf.math.divide_no_nan(l2_reg, damping)


def _inverse_root(x: tf.Tensor) -> tf.Tensor:
    """`x^-1/2`, and 0 unless x > 0."""
    positive = x > 0
    return tf.where(positive, tf.math.rsqrt(tf.where(positive, x, 1)), 0)


def _rounding_unit(dtype: tf.DType) -> float:
    return float(tf.experimental.numpy.finfo(dtype.as_numpy_dtype).eps)
