"""Where curvature state lives: variables found by a stable name.

Symbolic objects (collections, blocks, factors) belong to one trace of a function;
moving averages, inverses, velocities and counters outlive it.  Everything in the
core therefore asks `get_variable` for its variables, by names built from parameter
paths and roles (`dense_1/kernel/input/cov/var`), never from graph tensors' names.

* When the outermost context is a v1 `tf.Graph`, that is `tf.compat.v1.get_variable`
  in the ambient variable scope.
* Otherwise (inside a `tf.function`, or one of its branch graphs) the variable is
  lifted out of the trace and kept by the `VariableStore` that is in force, so that a
  second trace finds it again and `tf.train.Checkpoint(state=store)` saves it.

Scopes are opened with `tf.compat.v1.variable_scope` in both worlds.

Under a `tf.distribute` strategy a variable is created under its scope, so it is
mirrored: one copy a replica, synchronization AUTO.  Replicas write equal values, which
they have from averaged statistics, so the aggregation is NONE: each writes its own
copy, no collective runs, and an assignment may stand in a conditional branch (where a
mirrored variable with another aggregation cannot be assigned).  ON_READ would reduce
on every read in cross-replica context, and save sums of equal values.  Checkpoints
hold the first copy and restoring writes all of them, so the number of replicas may
change in between.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops.rules import scalars

tf1 = tf.compat.v1

_active = threading.local()


class VariableStore(tf.Module):
    """Owner of the variables that functions' traces share.

    Create one outside the function, put it in force inside, and hand it to
    `tf.train.Checkpoint`:

        store = kfac.state.VariableStore()

        @tf.function
        def train_step(x, y):
            with store.as_default():
                ...
    """

    def __init__(self, name: str | None = None):
        super().__init__(name=name)
        self._by_name: dict[str, tf.Variable] = {}
        self._loaded: dict[str, np.ndarray] = {}

    @contextlib.contextmanager
    def as_default(self) -> Iterator[VariableStore]:
        """Puts the store in force for the current thread; may be nested."""
        stack = _stack()
        stack.append(self)
        try:
            yield self
        finally:
            stack.pop()

    def get(
        self,
        name: str,
        shape: Sequence[int],
        dtype: tf.DType,
        initial_value: Callable[[], tf.Tensor],
        **kwargs: Any,
    ) -> tf.Variable:
        """The variable called `name`, created from `initial_value` if it is new.

        Raises:
          ValueError: it exists with another shape or dtype.
        """
        if name not in self._by_name:
            with tf1.name_scope(None):  # The name must not depend on the trace.
                self._by_name[name] = tf.Variable(
                    self._initial_value(name, initial_value, dtype),
                    shape=shape,
                    dtype=dtype,
                    name=name,
                    **kwargs,
                )
        variable = self._by_name[name]
        if variable.dtype != dtype or not variable.shape.is_compatible_with(shape):
            raise ValueError(
                f"State variable {name!r} exists with shape {variable.shape} and dtype "
                f"{variable.dtype.name}, but shape {tf.TensorShape(shape)} and dtype "
                f"{tf.as_dtype(dtype).name} were asked for. Use another VariableStore "
                "for another model."
            )
        return variable

    def load(self, values: Mapping[str, np.ndarray]) -> None:
        """Sets variables by name; the values of unknown ones wait for their creation.

        `tf.train.Checkpoint` does the same by itself; this is for other file formats.
        """
        for name, value in values.items():
            if name in self._by_name:
                self._by_name[name].assign(value)
            else:
                self._loaded[name] = value

    def forget(self, is_stale: Callable[[str], bool]) -> None:
        """Lets go of the variables of those names; the next `get` makes new ones."""
        # Not deleted from the dictionary, which checkpoints would refuse.
        kept = {n: v for n, v in self._by_name.items() if not is_stale(n)}
        self._by_name = kept

    def not_yet_loaded(self) -> list[str]:
        """Names given to `load` whose variables have not been created so far."""
        return sorted(self._loaded)

    def _initial_value(self, name, initial_value, dtype):
        if name not in self._loaded:
            return initial_value
        return tf.constant(self._loaded.pop(name), dtype)

    def named_variables(self) -> dict[str, tf.Variable]:
        """Copy of the name -> variable mapping, in creation order."""
        return dict(self._by_name)


def _stack() -> list[VariableStore]:
    if not hasattr(_active, "stores"):
        _active.stores = []
    return _active.stores


def current_store() -> VariableStore | None:
    """The store in force, or None."""
    stack = _stack()
    return stack[-1] if stack else None


def get_variable(
    name: str,
    shape: Sequence[int] = (),
    dtype: tf.DType = tf.float32,
    initializer: Any = None,
    aggregation: tf.VariableAggregation = tf.VariableAggregation.NONE,
) -> tf.Variable:
    """A non-trainable resource variable named `<variable scope>/<name>`.

    Args:
      name: stable name, relative to the ambient `tf.compat.v1.variable_scope`.
      shape: static shape.
      dtype: element type.
      initializer: initializer class or instance (`initializer(shape, dtype=...)`),
        or a number; zeros by default.
      aggregation: of writes under `tf.distribute`.

    Raises:
      RuntimeError: called eagerly, or in a function's trace with no store in force.
      ValueError: the name is taken (v1 graph without reuse), or is held by the store
        with another shape or dtype.
    """
    if tf.executing_eagerly():
        raise RuntimeError(
            f"Curvature state ({name!r}) was asked for eagerly. The graph API runs in "
            "a tf.Graph or inside a tf.function; for eager training use kfac.keras."
        )
    dtype = tf.as_dtype(dtype)
    make = _initial_value_fn(initializer)
    scope = tf1.get_variable_scope().name
    with tf.init_scope():
        if not tf.executing_eagerly():
            return tf1.get_variable(
                name,
                shape=shape,
                dtype=dtype,
                initializer=lambda shape, dtype=dtype, partition_info=None: make(
                    shape, dtype
                ),
                trainable=False,
                use_resource=True,
                aggregation=_v1_aggregation(aggregation),
            )
        store = current_store()
        if store is None:
            raise RuntimeError(
                f"No VariableStore is in force to keep {name!r} beyond this trace. "
                "Create `store = kfac.state.VariableStore()` outside the tf.function "
                "and build inside `with store.as_default():`."
            )
        return store.get(
            f"{scope}/{name}" if scope else name,
            shape,
            dtype,
            lambda: make(shape, dtype),
            trainable=False,
            aggregation=aggregation,
        )


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, to be called in another thread with the present store and names.

    Replicas are traced in threads of their own, and branches in further ones.
    """
    stores = list(_stack())
    names = getattr(_active, "parameter_names", {})

    def in_another_thread(*args, **kwargs):
        with contextlib.ExitStack() as contexts:
            for store in stores:
                contexts.enter_context(store.as_default())
            contexts.enter_context(parameter_names(names))
            return function(*args, **kwargs)

    return in_another_thread


