"""Registers a model's layers and losses on a collection, in the current graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.keras import losses, private_keras
from kfac.python.keras.batches import Batch
from kfac.python.keras.models import PureModel, tf_variable
from kfac.python.ops import deferred
from kfac.python.ops.layer_collection import LayerCollection

CLASS_PREFIX = "kfac_class_"
# The approximation that hands a layer to the fallback optimizer.
FALLBACK = "fallback"


class Registrar:
    """Knows what a model's losses and layers are to the curvature.

    Args:
      model: the model as a pure function, with its loss.
      approximations: see the function of that name.
      register_losses: replaces the reading of the loss: called with the collection,
        the model's outputs and the `Batch`.

    Raises:
      ValueError: the loss is not known.
    """

    def __init__(
        self,
        model: PureModel,
        approximations: Sequence[tuple[Any, str]] = (),
        register_losses: Callable[[Any, Any, Batch], None] | None = None,
    ):
        if model.declared_loss is None and register_losses is None:
            raise ValueError(
                "Kfac must know the loss: provide a model with a loss (compile it), or "
                "pass loss= or register_losses= to the optimizer."
            )
        self._model = model
        self._register_losses = register_losses
        self._approximations = approximations

    @property
    def reads_loss(self) -> bool:
        """Whether the loss is read, rather than registered by the user's callable."""
        return self._register_losses is None

    def read_losses(self, outputs: Any) -> list[tuple[losses.OutputLoss, Any]]:
        """What the declared losses are, see `losses.read_all`."""
        return losses.read_all(
            self._model.declared_loss,
            self._model.declared_loss_weights,
            outputs,
            self._model.output_names,
        )

    def register_losses(
        self, collection: Any, outputs: Any, batch: Batch, seed: Any = None
    ) -> None:
        """Registers one predictive distribution an output that has a loss.

        Args:
          collection: the `LayerCollection`.
          outputs: the model's, in training mode.
          batch: what they were computed from; the targets may be missing.
          seed: int32 vector of two words for sampled targets.
        """
        if self._register_losses is not None:
            self._register_losses(collection, outputs, batch)
            _set_seeds(collection, seed)
            return
        for i, (read, key) in enumerate(self.read_losses(outputs)):
            output = losses.at(outputs, key)
            weights = losses.at(batch.sample_weight, key, self._model.output_names)
            mask = private_keras.mask_of(output)
            parameters = read.natural_parameters(output)
            y = losses.at(batch.y, key, self._model.output_names)
            targets = _targets(read, y, parameters)
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
        self, collection: Any, variables: Sequence[tf.Variable], batch_size: Any
    ) -> None:
        """Finds the layers in the graph behind the registered losses.

        Statistics of layers that compute in half precision are taken in float32.
        """
        for layer, approximation in self._approximations:
            if layer is None:
                collection.set_default_approximation(approximation)
            elif approximation != FALLBACK:
                ask_for(collection, layer, approximation, variables)
        collection.auto_register_layers(variables, batch_size=batch_size)
        collection.check_preferences()
        in_float32 = deferred.AtLeastFloat32()
        for block in collection.get_blocks():
            block.use_sub_batch(in_float32, lambda size: size)

    def left_to_fallback(self) -> set[Any]:
        """`variable.ref()` of what the user gave to the fallback optimizer."""
        return {
            tf_variable(variable).ref()
            for layer, approximation in self._approximations
            if approximation == FALLBACK
            for variable in layer.trainable_variables
        }


_REGISTER = {
    losses.CATEGORICAL: LayerCollection.register_categorical_predictive_distribution,
    losses.BERNOULLI: LayerCollection.register_multi_bernoulli_predictive_distribution,
    losses.SQUARED_ERROR: LayerCollection.register_squared_error_loss,
}


def layers_with_weights(model: Any) -> Iterator[Any]:
    """Layers with variables of their own, depth first through `layers`."""
    for layer in getattr(model, "layers", []):
        if getattr(layer, "layers", None):
            yield from layers_with_weights(layer)
        elif layer.weights:
            yield layer


def trainable_layers(model: Any) -> list[Any]:
    """Those of `layers_with_weights` that have trainable ones."""
    return [layer for layer in layers_with_weights(model) if layer.trainable_variables]


def ask_for(
    collection: Any,
    layer: Any,
    approximation: str,
    variables: Sequence[tf.Variable],
) -> None:
    """Asks for an approximation of a layer's parameters that are among `variables`.

    Of a layer with several groups of parameters (attention, recurrent cells) it is that
    of each group that can have it.
    """
    wanted = {v.ref() for v in variables}
    own = [tf_variable(v) for v in layer.trainable_variables]
    own = [v for v in own if v.ref() in wanted]
    if own:
        collection.prefer_approximation(own, approximation)


def approximations(model: Any, fisher_approx: Any) -> list[tuple[Any | None, str]]:
    """Pairs of a layer and the approximation that is asked for it.

    Args:
      model: Keras model.
      fisher_approx: approximations by layer name or path, layer class or
        `kfac_class_<name>`; a list with one entry (or None) a trainable layer; or one
        approximation for all layers that have it, which makes a pair without layer.

    Raises:
      ValueError: `fisher_approx` does not fit the layers.
    """
    if not fisher_approx:
        return []
    if isinstance(fisher_approx, str):
        if fisher_approx == FALLBACK:
            raise ValueError(
                "fisher_approx='fallback' leaves no layer to Kfac; name the layers "
                "that the fallback is to train: {'<layer>': 'fallback'}."
            )
        return [(None, fisher_approx)]
    if isinstance(fisher_approx, (list, tuple)):
        layers = trainable_layers(model)
        if len(fisher_approx) != len(layers):
            raise ValueError(
                f"fisher_approx has {len(fisher_approx)} entries, but the model has "
                f"{len(layers)} trainable layers: {[layer.name for layer in layers]}."
            )
        pairs = zip(layers, fisher_approx, strict=True)
        return [(layer, approx) for layer, approx in pairs if approx is not None]
    by_key = serialize_fisher_approx(fisher_approx)
    layers = list(layers_with_weights(model))
    names = {layer.name for layer in layers} | {layer.path for layer in layers}
    unknown = [k for k in by_key if k not in names and not k.startswith(CLASS_PREFIX)]
    if unknown:
        raise ValueError(
            f"fisher_approx names the layers {unknown}, but the layers with weights "
            f"are {sorted({layer.name for layer in layers})}."
        )
    chosen = []
    for layer in layers:
        keys = (layer.path, layer.name, CLASS_PREFIX + type(layer).__name__)
        found = [by_key[key] for key in keys if key in by_key]
        if found and found[0] is not None:
            chosen.append((layer, found[0]))
    return chosen


def serialize_fisher_approx(fisher_approx: Any) -> Any:
    """Layer classes as `kfac_class_<name>`; everything else unchanged."""
    if not isinstance(fisher_approx, Mapping):
        return fisher_approx
    return {
        key if isinstance(key, str) else CLASS_PREFIX + key.__name__: value
        for key, value in fisher_approx.items()
    }


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


def _set_seeds(collection: Any, seed: Any) -> None:
    """Lets losses that were registered without a seed sample reproducibly."""
    if seed is None:
        return
    for i, loss in enumerate(collection.losses):
        if getattr(loss, "_default_seed", 0) is None:
            loss._default_seed = seed + i
