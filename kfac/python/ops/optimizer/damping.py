"""Levenberg-Marquardt adaptation of the damping of `KfacOptimizer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from kfac.python.ops import deferred
from kfac.python.ops.rules import levenberg_marquardt, scalars
from kfac.python.ops.utils.scheduling import run_if


class CurrentDamping(deferred.DeferredTensor):
    """The damping of the preconditioner, read anew wherever it is used.

    An inverse update that is built inside a branch reads the damping there, after the
    adaptation of the same step.  Arithmetic converts it to a tensor first.
    """

    def __init__(self, damping: Callable[[], Any], multiple: Any, dtype: tf.DType):
        def current():
            return scalars.cast(damping(), dtype) * scalars.cast(multiple, dtype)

        super().__init__(current, shape=(), dtype=dtype, name="current_damping")

    def __mul__(self, other):
        return self.resolve() * other

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self.resolve() / other

    def __pow__(self, other):
        return self.resolve() ** other

    def __add__(self, other):
        return self.resolve() + other

    __radd__ = __add__


def for_preconditioner(damping: Any, multiple: Any) -> Any:
    """`damping * multiple`: a number if both are, else a `CurrentDamping`."""
    if isinstance(damping, (int, float)) and isinstance(multiple, (int, float)):
        return damping * multiple
    dtype = getattr(damping, "dtype", None) or getattr(multiple, "dtype", tf.float32)
    return CurrentDamping(lambda: damping, multiple, tf.as_dtype(dtype).base_dtype)


class DampingAdaptationMixin:
    """When to record the losses, when to compare them, and what to write.

    The last step of each interval of T steps is the adaptation step: the loss before
    it and the predicted change are recorded.  The loss after it is evaluated in the
    same step ("immediate") or at the start of the next one ("delayed").  Only the
    chief takes part.
    """

    def _preconditioner_damping(self, damping: Any) -> Any:
        """Damping of the preconditioner; if it is adapted, the variable's to be."""
        multiple = self._precon_damping_mult
        if self._adapt_damping:
            return CurrentDamping(lambda: self._damping, multiple, self._dtype)
        return for_preconditioner(damping, multiple)

    def _is_damping_adaptation_time(self) -> tf.Tensor:
        """Whether this step is the last one of an interval."""
        interval = scalars.cast(self._damping_adaptation_interval, tf.int64)
        return tf.equal((self.counter + 1) % interval, 0)

    def _is_just_after_damping_adaptation_time(self) -> tf.Tensor:
        """Whether the previous step was the last one of an interval."""
        counter = self.counter
        interval = scalars.cast(self._damping_adaptation_interval, tf.int64)
        return tf.equal(counter % interval, 0) & tf.not_equal(counter, 0)

    def maybe_pre_update_adapt_damping(self) -> tf.Operation:
        """Op that does the delayed adaptation where it is due.

        Run it every step, before the inverse updates and before the parameters move.
        Does nothing unless damping is adapted with `update_damping_immediately=False`
        on the chief.
        """
        if not self._adapts_damping_here or self._update_damping_immediately:
            return tf.no_op()
        return run_if(
            self._is_just_after_damping_adaptation_time(), self._update_damping
        )

    def _maybe_post_update_adapt_damping(self) -> tf.Operation:
        if not self._adapts_damping_here or not self._update_damping_immediately:
            return tf.no_op()
        return run_if(self._is_damping_adaptation_time(), self._update_damping)

    def _maybe_update_prev_loss(self) -> tf.Operation:
        if not self._adapts_damping_here:
            return tf.no_op()
        return run_if(
            self._is_damping_adaptation_time(),
            lambda: self._store(self._prev_loss, self._loss_before_update()),
        )

    def _maybe_update_qmodel_change(
        self, qmodel_change_thunk: Callable[[], tf.Tensor]
    ) -> tf.Operation:
        """Op that stores the thunk's predicted change on adaptation steps."""
        if not self._adapts_damping_here:
            return tf.no_op()
        return run_if(
            self._is_damping_adaptation_time(),
            lambda: self._store(self._qmodel_change, qmodel_change_thunk()),
        )

    def _update_damping(self) -> tf.Operation:
        """Compares losses, writes the damping and rho."""
        damping, rho = levenberg_marquardt.adapt(
            self._damping.read_value(),
            self._get_prev_loss(),
            self._get_current_loss(),
            self.qmodel_change,
            decay=self._omega,
            floor=self._min_damping + self._l2_reg,
            decrease_threshold=self._damping_decrease_rho_threshold,
            increase_threshold=self._damping_increase_rho_threshold,
        )
        return tf.group(
            self._store(self._damping, damping), self._store(self._rho, rho)
        )

    def _get_prev_loss(self) -> tf.Tensor:
        """The loss before the adaptation step's update."""
        return self._prev_loss.read_value()

    def _get_current_loss(self) -> tf.Tensor:
        """The loss on the same data after the update, averaged over replicas.

        Raises:
          ValueError: `loss_fn` or its batch is missing.
        """
        name = "train_batch" if self._update_damping_immediately else "prev_train_batch"
        batch = getattr(self, f"_{name}")
        if batch is None:
            raise ValueError(
                f"adapt_damping with update_damping_immediately="
                f"{self._update_damping_immediately} evaluates loss_fn({name}), but "
                f"{name} is None."
            )
        return self._evaluated_loss(batch)

    def _loss_before_update(self) -> tf.Tensor:
        if not self._use_passed_loss:
            return self._evaluated_loss(self._train_batch)
        if self._loss_tensor is None:
            raise ValueError(
                "adapt_damping needs the loss before the step: use minimize(loss), "
                "call set_loss(loss), or pass use_passed_loss=False."
            )
        return self._average(self._loss_tensor, "loss")

    def _evaluated_loss(self, batch: Any) -> tf.Tensor:
        if self._loss_fn is None:
            raise ValueError(
                "adapt_damping compares the loss before and after a step and needs "
                "loss_fn, a function of a batch that returns the scalar loss."
            )
        return self._average(self._loss_fn(batch), "loss")

    @property
    def _adapts_damping_here(self) -> bool:
        return self._adapt_damping and self._is_chief
