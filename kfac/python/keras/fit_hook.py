"""What has to happen around the training function of `fit`.

**Before it is traced**: all state is made, because a function that makes variables is
traced twice; and the loss is compared again, if the model was compiled again.

**Between its executions**, if XLA compiles it for a CPU: the inverses are updated by
native kernels.  XLA takes seconds to compile the factorisation of one matrix and runs
it half as fast; its eigendecomposition is 40 times as slow.  With `jit_compile=True`
the compiled step therefore leaves the inverses alone.  They are then those of the
statistics before the step, where otherwise they include its own; the first step, which
finds none, moves only what is not preconditioned by a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from kfac.python.keras.schedule import inverses_due

_COUNTER = "kfac/counter"


class FitHook:
    """Looks after the training function of one model for one `Kfac`.

    Attributes:
      updates_inverses: whether the step that is being traced shall not do it itself.
    """

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self._update: Callable | None = None
        self.updates_inverses = False

    def attach(self, model: Any) -> None:
        """Wraps `model.make_train_function`; does nothing the second time."""
        make = getattr(model, "make_train_function", None)
        if make is None or getattr(make, "kfac_hook", None) is self:
            return

        def make_train_function(force=False):
            before = model.train_function
            make(force)
            if self._trains(model):
                if model.train_function is not before:  # Compiled (again).
                    self._optimizer.recheck_loss()
                with model.distribute_strategy.scope():
                    self._optimizer.build_for(model)
                if _is_compiled_for_cpu(model):
                    self._wrap(model)
            return model.train_function

        make_train_function.kfac_hook = self
        model.make_train_function = make_train_function

    def _trains(self, model: Any) -> bool:
        optimizer = model.optimizer
        inner = getattr(optimizer, "inner_optimizer", optimizer)  # Loss scaling.
        return inner is self._optimizer

    def _wrap(self, model: Any) -> None:
        if not isinstance(model.train_function, _Between):
            model.train_function = _Between(model.train_function, self)

    def run(self, function: Callable, *args: Any) -> Any:
        """Calls a training function, and updates the inverses if that became due."""
        before = self._count()
        self.updates_inverses = True
        try:
            result = function(*args)
        finally:
            self.updates_inverses = False
        period = self._optimizer.invert_every
        if any(inverses_due(k, period) for k in range(before + 1, self._count() + 1)):
            if self._update is None:
                self._update = tf.function(self._optimizer.build_inverse_updates)
            self._update()
        return result

    def _count(self) -> int:
        counter = self._optimizer.state_variable(_COUNTER)
        return 0 if counter is None else int(counter)


class _Between:
    """A training function that is followed by updates of the inverses."""

    def __init__(self, function: Callable, hook: FitHook):
        self._function = function
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        return self._hook.run(self._function, *args)


def _is_compiled_for_cpu(model: Any) -> bool:
    if not model.jit_compile:
        return False
    kinds = {device.device_type for device in tf.config.list_physical_devices()}
    return kinds <= {"CPU", "XLA_CPU"}
