"""Factors that keep a full matrix, and functions of it in variables."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, KeysView
from typing import Any

import tensorflow as tf

from kfac.python.ops import config, deferred, inverses, utils
from kfac.python.ops import linear_operator as lo
from kfac.python.ops.fisher_factors import base, naming, stored
from kfac.python.ops.rules import scalars
from kfac.python.ops.utils import packing


class DenseSquareMatrixFactor(base.FisherFactor):
    """A second moment `[n, n]`, with powers and Cholesky factors kept in variables.

    What is served is as of the last run of the inverse updates. The updates leave the
    variables alone until there are statistics. A matrix that cannot be inverted is
    handled as `inverses` describes, and counted in `fallbacks`.

    The inverse and both Cholesky factors at one damping share one factorisation. All
    powers share one eigendecomposition if there is any power besides -1, or if there
    are at least `eigenvalue_decomposition_threshold` inverses.

    Subclasses set their data first and call `__init__` of this class last.
    """

    def __init__(self):
        self._store = stored.InverseStore(self)
        # Ordered as registered, so that all processes create the same variables.
        self._matpowers: dict[tuple[float, Hashable], None] = {}
        self._choleskys: dict[Hashable, None] = {}
        self._cholesky_inverses: dict[Hashable, None] = {}
        self._matpower_by_exp_and_damping: dict[tuple[float, Hashable], Any] = {}
        self._cholesky_by_damping: dict[Hashable, Any] = {}
        self._cholesky_inverse_by_damping: dict[Hashable, Any] = {}
        self._eigendecomp: deferred.PerContextCache | None = None
        super().__init__()

    @property
    def fallbacks(self) -> tf.Variable | None:
        """int64 count of inverse updates that met a matrix they could not handle."""
        return self._store.fallbacks

    @property
    def _damping_funcs_by_id(self) -> dict[Hashable, Callable[[], Any]]:
        return self._store.damping_funcs

    @property
    def _matpower_registrations(self) -> KeysView:
        return self._matpowers.keys()

    @property
    def _cholesky_registrations(self) -> KeysView:
        return self._choleskys.keys()

    @property
    def _cholesky_inverse_registrations(self) -> KeysView:
        return self._cholesky_inverses.keys()

    def register_matpower(self, exp: float, damping_func: Callable[[], Any]) -> None:
        """Asks for `(cov + damping I)^exp` to be maintained; a repeat does nothing.

        Args:
          exp: the exponent; nothing is stored for 1.
          damping_func: has an attribute `func_id`, equality of which is equality of
            the dampings.

        Raises:
          AttributeError: `damping_func` has no `func_id`.
        """
        if exp != 1:
            damping_id = self._store.register(damping_func)
            self._matpowers.setdefault((naming.python_scalar(exp), damping_id))

    def register_inverse(self, damping_func: Callable[[], Any]) -> None:
        """Asks for `(cov + damping I)^-1` to be maintained."""
        self.register_matpower(-1, damping_func)

    def register_cholesky(self, damping_func: Callable[[], Any]) -> None:
        """Asks for the lower Cholesky factor L of `cov + damping I`."""
        self._choleskys.setdefault(self._store.register(damping_func))

    def register_cholesky_inverse(self, damping_func: Callable[[], Any]) -> None:
        """Asks for the inverse of the lower Cholesky factor of `cov + damping I`."""
        self._cholesky_inverses.setdefault(self._store.register(damping_func))

    def instantiate_inv_variables(self) -> None:
        """Creates a variable of the covariance's shape for each registration.

        Raises:
          ValueError: they exist already (v1 graph, no reuse).
        """
        create = self._store.create
        for exp, damping_id in self._matpowers:
            self._matpower_by_exp_and_damping[(exp, damping_id)] = create(
                f"matpower_exp{exp!r}_damp{self._store.label(damping_id)}",
                self._cov_shape,
            )
        for damping_id in self._choleskys:
            self._cholesky_by_damping[damping_id] = create(
                f"cholesky_damp{self._store.label(damping_id)}", self._cov_shape
            )
        for damping_id in self._cholesky_inverses:
            self._cholesky_inverse_by_damping[damping_id] = create(
                f"cholesky_inverse_damp{self._store.label(damping_id)}",
                self._cov_shape,
            )

    def get_inv_vars(self) -> list[Any]:
        """Variables: powers, then Cholesky factors, then their inverses."""
        return [
            *self._matpower_by_exp_and_damping.values(),
            *self._cholesky_by_damping.values(),
            *self._cholesky_inverse_by_damping.values(),
        ]

    def statistics_layouts(self) -> list[packing.Layout]:
        """Second moments are symmetric."""
        return [packing.Layout.SYMMETRIC]

    def inverse_layouts(self) -> list[packing.Layout]:
        """Powers are symmetric, Cholesky factors and their inverses triangular."""
        triangular = [*self._cholesky_by_damping, *self._cholesky_inverse_by_damping]
        return [packing.Layout.SYMMETRIC] * len(self._matpower_by_exp_and_damping) + [
            packing.Layout.LOWER
        ] * len(triangular)

    def inverse_flops(self) -> float:
        """Operations of factorisations `n^3 / 3`, solves `n^3`, products `2 n^3`.

        A symmetric eigendecomposition with vectors takes about `9 n^3` (Golub & Van
        Loan, "Matrix computations", 8.3).
        """
        powers = self._matpower_by_exp_and_damping
        by_eig = self._updates_powers_by_eig()
        inverted = {i for _, i in powers} if not by_eig else set()
        solved = inverted | set(self._cholesky_inverse_by_damping)
        factorised = solved | set(self._cholesky_by_damping)
        cubes = len(factorised) / 3 + len(solved) + 2 * len(inverted)
        if by_eig:
            cubes += 9 + 2 * len(powers)
        return cubes * float(self._cov_shape[0]) ** 3

    def make_inverse_update_ops(self) -> list[Any]:
        """Ops that refresh all stored matrices from the current average.

        Returns:
          By eigendecomposition one op for all powers, else one op per inverse; then
          one op per inverse Cholesky factor, which also refreshes the Cholesky factor
          at that damping; then one op per other Cholesky factor.
        """
        return self._inverse_updates(self._store.dampings())

    def _inverse_updates(self, dampings: dict[Hashable, tf.Tensor]) -> list[Any]:
        """`make_inverse_update_ops` at these values of the dampings."""
        by_eig = self._updates_powers_by_eig()
        ops = []
        if by_eig:
            ops.append(tf.group(*self._eig_updates(dampings)))
        if self.get_inv_vars():
            ops.extend(self._factorisation_updates(dampings, not by_eig))
        self._eigendecomp = None
        return ops

    def _updates_powers_by_eig(self) -> bool:
        exponents = [exp for exp, _ in self._matpower_by_exp_and_damping]
        threshold = config.settings().eigenvalue_decomposition_threshold
        return (
            bool(self._eigendecomp)
            or any(exp != -1 for exp in exponents)
            or (bool(exponents) and len(exponents) >= threshold)
        )

    def _eig_updates(self, dampings: dict[Hashable, tf.Tensor]) -> list[Any]:
        """Ops for all powers, from one eigendecomposition."""
        eigenvalues, eigenvectors = self.get_eigendecomp()
        decomposition = inverses.Eigendecomposition(
            eigenvalues,
            eigenvectors,
            failed=tf.reduce_any(tf.math.is_nan(eigenvalues)),
        )
        has_statistics = self._store.has_statistics(self.cov)
        ops = []
        for (exp, damping_id), variable in self._matpower_by_exp_and_damping.items():
            power, fell_back = inverses.damped_power(
                decomposition, exp, dampings[damping_id], previous=variable
            )
            ops += self._store.refresh([variable], [power], fell_back, has_statistics)
        return ops

    def _factorisation_updates(
        self, dampings: dict[Hashable, tf.Tensor], with_inverses: bool
    ) -> list[Any]:
        """Ops for Cholesky factors (and inverses), one factorisation per damping."""
        cov = self.cov
        has_statistics = self._store.has_statistics(cov)
        tables = {
            "inverse": {
                i: v for (_, i), v in self._matpower_by_exp_and_damping.items()
            },
            "cholesky": self._cholesky_by_damping,
            "cholesky_inverse": self._cholesky_inverse_by_damping,
        }
        if not with_inverses:
            del tables["inverse"]
        updates = {}
        for damping_id, damping in dampings.items():
            variables = {
                kind: table[damping_id]
                for kind, table in tables.items()
                if damping_id in table
            }
            for kinds, values, fell_back in _factorise(cov, damping, variables):
                ops = self._store.refresh(
                    [variables[kind] for kind in kinds],
                    values,
                    fell_back,
                    has_statistics,
                )
                updates.update(
                    ((kind, damping_id), op)
                    for kind, op in zip(kinds, ops, strict=True)
                )
        ops = [updates["inverse", i] for i in tables.get("inverse", ())]
        for i in tables["cholesky_inverse"]:
            partner = [updates["cholesky", i]] if i in tables["cholesky"] else []
            ops.append(tf.group(updates["cholesky_inverse", i], *partner))
        ops += [
            updates["cholesky", i]
            for i in tables["cholesky"]
            if i not in tables["cholesky_inverse"]
        ]
        return ops

    def get_eigendecomp(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Eigendecomposition of the current average.

        The same tensors are returned (within one graph and control-flow context)
        until the next `make_inverse_update_ops`.

        Returns:
          Ascending eigenvalues `[n]`, clipped below at the setting
          `eigenvalue_clipping_threshold` (NaN if the average is not finite), and
          eigenvectors `[n, n]` as columns.
        """
        if not self._eigendecomp:
            self._eigendecomp = deferred.PerContextCache(self._compute_eigendecomp)
        return self._eigendecomp.get()

    def _compute_eigendecomp(self) -> tuple[tf.Tensor, tf.Tensor]:
        cov = self.cov
        finite = stored.all_finite(cov)
        # A decomposition of NaN raises on some devices.
        identity = tf.eye(cov.shape.as_list()[-1], dtype=cov.dtype)
        eigenvalues, eigenvectors = utils.posdef_eig(tf.where(finite, cov, identity))
        # Methods differ in the order they return.
        order = tf.argsort(eigenvalues)
        eigenvalues = tf.gather(eigenvalues, order)
        eigenvectors = tf.gather(eigenvectors, order, axis=1)
        threshold = config.settings().eigenvalue_clipping_threshold
        clipped = tf.maximum(eigenvalues, scalars.cast(threshold, cov.dtype))
        nan = tf.constant(float("nan"), cov.dtype)
        return tf.where(finite, clipped, nan), eigenvectors

    def get_cov_as_linear_operator(self) -> lo.LinearOperatorFullMatrix:
        """The running second moment as an operator, read afresh, undamped."""
        return lo.LinearOperatorFullMatrix(
            stored.check_matrix(self.cov), is_self_adjoint=True, is_square=True
        )

    def get_matpower(
        self, exp: float, damping_func: Callable[[], Any]
    ) -> lo.LinearOperatorFullMatrix:
        """`(cov + damping I)^exp`: as of the last inverse update, fresh if exp is 1.

        Raises:
          KeyError: a power other than 1 has no variable.
        """
        if exp == 1:
            cov = self.cov
            damped = tf.linalg.diag_part(cov) + self._damping(damping_func)
            matrix = tf.linalg.set_diag(cov, damped)
        else:
            key = (exp, naming.graph_func_to_id(damping_func))
            matrix = self._store.lookup(
                self._matpower_by_exp_and_damping, key, "matrix power"
            )
        return lo.LinearOperatorFullMatrix(
            stored.check_matrix(matrix),
            is_non_singular=True,
            is_self_adjoint=True,
            is_positive_definite=True,
            is_square=True,
        )

    def get_inverse(
        self, damping_func: Callable[[], Any]
    ) -> lo.LinearOperatorFullMatrix:
        """`(cov + damping I)^-1` as of the last inverse update."""
        return self.get_matpower(-1, damping_func)

    def get_cholesky(
        self, damping_func: Callable[[], Any]
    ) -> lo.LinearOperatorFullMatrix:
        """Lower triangular L, `L Lᵀ = cov + damping I` at the last inverse update.

        Raises:
          KeyError: it has no variable.
        """
        return self._triangular_operator(
            self._cholesky_by_damping, damping_func, "Cholesky factor"
        )

    def get_cholesky_inverse(
        self, damping_func: Callable[[], Any]
    ) -> lo.LinearOperatorFullMatrix:
        """`L⁻¹` (lower triangular) of `get_cholesky` at the last inverse update.

        Raises:
          KeyError: it has no variable.
        """
        return self._triangular_operator(
            self._cholesky_inverse_by_damping, damping_func, "inverse Cholesky factor"
        )

    def _triangular_operator(self, table, damping_func, what):
        damping_id = naming.graph_func_to_id(damping_func)
        matrix = self._store.lookup(table, damping_id, what)
        # Kept as a full matrix: blocks also multiply by it from the right.
        return lo.LinearOperatorFullMatrix(
            stored.check_matrix(matrix), is_non_singular=True, is_square=True
        )


def _factorise(
    cov: tf.Tensor, damping: tf.Tensor, previous: dict[str, tf.Variable]
) -> Iterator[tuple[list[str], list[tf.Tensor], tf.Tensor]]:
    """Functions of `cov + damping I` that need no eigendecomposition.

    Args:
      cov: `[n, n]`.
      damping: scalar.
      previous: what is wanted ("inverse", "cholesky", "cholesky_inverse") and its last
        value.

    Yields:
      What was computed together, its values, and whether they had to be replaced.
    """
    kinds = list(previous)
    if "inverse" in kinds and config.settings().posdef_inv_method != "cholesky":
        kinds.remove("inverse")
        inverse, fell_back = inverses.damped_inverse(
            cov, damping, previous=previous["inverse"]
        )
        yield ["inverse"], [inverse], fell_back
    if not kinds:
        return
    values, fell_back = inverses.with_fallbacks(
        inverses.Factorisation(tuple(kinds)),
        cov,
        damping,
        [previous[kind] for kind in kinds],
        len(kinds),
    )
    yield kinds, values, fell_back
