"""The batches that a model trains on, and how the optimizer gets to see them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one training step was given: structures of tensors, batch first.

    Structures may hold None.

    Attributes:
      x: inputs.
      y: targets, or None.
      sample_weight: weights, or None.
    """

    x: Any
    y: Any
    sample_weight: Any = None

    def parts(self) -> tuple:
        """`(x, y, sample_weight)`."""
        return (self.x, self.y, self.sample_weight)

    def map(self, function: Callable[[Any], Any]) -> Batch:
        """`function` of every tensor."""
        mapped = lambda leaf: None if leaf is None else function(leaf)
        return Batch(*(tf.nest.map_structure(mapped, part) for part in self.parts()))

    def as_tensors(self) -> Batch:
        return self.map(tf.convert_to_tensor)

    def head(self, count: tf.Tensor | int) -> Batch:
        """The first `count` cases."""
        return self.map(lambda tensor: tensor[:count])

    def of_unknown_size(self) -> Batch:
        """The same tensors, with a leading dimension that is not known statically.

        Which axis of a sequence counts cases is then certain, whatever its length.
        """

        def relaxed(tensor):
            if not tensor.shape.rank:
                return tensor
            shape = [None, *tensor.shape[1:]]
            return tf.compat.v1.placeholder_with_default(tensor, shape)

        return self.map(relaxed)

    def size(self) -> tf.Tensor | int:
        """Number of cases; an int where static."""
        leaves = [leaf for leaf in tf.nest.flatten(self.x) if leaf is not None]
        static = leaves[0].shape[0]
        return tf.shape(leaves[0])[0] if static is None else static

    def specs(self) -> Batch:
        """`tf.TensorSpec`s for such batches of any size."""

        def spec(tensor):
            shape = tf.TensorShape(tensor.shape)
            if shape.rank:
                shape = tf.TensorShape([None]).concatenate(shape[1:])
            return tf.TensorSpec(shape, tf.as_dtype(tensor.dtype))

        return self.map(spec)


class BatchRecorder:
    """Remembers the batch of the training step that is being traced or executed.

    Keras hands every training step's data to `compute_loss`; wrapping that method on
    the model shows them to the optimizer whatever the training loop looks like.
    A batch is kept for each replica, with the graph it belongs to, and forgotten once
    taken.

    Attributes:
      specs: what batches look like; None before the first one.
    """

    def __init__(self):
        self._recorded: dict[int, tuple[Any, Batch]] = {}
        self.specs: Batch | None = None

    def attach(self, model: Any) -> None:
        """Wraps `model.compute_loss`; does nothing the second time."""
        compute_loss = getattr(model, "compute_loss", None)
        if compute_loss is None or getattr(compute_loss, "kfac_recorder", None) is self:
            return
        model.compute_loss = self._wrap(compute_loss)

    def show(self, x: Any, y: Any, sample_weight: Any = None) -> None:
        """Records a batch by hand, for loops that do not call `compute_loss`."""
        batch = Batch(x, y, sample_weight)
        self.specs = batch.as_tensors().specs()
        self._recorded[replica()] = (_current_graph(), batch)

    def take(self) -> Batch | None:
        """The batch recorded since the last call, or None.

        It must come from the current graph or from one around it: Keras' mixed
        precision applies gradients inside a conditional.
        """
        graph, batch = self._recorded.get(replica(), (None, None))
        if batch is None or not _is_enclosing(graph):
            return None
        del self._recorded[replica()]
        return batch

    def _wrap(self, compute_loss: Callable) -> Callable:
        signature = inspect.signature(compute_loss)

        def recording_compute_loss(*args, **kwargs):
            given = signature.bind_partial(*args, **kwargs).arguments
            batch = [given.get(name) for name in ("x", "y", "sample_weight")]
            if given.get("training", True) and batch[0] is not None:
                self.show(*batch)
            return compute_loss(*args, **kwargs)

        recording_compute_loss.kfac_recorder = self
        recording_compute_loss.kfac_original = compute_loss
        recording_compute_loss.__signature__ = signature
        return recording_compute_loss


def not_recording(compute_loss: Callable) -> Callable:
    """What optimizers wrapped to see batches, for evaluations that are no steps."""
    while hasattr(compute_loss, "kfac_original"):
        compute_loss = compute_loss.kfac_original
    return compute_loss


def _current_graph() -> tf.Graph | None:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _is_enclosing(graph: tf.Graph | None) -> bool:
    """Whether tensors of `graph` can be used in the current one as they are."""
    current = _current_graph()
    while current is not None and current is not graph:
        current = getattr(current, "outer_graph", None)
    return current is graph and (graph is not None or tf.executing_eagerly())


def replica() -> int:
    """Index of the replica that is being traced; Mirrored ones have threads."""
    if tf.distribute.in_cross_replica_context():
        return 0
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    static = tf.get_static_value(replica) if tf.is_tensor(replica) else replica
    return 0 if static is None else int(static)
