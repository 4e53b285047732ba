"""Saving and restoring `Kfac`: variables, files, configuration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kfac.python.keras import arguments, models, option_checks, private_keras
from kfac.python.keras.private_keras import KerasVariable
from kfac.python.keras.working import OWN_STATE

_STATE, _HYPER = "state|", "hyper|"


class PersistenceMixin:
    """The part of `Kfac` that is saved.

    The curvature's state is saved by name, so that layers may be frozen and unfrozen
    in between.  Names are made of the parameters' paths in the model, see
    `PureModel.state_names`.
    """

    # ------------------------------------------------------------ variables

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables: iterations, learning rate, the curvature's, the fallback's.

        Complete once the model is registered and its inputs are known.
        """
        found = list(super().variables)
        if "_store" not in self.__dict__:  # While the base class is constructed.
            return found
        found += self._state_variables().values()
        if self.fallback is not None:
            found += self.fallback.variables
        return found

    def _state_variables(self) -> dict[str, keras.Variable]:
        """The curvature's state by name, as Keras variables."""
        wrapped = self._working.keras_variables
        for name, variable in self._store.named_variables().items():
            if name not in wrapped:
                wrapped[name] = private_keras.as_keras_variable(
                    variable, name, self.name
                )
        return {name: wrapped[name] for name in self._store.named_variables()}

    @property
    def weights(self) -> list[keras.Variable]:
        """The variables in the order of the reference API.

        Iterations; damping if it is adapted; rho, previous loss, learning rate,
        momentum and predicted change of the quadratic model; counters of steps and of
        burn-in; per factor moving average, its weight; inverses; velocities.
        """
        left_out = [self.configured_learning_rate]
        left_out += [
            v for n, v in self._state_variables().items() if n.startswith(OWN_STATE)
        ]
        left_out_ids = {id(variable) for variable in left_out}
        return [v for v in self.variables if id(v) not in left_out_ids]

    def get_weights(self) -> list[np.ndarray]:
        """Values of `weights`."""
        return [keras.ops.convert_to_numpy(variable) for variable in self.weights]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets `weights`, or all `variables`: the number of values tells which.

        Before the model is registered, more values than there are variables are kept
        until it is; Keras' legacy format loads like that.

        Raises:
          ValueError: it is neither number, or shapes differ.
        """
        # Read now: they may be data of a file that is closed soon.
        weights = [np.asarray(value) for value in weights]
        variables = self.variables
        if not self._store.named_variables() and len(weights) > len(variables):
            self._working.loaded_weights = weights
            return
        if len(weights) != len(variables):
            variables = self.weights
        if len(weights) != len(variables):
            raise ValueError(
                f"{self.name} has {len(self.weights)} weights and "
                f"{len(self.variables)} variables, but got {len(weights)} values. "
                "Variables are complete once the model is registered (register_layers) "
                "or has been trained for a step."
            )
        for variable, value in zip(variables, weights, strict=True):
            if tuple(variable.shape) != np.shape(value):
                raise ValueError(
                    f"{variable.path} has shape {tuple(variable.shape)}, but the value "
                    f"has shape {np.shape(value)}."
                )
        for variable, value in zip(variables, weights, strict=True):
            variable.assign(value)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """With `use_ema`, replaces the weights by their moving averages."""
        if not self.use_ema:
            return
        wanted = {id(models.tf_variable(variable)) for variable in var_list}
        for variable, average in self.averages():
            if id(models.tf_variable(variable)) in wanted:
                variable.assign(average)

    # ------------------------------------------------------------ files

    def save_own_variables(self, store: Any) -> None:
        """Saves Keras' variables by position and the curvature's by name."""
        for i, variable in enumerate(super().variables):
            store[str(i)] = variable.numpy()
        for name, variable in self._store.named_variables().items():
            store[_STATE + _escaped(name)] = variable.numpy()
        for name, variable in self._hyper.variables_by_name().items():
            store[_HYPER + name] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Restores them; what is made later is set when it is made."""
        keys = set(store.keys())
        model = self._working.model and self._working.model.model
        if not self.built and getattr(model, "built", False):
            super().build(model.trainable_variables)  # As it was when it was saved.
        own = super().variables
        saved = sum(key.isdigit() for key in keys)
        is_kfac = any(key.startswith((_STATE, _HYPER)) for key in keys)
        if saved != len(own) or not is_kfac:
            warnings.warn(
                f"Skipping the state of {self.name}, since it was saved by another "
                f"optimizer or with other options: the file holds {saved} variables "
                f"of Keras' where {len(own)} are expected, and "
                + ("some" if is_kfac else "none")
                + " of K-FAC."
            )
            return
        for i, variable in enumerate(own):
            variable.assign(store[str(i)])
        hyper = self._hyper.variables_by_name()
        for key in keys:
            if key.startswith(_HYPER) and key.removeprefix(_HYPER) in hyper:
                hyper[key.removeprefix(_HYPER)].assign(store[key])
        values = {
            _unescaped(key.removeprefix(_STATE)): np.asarray(store[key])
            for key in sorted(keys)
            if key.startswith(_STATE)
        }
        self._store.load(values)

    def set_loaded_weights(self) -> None:
        """Sets what `set_weights` was given before there were variables for it."""
        working = self._working
        if working.loaded_weights is not None:
            weights, working.loaded_weights = working.loaded_weights, None
            self.set_weights(weights)

    # ------------------------------------------------------------ configuration

    def get_config(self) -> dict[str, Any]:
        """Configuration with the current hyper-parameters; not the model."""
        config = arguments.config_of(self._options)
        config |= self._hyper.numbers()
        config |= {
            "name": self.name,
            "seed": self._seed,
            "strict": self._strict,
            "loss": arguments.serialize_loss(self._loss),
            "loss_weights": self._loss_weights,
            "fisher_approx": self._fisher_approx,
            "register_losses": _serialized_callable(self._register_losses),
            "learning_rate": self._serialized_learning_rate(),
        }
        if self._fallback is not None:
            rate = config["learning_rate"]
            number = rate if isinstance(rate, float) else None
            config["fallback"] = self._fallback.config(number)
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> Any:
        """The optimizer of a configuration; call `register_layers` on it."""
        config = dict(config)
        with keras.saving.CustomObjectScope(custom_objects or {}):
            for name in ("fallback", "register_losses"):
                if isinstance(config.get(name), Mapping):
                    config[name] = keras.saving.deserialize_keras_object(config[name])
            return cls(**config)

    def _serialized_learning_rate(self) -> Any:
        if self._options["learning_rate"] is None:
            return None
        rate = self.configured_learning_rate
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            return keras.optimizers.schedules.serialize(rate)
        if callable(rate) and not isinstance(rate, KerasVariable):
            if not option_checks.is_symbolic(self._options["learning_rate"]):
                return _serialized_callable(rate)
            rate = rate()
        return float(keras.ops.convert_to_numpy(rate))


def _serialized_callable(function: Any) -> Any:
    if function is None:
        return None
    name = keras.saving.get_registered_name(function)
    if keras.saving.get_registered_object(name) is None:
        warnings.warn(
            f"{function!r} is not part of the saved configuration of Kfac, for it is "
            "not registered; decorate it with keras.saving.register_keras_serializable."
        )
        return None
    return keras.saving.serialize_keras_object(function)


def _escaped(name: str) -> str:
    # HDF5 would make groups of "/".
    return name.replace("/", "|")


def _unescaped(key: str) -> str:
    return key.replace("|", "/")
