"""Keras callbacks: schedules of hyper-parameters, and `CurvatureMonitor`.

Schedules work with any Keras optimizer that has the attribute, not only with `Kfac`.
Steps count from `optimizer.iterations - num_delay_steps`, read before each batch;
nothing changes while that is zero or less.
"""

from __future__ import annotations

import abc
from typing import Any

import keras

from kfac.python.keras.monitor import CurvatureMonitor

__all__ = [
    "CurvatureMonitor",
    "ExponentialDecay",
    "HyperparameterDecay",
    "PolynomialDecay",
]


class HyperparameterDecay(keras.callbacks.Callback, abc.ABC):
    """Base of schedules for one optimizer attribute.

    Args:
      hyperparameter: name of the attribute, for instance "damping".
      num_delay_steps: updates before the schedule starts.
      verbose: print the value at the start of every epoch.

    The value at the end of an epoch is put into `logs`, hence into the history.
    """

    def __init__(self, hyperparameter: str, num_delay_steps: int = 0, verbose: int = 0):
        super().__init__()
        self._hyperparameter = hyperparameter
        self._num_delay_steps = num_delay_steps
        self._verbose = verbose
        self._optimizer = None

    @abc.abstractmethod
    def value_at(self, step: int) -> float | None:
        """The value from `step >= 1` updates on, or None to leave it alone."""

    def on_train_begin(self, logs: dict | None = None) -> None:
        optimizer = self.model.optimizer
        # Mixed precision wraps the optimizer.
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        for attribute in (self._hyperparameter, "iterations"):
            if not hasattr(optimizer, attribute):
                raise ValueError(
                    f'The optimizer must have a "{attribute}" attribute to be '
                    f"scheduled; {type(optimizer).__name__} has none."
                )
        self._optimizer = optimizer

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        step = int(_to_float(self._optimizer.iterations)) - self._num_delay_steps
        if step <= 0:
            return
        value = self.value_at(step)
        if value is not None:
            setattr(self._optimizer, self._hyperparameter, value)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        if self._verbose > 0:
            print(f"\nEpoch {epoch + 1}: {self._hyperparameter} is {self._current()}.")

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is not None:
            logs[self._hyperparameter] = self._current()

    def _current(self) -> float:
        return _to_float(getattr(self._optimizer, self._hyperparameter))


class PolynomialDecay(HyperparameterDecay):
    """`(init - final) * (1 - step / N) ** power + final` for N steps, then `final`.

    Args:
      hyperparameter: name of the attribute.
      init_value: value at step 0.
      final_value: value from step `num_decay_steps` on.
      power: exponent; 1 is a straight line.
      num_decay_steps: N.
      **kwargs: `num_delay_steps`, `verbose`.
    """

    def __init__(
        self,
        hyperparameter: str,
        init_value: float,
        final_value: float,
        power: float,
        num_decay_steps: int,
        **kwargs: Any,
    ):
        super().__init__(hyperparameter, **kwargs)
        self._init_value = init_value
        self._final_value = final_value
        self._power = power
        self._num_decay_steps = num_decay_steps

    def value_at(self, step: int) -> float | None:
        if step > self._num_decay_steps:
            return None
        left = (1 - step / self._num_decay_steps) ** self._power
        return (self._init_value - self._final_value) * left + self._final_value


class ExponentialDecay(HyperparameterDecay):
    """Multiplies by a constant rate; give exactly two of the last three arguments.

    * `final_value`, `decay_rate`: `max(init * rate**step, final)`.
    * `decay_rate`, `num_decay_steps`: `init * rate**step`, frozen after N steps.
    * `final_value`, `num_decay_steps`: reaches `final` at step N, then frozen.

    Args:
      hyperparameter: name of the attribute.
      init_value: value at step 0.
      final_value: see above.
      decay_rate: see above.
      num_decay_steps: N.
      **kwargs: `num_delay_steps`, `verbose`.

    Raises:
      ValueError: not exactly two of the three are given.
    """

    def __init__(
        self,
        hyperparameter: str,
        init_value: float,
        final_value: float | None = None,
        decay_rate: float | None = None,
        num_decay_steps: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(hyperparameter, **kwargs)
        given = [v is not None for v in (final_value, decay_rate, num_decay_steps)]
        if sum(given) != 2:
            raise ValueError(
                "You must specify exactly two of final_value, decay_rate and "
                f"num_decay_steps; got final_value={final_value}, "
                f"decay_rate={decay_rate}, num_decay_steps={num_decay_steps}."
            )
        if decay_rate is None:
            decay_rate = (final_value / init_value) ** (1.0 / num_decay_steps)
        self._init_value = init_value
        self._decay_rate = decay_rate
        self._num_decay_steps = num_decay_steps
        # With a number of steps the rate alone decides where the decay ends.
        self._floor = final_value if num_decay_steps is None else None

    def value_at(self, step: int) -> float | None:
        if self._num_decay_steps is not None and step > self._num_decay_steps:
            return None
        value = self._init_value * self._decay_rate**step
        return value if self._floor is None else max(value, self._floor)


def _to_float(value: Any) -> float:
    return float(keras.ops.convert_to_numpy(value))
