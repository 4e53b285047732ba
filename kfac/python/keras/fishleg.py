"""`FishLeg`: a learned inverse Fisher matrix as a Keras 3 optimizer."""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from kfac.python.keras import option_checks
from kfac.python.keras.exact_products import TracedWithExactProducts
from kfac.python.keras.kfac_optimizer import Kfac
from kfac.python.ops import fishleg, layer_inverses, report, utils
from kfac.python.ops.natural_gradient import DampedCurvature
from kfac.python.ops.optimizer.update_steps import Pair, tensors_of, variables_of
from kfac.python.ops.rules import scalars
from kfac.python.ops.utils.scheduling import run_if

_SCOPE = "fishleg"
_PREVIOUS_SLOT = "previous_gradient"
_LOSS, _RESIDUAL = "auxiliary_loss", "auxiliary_residual"

tf1 = tf.compat.v1


class TracedFishLeg(TracedWithExactProducts):
    """`TracedKfac` that preconditions by a learned inverse.

    Where the inverse is due for training, the model is registered on part of the
    batch, inside the branch; its layers tell which `LayerInverse` each group of
    parameters has, its losses give products with the Fisher matrix.

    Args:
      *args: of `TracedKfac`.
      update_aux_every: steps from one auxiliary update to the next.
      aux_learning_rate: of Adam.
      warmup_steps: auxiliary updates before the first step.
      initial_scale: of Q, which starts as a multiple of the identity.
      **kwargs: of `TracedKfac`.
    """

    def __init__(
        self,
        *args: Any,
        update_aux_every: int,
        aux_learning_rate: Any,
        warmup_steps: int,
        initial_scale: float,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._update_aux_every = update_aux_every
        self._aux_learning_rate = aux_learning_rate
        self._warmup_steps = warmup_steps
        self._initial_scale = initial_scale
        self._inverse: fishleg.InverseFisher | None = None
        with tf1.variable_scope(self._scope, auxiliary_name_scope=False):
            self._last_loss = self._scalar(_LOSS)
            self._last_residual = self._scalar(_RESIDUAL)

    def create_state(self) -> list[report.Row]:
        variables = self.registered_variables
        self._get_or_make_velocities(variables)
        self._previous_gradients(variables)
        self._make_inverse()
        return report.explain(self._layers)

    def update_curvature(self) -> None:
        """Builds the conditional training of the inverse."""
        due = tf.equal(self.counter % self._update_aux_every, 0)
        run_if(due, self._update_statistics)

    def update_inverses(self) -> list:
        """There are none besides the one that is learned."""
        return []

    def _update_statistics(self, should_decay: bool = True) -> list[tf.Operation]:
        """Auxiliary updates: those of the warm-up before the first step, else one."""
        del should_decay
        self.register()
        if self._strict:
            self._layers.check_strict()
        self._make_inverse()
        variables = self._inverse.variables
        size = self._batch_size
        curvature = DampedCurvature(
            self._layers,
            variables,
            damping=scalars.cast(self._fisher_est.damping, variables[0].dtype),
            num_cases=size,
        )

        def sampled(step):
            return curvature.sample_gradient(self._seed_of(step))

        previous = [slot.read_value() for slot in self._previous_gradients(variables)]
        before_first = tf.equal(self.counter, 0)
        run_if(
            before_first,
            lambda: self._train_inverse(sampled, curvature, self._warmup_steps, size),
        )
        run_if(
            tf.logical_not(before_first),
            lambda: self._train_inverse(lambda _: previous, curvature, 1, size),
        )
        return []

    def _train_inverse(
        self, direction: Any, curvature: DampedCurvature, num_steps: int, size: Any
    ) -> list[Any]:
        """Ops that train Q on the replica's cases, store the mean and report."""
        op, progress = self._inverse.train(
            direction,
            curvature.multiply,
            learning_rate=self._aux_learning_rate,
            num_steps=num_steps,
            weight=size if tf.is_tensor(size) else None,
        )
        reports = [self._last_loss, self._last_residual]
        return [op] + [
            utils.smart_assign(report, value, force_cast=True, force_sync=False)
            for report, value in zip(reports, progress, strict=True)
        ]

    def _make_inverse(self) -> None:
        """Finds or makes the state of Q for the registered layers."""
        groups = []
        for params, block in self._layers.fisher_blocks.items():
            params = list(utils.ensure_sequence(params))
            groups.append((params, layer_inverses.of_block(block, params)))
        with tf1.variable_scope(self._scope, auxiliary_name_scope=False):
            with tf1.variable_scope(_SCOPE, auxiliary_name_scope=False):
                self._inverse = fishleg.InverseFisher(groups, self._initial_scale)

    def _multiply_preconditioner(self, vecs_and_vars: Sequence[Pair]) -> list[Pair]:
        by_variable = {v.ref(): tensor for tensor, v in vecs_and_vars}
        ordered = [by_variable[v.ref()] for v in self._inverse.variables]
        products = {
            v.ref(): product
            for v, product in zip(
                self._inverse.variables, self._inverse.multiply(ordered), strict=True
            )
        }
        return [(products[v.ref()], v) for _, v in vecs_and_vars]

    def apply_gradients(
        self, grads_and_vars: Iterable[Pair], *args: Any, **kwargs: Any
    ) -> tf.Operation:
        """As in the base class; the gradients are what the next update trains on."""
        grads_and_vars = tuple(grads_and_vars)
        slots = self._previous_gradients(variables_of(grads_and_vars))
        kept = [
            utils.smart_assign(slot, gradient, force_sync=False)
            for slot, gradient in zip(slots, tensors_of(grads_and_vars), strict=True)
        ]
        with tf.control_dependencies(kept):
            return super().apply_gradients(grads_and_vars, *args, **kwargs)

    def _previous_gradients(self, variables: Sequence[Any]) -> list[tf.Variable]:
        return [self._zeros_slot(v, _PREVIOUS_SLOT, _PREVIOUS_SLOT) for v in variables]


@keras.saving.register_keras_serializable(package="kfac")
class FishLeg(Kfac):
    """Preconditions gradients with an inverse Fisher matrix that is learned on the go.

        optimizer = kfac.keras.optimizers.FishLeg(
            learning_rate=0.05, damping=0.1, model=model)
        model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
        model.fit(x, y, batch_size=512, epochs=5)

    Q(λ) has a Kronecker product of two matrices for each dense and convolutional layer
    and a diagonal for everything else (other kinds plug in, see `layer_inverses`). It
    is trained by Adam to be `(F + damping I)^-1` on normalised gradients, by products
    with the Fisher matrix F of other data: the batch of a step serves for the gradient
    of the step before. There are no factorisations.

    Everything else is as in `Kfac`, and its arguments are available as far as they are
    not about Kronecker factors; `cov_batch_fraction` is the part of the batch that F is
    taken from.  In replicas each one trains on the cases of its own, and λ is averaged.

    Garcia et al., "Fisher-Legendre (FishLeg) optimization of deep neural networks",
    ICLR 2023.
    """

    _traced_class = TracedFishLeg

    def __init__(
        self,
        learning_rate: Any = None,
        damping: Any = None,
        model: Any = None,
        update_aux_every: int = 1,
        aux_learning_rate: float = 3e-3,
        warmup_steps: int = 100,
        initial_scale: float = 1.0,
        **kfac_kwargs: Any,
    ):
        """Checks the arguments; the model is registered when training starts.

        Args:
          learning_rate: see `Kfac`.
          damping: multiple of the identity added to F.
          model: see `Kfac`.
          update_aux_every: steps from one auxiliary update to the next.
          aux_learning_rate: of Adam in the auxiliary updates.
          warmup_steps: auxiliary updates before the first step, on gradients sampled
            from the model; at least 1.
          initial_scale: Q is that multiple of the identity at the start.
          **kfac_kwargs: of `Kfac`.

        Raises:
          ValueError: arguments are missing, unknown or contradict each other.
        """
        own = {
            "update_aux_every": update_aux_every,
            "aux_learning_rate": aux_learning_rate,
            "warmup_steps": warmup_steps,
            "initial_scale": initial_scale,
        }
        own = option_checks.checked_by(option_checks.FISHLEG, own)
        super().__init__(
            learning_rate=learning_rate, damping=damping, model=model, **kfac_kwargs
        )
        self._options = types.MappingProxyType({**self._options, **own})

    @property
    def auxiliary_loss(self) -> Any:
        """Of the last auxiliary update; NaN before any."""
        return self._reported(_LOSS)

    @property
    def auxiliary_residual(self) -> Any:
        """`|(F + damping I) Q u - u| / |u|` of the last update; NaN before any."""
        return self._reported(_RESIDUAL)

    def _reported(self, name: str) -> Any:
        variable = self.state_variable(f"kfac/{name}")
        return float("nan") if variable is None else variable
