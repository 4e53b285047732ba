"""How the damping of a Kronecker-factored block is shared between its two factors.

`(A + pi r I) (x) (G + r/pi I)` with `r = sqrt(damping)` approximates
`A (x) G + damping I`; the trace-norm choice of `pi` keeps the cross terms small
whatever the scales of `A` and `G` (Martens & Grosse 2015, section 6.3).
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kfac.python.ops.rules import scalars


def pi_tracenorm(
    left_trace: tf.Tensor, left_dim: int, right_trace: tf.Tensor, right_dim: int
) -> tf.Tensor:
    """`sqrt((tr A / dim A) / (tr B / dim B))` as a scalar tensor.

    The result is 1 where it would be meaningless: before the first statistic (a
    trace, or the product of the two, is exactly zero) and after the right factor has
    diverged (its trace is negative or NaN).  Divergence is dealt with by whoever
    inverts the factor; an exception here would end the training instead.  A left
    trace that is NaN or negative gives NaN.

    Args:
      left_trace: scalar tensor, `tr A`.
      left_dim: static side of `A`.
      right_trace: scalar tensor of the same dtype, `tr B`.
      right_dim: static side of `B`.
    """
    left = left_trace * right_dim
    right = right_trace * left_dim
    usable = tf.logical_and(right > 0, tf.not_equal(left * right, 0))
    one = tf.ones_like(left)
    return tf.where(usable, tf.sqrt(left / tf.where(usable, right, one)), one)


def split(root_damping: Any, pi: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The dampings `(r pi, r / pi)` of the left and the right factor.

    Args:
      root_damping: square root of the block's damping; float, tensor or variable.
      pi: scalar tensor; its dtype is that of the result.
    """
    root_damping = scalars.cast(root_damping, pi.dtype)
    return root_damping * pi, root_damping / pi
