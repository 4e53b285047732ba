"""Factors that keep only a diagonal: one entry per parameter or per feature."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import tensorflow as tf

from kfac.python.ops import linear_operator as lo
from kfac.python.ops.fisher_factors import base, naming, statistics
from kfac.python.ops.rules import scalars


class DiagonalFactor(base.FisherFactor):
    """A second moment kept as one entry per parameter, in any shape.

    Functions of it are computed when asked for: nothing has to be registered, no
    variables are needed besides the average, and what is served is never stale.
    Zero entries before the first update make `get_matpower(-1, f)` equal `1 / f()`.
    """

    @property
    def _cov_initializer(self) -> Any:
        return base.diagonal_covariance_initializer

    @property
    def _matrix_diagonal(self) -> tf.Tensor:
        """The running second moment, flattened row-major."""
        return tf.reshape(self.cov, [-1])

    def register_matpower(self, exp: float, damping_func: Callable[[], Any]) -> None:
        """Does nothing: powers are computed on demand."""

    def register_cholesky(self, damping_func: Callable[[], Any]) -> None:
        """Does nothing: Cholesky factors are computed on demand."""

    def register_cholesky_inverse(self, damping_func: Callable[[], Any]) -> None:
        """Does nothing: Cholesky factors are computed on demand."""

    def instantiate_inv_variables(self) -> None:
        """Does nothing: there are none."""

    def make_inverse_update_ops(self) -> list[Any]:
        """No ops: nothing is stored."""
        return []

    def get_cov_as_linear_operator(self) -> lo.LinearOperatorDiag:
        """The running second moment as a diagonal operator."""
        return lo.LinearOperatorDiag(
            self._matrix_diagonal, is_self_adjoint=True, is_square=True
        )

    def get_matpower(
        self, exp: float, damping_func: Callable[[], Any]
    ) -> lo.LinearOperatorDiag:
        """`(cov + damping)^exp` of the current average, for any exponent."""
        damped = self._matrix_diagonal + self._damping(damping_func)
        return lo.LinearOperatorDiag(
            tf.pow(damped, scalars.cast(exp, damped.dtype)),
            is_non_singular=True,
            is_self_adjoint=True,
            is_positive_definite=True,
            is_square=True,
        )

    def get_cholesky(self, damping_func: Callable[[], Any]) -> lo.LinearOperatorDiag:
        """The square root of `cov + damping`."""
        return self.get_matpower(0.5, damping_func)

    def get_cholesky_inverse(
        self, damping_func: Callable[[], Any]
    ) -> lo.LinearOperatorDiag:
        """The inverse square root of `cov + damping`."""
        return self.get_matpower(-0.5, damping_func)


class DiagonalKroneckerFactor(DiagonalFactor):
    """Mean square of each feature of a layer's inputs or output gradients.

    Integer data with an attribute `one_hot_depth` stand for one-hot rows, as in an
    embedding; the diagonal then is the whole second moment.

    Args:
      tensors: indexed by source, then by tower: `[batch, features]`, or ids
        `[batch]`.
      has_bias: append the constant 1 of a bias.
      dtype: of the statistics of ids, float32 by default; dense data have their own.

    Raises:
      ValueError: data of another rank.
    """

    def __init__(
        self, tensors: Any, has_bias: bool = False, dtype: tf.DType | None = None
    ):
        self._tensors = tensors
        self._has_bias = has_bias
        self._one_hot_depth = getattr(tensors[0][0], "one_hot_depth", None)
        self._sparse_dtype = tf.as_dtype(dtype or tf.float32)
        self._check_ranks(*((1,) if self.is_sparse else (2,)))
        super().__init__()

    @property
    def is_sparse(self) -> bool:
        """Whether the data are ids that stand for one-hot rows."""
        return self._one_hot_depth is not None

    def _check_ranks(self, *ranks: int) -> None:
        for data in tf.nest.flatten(self._tensors):
            if data.shape.rank not in (None, *ranks):
                expected = " or ".join(str(rank) for rank in ranks)
                kind = "Integer ids" if self.is_sparse else "Dense data"
                raise ValueError(
                    f"{kind} of {type(self).__name__} must have rank {expected}, got "
                    f"shape {data.shape}."
                )

    @property
    def _var_scope(self) -> str:
        return "ff_diag_kron_" + naming.scope_string_from_params(
            tf.nest.flatten(self._tensors)
        )

    @property
    def _identity(self) -> Hashable:
        return naming.fingerprint((self._tensors, self._has_bias))

    @property
    def _cov_shape(self) -> list[int]:
        if self.is_sparse:
            size = self._one_hot_depth
        else:
            size = tf.compat.dimension_value(self._tensors[0][0].shape[-1])
        return [int(size) + int(self._has_bias)]

    @property
    def _num_sources(self) -> int:
        return len(self._tensors)

    @property
    def _num_towers(self) -> int:
        return len(self._tensors[0])

    @property
    def _dtype(self) -> tf.DType:
        return self._sparse_dtype if self.is_sparse else self._tensors[0][0].dtype

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        return statistics.num_rows(self._tensors[source][tower])

    def _rows(self, source: int, tower: int) -> tf.Tensor:
        """`[rows, features]`, or `[rows]` for ids."""
        return tf.convert_to_tensor(self._tensors[source][tower])

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        rows = self._rows(source, tower)
        if self.is_sparse:
            return statistics.one_hot_frequencies(
                rows, self._one_hot_depth, self._dtype, self._has_bias
            )
        return statistics.second_moment_diagonal(rows, self._has_bias)

    def _get_data_device(self, tower: int) -> str | None:
        return self._tensors[0][tower].device


class DiagonalMultiKF(DiagonalKroneckerFactor):
    """`DiagonalKroneckerFactor` of a layer used several times per case.

    The mean is over uses and cases alike.

    Args:
      tensors: indexed by source, then by tower: `[uses * batch, features]`
        (use-major) or `[uses, batch, features]`; ids `[uses * batch]` or
        `[uses, batch]`.
      num_uses: number of uses.
      has_bias: append the constant 1 of a bias.
      dtype: of the statistics of ids, float32 by default.
    """

    def __init__(
        self,
        tensors: Any,
        num_uses: int,
        has_bias: bool = False,
        dtype: tf.DType | None = None,
    ):
        self._num_uses = num_uses
        super().__init__(tensors, has_bias=has_bias, dtype=dtype)

    @property
    def _feature_rank(self) -> int:
        return 0 if self.is_sparse else 1

    def _check_ranks(self, *ranks: int) -> None:
        super()._check_ranks(*ranks, *(rank + 1 for rank in ranks))

    @property
    def _identity(self) -> Hashable:
        return super()._identity, self._num_uses

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        return statistics.num_cases(
            self._tensors[source][tower], self._num_uses, self._feature_rank
        )

    def _rows(self, source: int, tower: int) -> tf.Tensor:
        return statistics.fold_uses(super()._rows(source, tower), self._feature_rank)
