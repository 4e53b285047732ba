"""Models as pure functions of their variables, and the batches they train on."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one training step was given: structures of tensors, batch first."""

    x: Any
    y: Any
    sample_weight: Any = None

    def head(self, count: tf.Tensor | int) -> Batch:
        """The first `count` cases."""
        first = lambda t: None if t is None else t[:count]
        return Batch(*(tf.nest.map_structure(first, part) for part in self.parts()))

    def parts(self) -> tuple:
        return (self.x, self.y, self.sample_weight)

    def size(self) -> tf.Tensor | int:
        """Number of cases; an int where static."""
        first = tf.nest.flatten(self.x)[0]
        static = first.shape[0]
        return tf.shape(first)[0] if static is None else static

    def as_tensors(self) -> Batch:
        to_tensor = lambda t: None if t is None else tf.convert_to_tensor(t)
        return Batch(*(tf.nest.map_structure(to_tensor, part) for part in self.parts()))


class PureModel:
    """A model whose forward pass changes nothing.

    Keras models run through `stateless_call`: batch-norm statistics, metrics and
    dropout seeds stay as they are, however often the curvature evaluates the model.
    Any other callable with `trainable_variables` (`tf.Module`) is simply called.
    """

    def __init__(self, model: Any):
        if not callable(model) or not hasattr(model, "trainable_variables"):
            raise ValueError(
                "model must be a Keras model, or a callable with `trainable_variables` "
                f"such as a tf.Module; got {type(model).__name__}."
            )
        self.model = model
        self._is_keras = isinstance(model, keras.layers.Layer)
        call = model.call if self._is_keras else model
        parameters = inspect.signature(call).parameters.values()
        self._takes_training = any(
            p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters
        )

    def variables(self) -> list[tf.Variable]:
        """The trainable variables, as `tf.Variable`s."""
        return [tf_variable(v) for v in self.model.trainable_variables]

    def paths(self) -> dict[Any, str]:
        """`variable.ref()` -> unique, stable path."""
        return {
            tf_variable(v).ref(): getattr(v, "path", v.name).split(":")[0]
            for v in self.model.trainable_variables
        }

    def __call__(self, x: Any, training: bool = True) -> Any:
        """The model's output in the current graph, without side effects."""
        kwargs = {"training": training} if self._takes_training else {}
        if not self._is_keras:
            return self.model(x, **kwargs)
        outputs, _ = self.model.stateless_call(
            [v.value for v in self.model.trainable_variables],
            [v.value for v in self.model.non_trainable_variables],
            x,
            **kwargs,
        )
        return outputs


class BatchRecorder:
    """Remembers the batch of the training step that is being traced or executed.

    Keras hands every training step's data to `compute_loss`; wrapping that method on
    the model shows them to the optimizer whatever the training loop looks like.
    Batches are kept per thread (a replica has its own) and per graph, and forgotten
    once taken.
    """

    def __init__(self):
        self._local = threading.local()

    def attach(self, model: Any) -> None:
        """Wraps `model.compute_loss`; does nothing the second time."""
        compute_loss = getattr(model, "compute_loss", None)
        if compute_loss is None or getattr(compute_loss, "kfac_recorder", None) is self:
            return
        model.compute_loss = self._wrap(compute_loss)

    def show(self, x: Any, y: Any, sample_weight: Any = None) -> None:
        """Records a batch by hand, for loops that do not call `compute_loss`."""
        self._local.graph = _current_graph()
        self._local.batch = Batch(x, y, sample_weight)

    def take(self) -> Batch | None:
        """The batch recorded in the current graph since the last call, or None."""
        batch = getattr(self._local, "batch", None)
        if batch is None or self._local.graph is not _current_graph():
            return None
        self._local.batch = None
        return batch

    def _wrap(self, compute_loss: Callable) -> Callable:
        signature = inspect.signature(compute_loss)

        def recording_compute_loss(*args, **kwargs):
            given = signature.bind_partial(*args, **kwargs).arguments
            self.show(given.get("x"), given.get("y"), given.get("sample_weight"))
            return compute_loss(*args, **kwargs)

        recording_compute_loss.kfac_recorder = self
        recording_compute_loss.__signature__ = signature
        return recording_compute_loss


def tf_variable(variable: Any) -> tf.Variable:
    """The `tf.Variable` beneath a Keras variable; others are returned unchanged."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _current_graph() -> tf.Graph | None:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
