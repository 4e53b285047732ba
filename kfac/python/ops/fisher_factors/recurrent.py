"""Factors of fully-connected layers used several times per case, also over time.

The approximations for recurrent networks (Martens, Ba & Johnson 2018, "Kronecker-
factored curvature approximations for recurrent neural networks", sections 3.5.1 to
3.5.3) need, besides the second moment C0 of all uses, the moment C1 between
successive ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import errors, utils
from kfac.python.ops.fisher_factors import (
    fully_connected,
    naming,
    statistics,
    stored,
)
from kfac.python.ops.utils import packing

tf1 = tf.compat.v1


class FullyConnectedMultiKF(fully_connected.FullyConnectedKroneckerFactor):
    """Second moment over uses and cases, and optionally between successive uses.

    Args:
      tensors: indexed by source, then by tower: `[uses * batch, features]` (use-major)
        or `[uses, batch, features]`.
      num_uses: number of uses; needed for folded data.
      has_bias: append the constant 1 of a bias.

    Raises:
      ValueError: the data are integer ids (they carry `one_hot_depth`).
    """

    def __init__(
        self, tensors: Any, num_uses: int | None = None, has_bias: bool = False
    ):
        self._num_uses = num_uses
        self._num_timesteps = num_uses
        self._wants_cov_dt1 = False
        self._cov_dt1 = None
        self._option1_signed: dict[Hashable, bool] = {}
        self._option2_registrations: dict[Hashable, None] = {}
        self._option1quants_by_damping: dict[Hashable, tuple[tf.Variable, ...]] = {}
        self._option2quants_by_damping: dict[Hashable, tuple[tf.Variable, ...]] = {}
        super().__init__(tensors, has_bias=has_bias)

    @property
    def _var_scope(self) -> str:
        return "ff_fc_multi_" + naming.scope_string_from_params(
            [*tf.nest.flatten(self._tensors), self._num_uses, self._has_bias]
        )

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        return statistics.num_cases(self._tensors[source][tower], self._num_uses)

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        data = tf.convert_to_tensor(self._tensors[source][tower])
        return statistics.second_moment(statistics.fold_uses(data), self._has_bias)

    def _compute_new_cov_dt1(self, source: int, tower: int) -> tf.Tensor:
        """Moment between successive uses of one shard, see `cov_dt1`."""
        data = tf.convert_to_tensor(self._tensors[source][tower])
        data = statistics.to_canonical(data, self._num_uses)
        return statistics.shifted_cross_moment(data, self._has_bias)

    def register_cov_dt1(self) -> None:
        """Asks for `cov_dt1`; a repeat does nothing.

        Raises:
          ArgumentError: the covariance variables exist already, without it.
        """
        if self._cov is not None and not self._wants_cov_dt1:
            raise errors.ArgumentError(
                f"Factor {self.name!r} has its covariance variables already; call "
                "register_cov_dt1() before instantiate_cov_variables()."
            )
        self._wants_cov_dt1 = True

    def instantiate_cov_variables(self) -> None:
        """Creates the variables of both moving averages."""
        super().instantiate_cov_variables()
        if self._wants_cov_dt1:
            with tf1.variable_scope(self.name):
                self._cov_dt1 = self._moving_average("cov_dt1", self._cov_shape)

    @property
    def cov_dt1(self) -> tf.Tensor:
        """Running `E[x_{t+1} x_tᵀ]` (later use on the left), not symmetric.

        The sum over the `uses - 1` pairs is divided by `uses`.

        Raises:
          ArgumentError: not registered, or not instantiated.
        """
        if self._cov_dt1 is None:
            raise errors.ArgumentError(
                f"Factor {self.name!r} has no cov_dt1; call register_cov_dt1() and "
                "then instantiate_cov_variables()."
            )
        return self._cov_dt1.value

    def get_cov_vars(self) -> list[tf.Tensor]:
        """Values (not variables) of the running averages."""
        values = super().get_cov_vars()
        return [*values, self.cov_dt1] if self._wants_cov_dt1 else values

    def cov_variables(self) -> list[tf.Variable]:
        """The variables behind `get_cov_vars`: averages and their total weights."""
        variables = super().cov_variables()
        if self._wants_cov_dt1:
            variables += [self._cov_dt1._var, self._cov_dt1._total_weight]
        return variables

    def new_statistics(self) -> list[tf.Tensor]:
        """The second moment and, if it is wanted, `cov_dt1` of this mini-batch."""
        statistics = super().new_statistics()
        if self._wants_cov_dt1:
            statistics.append(self._combine_shards(self._compute_new_cov_dt1))
        return statistics

    def statistics_layouts(self) -> list[packing.Layout]:
        """`cov_dt1` is not symmetric."""
        dt1 = [packing.Layout.FULL] if self._wants_cov_dt1 else []
        return [*super().statistics_layouts(), *dt1]

    def add_statistics(
        self, statistics: Sequence[tf.Tensor], ema_decay: Any, ema_weight: Any
    ) -> Any:
        """Op that takes one step of both moving averages."""
        new_cov, *new_cov_dt1 = statistics
        updates = [super().add_statistics([new_cov], ema_decay, ema_weight)]
        updates += [
            self._cov_dt1.add_to_average(new, decay=ema_decay, weight=ema_weight)
            for new in new_cov_dt1
        ]
        return tf.group(*updates)

    def register_option1quants(
        self, damping_func: Callable[[], Any], signed: bool = False
    ) -> None:
        """Asks for the quantities of `get_option1quants`.

        Args:
          damping_func: has an attribute `func_id`.
          signed: keep the signs of the eigenvalues psi. By default they are the
            magnitudes, which erases negative correlation between successive uses.

        Raises:
          ValueError: the same damping is registered with another `signed`.
        """
        damping_id = self._store.register(damping_func)
        if self._option1_signed.setdefault(damping_id, signed) != signed:
            raise ValueError(
                f"Option 1 of factor {self.name!r} at damping {damping_id} is "
                f"registered with signed={not signed} already."
            )

    def register_option2quants(self, damping_func: Callable[[], Any]) -> None:
        """Asks for the quantities of `get_option2quants`."""
        self._option2_registrations.setdefault(self._store.register(damping_func))

    def instantiate_inv_variables(self) -> None:
        """Creates the variables of all registered matrix functions and quantities."""
        super().instantiate_inv_variables()
        ones = tf1.ones_initializer
        for damping_id in self._option1_signed:
            label = self._store.label(damping_id)
            self._option1quants_by_damping[damping_id] = (
                self._store.create(f"Lmat_damp{label}", self._cov_shape),
                self._store.create(f"psi_damp{label}", self._vec_shape, ones),
            )
        for damping_id in self._option2_registrations:
            label = self._store.label(damping_id)
            self._option2quants_by_damping[damping_id] = (
                self._store.create(f"Pmat_damp{label}", self._cov_shape),
                self._store.create(f"Kmat_damp{label}", self._cov_shape),
                self._store.create(f"mu_damp{label}", self._vec_shape, ones),
            )

    def get_inv_vars(self) -> list[Any]:
        """Variables of powers and Cholesky factors, then tuples of quantities."""
        return [
            *super().get_inv_vars(),
            *self._option1quants_by_damping.values(),
            *self._option2quants_by_damping.values(),
        ]

    def inverse_variables(self) -> list[tf.Variable]:
        """`get_inv_vars()` without the nesting."""
        return tf.nest.flatten(self.get_inv_vars())

    def inverse_layouts(self) -> list[packing.Layout]:
        """The quantities of both options are general matrices."""
        layouts = super().inverse_layouts()
        others = len(self.inverse_variables()) - len(layouts)
        return layouts + [packing.Layout.FULL] * others

    def get_option1quants(
        self, damping_func: Callable[[], Any]
    ) -> tuple[tf.Variable, ...]:
        """`(L, psi)`: `L = S U`, where `S ½(C1 + C1ᵀ) S = U diag(psi) Uᵀ`.

        `S` is the damped `C0^(-1/2)`. As of the last inverse update.

        Raises:
          KeyError: not registered in time.
        """
        damping_id = naming.graph_func_to_id(damping_func)
        return self._store.lookup(
            self._option1quants_by_damping, damping_id, "option 1 quantities"
        )

    def get_option2quants(
        self, damping_func: Callable[[], Any]
    ) -> tuple[tf.Variable, ...]:
        """`(P, K, mu)`: `P = C1ᵀ S²`, `K = S E`, `mu = min(σ², 1)` descending.

        `S` is the damped `C0^(-1/2)`, and `S C1 S = Q diag(σ) Eᵀ`. As of the last
        inverse update.

        Raises:
          KeyError: not registered in time.
        """
        damping_id = naming.graph_func_to_id(damping_func)
        return self._store.lookup(
            self._option2quants_by_damping, damping_id, "option 2 quantities"
        )

    def make_inverse_update_ops(self) -> list[Any]:
        """One op that refreshes everything stored.

        Raises:
          ArgumentError: quantities are registered but `cov_dt1` is not.
        """
        dampings = self._store.dampings()
        updates = []
        if self._option1quants_by_damping or self._option2quants_by_damping:
            # Cached, so that the powers use this decomposition too.
            updates += self._option_updates(dampings, *self.get_eigendecomp())
        updates += self._inverse_updates(dampings)
        return [tf.group(*updates)]

    def _option_updates(
        self,
        dampings: dict[Hashable, tf.Tensor],
        eigenvalues: tf.Tensor,
        eigenvectors: tf.Tensor,
    ) -> list[Any]:
        """Ops for the quantities of both options, from one snapshot of C0 and C1."""
        cov_dt1 = self.cov_dt1
        has_statistics = self._store.has_statistics(self.cov)
        jobs = [
            (
                damping_id,
                quantities,
                _option1_function(self._option1_signed[damping_id]),
            )
            for damping_id, quantities in self._option1quants_by_damping.items()
        ] + [
            (damping_id, quantities, _option2)
            for damping_id, quantities in self._option2quants_by_damping.items()
        ]
        ops = []
        for damping_id, variables, function in jobs:
            damped = eigenvalues + dampings[damping_id]
            root = tf.matmul(
                eigenvectors * tf.math.rsqrt(damped), eigenvectors, transpose_b=True
            )
            root = statistics.symmetrized(root)
            values, fell_back = _guarded(function, root, cov_dt1, variables)
            ops += self._store.refresh(variables, values, fell_back, has_statistics)
        return ops


def _option1_function(signed: bool) -> Callable[..., tuple[tf.Tensor, ...]]:
    """Option 1 as a function of the damped `C0^(-1/2)` and of C1."""

    def option1(root, cov_dt1):
        middle = tf.matmul(statistics.symmetrized(cov_dt1), root)
        psi_matrix = statistics.symmetrized(tf.matmul(root, middle))
        decompose = tf.linalg.eigh if signed else utils.posdef_eig
        psi, vectors = decompose(psi_matrix)
        return tf.matmul(root, vectors), psi

    return option1


def _option2(root: tf.Tensor, cov_dt1: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Option 2 as a function of the damped `C0^(-1/2)` and of C1."""
    left = tf.matmul(root, cov_dt1)
    singular_values, _, right_vectors = tf.linalg.svd(tf.matmul(left, root))
    mu = tf.minimum(tf.square(singular_values), 1)
    return (
        tf.matmul(left, root, transpose_a=True),
        tf.matmul(root, right_vectors),
        mu,
    )


def _guarded(
    function: Callable[..., tuple[tf.Tensor, ...]],
    root: tf.Tensor,
    cov_dt1: tf.Tensor,
    variables: tuple[tf.Variable, ...],
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """`function(root, cov_dt1)`, or the previous values if that is not finite."""
    finite = tf.logical_and(stored.all_finite(root), stored.all_finite(cov_dt1))
    # Decompositions of NaN raise on some devices.
    root = tf.where(finite, root, tf.zeros_like(root))
    cov_dt1 = tf.where(finite, cov_dt1, tf.zeros_like(cov_dt1))
    values = function(root, cov_dt1)
    good = tf.logical_and(finite, tf.reduce_all([stored.all_finite(v) for v in values]))
    kept = [
        tf.where(good, value, variable)
        for value, variable in zip(values, variables, strict=True)
    ]
    return kept, tf.logical_not(good)
