"""Momentum, preconditioning, clipping and weight decay of `KfacOptimizer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import private_tf, state, utils
from kfac.python.ops.rules import momentum, norm_constraint, quadratic_model, scalars

Pair = tuple[Any, Any]

VELOCITY_SLOT = "velocity"


def tensors_of(pairs: Sequence[Pair]) -> list[tf.Tensor]:
    """The first members of pairs, dense."""
    return [tf.convert_to_tensor(tensor) for tensor, _ in pairs]


def variables_of(pairs: Sequence[Pair]) -> list[Any]:
    """The second members of pairs."""
    return [variable for _, variable in pairs]


def dense(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs with `tf.IndexedSlices` made dense."""
    return list(zip(tensors_of(pairs), variables_of(pairs), strict=True))


class UpdateStepsMixin:
    """Turns gradients into the direction r of the step `-_learning_rate * r`.

    Vectors over parameters are sequences of `(tensor, variable)` pairs.  The methods
    that only form inner products accept None for a variable.
    """

    def _compute_raw_update_steps(self, grads_and_vars: Sequence[Pair]) -> list[Pair]:
        """The direction r; writes velocities and the scalars of the model."""
        compute = {
            "regular": self._compute_regular_steps,
            "adam": self._compute_adam_steps,
            "qmodel": self._compute_qmodel_steps,
            "qmodel_fixedmu": self._compute_qmodel_steps,
        }[self._momentum_type]
        return compute(grads_and_vars)

    def _compute_regular_steps(self, grads_and_vars):
        preconditioned = dense(self._multiply_preconditioner(grads_and_vars))
        if self._norm_constraint is not None:
            preconditioned = self._clip_updates(grads_and_vars, preconditioned)
        steps = self._update_velocities(preconditioned, self._momentum)

        def predicted_change():
            updates = [(-self._rate(r) * r, variable) for r, variable in steps]
            return self._compute_approx_qmodel_change(updates, grads_and_vars)

        return self._after(self._maybe_update_qmodel_change(predicted_change), steps)

    def _compute_adam_steps(self, grads_and_vars):
        velocities = self._update_velocities(grads_and_vars, self._momentum)
        steps = dense(self._multiply_preconditioner(velocities))
        clip_coefficient = 1.0
        if self._norm_constraint is not None:
            clip_coefficient = self._update_clip_coeff(velocities, steps)
            steps = utils.sprod_p(clip_coefficient, steps)

        def predicted_change():
            return quadratic_model.adam_change(
                utils.ip_p(steps, velocities),
                utils.ip_p(steps, dense(grads_and_vars)),
                self._learning_rate,
                clip_coefficient,
            )

        return self._after(self._maybe_update_qmodel_change(predicted_change), steps)

    def _compute_qmodel_steps(self, grads_and_vars):
        preconditioned, m, c, b = self._get_qmodel_quantities(grads_and_vars)
        fixed_mu = self._momentum if self._momentum_type == "qmodel_fixedmu" else None
        alpha, mu, change = self._compute_qmodel_hyperparams(m, c, b, fixed_mu)
        stored = tf.group(
            self._store(self._qmodel_change, change),
            self._store(self._qmodel_learning_rate, -alpha),
            self._store(self._qmodel_momentum, mu),
        )
        steps = self._update_velocities(preconditioned, mu, vec_coeff=-alpha)
        return self._after(stored, steps)

    def _multiply_preconditioner(self, vecs_and_vars: Sequence[Pair]) -> list[Pair]:
        return self._fisher_est.multiply_inverse(vecs_and_vars)

    def _squared_fisher_norm(
        self, grads_and_vars: Sequence[Pair], precon_grads_and_vars: Sequence[Pair]
    ) -> tf.Tensor:
        """`<g, P g>`: squared length of `P g` in the damped curvature."""
        return utils.ip_p(dense(grads_and_vars), dense(precon_grads_and_vars))

    def _update_clip_coeff(
        self, grads_and_vars: Sequence[Pair], precon_grads_and_vars: Sequence[Pair]
    ) -> tf.Tensor:
        """Factor in (0, 1] that makes the step meet the norm constraint."""
        return norm_constraint.clip_coefficient(
            self._squared_fisher_norm(grads_and_vars, precon_grads_and_vars),
            self._learning_rate,
            self._norm_constraint,
        )

    def _clip_updates(
        self, grads_and_vars: Sequence[Pair], precon_grads_and_vars: Sequence[Pair]
    ) -> tuple[Pair, ...]:
        """The preconditioned gradients times the clip coefficient."""
        coefficient = self._update_clip_coeff(grads_and_vars, precon_grads_and_vars)
        return utils.sprod_p(coefficient, dense(precon_grads_and_vars))

    def _update_velocities(
        self, vecs_and_vars: Sequence[Pair], decay: Any, vec_coeff: Any = 1.0
    ) -> list[Pair]:
        """`v <- decay v + vec_coeff vec`; the returned tensors do the assignment."""
        slots = self._get_or_make_velocities(variables_of(vecs_and_vars))
        new_values = momentum.accumulate(
            [slot.read_value() for slot in slots],
            tensors_of(vecs_and_vars),
            decay,
            vec_coeff,
        )
        result = []
        for slot, value, (_, variable) in zip(
            slots, new_values, vecs_and_vars, strict=True
        ):
            # Equal on all replicas, so there is nothing to synchronise.
            stored = utils.smart_assign(slot, value, force_sync=False)
            with tf.control_dependencies([stored]):
                result.append((tf.identity(value), variable))
        return result

    def _compute_prev_updates(self, variables: Sequence[Any]) -> tuple[Pair, ...]:
        """`(-velocity, variable)` pairs: the previous step of the qmodel types."""
        slots = self._get_or_make_velocities(variables)
        previous = momentum.previous_updates([slot.read_value() for slot in slots])
        return tuple(zip(previous, variables, strict=True))

    def _add_weight_decay(self, vecs_and_vars: Sequence[Pair]) -> list[Pair]:
        """`r + weight_decay_coeff * parameter` for each pair."""
        variables = variables_of(vecs_and_vars)
        decayed = momentum.add_weight_decay(
            tensors_of(vecs_and_vars), variables, self._weight_decay_coeff
        )
        return list(zip(decayed, variables, strict=True))

    def _move(
        self, steps: Sequence[Pair], global_step: Any = None, name: str | None = None
    ) -> Any:
        """Op that applies the steps, which are equal on all replicas."""
        if not utils.is_in_replica():
            return tf.compat.v1.train.Optimizer.apply_gradients(
                self, steps, global_step, name
            )
        # The base class would sum over replicas what they all know.
        moved = [
            utils.smart_assign(
                variable,
                scalars.cast(self._learning_rate, step.dtype) * step,
                assign_fn=tf.compat.v1.assign_sub,
                force_sync=False,
            )
            for step, variable in steps
        ]
        if global_step is None:
            return tf.group(*moved, name=name)
        with tf.control_dependencies(moved):
            return tf.group(
                utils.smart_assign(
                    global_step,
                    tf.ones([], global_step.dtype),
                    assign_fn=tf.compat.v1.assign_add,
                    force_sync=False,
                ),
                name=name,
            )

    def _average(self, values: Any, name: str) -> Any:
        """Means over replicas of means over their cases, see `utils.all_average`."""
        size = self._batch_size
        return utils.all_average(values, name, size if tf.is_tensor(size) else None)

    def _prepare(self) -> None:
        """Called by the base class before it applies a step."""
        super()._prepare()
        private_tf.set_learning_rate_tensor(
            self, scalars.cast(self._learning_rate, tf.float64)
        )

    def _get_or_make_velocities(self, variables: Sequence[Any]) -> list[Any]:
        return [
            self._zeros_slot(variable, VELOCITY_SLOT, self.get_name())
            for variable in variables
        ]

    def _zeros_slot(self, var: Any, slot_name: str, op_name: str) -> Any:
        """The slot of a variable, from the `state` module so that traces share it."""
        slot = self.get_slot(var, slot_name)
        if slot is None:
            path = self._unique_path(var)
            with tf.compat.v1.variable_scope(self._scope, auxiliary_name_scope=False):
                slot = state.get_variable(
                    f"{path}/{op_name}", var.shape, var.dtype.base_dtype
                )
            private_tf.add_optimizer_slot(self, var, slot_name, slot)
        return slot

    def _unique_path(self, var: Any) -> str:
        """`var`'s path, numbered if another parameter has it (as eager names may)."""
        path = unique = state.parameter_path(var)
        number = 0
        while self._slot_paths.setdefault(unique, var.ref()) != var.ref():
            number += 1
            unique = f"{path}_{number}"
        return unique

    def _rate(self, like: tf.Tensor) -> tf.Tensor:
        return scalars.cast(self._learning_rate, like.dtype)

    @staticmethod
    def _after(op: Any, pairs: Sequence[Pair]) -> list[Pair]:
        """The same pairs, with tensors that wait for `op`."""
        with tf.control_dependencies([op]):
            return [(tf.identity(tensor), variable) for tensor, variable in pairs]
