"""Looks at a step from outside: measures it, and undoes it if it was bad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.keras.models import tf_variable
from kfac.python.ops import state
from kfac.python.ops.utils.scheduling import run_if

UPDATE_NORM = "keras/update_norm"
COSINE = "keras/cosine"
REJECTED_STEPS = "keras/rejected_steps"


def create_state() -> None:
    """Makes the variables that a step may write, see `kfac.state`."""
    state.get_variable(UPDATE_NORM)
    state.get_variable(COSINE)
    state.get_variable(REJECTED_STEPS, (), tf.int64)


class StepWatch:
    """Made before a step is built, finished after it.

    Adds no operation unless it is asked to do something.

    Args:
      variables: what the step moves.
      also: further variables to restore when the step is undone.
      loss: builds the loss of the step's batch; undo the step if that grows, or is not
        finite afterwards. None never undoes.
      on_rejection: builds what else is to be done then.
      gradients: of `variables`; measure the length of the update and its angle with
        the negative gradient. None does not measure.
    """

    def __init__(
        self,
        variables: Sequence[Any],
        also: Sequence[Any],
        loss: Callable[[], tf.Tensor] | None,
        on_rejection: Callable[[], Any] | None,
        gradients: Sequence[Any] | None,
    ):
        self._variables = [tf_variable(variable) for variable in variables]
        self._also = [tf_variable(variable) for variable in also]
        self._loss = loss
        self._on_rejection = on_rejection
        self._gradients = gradients
        self._before: list[tf.Tensor] = []
        if loss is not None or gradients is not None:
            restored = [*self._variables, *(self._also if loss is not None else ())]
            self._before = [tf.identity(variable) for variable in restored]
        self._loss_before = None if loss is None else loss()

    def finish(self) -> None:
        """Builds what is due after the step."""
        if self._loss is not None:
            self._undo_bad_step()
        if self._gradients is not None:
            self._measure()

    def _undo_bad_step(self) -> None:
        after = self._loss()
        good = (after <= self._loss_before) & tf.math.is_finite(after)
        restored = [*self._variables, *self._also]
        rejected = state.get_variable(REJECTED_STEPS, (), tf.int64)

        def undo():
            for variable, value in zip(restored, self._before, strict=True):
                variable.assign(value)
            rejected.assign_add(1)
            self._on_rejection()
            return []

        run_if(tf.logical_not(good), undo)

    def _measure(self) -> None:
        squared_norm = product = squared_gradient = tf.constant(0.0)
        before_step = self._before[: len(self._variables)]
        for variable, before, gradient in zip(
            self._variables, before_step, self._gradients, strict=True
        ):
            step = tf.cast(variable - before, tf.float32)
            gradient = tf.cast(tf.convert_to_tensor(gradient), tf.float32)
            squared_norm += tf.reduce_sum(step**2)
            product -= tf.reduce_sum(step * gradient)
            squared_gradient += tf.reduce_sum(gradient**2)
        norm = tf.sqrt(squared_norm)
        cosine = tf.math.divide_no_nan(product, norm * tf.sqrt(squared_gradient))
        state.get_variable(UPDATE_NORM).assign(norm)
        state.get_variable(COSINE).assign(cosine)
