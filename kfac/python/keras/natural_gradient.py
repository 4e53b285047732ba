"""`NaturalGradient`: the matrix-free natural gradient as a Keras 3 optimizer."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from kfac.python.keras import option_checks
from kfac.python.keras.exact_products import TracedWithExactProducts
from kfac.python.keras.kfac_optimizer import Kfac
from kfac.python.ops import natural_gradient, report, utils
from kfac.python.ops.fisher_factors import stored
from kfac.python.ops.layer_collection import LayerCollection
from kfac.python.ops.optimizer.update_steps import Pair, tensors_of, variables_of
from kfac.python.ops.rules import scalars

# Backward passes spent on the diagonal in a step; it is averaged over steps.
_DIAGONAL_SAMPLES = 2
_START_SLOT = "natural_gradient"
_ITERATIONS, _RESIDUAL = "cg_iterations", "cg_residual"

tf1 = tf.compat.v1


class TracedNaturalGradient(TracedWithExactProducts):
    """`TracedKfac` that preconditions by conjugate gradients.

    Momentum, clipping, weight decay, the quadratic model and damping adaptation are
    those of K-FAC; only the inverse curvature is another one.

    Args:
      *args: of `TracedWithExactProducts`, like `curvature`.
      preconditioner: of CG: None, "diagonal" or "kfac".
      cg_iterations: most iterations of a step.
      cg_tolerance: relative residual that ends the iteration.
      warm_start: whether to begin with the solution of the step before.
      **kwargs: of `TracedWithExactProducts`.
    """

    def __init__(
        self,
        *args: Any,
        preconditioner: str | None,
        cg_iterations: int,
        cg_tolerance: Any,
        warm_start: bool,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._preconditioner = preconditioner
        self._cg_iterations = cg_iterations
        self._cg_tolerance = cg_tolerance
        self._warm_start = warm_start
        self._diagonal_decay = kwargs["cov_ema_decay"]
        with tf1.variable_scope(self._scope, auxiliary_name_scope=False):
            self._last_iterations = self._step_counter(_ITERATIONS)
            self._last_residual = self._scalar(_RESIDUAL)

    # ---------------------------------------------------------------- curvature

    @property
    def _uses_kfac(self) -> bool:
        return self._preconditioner == "kfac"

    def register(self) -> LayerCollection:
        """Registers the losses, and the layers if K-FAC preconditions."""
        if self._uses_kfac:
            return super().register()
        self._layers.move_to_graph(tf1.get_default_graph())
        self.outputs = self._model(self._batch.x)
        self._registrar.register_losses(self._layers, self.outputs, self._batch)
        return self._layers

    def create_state(self) -> list[report.Row]:
        variables = self.registered_variables
        if self._uses_kfac:
            rows = super().create_state()
        else:
            self._get_or_make_velocities(variables)
            rows = report.explain(self._layers)
        if self._warm_start:
            self._starts(variables)
        if self._preconditioner == "diagonal":
            self._diagonal_averages(variables)
        return rows

    def update_curvature(self) -> None:
        """Updates K-FAC where it is used; products need no preparation."""
        if self._uses_kfac:
            super().update_curvature()

    def update_inverses(self) -> list:
        return super().update_inverses() if self._uses_kfac else []

    def _update_statistics(self, should_decay: bool = True) -> list[tf.Operation]:
        return super()._update_statistics(should_decay) if self._uses_kfac else []

    # ---------------------------------------------------------------- the solution

    def _multiply_preconditioner(self, vecs_and_vars: Sequence[Pair]) -> list[Pair]:
        variables = variables_of(vecs_and_vars)
        curvature = self._damped_curvature(variables)
        starts = self._starts(variables) if self._warm_start else None
        solution = curvature.solve(
            tensors_of(vecs_and_vars),
            preconditioner=self._make_preconditioner(curvature, variables),
            start=starts and [start.read_value() for start in starts],
            max_iterations=self._cg_iterations,
            tolerance=self._cg_tolerance,
        )
        # Each replica has the curvature of its own cases, so solutions differ.
        x = self._average(solution.x, "natural gradient")
        ops = [
            utils.smart_assign(self._last_residual, solution.residual, force_cast=True),
            self._last_iterations.assign(tf.cast(solution.iterations, tf.int64)),
        ]
        if starts is not None:
            pairs = zip(starts, x, strict=True)
            ops += [utils.smart_assign(s, part, force_sync=False) for s, part in pairs]
        return self._after(tf.group(ops), list(zip(x, variables, strict=True)))

    def _make_preconditioner(
        self, curvature: natural_gradient.DampedCurvature, variables: Sequence[Any]
    ) -> natural_gradient.Preconditioner | None:
        if self._preconditioner is None:
            return None
        if self._uses_kfac:
            return natural_gradient.estimator_preconditioner(
                self._fisher_est, variables
            )
        seed = self._seed_of(self.counter)
        sample = curvature.estimate_diagonal(_DIAGONAL_SAMPLES, seed)
        sample = self._average(sample, "diagonal")
        averages = self._diagonal_averages(variables)
        # A batch that is not finite would stay in the averages for ever.
        good = tf.reduce_all([stored.all_finite(part) for part in sample])
        decay = scalars.cast(self._diagonal_decay, sample[0].dtype)
        decay = tf.where(good, decay, tf.ones_like(decay))
        updates = [
            average.add_to_average(
                tf.where(good, part, tf.zeros_like(part)), decay, 1.0 - decay
            )
            for average, part in zip(averages, sample, strict=True)
        ]
        with tf.control_dependencies(updates):
            diagonal = [tf.identity(average.value) for average in averages]
        return natural_gradient.diagonal_preconditioner(
            diagonal, self._fisher_est.damping
        )

    def _starts(self, variables: Sequence[Any]) -> list[tf.Variable]:
        return [self._zeros_slot(v, _START_SLOT, _START_SLOT) for v in variables]

    def _diagonal_averages(
        self, variables: Sequence[Any]
    ) -> list[utils.MovingAverageVariable]:
        with tf1.variable_scope(self._scope, auxiliary_name_scope=False):
            return [
                utils.MovingAverageVariable(
                    f"{self._unique_path(v)}/diagonal", v.shape, v.dtype.base_dtype
                )
                for v in variables
            ]


@keras.saving.register_keras_serializable(package="kfac")
class NaturalGradient(Kfac):
    """Preconditions gradients with the exact inverse of the batch's curvature.

        optimizer = kfac.keras.optimizers.NaturalGradient(
            learning_rate=0.1, damping=0.3, model=model)
        model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
        model.fit(x, y, batch_size=512, epochs=5)

    Every step solves `(C + damping I) x = g` by conjugate gradients; C is the model's
    Fisher matrix, the generalised Gauss-Newton matrix or the empirical Fisher matrix
    of the step's batch, which is never formed: an iteration costs about two forward
    and two backward passes.  Everything else is as in `Kfac`, and all of its arguments
    are available: `norm_constraint`, `adaptive=True` (damping, learning rate and
    momentum from the quadratic model: Hessian-free optimization), ...
    `qmodel_batch_fraction` is the part of the batch that C is taken from; arguments
    about the statistics of K-FAC matter with `preconditioner="kfac"`.

    The momentum is "regular" by default, a sum of natural gradients.  That of "adam" is
    a sum of gradients, whose older terms come from other cases than C: what C does not
    know of them would be divided by the damping alone.  For the same reason C wants a
    larger damping than averaged statistics do, 0.1 to 1 for batches of a few hundred.

    In replicas each one solves with the curvature of its own cases and the gradient of
    all; the solutions are averaged.

    Martens 2010, "Deep learning via Hessian-free optimization"; Pascanu & Bengio 2014,
    "Revisiting natural gradient for deep networks".
    """

    _traced_class = TracedNaturalGradient

    def __init__(
        self,
        learning_rate: Any = None,
        damping: Any = None,
        model: Any = None,
        curvature: str = natural_gradient.FISHER,
        preconditioner: str | None = None,
        cg_iterations: int = 10,
        cg_tolerance: float = 0.1,
        warm_start: bool = True,
        **kfac_kwargs: Any,
    ):
        """Checks the arguments; the model is registered when training starts.

        Args:
          learning_rate: see `Kfac`.
          damping: likewise.
          model: likewise.
          curvature: "fisher", "ggn" or "empirical_fisher".
          preconditioner: of CG: None; "diagonal", a running estimate of C's diagonal;
            "kfac", whose statistics and inverses are then kept as in `Kfac`.
          cg_iterations: most iterations of a step.
          cg_tolerance: relative residual that ends the iteration.
          warm_start: begin with the solution of the step before, where it is of use.
          **kfac_kwargs: of `Kfac`.

        Raises:
          ValueError: arguments are missing, unknown or contradict each other.
        """
        own = {
            "curvature": curvature,
            "preconditioner": preconditioner,
            "cg_iterations": cg_iterations,
            "cg_tolerance": cg_tolerance,
            "warm_start": warm_start,
        }
        own = option_checks.checked_by(option_checks.NATURAL_GRADIENT, own)
        if not kfac_kwargs.get("adaptive"):
            kfac_kwargs.setdefault("momentum_type", "regular")
        super().__init__(
            learning_rate=learning_rate, damping=damping, model=model, **kfac_kwargs
        )
        self._options = types.MappingProxyType({**self._options, **own})

    @property
    def cg_iterations(self) -> Any:
        """Iterations that the last step took; 0 before any."""
        return self._reported(_ITERATIONS, 0)

    @property
    def cg_residual(self) -> Any:
        """Relative residual that the last step ended with; NaN before any."""
        return self._reported(_RESIDUAL, float("nan"))

    def _reported(self, name: str, default: Any) -> Any:
        variable = self.state_variable(f"kfac/{name}")
        return default if variable is None else variable
