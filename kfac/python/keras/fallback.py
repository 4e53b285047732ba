"""A Keras optimizer for the variables that K-FAC does not precondition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kfac.python.keras.private_keras import KerasVariable

GENERIC = "generic"


class Fallback:
    """Trains some of the variables with another optimizer.

    Its learning rate follows Kfac's: the two keep the ratio that they were given, so
    that one schedule, or one callback, drives both.  A schedule of its own is kept.

    Args:
      optimizer: a Keras optimizer.
      initial_rate: Kfac's learning rate at the start; None if it has none.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, initial_rate: Any):
        self.optimizer = optimizer
        # As it is kept in a variable.
        self._initial_rate = initial_rate and float(np.float32(initial_rate))
        self._own_rate = _plain_rate(optimizer)
        self._trained: set[int] | None = None

    @property
    def _follows(self) -> bool:
        return self._own_rate is not None and bool(self._initial_rate)

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the optimizer's variables.

        Raises:
          ValueError: a further call has variables that the first one had not.
        """
        if not self.optimizer.built:
            self.optimizer.build(list(variables))
        if self._trained is None:
            self._trained = {id(variable) for variable in variables}
        new = [v.name for v in variables if id(v) not in self._trained]
        if new:
            raise ValueError(
                f"The fallback optimizer {type(self.optimizer).__name__} was made for "
                f"other variables than {new}, and Keras' optimizers cannot be told of "
                "new ones. Make a new Kfac, with a new fallback."
            )

    def apply(self, grads: Sequence, variables: Sequence, rate: Any) -> None:
        """Takes a step.

        Args:
          grads: gradients.
          variables: variables that it was built with.
          rate: Kfac's current learning rate; None if it has none.
        """
        if self._follows and rate is not None:
            ratio = self._own_rate / self._initial_rate
            self.optimizer.learning_rate.assign(ratio * tf.convert_to_tensor(rate))
        self.optimizer.apply(list(grads), list(variables))

    def config(self, rate: float | None) -> dict[str, Any]:
        """Serialised optimizer, with the learning rate that belongs to Kfac's."""
        serialized = keras.optimizers.serialize(self.optimizer)
        if self._follows and rate is not None:
            scaled = self._own_rate * rate / self._initial_rate
            serialized["config"]["learning_rate"] = scaled
        return serialized


def make(fallback: Any, initial_rate: Any) -> Fallback | None:
    """What the argument `fallback` stands for; None for "generic".

    Args:
      fallback: "generic", or a Keras optimizer, its name or its config.
      initial_rate: number, schedule, or None.

    Raises:
      ValueError: it is none of these.
    """
    if fallback == GENERIC:
        return None
    try:
        optimizer = keras.optimizers.get(fallback)
        if optimizer is None:
            raise TypeError
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"fallback is {fallback!r}; use 'generic' (a diagonal curvature), or a "
            "Keras optimizer, for instance keras.optimizers.AdamW(1e-3)."
        ) from error
    if isinstance(initial_rate, keras.optimizers.schedules.LearningRateSchedule):
        with tf.init_scope():
            initial_rate = float(initial_rate(0))
    elif callable(initial_rate):
        with tf.init_scope():
            initial_rate = float(keras.ops.convert_to_numpy(initial_rate()))
    return Fallback(optimizer, initial_rate)


def _plain_rate(optimizer: keras.optimizers.Optimizer) -> float | None:
    """The learning rate if it is a number that can be assigned."""
    rate = optimizer.learning_rate
    schedule = optimizer.get_config()["learning_rate"]
    if not isinstance(rate, KerasVariable) or isinstance(schedule, dict):
        return None
    return float(keras.ops.convert_to_numpy(rate))
