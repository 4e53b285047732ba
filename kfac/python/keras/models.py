"""Models as pure functions of their variables."""

from __future__ import annotations

import collections
import inspect
import re
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from kfac.python.keras import losses, private_keras
from kfac.python.keras.batches import Batch, not_recording
from kfac.python.keras.private_keras import KerasVariable


def check(model: Any) -> None:
    """Raises `ValueError` for what cannot be a model."""
    is_class = isinstance(model, type)
    if is_class or not (callable(model) and hasattr(model, "trainable_variables")):
        what = f"the class {model.__name__}" if is_class else type(model).__name__
        raise ValueError(
            "model must be a Keras model, or a callable with `trainable_variables` "
            f"such as a tf.Module; got {what}."
        )


class PureModel:
    """A model whose forward pass can be evaluated without side effects.

    Inside `keras.StatelessScope` nothing that a model's layers update (batch-norm
    statistics, metrics, dropout seeds) changes, however often the curvature evaluates
    it; and nothing advances the dropout masks between two losses that are compared.

    Args:
      model: Keras model, or any callable with `trainable_variables` (`tf.Module`).
      loss: Keras loss or losses, where the model has not been compiled with any.
      loss_weights: likewise.

    Raises:
      ValueError: the model is neither.
    """

    def __init__(self, model: Any, loss: Any = None, loss_weights: Any = None):
        check(model)
        self.model = model
        self._loss = loss
        self._loss_weights = loss_weights
        call = model.call if isinstance(model, keras.layers.Layer) else model
        parameters = inspect.signature(call).parameters.values()
        self._takes_training = any(
            p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters
        )

    @property
    def declared_loss(self) -> Any:
        """The loss given here, else the one of `compile`, else None."""
        if self._loss is not None:
            return self._loss
        loss = getattr(self.model, "loss", None)
        # Models that were compiled without a loss have a method of that name.
        return None if inspect.ismethod(loss) else loss

    @property
    def declared_loss_weights(self) -> Any:
        """The loss weights given here, else the ones of `compile`, else None."""
        if self._loss_weights is not None or self._loss is not None:
            return self._loss_weights
        return private_keras.loss_weights_of(self.model) if self.is_compiled else None

    @property
    def output_names(self) -> Any:
        """Names that a dictionary of losses may use, or None."""
        return getattr(self.model, "output_names", None)

    @property
    def is_compiled(self) -> bool:
        """Whether the model computes its training loss itself."""
        return isinstance(self.model, keras.Model) and self.model.compiled

    @property
    def has_own_compute_loss(self) -> bool:
        """Whether the model's class overrides Keras' `compute_loss`."""
        return self.is_compiled and (
            type(self.model).compute_loss is not keras.Model.compute_loss
        )

    @property
    def has_own_train_step(self) -> bool:
        """Whether the model's class overrides Keras' `train_step`."""
        return self.is_compiled and (
            type(self.model).train_step is not keras.Model.train_step
            and not getattr(self.model, "keeps_loss", False)
        )

    @property
    def meets_replicas(self) -> bool:
        """Whether layers sum over replicas: synchronised batch normalisation."""
        layers = _leaf_layers(self.model, "")
        return any(getattr(layer, "synchronized", False) for _, layer in layers)

    def paths(self) -> dict[Any, str]:
        """`variable.ref()` -> path, as Keras names the variable."""
        return {
            tf_variable(v).ref(): getattr(v, "path", v.name).split(":")[0]
            for v in self._all_variables()
        }

    def state_names(self) -> dict[Any, str]:
        """`variable.ref()` -> unique name, the same for every model built alike.

        Keras' paths depend on how a model was built: another one after loading, and
        other numbers in a second instance.  These are made of the names of the layers
        around the variable, numbered within the model, frozen ones included.
        """
        found: dict[Any, str] = {}
        for prefix, layer in _leaf_layers(self.model, ""):
            for variable in layer.variables:
                name = prefix + _name_inside(layer, variable)
                found.setdefault(tf_variable(variable).ref(), name)
        for ref, path in self.paths().items():  # What is in no layer.
            found.setdefault(ref, path)
        numbered = _Numbering()
        return {ref: numbered(name) for ref, name in found.items()}

    def _all_variables(self) -> Any:
        return getattr(self.model, "variables", self.model.trainable_variables)

    def input_specs(self) -> Any:
        """Structure of the inputs' `tf.TensorSpec`s where the model knows it, or None.

        Functional and (built) sequential models do.
        """
        if isinstance(self.model, keras.Sequential):
            inputs = getattr(self.model, "inputs", [None])[0]
        elif hasattr(self.model, "inputs"):
            inputs = self.model.input  # In the structure of the call.
        else:
            inputs = None
        return None if inputs is None else Batch(inputs, None).specs().x

    def call(self, x: Any) -> Any:
        """The model's output in training mode, with all side effects."""
        kwargs = {"training": True} if self._takes_training else {}
        return self.model(x, **kwargs)

    def __call__(self, x: Any) -> Any:
        """The model's output in training mode, without side effects."""
        with self.without_side_effects():
            return self.call(x)

    def without_side_effects(self) -> keras.StatelessScope:
        """Context in which layers, losses and metrics leave variables as they are."""
        variables = [v for v in self._all_variables() if isinstance(v, KerasVariable)]
        # Keras looks up the values for penalties on weights here.
        mapping = [(variable, variable.value) for variable in variables]
        return keras.StatelessScope(state_mapping=mapping, collect_losses=True)

    def compute_loss(self, batch: Batch, outputs: Any) -> tf.Tensor:
        """The training loss: a mean over the batch, and penalties.

        Under a strategy it is a replica's share, as Keras' losses are.
        """
        if self.is_compiled:
            compute_loss = not_recording(self.model.compute_loss)
            return compute_loss(batch.x, batch.y, outputs, batch.sample_weight)
        loss = losses.total(
            self.declared_loss, self._loss_weights, outputs, batch, self.output_names
        )
        penalties = [tf.reduce_sum(p) for p in getattr(self.model, "losses", ())]
        return loss + sum(penalties) / num_replicas()

    def loss(self, batch: Batch) -> tf.Tensor:
        """The mean training loss of this replica, without side effects."""
        with self.without_side_effects():
            return self.compute_loss(batch, self.call(batch.x)) * num_replicas()


