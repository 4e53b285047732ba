"""Scalar hyper-parameters that may change while a compiled model trains."""

from __future__ import annotations

import numbers
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kfac.python.keras.option_checks import is_schedule, scalar
from kfac.python.keras.private_keras import KerasVariable


class Hyperparameters(tf.Module):
    """Named scalars: plain values until first read, variables from then on.

    A traced step reads the variables, so assigning a number takes effect at once and
    traces nothing.  A tensor or a variable given by the user is used as it is.  The
    variable of a schedule is written by every step, from the optimizer's `iterations`.
    """

    def __init__(self, values: dict[str, Any]):
        super().__init__(name="hyperparameters")
        self._given = dict(values)
        self._variables: dict[str, tf.Variable] = {}
        self._made = False

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def names(self) -> frozenset[str]:
        return frozenset(self._given)

    def read(self, name: str) -> Any:
        """The variable or tensor behind a name; makes all variables."""
        self._make_variables()
        return self._variables.get(name, self._given[name])

    def refresh(self, iterations: Any) -> None:
        """Writes the variables of schedules, for the step that begins."""
        self._make_variables()
        for name, value in self._given.items():
            if is_schedule(value):
                self._variables[name].assign(tf.cast(value(iterations), tf.float32))

    def variables_by_name(self) -> dict[str, tf.Variable]:
        """All variables made here, which are made if need be."""
        self._make_variables()
        return dict(self._variables)

    def assign(self, name: str, value: Any) -> None:
        """Gives a name another value.

        Before the first read anything goes; afterwards only numbers.

        Raises:
          ValueError: a tensor or variable is given after the first read, or a value
            that the hyper-parameter cannot have.
          AttributeError: the name stands for a tensor or schedule.
        """
        if name in self._variables and not is_schedule(self._given[name]):
            self._assign_number(name, self._variables[name], value)
        elif isinstance(self._given[name], (tf.Variable, KerasVariable)):
            self._assign_number(name, self._given[name], value)
        elif not self._made:
            self._given[name] = scalar(name, value)
        else:
            raise AttributeError(
                f"Can't set attribute: {name}. It was configured as a tensor or a "
                "schedule, which computes its value itself."
            )

    def numbers(self) -> dict[str, float]:
        """Current values as Python numbers, schedules as their configs."""
        return {name: self._as_number(name) for name in sorted(self._given)}

    def _as_number(self, name: str) -> Any:
        value = self._given[name]
        if is_schedule(value):
            return keras.optimizers.schedules.serialize(value)
        value = self._variables.get(name, value)
        if isinstance(value, numbers.Number):
            return float(value)
        if isinstance(value, tf.Variable):  # Keras cannot convert mirrored ones.
            return float(value.numpy())
        return float(keras.ops.convert_to_numpy(value))

    def _make_variables(self) -> None:
        if self._made:
            return
        self._made = True
        with tf.init_scope():
            for name, value in sorted(self._given.items()):
                if is_schedule(value):
                    value = float(value(0))
                if isinstance(value, numbers.Number):
                    self._variables[name] = tf.Variable(
                        float(value), name=name, trainable=False, dtype=tf.float32
                    )

    @staticmethod
    def _assign_number(name: str, variable: Any, value: Any) -> None:
        variable.assign(
            reassigned(
                name,
                value,
                "Tensors and variables can be set before the optimizer is first used.",
            )
        )


def reassigned(name: str, value: Any, otherwise: str) -> float:
    """The number that is assigned to a hyper-parameter in use.

    Raises:
      ValueError: it is none, or the hyper-parameter cannot have it; the message tells
        what to do `otherwise`.
    """
    if not isinstance(value, (numbers.Number, np.ndarray)):
        raise ValueError(
            f"Dynamic reassignment only works with numbers: {name} got {value!r}. "
            + otherwise
        )
    return scalar(name, value)
