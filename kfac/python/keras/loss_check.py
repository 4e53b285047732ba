"""Compares the loss that is trained with the one that the curvature belongs to.

Kfac reads what was given to `compile`.  A model may compute something else: its class
may override `compute_loss`, or a loss class may have been subclassed.  The check
evaluates the model's own `compute_loss` on random outputs and compares its curvature
with the declared one's: the change of the gradient between two random points, which
neither targets, nor label smoothing, nor terms linear in the outputs have a part in.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kfac.python.keras import losses
from kfac.python.keras.batches import Batch
from kfac.python.keras.models import PureModel, num_replicas

# Keras computes losses in float32 and clips probabilities; what is wrong is off by a
# factor.
TOLERANCE = 1e-2
_BATCH = 4
_UNKNOWN_SIZE = 3

# What a model returns, by the keys that `losses.read_all` uses.
ByKey = dict[Any, Any]


class LossMismatchError(ValueError):
    """The model trains another loss than the one it declares."""


def check(
    model: PureModel,
    declared: Sequence[tuple[losses.OutputLoss, Any]],
    outputs: Any,
    specs: Batch,
) -> None:
    """Compares the declared with the real loss at random outputs; runs eagerly.

    Args:
      model: a compiled model.
      declared: what the losses were read as, and the keys of their outputs.
      outputs: structure of the model's outputs, of which only shapes are used.
      specs: what batches look like.

    Raises:
      LossMismatchError: the curvatures differ.
    """
    rng = np.random.default_rng(0)
    shapes = {key: _shape(out.shape) for key, out in losses.by_key(outputs).items()}
    points = [
        {key: _normal(rng, shape) for key, shape in shapes.items()} for _ in range(2)
    ]
    batch = Batch(
        tf.nest.map_structure(lambda spec: _input(rng, spec), specs.x),
        _targets(rng, declared, shapes, specs.y, model.output_names),
    )

    def gradients(*values):
        z = dict(zip(shapes, values, strict=True))
        real = _real_gradients(model, declared, outputs, z, batch)
        return real, {key: _gradient(read, z[key]) for read, key in declared}

    try:
        # In a function, for tapes do not record outside of the step's trace.
        function = tf.function(gradients, autograph=False).get_concrete_function(
            *points[0].values()
        )
        (real, expected), (other_real, other_expected) = (
            function(*point.values()) for point in points
        )
    except Exception as error:
        warnings.warn(
            "Kfac could not compare the loss that the model computes with the declared "
            f"one, on random data ({type(error).__name__}: {error}). Make sure that "
            "they are the same up to penalties, or pass register_losses=."
        )
        return
    for read, key in declared:
        change = (real[key] - other_real[key]).numpy()
        declared_change = (expected[key] - other_expected[key]).numpy()
        error = np.linalg.norm(change - declared_change)
        if not error <= TOLERANCE * np.linalg.norm(declared_change):
            raise LossMismatchError(_message(model, read, key, change, declared_change))


def _message(
    model: PureModel,
    read: losses.OutputLoss,
    key: Any,
    change: np.ndarray,
    expected: np.ndarray,
) -> str:
    name = type(model.model).__name__
    output = "its output" if key == () else f"its output {key!r}"
    scale = float(np.sum(change * expected) / np.sum(expected * expected))
    rest = np.linalg.norm(change - scale * expected) / np.linalg.norm(change)
    difference = (
        f"{scale:.4g} times the declared one's" if rest <= TOLERANCE else "another one"
    )
    overriding = (
        f" {name} overrides compute_loss." if model.has_own_compute_loss else ""
    )
    return (
        f"The loss that {name} computes is not the {read.distribution} loss that was "
        f"declared: at {output} its curvature is {difference}.{overriding} Tell Kfac "
        "what is trained: pass register_losses=, a callable (collection, outputs, "
        "batch) that registers the predictive distribution, or compile with the loss "
        "that is meant."
    )


def _real_gradients(
    model: PureModel,
    declared: Sequence[tuple[losses.OutputLoss, Any]],
    outputs: Any,
    points: ByKey,
    batch: Batch,
) -> ByKey:
    """Gradients of the model's own loss with respect to the natural parameters."""
    predictions = dict(points)
    for read, key in declared:
        predictions[key] = _activate(read, points[key])
    with model.without_side_effects():
        loss = model.compute_loss(batch, losses.from_keys(outputs, predictions))
        loss *= num_replicas()  # Of which it is one's share.
    leaves = list(points.values())
    found = tf.gradients(loss, leaves, unconnected_gradients="zero")
    return dict(zip(points, found, strict=True))


