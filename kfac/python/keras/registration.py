"""Registers a model's layers and losses on a collection, in the current graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from kfac.python.keras import losses
from kfac.python.keras.models import Batch, PureModel, tf_variable
from kfac.python.ops.layer_collection import LayerCollection

CLASS_PREFIX = "kfac_class_"


class Registrar:
    """Knows what a model's losses and layers are to the curvature.

    Args:
      model: the model as a pure function.
      loss: the Keras loss or losses, as given to `compile`.
      loss_weights: likewise.
      fisher_approx: approximations by layer name, layer class or `kfac_class_<name>`,
        or a list with one entry (or None) a trainable layer.
      register_losses: replaces the reading of `loss`: called with the collection, the
        model's outputs and the `Batch`.
    """

    def __init__(
        self,
        model: PureModel,
        loss: Any,
        loss_weights: Any = None,
        fisher_approx: Mapping | list | None = None,
        register_losses: Callable[[Any, Any, Batch], None] | None = None,
    ):
        self._model = model
        self._loss = loss
        self._loss_weights = loss_weights
        self._register_losses = register_losses
        self._approximations = _approximations(model.model, fisher_approx)

    def register_losses(
        self, collection: Any, outputs: Any, batch: Batch, seed: Any = None
    ) -> None:
        """Registers one predictive distribution an output that has a loss."""
        if self._register_losses is not None:
            self._register_losses(collection, outputs, batch)
            return
        names = getattr(self._model.model, "output_names", None)
        pairs = losses.read_all(self._loss, self._loss_weights, outputs, names)
        for i, (read, key) in enumerate(pairs):
            output = losses.at(outputs, key)
            weights = losses.at(batch.sample_weight, key)
            mask = getattr(output, "_keras_mask", None)
            parameters = read.natural_parameters(output)
            targets = _targets(read, losses.at(batch.y, key), parameters)
            coefficient = read.uniform_coefficient(output)
            if weights is not None or mask is not None or coefficient is None:
                coefficients = read.coefficients(output, weights, mask)
                parameters = losses.scale_signal(parameters, coefficients)
                coefficient = 1.0
            _REGISTER[read.distribution](
                collection,
                parameters,
                targets=targets,
                seed=None if seed is None else seed + i,
                coeff=coefficient,
            )

    def register_layers(
        self, collection: Any, variables: list[tf.Variable], batch_size: Any
    ) -> None:
        """Finds the layers in the graph behind the registered losses."""
        wanted = {v.ref() for v in variables}
        for layer, approximation in self._approximations:
            params = [tf_variable(v) for v in layer.trainable_variables]
            if params and all(p.ref() in wanted for p in params):
                group = params[0] if len(params) == 1 else tuple(params)
                collection.define_linked_parameters(group, approximation)
        collection.auto_register_layers(variables, batch_size=batch_size)


_REGISTER = {
    losses.CATEGORICAL: LayerCollection.register_categorical_predictive_distribution,
    losses.BERNOULLI: LayerCollection.register_multi_bernoulli_predictive_distribution,
    losses.SQUARED_ERROR: LayerCollection.register_squared_error_loss,
}


def trainable_layers(model: Any) -> Iterator[Any]:
    """Layers with trainable variables of their own, depth first through `layers`."""
    for layer in getattr(model, "layers", []):
        if getattr(layer, "layers", None):
            yield from trainable_layers(layer)
        elif layer.trainable_variables:
            yield layer


def _approximations(model: Any, fisher_approx: Any) -> list[tuple[Any, str]]:
    if not fisher_approx:
        return []
    layers = list(trainable_layers(model))
    if isinstance(fisher_approx, (list, tuple)):
        if len(fisher_approx) != len(layers):
            raise ValueError(
                f"fisher_approx has {len(fisher_approx)} entries, but the model has "
                f"{len(layers)} trainable layers: {[layer.name for layer in layers]}."
            )
        pairs = zip(layers, fisher_approx, strict=True)
        return [(layer, approx) for layer, approx in pairs if approx is not None]
    by_key = {
        key if isinstance(key, str) else CLASS_PREFIX + key.__name__: approx
        for key, approx in fisher_approx.items()
    }
    names = {layer.name for layer in layers}
    unknown = [k for k in by_key if k not in names and not k.startswith(CLASS_PREFIX)]
    if unknown:
        raise ValueError(
            f"fisher_approx names the layers {unknown}, but the trainable layers are "
            f"{sorted(names)}."
        )
    chosen = []
    for layer in layers:
        by_class = by_key.get(CLASS_PREFIX + type(layer).__name__)
        approximation = by_key.get(layer.name, by_class)
        if approximation is not None:
            chosen.append((layer, approximation))
    return chosen


def _targets(read: losses.OutputLoss, y: Any, parameters: tf.Tensor) -> Any:
    """Targets in the form the registered distribution takes; None without any."""
    if y is None:
        return None
    y = tf.convert_to_tensor(y)
    if read.distribution != losses.CATEGORICAL:
        return tf.cast(tf.reshape(y, tf.shape(parameters)), parameters.dtype)
    if read.sparse:
        return tf.cast(tf.reshape(y, tf.shape(parameters)[:-1]), tf.int32)
    return tf.argmax(y, axis=-1, output_type=tf.int32)


def compiled_loss_weights(model: Any) -> Any:
    """The loss weights given to `compile`, or None."""
    if not isinstance(model, keras.Model) or not model.compiled:
        return None
    with tf.init_scope():  # The config holds the values of variables.
        return (model.get_compile_config() or {}).get("loss_weights")