@contextlib.contextmanager
def parameter_names(names: Mapping[Any, str]) -> Iterator[None]:
    """Gives parameters other paths than their variables' names, while building.

    Args:
      names: `variable.ref()` -> path. Keras needs it: its paths are unique, but the
        names of the `tf.Variable`s beneath are not.
    """
    before = getattr(_active, "parameter_names", {})
    _active.parameter_names = {**before, **names}
    try:
        yield
    finally:
        _active.parameter_names = before


def parameter_path(params: Any) -> str:
    """Stable path of a parameter or of a group (its first member), without `:0`."""
    if isinstance(params, (list, tuple)):
        params = params[0]
    names = getattr(_active, "parameter_names", {})
    if names and hasattr(params, "ref") and params.ref() in names:
        return names[params.ref()]
    return params.name.split(":")[0]


def _initial_value_fn(initializer: Any) -> Callable[..., tf.Tensor]:
    if initializer is None:
        return lambda shape, dtype: tf.zeros(shape, dtype)
    if isinstance(initializer, type):
        initializer = initializer()
    if callable(initializer):
        return lambda shape, dtype: initializer(shape, dtype=dtype)
    return lambda shape, dtype: tf.fill(shape, scalars.cast(initializer, dtype))


def _v1_aggregation(aggregation: tf.VariableAggregation) -> tf1.VariableAggregation:
    return tf1.VariableAggregation(aggregation.value)
