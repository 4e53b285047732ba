"""Running averages held in stably named state variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import state
from kfac.python.ops.rules import moving_average
from kfac.python.ops.utils import replicas

tf1 = tf.compat.v1


def _shared_variables_scope(name: str) -> Any:
    return tf1.variable_scope(name, reuse=tf1.AUTO_REUSE)


class MovingAverageVariable:
    """A decayed, weighted average, debiased by its accumulated weight.

    With decay `d` and weight `1 - d` at each of T updates from a zero start, `value`
    is `sum_t d^(T-t) (1-d) x_t / (1 - d^T)`; the first update gives exactly `x_1`.
    With decay and weight 1 it is the plain mean.

    Two instances of the same scoped name share the state.

    Args:
      name: variable scope of the state: `<name>/var` and `<name>/total_weight`.
      shape: static shape of the averaged value.
      dtype: its dtype, and that of the weight.
      initializer: of `<name>/var`.
      normalize_value: whether `value` is divided by the total weight.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        dtype: tf.DType,
        initializer: Any = tf.zeros_initializer,
        normalize_value: bool = True,
    ):
        self._normalize_value = normalize_value
        with _shared_variables_scope(name):
            self._var = state.get_variable("var", shape, dtype, initializer)
            self._total_weight = state.get_variable("total_weight", (), dtype)

    @property
    def dtype(self) -> tf.DType:
        return self._var.dtype.base_dtype

    @property
    def value(self) -> tf.Tensor:
        """The average: zeros before the first update and after a reset.

        Without normalisation, whatever `<name>/var` holds.
        """
        if self._normalize_value:
            return moving_average.debiased(self._var, self._total_weight)
        return tf.identity(self._var)

    def add_to_average(
        self, value: Any, decay: Any = 1.0, weight: Any = 1.0
    ) -> tf.Operation:
        """Op: `var <- decay var + weight value`, and likewise the total weight.

        Args:
          value: new observation, already averaged over replicas.
          decay: scalar, multiplies the past.
          weight: scalar, multiplies the observation.
        """
        var = moving_average.decayed(self._var, value, decay, weight)
        total_weight = moving_average.decayed(self._total_weight, 1.0, decay, weight)
        return tf.group(
            # Callers hand in the same value on every replica: nothing to synchronise.
            replicas.smart_assign(self._var, var, force_sync=False),
            replicas.smart_assign(self._total_weight, total_weight, force_sync=False),
            name="add_to_average",
        )

    def reset(self) -> tf.Operation:
        """Op: forgets everything."""
        return _zero_all(self._var, self._total_weight)


class AccumulatorVariable:
    """The plain mean of what was accumulated since the last reset.

    Args:
      name: variable scope of the state: `<name>/acc_var` and `<name>/counter`.
      shape: static shape of the accumulated value.
      dtype: its dtype.
    """

    def __init__(self, name: str, shape: Sequence[int], dtype: tf.DType):
        with _shared_variables_scope(name):
            self._acc_var = state.get_variable("acc_var", shape, dtype)
            self._counter = state.get_variable("counter", (), tf.int64)

    def accumulate(self, value: Any) -> tf.Operation:
        """Op: adds one observation."""
        total = moving_average.decayed(self._acc_var, value, 1.0, 1.0)
        return tf.group(
            replicas.smart_assign(self._acc_var, total, force_sync=False),
            replicas.smart_assign(self._counter, self._counter + 1, force_sync=False),
            name="accumulate",
        )

    @property
    def value(self) -> tf.Tensor:
        """The mean: zeros while nothing has been accumulated."""
        return moving_average.debiased(self._acc_var, self._counter)

    def reset(self) -> tf.Operation:
        """Op: forgets everything."""
        return _zero_all(self._acc_var, self._counter)

    def read_value_and_reset(self) -> tf.Tensor:
        """The mean as of before the reset that evaluating this tensor performs."""
        value = tf.identity(self.value)
        with tf.control_dependencies([value]):
            reset = self.reset()
        with tf.control_dependencies([reset]):
            return tf.identity(value)


def _zero_all(*variables: tf.Variable) -> tf.Operation:
    zeros = [tf.zeros(v.shape, v.dtype.base_dtype) for v in variables]
    return tf.group(
        *(
            replicas.smart_assign(variable, zero, force_sync=False)
            for variable, zero in zip(variables, zeros, strict=True)
        ),
        name="reset",
    )
