"""Inverses, Cholesky factors and powers of damped symmetric matrices that never fail.

All functions take `matrix` `[n, n]` (or a batch `[..., n, n]`) and a non-negative
`damping`, a scalar or a batch that broadcasts against the matrix's leading axes, so
that several dampings of one matrix cost one decomposition or one batched call.  Each
returns `(result, fell_back)` where `fell_back` is a boolean of the batch shape.

A step of training must survive a bad matrix, so a result that is not finite is
replaced, in this order, by

1. the result for the matrix with `settings().cholesky_jitters` times its mean
   absolute diagonal added to the diagonal, from the smallest jitter up;
2. `previous`, the last good result, if it is finite and not all zero;
3. the identity, which leaves the gradient alone.

The jitters are tried in a loop that normally ends after its first, unjittered, round;
they cost nothing unless needed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from kfac.python.ops import config
from kfac.python.ops.rules import scalars

tf1 = tf.compat.v1


class Eigendecomposition(NamedTuple):
    """`V diag(eigenvalues) Vᵀ`.

    Attributes:
      eigenvalues: `[..., n]`, ascending.
      eigenvectors: `[..., n, n]`, as columns.
      failed: boolean `[...]`; where set, the matrix was not finite and the identity
        was decomposed in its place.
    """

    eigenvalues: tf.Tensor
    eigenvectors: tf.Tensor
    failed: tf.Tensor


def damped_inverse(
    matrix: tf.Tensor,
    damping: Any,
    previous: Any = None,
    method: str | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """`(matrix + damping I)^-1` and whether it had to be replaced.

    Args:
      matrix: symmetric `[..., n, n]`; "cholesky" and "eig" read the lower triangle.
      damping: scalar or batch.
      previous: last good inverse, or None.
      method: "cholesky", "eig" or "matrix_inverse"; by default the setting
        `posdef_inv_method`. ("matrix_inverse" raises for an exactly singular matrix.)
    """
    method = method or config.settings().posdef_inv_method
    if method not in _INVERT:
        raise KeyError(f"Unknown method {method!r}; choose one of {sorted(_INVERT)}.")
    previous = None if previous is None else [previous]
    (inverse,), fell_back = with_fallbacks(_INVERT[method], matrix, damping, previous)
    return inverse, fell_back


def damped_cholesky(
    matrix: tf.Tensor, damping: Any, previous: Any = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Lower triangular L with `L Lᵀ = matrix + damping I`, and whether replaced."""
    previous = None if previous is None else [previous]
    (factor,), fell_back = with_fallbacks(
        Factorisation(("cholesky",)), matrix, damping, previous
    )
    return factor, fell_back


