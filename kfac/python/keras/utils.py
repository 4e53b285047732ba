"""Layer collections of Keras models, for the graph API.

`Kfac` does not need these: it registers what it trains by itself.  They are for those
who build on `kfac.LayerCollection` in a graph of their own, and for looking at what
would be registered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from kfac.python.keras import losses
from kfac.python.keras.arguments import serialize_loss
from kfac.python.keras.models import PureModel, tf_variable
from kfac.python.keras.registration import (
    CLASS_PREFIX,
    approximations,
    ask_for,
    serialize_fisher_approx,
    trainable_layers,
)
from kfac.python.ops import utils
from kfac.python.ops.layer_collection import LayerCollection
from kfac.python.ops.tensormatch import graph_search

__all__ = [
    "get_layer_collection",
    "get_loss_fn",
    "get_parent",
    "register_layer",
    "register_loss",
    "serialize_fisher_approx",
    "serialize_loss",
]

_CLASS_NAME_PREFIX = CLASS_PREFIX
_KERAS_LOSS_TO_KFAC_REGISTER_FUNC = {
    "sparsecategoricalcrossentropy": (
        LayerCollection.register_softmax_cross_entropy_loss
    ),
    "categoricalcrossentropy": LayerCollection.register_softmax_cross_entropy_loss,
    "binarycrossentropy": LayerCollection.register_sigmoid_cross_entropy_loss,
}
_SQUARED_ERRORS = ("meansquarederror", "mse")
_IDENTITIES = ("Identity", "StopGradient", "PreventGradient")


def get_parent(node: tf.Tensor) -> tf.Tensor:
    """The only input of the operation that makes a graph's tensor.

    Identities are skipped on both sides.

    Raises:
      ValueError: the operation has several inputs.
    """
    op = _without_identities(node).op
    if len(op.inputs) != 1:
        raise ValueError(
            f"{node.name!r} is made by {op.type} from {len(op.inputs)} tensors; it has "
            "more than one parent tensor."
        )
    return _without_identities(op.inputs[0])


def _without_identities(tensor: tf.Tensor) -> tf.Tensor:
    while tensor.op.type in _IDENTITIES:
        tensor = tensor.op.inputs[0]
    return tensor


def _get_verified_dict(
    container: Any, container_name: str, layer_names: Sequence[str]
) -> dict:
    """`container` as a dictionary by layer name (or class).

    Raises:
      ValueError: it is of another type, has the wrong length, or unknown names.
    """
    if container is None or container == {}:
        return {}
    if isinstance(container, Mapping):
        unknown = [
            key
            for key in container
            if isinstance(key, str)
            and not key.startswith(CLASS_PREFIX)
            and key not in layer_names
        ]
        if unknown:
            raise ValueError(
                f"{container_name} has the names {unknown}, which are not among "
                f"{list(layer_names)}."
            )
        return dict(container)
    if isinstance(container, list):
        if len(container) != len(layer_names):
            raise ValueError(
                f"{container_name} has {len(container)} entries for "
                f"{len(layer_names)} names: {list(layer_names)}."
            )
        return dict(zip(layer_names, container, strict=True))
    raise ValueError(
        f"{container_name} must be a list or a dictionary, got "
        f"{type(container).__name__}."
    )


def register_layer(
    layer_collection: LayerCollection,
    layer: keras.layers.Layer,
    fisher_approx: str | None = None,
    outputs: Any = None,
    batch_size: Any = None,
) -> None:
    """Registers what the current graph does with the weights of one layer.

    Frozen layers and layers without weights are skipped.

    Args:
      layer_collection: the collection.
      layer: layer that is called in the graph behind the losses (or `outputs`).
      fisher_approx: name of an approximation.
      outputs: structure of tensors to look behind; the registered losses' inputs by
        default.
      batch_size: cases per replica; needed for what no pattern covers.

    Raises:
      ValueError: there are neither losses nor outputs; see also
        `LayerCollection.auto_register_layers`.
    """
    variables = [tf_variable(v) for v in layer.trainable_variables]
    if not variables:
        return
    if fisher_approx is not None:
        ask_for(layer_collection, layer, fisher_approx, variables)
    if outputs is None:
        outputs = [loss.inputs for loss in layer_collection.losses]
    tensors = tf.nest.flatten(outputs)
    if not tensors:
        raise ValueError(
            "Register the losses first, or pass outputs=: layers are found by looking "
            "at what tensors depend on."
        )
    graph_search.register_subgraph_layers(
        layer_collection, variables, utils.SubGraph(tensors), batch_size=batch_size
    )
    layer_collection.check_preferences()


def register_loss(
    layer_collection: LayerCollection, output: tf.Tensor, loss: Any, **kwargs: Any
) -> None:
    """Registers the loss of a model's output.

    Args:
      layer_collection: the collection.
      output: the model's output, in the current graph. Logits are found behind Keras'
        softmax and sigmoid.
      loss: name of a Keras loss, function or object. Its reduction is not taken into
        account, see `kfac.python.keras.losses.OutputLoss.coefficients` for the factor.
      **kwargs: of the registration: `coeff`, `seed`, `targets`, `name`.

    Raises:
      ValueError: the loss is not supported.
    """
    serialized = loss if isinstance(loss, str) else serialize_loss(loss)
    if isinstance(serialized, Mapping):
        serialized = serialized["class_name"]
    name = str(serialized).replace("_", "").lower()
    if name in _SQUARED_ERRORS:
        layer_collection.register_squared_error_loss(output, **kwargs)
        return
    if name not in _KERAS_LOSS_TO_KFAC_REGISTER_FUNC:
        raise ValueError(
            f"Unsupported loss function: {serialized}. Supported are "
            f"{losses.SUPPORTED}; register others on the layer collection yourself."
        )
    register = _KERAS_LOSS_TO_KFAC_REGISTER_FUNC[name]
    register(layer_collection, losses.read(loss).natural_parameters(output), **kwargs)


def get_layer_collection(
    model: keras.Model,
    loss: Any = None,
    loss_weights: Any = None,
    fisher_approx: Any = None,
    layer_collection: LayerCollection | None = None,
    seed: Any = None,
    inputs: Any = None,
    batch_size: Any = None,
) -> LayerCollection:
    """Registers a model's layers and losses in the current graph.

    Called eagerly, it builds a graph that is never run, to look at.

    Args:
      model: Keras model.
      loss: a loss, or a list or dictionary of one an output; None registers none.
      loss_weights: likewise, the coefficients of the registered losses.
      fisher_approx: approximations by layer name or class, a list with one entry a
        trainable layer, or one for all layers that have it.
      layer_collection: collection to use; a new one by default.
      seed: of all losses.
      inputs: structure of tensors to call the model on, in training mode and without
        side effects; placeholders by default.
      batch_size: cases; that of the inputs by default.

    Returns:
      The collection.

    Raises:
      ValueError: something does not fit the model, or no pattern covers a layer.
    """
    if tf.executing_eagerly():
        function = tf.function(lambda: None).get_concrete_function()
        with function.graph.as_default():
            collection = get_layer_collection(
                model,
                loss,
                loss_weights,
                fisher_approx,
                layer_collection,
                seed,
                inputs,
                batch_size,
            )
        collection.scratch_function = function  # Keeps the graph.
        return collection
    pure = PureModel(model)
    outputs = pure(_placeholders(pure) if inputs is None else inputs)
    collection = LayerCollection() if layer_collection is None else layer_collection
    by_key = losses.by_key(outputs)
    names = _output_names(pure, by_key)
    loss_by_name = _losses_by_name(loss, names)
    weights = _get_verified_dict(loss_weights, "loss_weights", names)
    for name, output in zip(names, by_key.values(), strict=True):
        if name in loss_by_name:
            coefficient = weights.get(name, 1.0)
            register_loss(
                collection, output, loss_by_name[name], coeff=coefficient, seed=seed
            )
    if batch_size is None:
        batch_size = tf.shape(tf.nest.flatten(outputs)[0])[0]
    chosen = {}
    for layer, approximation in approximations(model, fisher_approx):
        if layer is None:
            collection.set_default_approximation(approximation)
        chosen[id(layer)] = approximation
    for layer in trainable_layers(model):
        register_layer(
            collection, layer, chosen.get(id(layer)), outputs, batch_size=batch_size
        )
    return collection


def _placeholders(model: PureModel) -> Any:
    specs = model.input_specs()
    if specs is None:
        raise ValueError(
            f"{type(model.model).__name__} does not know the shape of its inputs; pass "
            "inputs=, tensors to call it on."
        )
    return tf.nest.map_structure(
        lambda spec: tf.compat.v1.placeholder(spec.dtype, spec.shape), specs
    )


def _output_names(model: PureModel, outputs: Mapping) -> list:
    if list(outputs) == [()]:
        return [""]
    if model.output_names is not None and len(model.output_names) == len(outputs):
        return list(model.output_names)
    return list(outputs)


def _losses_by_name(loss: Any, names: Sequence[str]) -> dict:
    if not loss:
        return {}
    if not isinstance(loss, (Mapping, list, tuple)):
        if len(names) > 1:
            raise ValueError(
                f"The model has the outputs {list(names)}: pass a list of losses, or "
                "a loss dict by output name."
            )
        return {names[0]: loss}
    if isinstance(loss, Mapping) and len(names) == len(loss) == 1:
        return {names[0]: next(iter(loss.values()))}
    matching = (
        set(loss) == set(names)
        if isinstance(loss, Mapping)
        else len(loss) == len(names)
    )
    if not matching:
        raise ValueError(
            f"A loss dict (or list) must have one entry for each of the outputs "
            f"{list(names)}, got {loss!r}."
        )
    if isinstance(loss, Mapping):
        return dict(loss)
    return dict(zip(names, loss, strict=True))


def get_loss_fn(
    model: keras.Model,
    loss: Any,
    training: bool | None = None,
    loss_weights: Any = None,
    reduce_fn: Callable = tf.reduce_mean,
    name: str = "loss",
) -> Callable[..., tf.Tensor]:
    """A function that computes the loss a compiled model would report.

    Args:
      model: Keras model.
      loss: a loss, or a list, tuple or dictionary (by output name) of these.
      training: passed to the model, if it is not None.
      loss_weights: a number, or a list or dictionary like `loss`.
      reduce_fn: reduces unreduced losses, for instance to their mean.
      name: of the name scope.

    Returns:
      `loss_fn(inputs, prediction=None)` of `inputs = (x, y)`; the prediction is the
      model's by default. Without masks and sample weights.
    """
    call = {} if training is None else {"training": training}

    def loss_fn(inputs: Iterable[Any], prediction: Any = None) -> tf.Tensor:
        x, y = inputs
        with tf.name_scope(name):
            if prediction is None:
                prediction = model(x, **call)
            names = getattr(model, "output_names", None)
            total = losses.total_with(
                reduce_fn, loss, loss_weights, prediction, y, names
            )
            penalties = [tf.reduce_sum(penalty) for penalty in model.losses]
            return tf.add_n([total, *penalties])

    return loss_fn
