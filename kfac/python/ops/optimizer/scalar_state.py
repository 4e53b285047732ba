"""The scalar state of `KfacOptimizer`: variables in a fixed order, and their values."""

from __future__ import annotations

import numbers
import weakref
from typing import Any

import tensorflow as tf

from kfac.python.ops import state, utils
from kfac.python.ops.rules import scalars

tf1 = tf.compat.v1

# Function graph -> (store, scope) pairs that an optimizer of this trace has taken.
_taken_scopes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class ScalarStateMixin:
    """Damping, counter, and what the last step computed.

    Values are defined once the train op has run: read them after it, or use
    `step_metrics`.
    """

    def _create_scalar_state(self, damping: Any) -> None:
        """Makes the variables in an order that positional checkpoints rely on."""
        with tf1.variable_scope(self.get_name()) as self._scope:
            claim = self._new_claim()
            self._damping = damping
            if self._adapt_damping:
                self._damping = self._scalar("damping", damping)
            self._rho = self._scalar("rho")
            self._prev_loss = self._scalar("prev_loss")
            self._qmodel_learning_rate = self._scalar("qmodel_learning_rate")
            self._qmodel_momentum = self._scalar("qmodel_momentum")
            self._qmodel_change = self._scalar("qmodel_change")
            self._counter = self._step_counter("counter")
        if claim is not None:
            _taken_scopes.setdefault(tf1.get_default_graph(), set()).add(claim)

    def _scalar(self, name: str, initial: Any = float("nan")) -> tf.Variable:
        def initializer(shape, dtype=self._dtype):
            return tf.reshape(scalars.cast(_at_start(initial), dtype), shape)

        return state.get_variable(name, (), self._dtype, initializer)

    def _step_counter(self, name: str) -> tf.Variable:
        return state.get_variable(
            name,
            (),
            tf.int64,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    def _store(self, variable: tf.Variable, value: tf.Tensor) -> Any:
        # Values come from averages over replicas, so all replicas have the same.
        return utils.smart_assign(variable, value, force_cast=True, force_sync=False)

    def _new_claim(self) -> tuple[int, str] | None:
        """What no other optimizer of this trace may have: store and scope.

        Only traces need it: there the variables are found again on purpose, while a v1
        graph refuses to make them twice.

        Raises:
          ValueError: an optimizer of this trace has the same name.
        """
        store = state.current_store()
        if store is None or tf.distribute.has_strategy():
            return None
        claim = (id(store), self._scope.name)
        if claim in _taken_scopes.get(tf1.get_default_graph(), ()):
            raise ValueError(
                f"An optimizer named {self.get_name()!r} was built in this trace "
                "already, and they would share their state; give each a `name`."
            )
        return claim

    @property
    def damping(self) -> tf.Tensor:
        """Current damping."""
        if self._adapt_damping:
            return tf.identity(self._damping)
        return _as_tensor(self._damping)

    @property
    def damping_adaptation_interval(self) -> int:
        """Steps from one damping adaptation to the next."""
        return self._damping_adaptation_interval

    @property
    def learning_rate(self) -> tf.Tensor:
        """Step size; for qmodel types the last one the model chose, rescaled."""
        if self._uses_quadratic_model:
            chosen = self._qmodel_learning_rate.read_value()
            return scalars.cast(self._learning_rate, chosen.dtype) * chosen
        return _as_tensor(self._learning_rate)

    @property
    def momentum(self) -> tf.Tensor:
        """Momentum; for qmodel types the last one the model used."""
        if self._uses_quadratic_model:
            return self._qmodel_momentum.read_value()
        return _as_tensor(self._momentum)

    @property
    def rho(self) -> tf.Tensor:
        """Last ratio of actual to predicted change of the loss; NaN before any."""
        return self._rho.read_value()

    @property
    def qmodel_change(self) -> tf.Tensor:
        """Last predicted change of the loss; NaN before any."""
        return self._qmodel_change.read_value()

    @property
    def counter(self) -> tf.Tensor:
        """Number of steps taken, int64."""
        return self._counter.read_value()


def _as_tensor(value: Any) -> tf.Tensor:
    """`value` as a tensor; a Python integer is a real number here."""
    if isinstance(value, numbers.Real):
        value = float(value)
    return tf.convert_to_tensor(value)


def _at_start(value: Any) -> Any:
    """`value` as an initializer can use it, outside of any function's trace.

    Raises:
      ValueError: it is known only while a function runs.
    """
    if isinstance(value, tf.Variable) and not tf.executing_eagerly():
        return value.initial_value
    if tf.is_tensor(value) and tf.executing_eagerly():
        static = tf.get_static_value(value)
        if static is None:
            raise ValueError(
                f"The initial damping {value!r} is computed by the tf.function that "
                "uses it; pass a number or a variable."
            )
        return static
    return value
