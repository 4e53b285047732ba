"""Matrix-free natural gradient: solves `(C + damping I) x = g` by products with C.

C is the mean over the cases of a mini-batch of

    "fisher"            the model's Fisher matrix           J' F_z J
    "ggn"               the generalised Gauss-Newton matrix J' H_z J
    "empirical_fisher"  g_b g_b', g_b the gradient of a case on its actual target

of the registered losses; z are their inputs, J the Jacobian of z.  No matrix of the
parameters is ever formed (Amari 1998; Martens 2010, "Deep learning via Hessian-free
optimization"; Martens 2014, section 12).

    curvature = DampedCurvature(collection, variables, damping=1e-2, num_cases=512)
    solution = curvature.solve(gradients, max_iterations=20)

All of it is built in the current graph: v1, `tf.function`, or a conditional's branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import curvature_matrix_vector_products as cmvp
from kfac.python.ops import utils
from kfac.python.ops.errors import MissingTargetsError
from kfac.python.ops.rules import conjugate_gradients, scalars

Vector = list[tf.Tensor]
Preconditioner = Callable[[Vector], Sequence[tf.Tensor]]

FISHER, GGN, EMPIRICAL_FISHER = "fisher", "ggn", "empirical_fisher"
MATRICES = (FISHER, GGN, EMPIRICAL_FISHER)


class EmpiricalFisherProductComputer(cmvp.CurvatureMatrixVectorProductComputer):
    """Products with the empirical Fisher matrix `Σ_b g_b g_b'`, summed over cases.

    With s_lb the derivative of loss l with respect to its inputs for case b, g_b is
    `Σ_l √c_l J_lb' s_lb`, so that the matrix scales with the coefficients c, as the
    other matrices do.  The directional derivatives `g_b' v` of all cases are one
    forward pass `J v`, followed by inner products within each case; the weighted sum
    of the g_b is one reverse pass.

    Rows of the losses' inputs count cases: the leading axis is the batch, and all
    losses of a tower have the same one.

    Args:
      layer_collection: `LayerCollection` whose losses all have targets.
      wrt_tensors: see the base class.

    Raises:
      MissingTargetsError: a loss has no targets.
    """

    def __init__(self, layer_collection: Any, wrt_tensors: Any):
        super().__init__(layer_collection, wrt_tensors)
        for loss in layer_collection.losses:
            if loss.targets is None:
                raise MissingTargetsError(
                    "The empirical Fisher matrix needs targets on every loss, but a "
                    f"{type(loss).__name__} has none. Pass `targets` when registering "
                    "it, or use the model's Fisher matrix."
                )
        # Made here and not in the loops that multiply: they do not depend on vectors.
        self._signals = [self._signal(loss) for loss in layer_collection.losses]

    def multiply_empirical_fisher(self, vecs: Sequence[Any]) -> list[Any]:
        """`Σ_b g_b (g_b' v)`; see `multiply_fisher` for vectors, results and errors."""
        return self.multiply_empirical_fisher_factor(
            self.multiply_empirical_fisher_factor_transpose(vecs)
        )

    def multiply_empirical_fisher_factor_transpose(
        self, vecs: Sequence[Any]
    ) -> tuple[tf.Tensor, ...]:
        """Directional derivatives `g_b' v`, a tensor `[batch]` for each tower."""
        images = self._multiply_jacobian(vecs)
        by_loss = {
            id(loss): _sum_within_cases(signal, image)
            for loss, signal, image in zip(
                self._losses, self._signals, images, strict=True
            )
        }
        return tuple(
            tf.add_n([by_loss[id(loss)] for loss in tower]) for tower in self._towers
        )

    def multiply_empirical_fisher_factor(
        self, case_weights: Sequence[tf.Tensor]
    ) -> list[Any]:
        """`Σ_b w_b g_b` for a tensor of weights `[batch]` for each tower."""
        weights = {
            id(loss): weight
            for tower, weight in zip(self._towers, case_weights, strict=True)
            for loss in tower
        }
        return self._multiply_jacobian_transpose(
            [
                [_times_cases(part, weights[id(loss)]) for part in signal]
                for loss, signal in zip(self._losses, self._signals, strict=True)
            ]
        )

    @property
    def empirical_fisher_factor_inner_shapes(self) -> tuple[tf.Tensor, ...]:
        """For each tower the runtime shape `[batch]` of case weights."""
        position = {id(loss): i for i, loss in enumerate(self._losses)}
        return tuple(
            tf.shape(self._signals[position[id(tower[0])]][0])[:1]
            for tower in self._towers
        )

    @property
    def _towers(self) -> list[tuple]:
        """Per tower its losses."""
        return list(zip(*self._layer_collection.towers_by_loss, strict=True))

    def _signal(self, loss: Any) -> list[tf.Tensor]:
        """`√c s` for each input tensor of a loss, shaped like it."""
        inputs = [tf.convert_to_tensor(z) for z in tf.nest.flatten(loss.inputs)]
        root = scalars.cast(self._layer_collection.loss_coeffs[loss], inputs[0].dtype)
        derivatives = tf.gradients(
            loss.evaluate(), inputs, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return [tf.sqrt(root) * derivative for derivative in derivatives]


class DampedCurvature:
    """`C + damping I` of the registered losses, as a linear map and its inverse.

    Vectors are lists of tensors like `variables`.  Under `tf.distribute` each replica
    has the matrix of its own cases.

    Args:
      layer_collection: `LayerCollection` with the losses (layers are not needed).
      variables: the parameters.
      damping: scalar, positive (or zero, if C has an inverse).
      num_cases: number of cases the losses are of, an int or integer scalar: C is a
        mean over them.
      matrix: one of `MATRICES`.

    Raises:
      ValueError: unknown matrix, no losses, or a negative number.
      MissingTargetsError: see `EmpiricalFisherProductComputer`.
    """

    def __init__(
        self,
        layer_collection: Any,
        variables: Sequence[Any],
        *,
        damping: Any,
        num_cases: Any,
        matrix: str = FISHER,
    ):
        check_matrix(matrix)
        scalars.refuse_unless_positive("damping", damping, or_zero=True)
        scalars.refuse_unless_positive("num_cases", num_cases)
        if not layer_collection.losses:
            raise ValueError("No loss is registered, so there is no curvature.")
        self._variables = list(variables)
        computer = (
            EmpiricalFisherProductComputer
            if matrix == EMPIRICAL_FISHER
            else cmvp.CurvatureMatrixVectorProductComputer
        )(layer_collection, self._variables)
        self._product = getattr(computer, f"multiply_{matrix}")
        self._factor = getattr(computer, f"multiply_{matrix}_factor")
        self._computer = computer
        self._inner_shapes = f"{matrix}_factor_inner_shapes"
        self._damping = damping
        self._num_cases = num_cases

    def multiply(self, vector: Sequence[Any]) -> Vector:
        """`(C + damping I) v`."""
        return [
            product + scalars.cast(self._damping, product.dtype) * v
            for product, v in zip(
                self.multiply_undamped(vector), self._dense(vector), strict=True
            )
        ]

    def multiply_undamped(self, vector: Sequence[Any]) -> Vector:
        """`C v`."""
        return self._mean(self._product(self._dense(vector)))

    def sample_gradient(self, seed: Any = None) -> Vector:
        """A random vector of mean zero and covariance C / cases.

        It is the batch's mean gradient with the derivatives at the loss inputs replaced
        by a factor of their curvature times random signs (Martens, Sutskever & Swersky
        2012, "Estimating the Hessian by back-propagating curvature"); for the
        empirical matrix, with random signs of the cases.  Costs one backward pass.

        Args:
          seed: int, or an integer tensor `[2]` for stateless sampling.
        """
        signs = []
        for i, shape in enumerate(getattr(self._computer, self._inner_shapes)):
            own = seed if seed is None or isinstance(seed, int) else seed + i
            signs.append(utils.generate_random_signs(shape, self._dtype, own))
        return self._mean(self._factor(signs))

    def estimate_diagonal(self, num_samples: int = 8, seed: Any = None) -> Vector:
        """An unbiased, non-negative estimate of C's diagonal.

        Squares of `sample_gradient`, whose entries have about the relative deviation
        `√(2 / num_samples)`.

        Args:
          num_samples: how many are averaged.
          seed: an integer tensor `[2]` for stateless sampling.
        """
        scale = scalars.cast(self._num_cases, self._dtype) / num_samples

        def add(i, total):
            own = seed if seed is None else seed + 1000 * tf.cast(i, seed.dtype)
            sample = self.sample_gradient(own)
            return i + 1, [t + tf.square(s) for t, s in zip(total, sample, strict=True)]

        zero = [tf.zeros(v.shape, v.dtype.base_dtype) for v in self._variables]
        _, total = tf.while_loop(
            lambda i, _: i < num_samples, add, (tf.constant(0), zero)
        )
        return [tf.cast(scale, t.dtype) * t for t in total]

    def solve(
        self,
        gradients: Sequence[Any],
        *,
        preconditioner: Preconditioner | None = None,
        start: Sequence[Any] | None = None,
        max_iterations: Any = 20,
        tolerance: Any = 1e-3,
    ) -> conjugate_gradients.Solution:
        """`(C + damping I)^-1 g`; see `rules.conjugate_gradients.solve`.

        Args:
          gradients: g.
          preconditioner: from `estimator_preconditioner`, `diagonal_preconditioner`,
            or any other map that roughly inverts the matrix.
          start: for a warm start, such as the solution of the step before.
          max_iterations: most products.
          tolerance: on the relative residual.
        """
        return conjugate_gradients.solve(
            self.multiply,
            self._dense(gradients),
            preconditioner=preconditioner,
            start=start,
            max_iterations=max_iterations,
            tolerance=tolerance,
        )

    @property
    def _dtype(self) -> tf.DType:
        return tf.as_dtype(self._variables[0].dtype).base_dtype

    def _dense(self, vector: Sequence[Any]) -> Vector:
        return [
            tf.zeros(v.shape, v.dtype.base_dtype)
            if part is None
            else tf.convert_to_tensor(part)
            for part, v in zip(vector, self._variables, strict=True)
        ]

    def _mean(self, total: Sequence[Any]) -> Vector:
        return [
            part / scalars.cast(self._num_cases, part.dtype)
            for part in self._dense(total)
        ]


def check_matrix(matrix: Any) -> None:
    """Raises `ValueError` unless `matrix` is one of `MATRICES`."""
    if matrix not in MATRICES:
        raise ValueError(
            f"Unknown curvature matrix {matrix!r}; use one of "
            f"{', '.join(map(repr, MATRICES))}."
        )


def diagonal_preconditioner(diagonal: Sequence[Any], damping: Any) -> Preconditioner:
    """Divides by `diagonal + damping`.

    Args:
      diagonal: of C, not negative; for instance `DampedCurvature.estimate_diagonal()`
        or a moving average of it.
      damping: scalar, positive.
    """
    inverses = [1 / (d + scalars.cast(damping, d.dtype)) for d in diagonal]
    return lambda vector: [m * v for m, v in zip(inverses, vector, strict=True)]


def estimator_preconditioner(
    estimator: Any, variables: Sequence[Any]
) -> Preconditioner:
    """Multiplies by the inverse of a `FisherEstimator`'s damped blocks (K-FAC).

    Args:
      estimator: with variables and up-to-date inverses.
      variables: the order of the vectors.
    """

    def multiply(vector):
        pairs = list(zip(vector, variables, strict=True))
        return [product for product, _ in estimator.multiply_inverse(pairs)]

    return multiply


def _sum_within_cases(signal: Sequence[tf.Tensor], image: Any) -> tf.Tensor:
    """`[batch]` inner products of two structures of tensors `[batch, ...]`."""
    return tf.add_n(
        [
            tf.reduce_sum(
                s * tf.convert_to_tensor(z), axis=list(range(1, s.shape.rank))
            )
            for s, z in zip(signal, tf.nest.flatten(image), strict=True)
        ]
    )


def _times_cases(part: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """`[batch, ...]` times `[batch]`."""
    ones = [1] * (part.shape.rank - 1)
    return part * tf.reshape(weights, [-1, *ones])
