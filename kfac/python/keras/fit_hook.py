"""What has to happen around the training function of `fit`.

**Before it is traced**: all state is made, because a function that makes variables is
traced twice; and the loss is compared again, if the model was compiled again.

**Before each of its steps**, if XLA compiles it for a CPU: the curvature is updated by
native kernels.  XLA takes seconds to compile the factorisation of one matrix and runs
it half as fast; its eigendecomposition is 40 times as slow.  With `jit_compile=True`
the compiled step therefore only uses the inverses, and each batch is shown to a
function that is not compiled first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from kfac.python.keras import private_keras


class FitHook:
    """Looks after the training function of one model for one `Kfac`.

    Attributes:
      updates_curvature: whether the step that is being traced shall not do it itself.
    """

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self.updates_curvature = False

    def attach(self, model: Any) -> None:
        """Wraps `model.make_train_function`; does nothing the second time."""
        make = getattr(model, "make_train_function", None)
        if make is None or getattr(make, "kfac_hook", None) is self:
            return

        def make_train_function(force=False):
            before = model.train_function
            make(force)
            if self._trains(model) and model.train_function is not before:
                self._optimizer.recheck_loss()  # Compiled (again).
                if self._separates_curvature(model):
                    function = model.train_function
                    model.train_function = lambda data: self._run(model, function, data)
            if self._trains(model):
                private_keras.watch_all_replicas(model.optimizer)
                self._optimizer.build_for(model)
            return model.train_function

        make_train_function.kfac_hook = self
        model.make_train_function = make_train_function

    def _trains(self, model: Any) -> bool:
        optimizer = model.optimizer
        inner = getattr(optimizer, "inner_optimizer", optimizer)  # Loss scaling.
        return inner is self._optimizer

    def _separates_curvature(self, model: Any) -> bool:
        # A training step of one's own may train on something else than its data.
        own_step = type(model).train_step is not keras.Model.train_step
        kinds = {device.device_type for device in tf.config.list_physical_devices()}
        on_cpu = kinds <= {"CPU", "XLA_CPU"}
        separable = self._optimizer.can_separate_curvature
        return model.jit_compile and on_cpu and separable and not own_step

    def _run(self, model: Any, function: Callable, iterator: Iterator) -> Any:
        """Steps of an execution, each after an update of the curvature.

        Raises:
          StopIteration: the data are exhausted.
        """
        logs = None
        for _ in range(model.steps_per_execution):
            try:
                data = next(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                if logs is None:
                    raise
                break
            self._optimizer.update_curvature(*_unpacked(data))
            self.updates_curvature = True
            try:
                logs = function(iter([data]))
            finally:
                self.updates_curvature = False
        return logs


def _unpacked(data: Any) -> tuple:
    """`(x, y, sample_weight)`; Keras' data may say None by an empty optional."""
    given = tf.nest.map_structure(
        lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data
    )
    return keras.utils.unpack_x_y_sample_weight(given)
