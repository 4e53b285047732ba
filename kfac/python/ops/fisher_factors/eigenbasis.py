"""Second moments of gradients in the eigenbasis of two Kronecker factors (EKFAC).

T. George, C. Laurent, X. Bouthillier, N. Ballas, P. Vincent, "Fast approximate natural
gradient descent in a Kronecker-factored eigenbasis", arXiv 1806.03884.

With the eigenbasis `U = U_A (x) U_G` of K-FAC's factors A and G, K-FAC says
`F ~ U diag(c λ_A (x) λ_G) Uᵀ`.  The best diagonal in that basis, in Frobenius norm, is
the diagonal of `Uᵀ F U`: the second moments S of the coordinates of the gradients of
single examples (section 3, theorem 2).

**What happens when the basis is refreshed.**  Moments belong to the basis they were
taken in.  The first refresh leaves the identity for an eigenbasis and starts S anew at
K-FAC's own estimate, `c λ_A (x) λ_G`; every later batch moves it towards the true
moments, so S is never further from `diag(Uᵀ F U)` than K-FAC is.  Later refreshes turn
the basis a little: S becomes the diagonal of the old estimate in the new basis, which
is its best diagonal approximation there, keeps its sum, and merely reorders S where
eigenvectors changed places.  The accumulated weight stays as it is both times.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import eigenbasis, utils
from kfac.python.ops.fisher_factors import base, example_gradients, stored
from kfac.python.ops.rules import scalars

tf1 = tf.compat.v1


class EigenbasisFactor(base.FisherFactor):
    """Bases, and eigenvalues in them that are re-estimated at every update.

    Before the first refresh, by `make_inverse_update_ops`, both bases are the identity
    and the eigenvalues those of the plain diagonal.  A decomposition that fails leaves
    everything as it is and is counted in `fallbacks`; so does a batch whose statistics
    are not finite.

    All functions of the damped matrix are computed on demand from the current
    eigenvalues and damping: nothing has to be registered, and any exponent will do.

    Args:
      examples: `example_gradients.Examples` of the layer.
      input_factor: factor of A, a `DenseSquareMatrixFactor` of side `d_in`.
      output_factor: factor of G, of side `d_out`.
    """

    def __init__(self, examples: Any, input_factor: Any, output_factor: Any):
        self._examples = examples
        self._input_factor = input_factor
        self._output_factor = output_factor
        self._store = stored.InverseStore(self)
        self._input_basis: tf.Variable | None = None
        self._output_basis: tf.Variable | None = None
        self._refreshes: tf.Variable | None = None
        super().__init__()

    @property
    @abc.abstractmethod
    def eigenvalues(self) -> tf.Tensor:
        """Current second moments in the basis, `[d_in, d_out]`, undamped."""

    @abc.abstractmethod
    def _kronecker_moments(
        self, input_eigenvalues: tf.Tensor, output_eigenvalues: tf.Tensor
    ) -> tf.Tensor:
        """What K-FAC takes for the average, in the layout of `cov`."""

    @abc.abstractmethod
    def _carried_over(
        self, input_rotation: tf.Tensor, output_rotation: tf.Tensor, restart: tf.Tensor
    ) -> tf.Tensor:
        """The average after a change of eigenbasis, in the layout of `cov`.

        Args:
          input_rotation: `[d_in, d_in]`, new basis transposed times the old one.
          output_rotation: the same, `[d_out, d_out]`.
          restart: what `_kronecker_moments` gives in the new basis.
        """

    @property
    def _var_scope(self) -> str:
        return "ff_eigenbasis_" + self._examples.scope

    @property
    def _identity(self) -> Hashable:
        return self._examples.identity

    @property
    def _num_sources(self) -> int:
        return self._examples.num_sources

    @property
    def _num_towers(self) -> int:
        return self._examples.num_towers

    @property
    def _dtype(self) -> tf.DType:
        return self._examples.dtype

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        return self._examples.batch_size(source, tower)

    def _get_data_device(self, tower: int) -> str | None:
        return self._examples.device(tower)

    @property
    def sides(self) -> tuple[int, int]:
        """`(d_in, d_out)`: the sizes of the bases."""
        return self._examples.d_in, self._examples.d_out

    @property
    def input_basis(self) -> tf.Variable:
        """U_A, eigenvectors as columns, `[d_in, d_in]`."""
        return self._input_basis

    @property
    def output_basis(self) -> tf.Variable:
        """U_G, eigenvectors as columns, `[d_out, d_out]`."""
        return self._output_basis

    @property
    def fallbacks(self) -> tf.Variable | None:
        """int64 count of updates that met statistics they could not use."""
        return self._store.fallbacks

    # Updates.

    def instantiate_cov_variables(self) -> None:
        """Creates the variables of the average and, as it is taken in them, the bases.

        Raises:
          ArgumentError: this factor has them already.
        """
        super().instantiate_cov_variables()
        identity = tf1.initializers.identity
        d_in, d_out = self.sides
        self._input_basis = self._store.create("input_basis", [d_in] * 2, identity)
        self._output_basis = self._store.create("output_basis", [d_out] * 2, identity)
        self._refreshes = self._store.create("refreshes", [], tf1.zeros_initializer)

    def add_statistics(
        self, statistics: Sequence[tf.Tensor], ema_decay: Any, ema_weight: Any
    ) -> Any:
        """Op that takes one step of the moving average.

        Statistics that are not finite are replaced by the current average.

        Args:
          statistics: the second moment of a mini-batch.
          ema_decay: float or scalar tensor, multiplies the past.
          ema_weight: float or scalar tensor, multiplies the new second moment.
        """
        (new,) = statistics
        finite = stored.all_finite(new)
        self._cov_tensor = tf.where(finite, new, self.cov)
        return tf.group(
            self._cov.add_to_average(
                self._cov_tensor, decay=ema_decay, weight=ema_weight
            ),
            self._count_fallback(tf.logical_not(finite)),
        )

    def _count_fallback(self, fell_back: tf.Tensor) -> tf.Operation:
        return utils.smart_assign(
            self._store.fallbacks,
            tf.cast(fell_back, tf.int64),
            assign_fn=tf1.assign_add,
            force_sync=False,
        )

    def instantiate_inv_variables(self) -> None:
        """Nothing left to create."""

    def make_inverse_update_ops(self) -> list[Any]:
        """One op that refreshes the bases and carries the average over to them.

        It reads the running averages of A and G only; without statistics it changes
        nothing.
        """
        input_values, input_basis = self._input_factor.get_eigendecomp()
        output_values, output_basis = self._output_factor.get_eigendecomp()
        good = tf.reduce_all(
            [
                stored.all_finite(part)
                for part in (input_values, input_basis, output_values, output_basis)
            ]
        )
        has_statistics = tf.reduce_all(
            [
                tf.reduce_any(tf.not_equal(values, 0))
                for values in (input_values, output_values)
            ]
        )
        restart = self._kronecker_moments(input_values, output_values)
        carried = self._carried_over(
            tf.matmul(input_basis, self._input_basis, transpose_a=True),
            tf.matmul(output_basis, self._output_basis, transpose_a=True),
            restart,
        )
        moments = tf.where(tf.equal(self._refreshes, 0), restart, carried)
        moments = self._undebiased(moments)
        new = [input_basis, output_basis, self._refreshes + 1, moments]
        old = self.inverse_variables()
        values = [
            tf.where(good, value, variable)
            for value, variable in zip(new, old, strict=True)
        ]
        # All old values must be read before the first one is overwritten.
        with tf.control_dependencies(values):
            ops = self._store.refresh(old, values, tf.logical_not(good), has_statistics)
        return [tf.group(*ops)]

    def _undebiased(self, average: tf.Tensor) -> tf.Tensor:
        """What the variable of the moving average holds for this average."""
        if not self._cov._normalize_value:
            return average
        return average * self._cov._total_weight

    def get_inv_vars(self) -> list[Any]:
        """The bases, of the input side first."""
        return [] if self._input_basis is None else [*self._bases]

    @property
    def _bases(self) -> tuple[tf.Variable, tf.Variable]:
        return self._input_basis, self._output_basis

    def inverse_variables(self) -> list[tf.Variable]:
        """The bases, the count of refreshes, and the average, which is carried over."""
        return [*self._bases, self._refreshes, self._cov._var]

    def inverse_flops(self) -> float:
        """Two eigendecompositions, and the old bases in terms of the new ones."""
        return sum(11.0 * side**3 for side in self.sides)

    # What is served.

    def register_matpower(self, exp: float, damping_func: Callable[[], Any]) -> None:
        """Does nothing: powers are computed on demand."""

    def register_cholesky(self, damping_func: Callable[[], Any]) -> None:
        """Does nothing: square roots are computed on demand."""

    def register_cholesky_inverse(self, damping_func: Callable[[], Any]) -> None:
        """Does nothing: square roots are computed on demand."""

    def to_eigenbasis(self, matrix: tf.Tensor) -> tf.Tensor:
        """Coordinates `U_Aᵀ V U_G` of `V` `[d_in, d_out]`."""
        return eigenbasis.to_eigenbasis(matrix, *self._bases)

    def from_eigenbasis(self, coordinates: tf.Tensor) -> tf.Tensor:
        """The matrix `U_A C U_Gᵀ` of coordinates C `[d_in, d_out]`."""
        return eigenbasis.from_eigenbasis(coordinates, *self._bases)

    def damped_power(self, exp: float, damping_func: Callable[[], Any]) -> tf.Tensor:
        """`(eigenvalues + damping)^exp`, `[d_in, d_out]`."""
        damped = self.eigenvalues + self._damping(damping_func)
        return tf.pow(damped, scalars.cast(exp, damped.dtype))

    def get_cov_as_linear_operator(self) -> eigenbasis.LinearOperatorEigenbasis:
        """`U diag(S) Uᵀ` over the parameters, flattened row-major."""
        return eigenbasis.LinearOperatorEigenbasis(self.eigenvalues, *self._bases)

    def get_matpower(
        self, exp: float, damping_func: Callable[[], Any]
    ) -> eigenbasis.LinearOperatorEigenbasis:
        """`U diag((S + damping)^exp) Uᵀ`, for any exponent."""
        return eigenbasis.LinearOperatorEigenbasis(
            self.damped_power(exp, damping_func),
            *self._bases,
            is_positive_definite=True,
        )

    def get_cholesky(
        self, damping_func: Callable[[], Any]
    ) -> eigenbasis.LinearOperatorEigenbasis:
        """The symmetric square root of `U diag(S + damping) Uᵀ`."""
        return self.get_matpower(0.5, damping_func)

    def get_cholesky_inverse(
        self, damping_func: Callable[[], Any]
    ) -> eigenbasis.LinearOperatorEigenbasis:
        """The symmetric inverse square root of `U diag(S + damping) Uᵀ`."""
        return self.get_matpower(-0.5, damping_func)


class ExampleEigenbasisFactor(EigenbasisFactor):
    """Eigenvalues that are true second moments of the gradients of examples.

    The average `[d_in, d_out]` is the sum over sources and the mean over examples of
    `(U_Aᵀ (Σ_u a_u g_uᵀ) U_G)²`, u the uses of the parameters by the example.
    """

    @property
    def eigenvalues(self) -> tf.Tensor:
        """Current second moments in the basis, `[d_in, d_out]`, undamped."""
        return self.cov

    @property
    def _cov_shape(self) -> Sequence[int]:
        return self.sides

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        return self._tower_moments(tower, [source])

    def _compute_local_new_cov(self) -> tf.Tensor:
        # All sources of a tower together: its inputs are rotated once.
        towers = []
        for tower in range(self._num_towers):
            with base.maybe_place_on_device(self._get_data_device(tower)):
                towers.append(self._tower_moments(tower, range(self._num_sources)))
        return tf.add_n(towers) / len(towers)

    def _tower_moments(self, tower: int, sources: Sequence[int]) -> tf.Tensor:
        return example_gradients.mean_of_squares(
            self._examples, tower, sources, *self._bases
        )

    def _kronecker_moments(self, input_eigenvalues, output_eigenvalues):
        return self._examples.uses * tf.tensordot(
            input_eigenvalues, output_eigenvalues, axes=0
        )

    def _carried_over(self, input_rotation, output_rotation, restart):
        del restart
        return eigenbasis.diagonal_after_rotation(
            self.cov, input_rotation, output_rotation
        )


class ProductEigenbasisFactor(EigenbasisFactor):
    """Eigenvalues that are products, as in K-FAC: cheaper, and exact in damping only.

    The average `[d_in + d_out]` holds the diagonals of `U_Aᵀ A U_A` and `U_Gᵀ G U_G`,
    which are the eigenvalues of A and G right after a refresh and stay up to date
    between refreshes.  No gradients of single examples are formed.
    """

    @property
    def eigenvalues(self) -> tf.Tensor:
        """Current products of moments in the bases, `[d_in, d_out]`, undamped."""
        cov = self.cov
        d_in = self._examples.d_in
        return self._examples.uses * tf.tensordot(cov[:d_in], cov[d_in:], axes=0)

    @property
    def _cov_shape(self) -> Sequence[int]:
        return [sum(self.sides)]

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        examples = self._examples
        outputs = example_gradients.mean_square_of_features(
            examples.grads(source, tower), self._output_basis
        )
        if source:  # The inputs have but one source.
            return tf.pad(outputs, [[examples.d_in, 0]])
        inputs = example_gradients.mean_square_of_features(
            examples.rows(examples.inputs(tower)), self._input_basis
        )
        return tf.concat([inputs, outputs], axis=0)

    def _kronecker_moments(self, input_eigenvalues, output_eigenvalues):
        return tf.concat([input_eigenvalues, output_eigenvalues], axis=0)

    def _carried_over(self, input_rotation, output_rotation, restart):
        del input_rotation, output_rotation
        return restart  # Exactly the diagonals in the new bases.