def damped_cholesky_inverse(
    matrix: tf.Tensor,
    damping: Any,
    previous: tuple[Any, Any] | None = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The Cholesky factor L, its inverse (lower triangular), and whether replaced.

    Args:
      matrix: symmetric `[..., n, n]`.
      damping: scalar or batch.
      previous: last good `(L, L^-1)`, or None.
    """
    kinds = ("cholesky", "cholesky_inverse")
    (factor, inverse), fell_back = with_fallbacks(
        Factorisation(kinds), matrix, damping, previous, num_results=2
    )
    return factor, inverse, fell_back


def triangular_inverse(factor: tf.Tensor) -> tf.Tensor:
    """Inverse of lower triangular matrices `[..., n, n]`."""
    return tf.linalg.triangular_solve(factor, _identity_like(factor))


def symmetric_eig(matrix: tf.Tensor) -> Eigendecomposition:
    """Eigendecomposition of symmetric `[..., n, n]` (the lower triangle is read).

    A matrix that is not finite would raise, or give NaN, depending on the device;
    the identity takes its place and `failed` says so.
    """
    matrix, finite = _finite_or_identity(tf.convert_to_tensor(matrix))
    eigenvalues, eigenvectors = tf.linalg.eigh(matrix)
    return Eigendecomposition(eigenvalues, eigenvectors, tf.logical_not(finite))


def damped_power(
    decomposition: Eigendecomposition,
    exponent: Any,
    damping: Any,
    previous: Any = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """`(matrix + damping I)^exponent` and whether it had to be replaced.

    Args:
      decomposition: of the undamped matrix, shared by all powers and dampings.
      exponent: scalar.
      damping: scalar, or batch that the result gets as its leading axes.
      previous: last good power, or None.
    """
    dtype = decomposition.eigenvalues.dtype
    damped = decomposition.eigenvalues + _per_matrix(damping, dtype, axes=1)
    scale = tf.pow(damped, scalars.cast(exponent, dtype))
    vectors = decomposition.eigenvectors
    power = tf.matmul(vectors * scale[..., None, :], vectors, transpose_b=True)
    good = tf.logical_and(_all_finite(power), tf.logical_not(decomposition.failed))
    previous = None if previous is None else [previous]
    (power,) = _replace_bad([power], good, previous)
    return power, tf.logical_not(good)


@dataclasses.dataclass(frozen=True)
class Factorisation:
    """What one Cholesky factorisation `matrix = L Lᵀ` gives.

    Attributes:
      kinds: any of "cholesky" (L), "cholesky_inverse" (`L^-1`) and "inverse".
    """

    kinds: tuple[str, ...]

    def __call__(self, matrix: tf.Tensor) -> list[tf.Tensor]:
        """The matrices of those kinds, not finite where the factorisation fails."""
        results = {"cholesky": tf.linalg.cholesky(matrix)}
        if self.kinds != ("cholesky",):
            inverse = triangular_inverse(results["cholesky"])
            results["cholesky_inverse"] = inverse
        if "inverse" in self.kinds:
            # One triangular inverse and one product take about a third of the time of
            # `cholesky_solve` against the identity.
            results["inverse"] = tf.matmul(inverse, inverse, transpose_a=True)
        return [results[kind] for kind in self.kinds]


def with_fallbacks(
    attempt: Callable[[tf.Tensor], list[tf.Tensor]],
    matrix: tf.Tensor,
    damping: Any,
    previous: Sequence[Any] | None,
    num_results: int = 1,
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """`attempt(matrix + damping I)`, made good as the module's docstring says.

    Args:
      attempt: takes the damped matrix, returns several functions of it, for instance
        of one factorisation; not finite where it fails.  It is traced once for all
        matrices: equal ones must do the same, and they must be hashable.
      matrix: symmetric `[..., n, n]`.
      damping: scalar or batch.
      previous: last good results, or None. They are used together or not at all.
      num_results: how many matrices `attempt` returns.
    """
    damped, finite = _finite_or_identity(_add_to_diagonal(matrix, damping))
    try_jitters = _jitter_trial(
        attempt,
        num_results,
        tuple(config.settings().cholesky_jitters),
        damped.dtype,
        damped.shape.rank,
    )
    good, fell_back, *results = try_jitters(damped)
    for tensor in results:
        tensor.set_shape(damped.shape)
    for flags in (good, fell_back):
        flags.set_shape(finite.shape)
    results = _replace_bad(results, tf.logical_and(good, finite), previous)
    return results, tf.logical_or(fell_back, tf.logical_not(finite))


@functools.cache
def _jitter_trial(
    attempt: Callable[[tf.Tensor], list[tf.Tensor]],
    num_results: int,
    jitters: tuple[float, ...],
    dtype: tf.DType,
    rank: int,
) -> Callable[[tf.Tensor], tuple]:
    """Function of matrices of any size, so that all factors of a model share a trace.

    It returns flags of success and of failure without jitter, and the results.
    """
    jitters = (0.0, *jitters)

    def try_jitters(damped):
        scale = tf.reduce_mean(tf.abs(tf.linalg.diag_part(damped)), axis=-1)

        def unfinished(round_, good, *_):
            bad_left = tf.logical_not(tf.reduce_all(good))
            return tf.logical_and(bad_left, round_ < len(jitters))

        def next_round(round_, good, fell_back, *results):
            jitter = tf.gather(tf.constant(jitters, damped.dtype), round_)
            new = attempt(_add_to_diagonal(damped, jitter * scale))
            kept = [
                tf.where(_over_matrix(good), old, result)
                for old, result in zip(results, new, strict=True)
            ]
            good = tf.logical_or(good, _all_finite(*new))
            # Whatever the first, unjittered, round leaves bad has fallen back.
            fell_back = tf.logical_or(fell_back, tf.logical_not(good))
            return (round_ + 1, good, fell_back, *kept)

        none = tf.zeros_like(scale, tf.bool)
        start = [tf.zeros_like(damped) for _ in range(num_results)]
        _, *found = tf.while_loop(
            unfinished, next_round, (tf.constant(0), none, none, *start)
        )
        return found

    spec = tf.TensorSpec([None] * rank, dtype)
    traced = tf.function(try_jitters, input_signature=[spec], autograph=False)

    def in_any_graph(damped):
        # On another device than the predicate's, a function that has a loop makes a
        # branch of v1 control flow hang where it is not taken.
        if tf1.control_flow_v2_enabled() or tf.inside_function():
            return traced(damped)
        return try_jitters(damped)

    return in_any_graph


def _eig_inverse(damped: tf.Tensor) -> list[tf.Tensor]:
    values, vectors = tf.linalg.eigh(damped)
    # An indefinite matrix is as bad here as it is for a Cholesky factorisation.
    values = tf.where(values > 0, values, tf.constant(float("nan"), values.dtype))
    return [tf.matmul(vectors / values[..., None, :], vectors, transpose_b=True)]


def _plain_inverse(damped: tf.Tensor) -> list[tf.Tensor]:
    return [tf.linalg.inv(damped)]


_INVERT = {
    "cholesky": Factorisation(("inverse",)),
    "eig": _eig_inverse,
    "matrix_inverse": _plain_inverse,
}


def _replace_bad(
    results: list[tf.Tensor], good: tf.Tensor, previous: Sequence[Any] | None
) -> list[tf.Tensor]:
    """Results where good, else the previous ones if usable, else the identity."""
    replacements = [_identity_like(result) for result in results]
    if previous is not None:
        previous = [tf.convert_to_tensor(tensor) for tensor in previous]
        usable = _all_finite(*previous)
        for tensor in previous:
            nonzero = tf.reduce_any(tf.not_equal(tensor, 0), axis=[-2, -1])
            usable = tf.logical_and(usable, nonzero)
        replacements = [
            tf.where(_over_matrix(usable), old, identity)
            for old, identity in zip(previous, replacements, strict=True)
        ]
    return [
        tf.where(_over_matrix(good), result, replacement)
        for result, replacement in zip(results, replacements, strict=True)
    ]


def _per_matrix(value: Any, dtype: tf.DType, axes: int) -> tf.Tensor:
    """`value`, a scalar or a batch, with that many new trailing axes."""
    value = scalars.cast(value, dtype)
    if value.shape.rank == 0:
        return value
    return tf.reshape(value, tf.concat([tf.shape(value), [1] * axes], axis=0))


def _add_to_diagonal(matrix: tf.Tensor, damping: Any) -> tf.Tensor:
    matrix = tf.convert_to_tensor(matrix)
    diagonal = tf.linalg.diag_part(matrix) + _per_matrix(damping, matrix.dtype, axes=1)
    if diagonal.shape.rank != matrix.shape.rank - 1:
        matrix += tf.zeros_like(diagonal)[..., None]
    return tf.linalg.set_diag(matrix, diagonal)


def _all_finite(*matrices: tf.Tensor) -> tf.Tensor:
    """Per matrix of the batch: whether every entry of all of them is finite."""
    finite = [
        tf.reduce_all(tf.math.is_finite(matrix), axis=[-2, -1]) for matrix in matrices
    ]
    return tf.reduce_all(tf.stack(finite), axis=0)


def _finite_or_identity(matrix: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The matrix where it is finite, else the identity; and where it is."""
    # Not every factorisation of an infinite matrix has an infinite result, and some
    # raise an error.
    finite = _all_finite(matrix)
    return tf.where(_over_matrix(finite), matrix, _identity_like(matrix)), finite


def _over_matrix(flags: tf.Tensor) -> tf.Tensor:
    return flags[..., None, None]


def _identity_like(matrix: tf.Tensor) -> tf.Tensor:
    """An identity that broadcasts against the matrix, or the batch of matrices."""
    side = tf.compat.dimension_value(matrix.shape[-1])
    return tf.eye(tf.shape(matrix)[-1] if side is None else side, dtype=matrix.dtype)