def _leaf_layers(model: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Layers that are no models, with the names of those around them."""
    for layer in getattr(model, "layers", ()):
        inside = f"{prefix}{layer.name}/"
        if getattr(layer, "layers", None):
            yield from _leaf_layers(layer, inside)
        else:
            yield inside, layer


def _name_inside(layer: Any, variable: Any) -> str:
    """The part of a variable's path below its layer."""
    *parents, last = variable.path.split("/")
    if layer.name in parents:
        position = len(parents) - 1 - parents[::-1].index(layer.name)
        parents = parents[position + 1 :]
    return "/".join([*parents, last])


class _Numbering:
    """Replaces the numbers at the ends of a path's components by their order."""

    def __init__(self):
        self._components: dict[tuple[str, str], str] = {}
        self._counts: collections.Counter = collections.Counter()

    def __call__(self, path: str) -> str:
        *parents, last = path.split("/")
        name = ""
        for component in parents:
            name += self._numbered(name, component) + "/"
        return name + self._next(name, last)

    def _numbered(self, parent: str, component: str) -> str:
        key = (parent, component)
        if key not in self._components:
            self._components[key] = self._next(parent, component)
        return self._components[key]

    def _next(self, parent: str, component: str) -> str:
        stem = re.sub(r"_\d+$", "", component)
        number = self._counts[parent, stem]
        self._counts[parent, stem] += 1
        return f"{stem}_{number}" if number else stem


def num_replicas() -> int:
    """Number of replicas; Keras divides losses by it."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def tf_variable(variable: Any) -> tf.Variable:
    """The `tf.Variable` beneath a Keras variable; others are returned unchanged."""
    return variable.value if isinstance(variable, KerasVariable) else variable
