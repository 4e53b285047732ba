"""Curvature on the first cases of the batch.

The paper estimates the factors on 1/8 and the quadratic model on 1/4 of the batch
(Martens & Grosse 2015, section 8): second moments need far fewer cases than the
gradient.  `SubBatch` evaluates the registered part of the model again on the first
cases, in whichever branch asks for it; weights are shared with the original.

The sources of the batch (placeholders, function arguments, iterators, queues) are
cut; everything computed from them is copied.  Consequences: batch normalisation sees
the statistics of the part, and dropout draws a mask of its own.

Where the model does not accept a smaller batch as it is, because it holds the batch or
its size as a constant, floating constants whose leading dimension is the batch's are
cut, too, and reshapes from one such dimension to another are adapted.  A constant that
has this size for another reason does not fit the rest of the model then; like all else
that cannot be cut, this fails loudly, here, not at run time.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import deferred, errors, graph_clone
from kfac.python.ops.layer_collection.losses import LossRegistry
from kfac.python.ops.utils import subgraph


class SubBatch:
    """The registered tensors and losses of a collection on its first cases."""

    def __init__(self, layer_collection: Any, fraction: float, batch_size: Any = None):
        """Analyses the graph and tries the copy; builds nothing in it.

        Args:
          layer_collection: collection with all losses registered; the copied tensors
            must belong to the graph of the losses.
          fraction: the first ceil(fraction * batch) cases are used, in (0, 1].
          batch_size: cases per replica, over all towers: int, integer tensor, or None
            to take it from the losses' inputs.

        Raises:
          ArgumentError: `fraction` is out of range.
          ValueError: no loss is registered; no source carries the batch; or the model
            does not accept a smaller batch (the message says what failed).
        """
        check_fraction("fraction", fraction)
        if not layer_collection.losses:
            raise ValueError("A sub-batch needs a registered loss; register one first.")
        self._layer_collection = layer_collection
        self._fraction = float(fraction)
        self._num_towers = len(layer_collection.towers_by_loss[0])
        inputs = tf.nest.flatten([loss.inputs for loss in layer_collection.losses])
        self._whole = self._static_batch_size(batch_size)
        self._given_batch_size = batch_size
        self._graph = inputs[0].graph
        # Keeps what was asked for, since the key is its id.
        self._deferred: dict[int, tuple[Any, deferred.DeferredTensor]] = {}
        self._sizes = deferred.PerContextCache(self._dynamic_batch_size)
        try:
            self._try_copy(inputs, graph_clone.GraphClone(self._graph, self._cut))
        except ValueError as error:
            if self._whole is None:
                raise
            clone = graph_clone.GraphClone(
                self._graph, self._cut_with_constants, self._shape_of_part
            )
            try:
                self._try_copy(inputs, clone)
            except ValueError:
                raise error from None  # It tells what is wrong with the model itself.

    def _try_copy(
        self, inputs: Sequence[tf.Tensor], clone: graph_clone.GraphClone
    ) -> None:
        """Uses this kind of copy if it can be made of the losses.

        Raises:
          ValueError: it cannot.
        """
        self._clone = clone
        self._losses = deferred.PerContextCache(self._copy_losses)
        for tensor in inputs:
            if not self._clone.depends(tensor):
                raise ValueError(self._no_source_message(tensor))
        # A function's graph that is never called: what cannot be cut fails here.
        self._trial_graph = tf.function(lambda: None).get_concrete_function().graph
        with self._trial_graph.as_default():
            self.losses()

    @property
    def fraction(self) -> float:
        """The fraction of the batch."""
        return self._fraction

    @property
    def batch_size(self) -> int | tf.Tensor:
        """Number of cases of the part, per replica; a tensor of the current context
        unless the batch size is known statically.
        """
        if self._whole is not None:
            return self.count(self._whole)
        return self._sizes.get()

    def count(self, cases: Any) -> Any:
        """ceil(fraction * cases), see `part_size`."""
        return part_size(self._fraction, cases)

    def tensor(self, tensor: Any) -> Any:
        """`tensor` on the sub-batch, in the current context.

        Variables, and tensors that do not depend on the batch, are returned as given.

        Raises:
          ValueError: the computation does not accept a smaller batch.
        """
        if not isinstance(tensor, tf.Tensor):
            return tensor
        try:
            part = self._clone.tensor(tensor)
            if part is not tensor:
                part.set_shape(self._expected_shape(tensor))
        except ValueError as error:
            raise ValueError(self._cannot_cut_message(tensor, error)) from error
        return part

    def deferred(self, tensor: Any) -> Any:
        """Stands for `tensor` on the sub-batch wherever it is used.

        The same argument gives the identical object, so that factors are shared.
        """
        if id(tensor) in self._deferred:
            return self._deferred[id(tensor)][1]
        whole = tensor
        if isinstance(tensor, deferred.DeferredTensor):  # Integer ids, for example.
            with self._graph.as_default():
                whole = tensor.resolve()
        if not isinstance(whole, tf.Tensor) or not self._clone.depends(whole):
            return tensor
        part = deferred.DeferredTensor(
            lambda: self.tensor(whole),
            shape=self.static_shape(whole),
            dtype=whole.dtype,
            name=whole.name,
            device=whole.device,
            one_hot_depth=getattr(tensor, "one_hot_depth", None),
        )
        self._deferred[id(tensor)] = (tensor, part)
        return part

    def static_shape(self, tensor: Any) -> tf.TensorShape:
        """Static shape of `tensor` on the sub-batch."""
        return self._static_shapes([tensor])[0]

    def losses(self) -> LossRegistry:
        """The losses on the sub-batch, in the current context.

        It stands in for the collection wherever losses are evaluated or multiplied:
        same names, order, towers and coefficients.
        """
        return self._losses.get()

    def _copy_losses(self) -> LossRegistry:
        registry = LossRegistry()
        for name, towers in self._layer_collection._loss_dict.items():
            for tower, loss in enumerate(towers):
                part = _loss_on(loss, self.tensor, self._target)
                registry._register_loss_function(
                    part,
                    self.tensor(self._layer_collection.loss_colocation_ops[loss]),
                    base_name=name,
                    name=name,
                    coeff=self._layer_collection.loss_coeffs[loss],
                    reuse=tower > 0,
                )
        return registry

    # The batch and its sources.

    def _static_batch_size(self, batch_size: Any) -> int | None:
        if batch_size is not None:
            value = tf.get_static_value(batch_size)
            return None if value is None else int(value)
        towers = self._layer_collection.towers_by_loss[0]
        sizes = [
            tf.compat.dimension_value(tf.nest.flatten(loss.inputs)[0].shape[0])
            for loss in towers
        ]
        return None if None in sizes else sum(sizes)

    def _dynamic_batch_size(self) -> tf.Tensor:
        if self._given_batch_size is not None:
            return self.count(self._given_batch_size)
        towers = self._layer_collection.towers_by_loss[0]
        return self.count(
            tf.add_n([tf.shape(tf.nest.flatten(t.inputs)[0])[0] for t in towers])
        )

    def _is_batch_dimension(self, size: int | None) -> bool:
        """Whether a static leading dimension may count cases (of one tower)."""
        if size is None or self._whole is None:
            return size is None
        return size in (self._whole, self._whole / self._num_towers)

    def _cut_with_constants(self, source: tf.Tensor) -> Callable | None:
        """Like `_cut`, also for constants that may hold the batch."""
        if source.op.type not in ("Const", "Fill"):
            return self._cut(source)
        if not (source.dtype.is_floating and source.shape.rank):
            return None
        if not self._is_batch_dimension(tf.compat.dimension_value(source.shape[0])):
            return None
        return lambda: self._first_cases(source)

    def _shape_of_part(self, reshape: tf.Operation) -> list[int] | None:
        """Shape for the part of a reshape that leaves the number of cases as it is."""
        shape = tf.get_static_value(reshape.inputs[1])
        data = reshape.inputs[0].shape
        if shape is None or not len(shape) or not data.rank:
            return None
        cases = int(shape[0])
        rows = tf.compat.dimension_value(data[0])
        if rows != cases or not self._is_batch_dimension(cases):
            return None
        return [self.count(cases), *(int(size) for size in shape[1:])]

    def _cut(self, source: tf.Tensor) -> Callable[[], tf.Tensor] | None:
        """How to cut a source; None if it does not carry the batch."""
        if source.dtype in (tf.resource, tf.variant) or _is_outer_constant(source):
            return None
        if source.shape.rank is None:
            raise ValueError(
                f"{source.name!r}, which feeds the losses, has unknown rank. Give it a "
                "static rank (tf.ensure_shape) so that it is known whether its leading "
                "dimension counts cases."
            )
        if source.shape.rank == 0:
            return None
        if not self._is_batch_dimension(tf.compat.dimension_value(source.shape[0])):
            return None
        return lambda: self._first_cases(source)

    def _first_cases(self, source: tf.Tensor) -> tf.Tensor:
        size = tf.compat.dimension_value(source.shape[0])
        if size is None and self._num_towers == 1:
            size = self._whole
        if size is None:
            return source[: self.count(tf.shape(source)[0])]
        part = source[: self.count(size)]
        part.set_shape([self.count(size), *source.shape[1:]])
        return part

    def _target(self, target: Any) -> Any:
        """Targets on the sub-batch; constant ones are cut too, for cases lead them."""
        if not isinstance(target, tf.Tensor):
            target = np.asarray(target)
            return target[: self.count(len(target))]
        if self._clone.depends(target):
            return self.tensor(target)
        return self._first_cases(target)

    def _expected_shape(self, tensor: tf.Tensor) -> tf.TensorShape:
        """What is known of a copy in advance: a leading batch dimension shrinks."""
        shape = tensor.shape
        if not shape.rank:
            return shape
        size = tf.compat.dimension_value(shape[0])
        if not self._is_batch_dimension(size):
            return tf.TensorShape(None)
        leading = None if size is None else self.count(size)
        return tf.TensorShape([leading]).concatenate(shape[1:])

    def _static_shapes(self, tensors: Sequence[tf.Tensor]) -> list[tf.TensorShape]:
        """Shapes of the copies, from copies that never run."""
        with self._trial_graph.as_default():
            return [self.tensor(tensor).shape for tensor in tensors]

    # Messages.

    def _no_source_message(self, tensor: tf.Tensor) -> str:
        size = "unknown" if self._whole is None else self._whole
        return (
            f"No source of the batch was found behind the loss input {tensor.name!r}: "
            "no placeholder, function argument, iterator or queue with an unknown "
            f"leading dimension or one of the batch size ({size}). A batch held in a "
            "constant can be passed through tf.compat.v1.placeholder_with_default."
        )

    def _cannot_cut_message(self, tensor: tf.Tensor, error: ValueError) -> str:
        return (
            f"{tensor.name!r} cannot be computed on {self._fraction} of the batch: "
            f"{error} Probably the model holds the batch size as a constant (in a "
            "reshape, an initial state, ...). Feed the batch with an unknown leading "
            "dimension (None), or use the whole batch."
        )


def part_size(fraction: float, cases: Any) -> Any:
    """ceil(fraction * cases), at least 1 where `cases` is static.

    Args:
      fraction: in (0, 1].
      cases: a number, or an integer tensor.

    Returns:
      An int for a number, else a tensor of the same dtype.
    """
    if isinstance(cases, numbers.Real):
        # The tolerance keeps 0.1 * 30 = 3.0000000000000004 from becoming 4.
        return max(1, math.ceil(fraction * cases - 1e-9))
    cases = tf.convert_to_tensor(cases)
    size = tf.math.ceil(tf.cast(cases, tf.float64) * fraction - 1e-9)
    return tf.cast(size, cases.dtype)


def check_fraction(name: str, fraction: Any) -> None:
    """Raises `ArgumentError` unless `fraction` is a number in (0, 1]."""
    if not (isinstance(fraction, numbers.Real) and 0 < fraction <= 1):
        raise errors.ArgumentError(
            f"{name} must be a number in (0, 1], the part of the batch to use; got "
            f"{fraction!r}."
        )


def _is_outer_constant(source: tf.Tensor) -> bool:
    """Whether a function's captured argument is a constant or a weight outside."""
    outer = source
    while outer is not None and hasattr(outer, "graph"):
        source, outer = outer, subgraph.captured_tensor(outer)
    return outer is not None or source.op.type in ("Const", "ReadVariableOp")


def _loss_on(loss: Any, replace: Callable, replace_targets: Callable) -> Any:
    """The same kind of loss on other tensors.

    A loss class whose constructor's arguments are not kept in attributes of the same
    name (with or without an underscore) provides
    `with_tensors(replace, replace_targets)` that returns the new object.
    """
    if hasattr(loss, "with_tensors"):
        return loss.with_tensors(replace, replace_targets)
    arguments = {}
    for name in list(inspect.signature(type(loss)).parameters):
        for attribute in (f"_{name}", name, f"_default_{name}"):
            if hasattr(loss, attribute):
                arguments[name] = getattr(loss, attribute)
                break
        else:
            raise ValueError(
                f"{type(loss).__name__} cannot be rebuilt on a part of the batch: its "
                f"argument {name!r} is not kept. Give the class a method "
                "with_tensors(replace, replace_targets), which returns the loss on "
                "replace(input) and replace_targets(target)."
            )
    targets = arguments.pop("targets", None)
    arguments = {
        name: tf.nest.map_structure(replace, value) for name, value in arguments.items()
    }
    if targets is not None:
        arguments["targets"] = tf.nest.map_structure(replace_targets, targets)
    return type(loss)(**arguments)