def _gradient(read: losses.OutputLoss, z: tf.Tensor) -> tf.Tensor:
    """Gradient of the declared loss, but for what the targets contribute."""
    if read.distribution == losses.CATEGORICAL:
        values = tf.reduce_logsumexp(z, axis=-1)
    elif read.distribution == losses.BERNOULLI:
        values = tf.reduce_sum(tf.nn.softplus(z), axis=-1)
    else:
        values = tf.reduce_sum(z**2, axis=-1)
    loss = tf.reduce_sum(read.coefficients(z) * values) / z.shape[0]
    return tf.gradients(loss, z)[0]


def _activate(read: losses.OutputLoss, z: tf.Tensor) -> tf.Tensor:
    if read.from_logits or read.distribution == losses.SQUARED_ERROR:
        return z
    if read.distribution == losses.CATEGORICAL:
        return keras.activations.softmax(z)
    return keras.activations.sigmoid(z)


def _targets(
    rng: np.random.Generator,
    declared: Sequence[tuple[losses.OutputLoss, Any]],
    shapes: ByKey,
    specs: Any,
    names: Sequence[str] | None,
) -> Any:
    """Random targets for the declared losses, zeros for other outputs."""
    flat = [_zeros(spec) for spec in tf.nest.flatten(specs)]
    found = tf.nest.pack_sequence_as(specs, flat)
    for read, key in declared:
        spec = losses.at(specs, key, names)
        target = _target(rng, read, shapes[key])
        if spec is not None:
            target = tf.cast(_with_rank(target, spec.shape.rank), spec.dtype)
        found = _with_member(found, key, names, target)
    return found


def _target(
    rng: np.random.Generator, read: losses.OutputLoss, shape: Sequence[int]
) -> np.ndarray:
    if read.distribution == losses.SQUARED_ERROR:
        return rng.normal(size=shape).astype(np.float32)
    if read.distribution == losses.BERNOULLI:
        return rng.integers(2, size=shape).astype(np.float32)
    classes = rng.integers(shape[-1], size=shape[:-1])
    return classes if read.sparse else np.eye(shape[-1], dtype=np.float32)[classes]


def _with_rank(target: np.ndarray, rank: int | None) -> np.ndarray:
    """Adds or takes away a last axis of size one, as Keras' losses accept it."""
    if rank is not None and rank == target.ndim + 1:
        return target[..., np.newaxis]
    if rank is not None and rank == target.ndim - 1 and target.shape[-1] == 1:
        return target[..., 0]
    return target


def _with_member(structure: Any, key: Any, names: Any, value: Any) -> Any:
    """A copy of `structure` with another member at a key."""
    if key == ():
        return value
    if isinstance(structure, Mapping):
        return {**structure, losses.name_of(structure, key, names): value}
    changed = list(structure)
    changed[key] = value
    return type(structure)(changed)


def _input(rng: np.random.Generator, spec: Any) -> Any:
    if spec is None or not spec.dtype.is_floating:
        return _zeros(spec)
    return tf.cast(_normal(rng, _shape(spec.shape)), spec.dtype)


def _zeros(spec: Any) -> Any:
    return None if spec is None else tf.zeros(_shape(spec.shape), spec.dtype)


def _normal(rng: np.random.Generator, shape: Sequence[int]) -> tf.Tensor:
    return tf.constant(rng.normal(size=shape), tf.float32)


def _shape(shape: tf.TensorShape) -> list[int]:
    """A small static shape like `shape`."""
    first, *rest = shape.as_list()
    del first
    return [_BATCH, *(_UNKNOWN_SIZE if size is None else size for size in rest)]
