"""Inverses, factors and eigendecompositions of symmetric positive matrices.

The functions here are the reference API's front end, with the method chosen by the
settings `posdef_inv_method` and `posdef_eig_method`; `inverses` does the work.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kfac.python.ops import config, inverses
from kfac.python.ops.rules import scalars


def posdef_inv(tensor: tf.Tensor, damping: Any) -> tf.Tensor:
    """`(tensor + damping I)^-1` by the method in force.

    Args:
      tensor: symmetric `[n, n]`, static n.
      damping: scalar, cast to the tensor's dtype.
    """
    invert = _choose(posdef_inv_functions, config.settings().posdef_inv_method)
    identity = tf.eye(tensor.shape.as_list()[-1], dtype=tensor.dtype)
    return invert(tensor, identity, damping)


def posdef_inv_matrix_inverse(
    tensor: tf.Tensor, identity: tf.Tensor, damping: Any
) -> tf.Tensor:
    """`(tensor + damping identity)^-1` by a general inverse."""
    return _inverse(tensor, identity, damping, "matrix_inverse")


def posdef_inv_cholesky(
    tensor: tf.Tensor, identity: tf.Tensor, damping: Any
) -> tf.Tensor:
    """`(tensor + damping identity)^-1` by a Cholesky factorisation."""
    return _inverse(tensor, identity, damping, "cholesky")


def posdef_inv_eig(tensor: tf.Tensor, identity: tf.Tensor, damping: Any) -> tf.Tensor:
    """`(tensor + damping identity)^-1` by an eigendecomposition."""
    return _inverse(tensor, identity, damping, "eig")


def _inverse(tensor, identity, damping, method):
    damped = tensor + scalars.cast(damping, tensor.dtype) * identity
    inverse, _ = inverses.damped_inverse(damped, 0.0, method=method)
    return inverse


posdef_inv_functions = {
    "matrix_inverse": posdef_inv_matrix_inverse,
    "cholesky": posdef_inv_cholesky,
    "eig": posdef_inv_eig,
}


def cholesky(tensor: tf.Tensor, damping: Any) -> tf.Tensor:
    """Lower triangular L with `L Lᵀ = tensor + damping I`."""
    factor, _ = inverses.damped_cholesky(tensor, damping)
    return factor


def posdef_eig(mat: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """`(eigenvalues [n], eigenvectors [n, n] as columns)` by the method in force."""
    return _choose(posdef_eig_functions, config.settings().posdef_eig_method)(mat)


def posdef_eig_self_adjoint(mat: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Absolute eigenvalues, in the ascending order of the signed ones, and vectors.

    For a positive matrix only rounding makes a difference.  For an indefinite one, such
    as the temporal correlations of a recurrent layer, the magnitudes are wanted.
    """
    decomposition = inverses.symmetric_eig(mat)
    return tf.abs(decomposition.eigenvalues), decomposition.eigenvectors


def posdef_eig_svd(mat: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Singular values, descending, and left singular vectors."""
    values, left, _ = tf.linalg.svd(mat)
    return values, left


posdef_eig_functions = {
    "self_adjoint": posdef_eig_self_adjoint,
    "svd": posdef_eig_svd,
}


def _choose(functions, method):
    if method not in functions:
        raise KeyError(f"Unknown method {method!r}; choose one of {sorted(functions)}.")
    return functions[method]
