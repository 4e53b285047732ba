"""Looking at `Kfac` and changing its hyper-parameters while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from kfac.python.keras import arguments, option_checks, step_watch
from kfac.python.keras.batches import Batch
from kfac.python.keras.hyperparameters import reassigned
from kfac.python.keras.option_checks import MUTABLE
from kfac.python.keras.private_keras import KerasVariable
from kfac.python.ops import report

_REPORTED = {
    "damping": "kfac/damping",
    "rho": "kfac/rho",
    "learning_rate": "kfac/qmodel_learning_rate",
    "momentum": "kfac/qmodel_momentum",
    "update_norm": step_watch.UPDATE_NORM,
    "cosine": step_watch.COSINE,
    "rejected_steps": step_watch.REJECTED_STEPS,
}


class AccessMixin:
    """The part of `Kfac` that shows and changes values."""

    @property
    def name(self) -> str:
        """Name of the optimizer; may be changed until its variables are made."""
        return self._name

    @name.setter
    def name(self, value: str) -> None:
        store = self.__dict__.get("_store")
        if store is not None and store.named_variables():
            raise ValueError(
                f"The name of {self._name!r} cannot be changed after the variables are "
                "created."
            )
        self._name = value

    @property
    def layers(self) -> Any:
        """The latest layer collection, or None before the model is registered."""
        inner = self._inner()
        return None if inner is None else inner.layers

    @property
    def optimizer(self) -> Any:
        """The graph optimizer of the latest trace.

        Raises:
          ValueError: the model, its loss or the shape of its inputs is not known yet.
        """
        if self._inner() is None:
            self._register_now(None)
        return self._inner()

    def _inner(self) -> Any:
        working = self._working
        if working.traced is not None:
            return working.traced
        prototypes = list(working.prototypes.values())
        return prototypes[-1].traced if prototypes else None

    def _register_now(self, x: Any) -> None:
        """Makes all state before the first step."""
        model = self._known_model().model
        self._registrar()
        if self._needs_targets and self._recorder.specs is None:
            raise ValueError(
                "estimation_mode='empirical' takes statistics from targets, and none "
                "have been seen yet; train for a step first."
            )
        if x is not None and self._recorder.specs is None:
            batch = Batch(x, None).as_tensors()
            if not getattr(model, "built", True):
                model(batch.x, training=False)
            self._recorder.specs = batch.specs()
        if self._specs() is None:
            raise ValueError(
                "The shapes of the model's inputs are not known yet: pass a batch of "
                "inputs, optimizer.explain(x), or train for a step."
            )
        self.build(model.trainable_variables)

    def explain(
        self, x: Any = None, print_fn: Callable[[str], Any] | None = print
    ) -> list[report.Row]:
        """Tells how every trainable variable is covered, also before training.

        Args:
          x: inputs, for models that do not know the shape of theirs.
          print_fn: gets the table as text; None for no printing.

        Returns:
          One row a parameter group.

        Raises:
          ValueError: the model, its loss or the shape of its inputs is not known.
        """
        prototypes = self._working.prototypes
        if x is not None or not prototypes:
            self._register_now(x)
        rows = list(prototypes.values())[-1].rows
        if print_fn is not None:
            print_fn(report.format_table(rows))
        return rows

    # ------------------------------------------------------------ hyper-parameters

    @property
    def mutable_hyperparameters(self) -> frozenset[str]:
        """Names of the hyper-parameters that can be assigned while training."""
        return arguments.mutable_names(self._options)

    @property
    def learning_rate(self) -> Any:
        """The learning rate: a variable, or a schedule's current value.

        With a quadratic-model momentum it is what the model chose in the last step.
        """
        if not self._has_learning_rate():
            chosen = self.state_variable(_REPORTED["learning_rate"])
            if chosen is not None:
                return chosen
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if not self._has_learning_rate():
            raise AttributeError(
                "learning_rate cannot be set: the quadratic model chooses it "
                f"(momentum_type={self._options['momentum_type']!r})."
            )
        configured = self.configured_learning_rate
        given = self._options["learning_rate"]
        if isinstance(given, (tf.Variable, KerasVariable)):
            configured = given
        elif option_checks.is_symbolic(given):
            raise AttributeError(
                "Can't set attribute: learning_rate. It was configured as a tensor."
            )
        elif callable(value) or callable(given):
            keras.optimizers.Optimizer.learning_rate.fset(self, value)
            return
        otherwise = "Pass tensors and variables to the constructor."
        configured.assign(reassigned("learning_rate", value, otherwise))

    @property
    def lr(self) -> Any:
        """Alias of `learning_rate`."""
        return self.learning_rate

    @lr.setter
    def lr(self, value: Any) -> None:
        self.learning_rate = value

    def _has_learning_rate(self) -> bool:
        options = self.__dict__.get("_options")
        return options is None or not arguments.uses_quadratic_model(options)

    @property
    def invert_every(self) -> int:
        """Steps between updates of the inverses."""
        return self._options["invert_every"]

    def state_variable_names(self) -> list[str]:
        """Names of the curvature's state, in the order of its creation."""
        return list(self._store.named_variables())

    def state_variable(self, name: str) -> tf.Variable | None:
        """A variable of the curvature's state by its name, or None."""
        return self._store.named_variables().get(name)

    def scalars(self, as_tensors: bool = False) -> dict[str, Any]:
        """Current values of what a training curve may be interested in.

        Args:
          as_tensors: in the current graph; by default floats.

        Returns:
          "damping", "rho", "learning_rate", "momentum", "update_norm" and "cosine" (of
          the last `step`, 0 before any), "fallbacks" and "rejected_steps"; NaN where a
          value does not exist (yet).
        """
        values = {name: self._scalar(name) for name in _REPORTED}
        values["fallbacks"] = self.fallbacks
        if as_tensors:
            return {name: tf.convert_to_tensor(v) for name, v in values.items()}
        return {
            name: float(keras.ops.convert_to_numpy(value))
            for name, value in values.items()
        }

    def _scalar(self, name: str) -> Any:
        mutable = name in self.mutable_hyperparameters
        if mutable:
            return getattr(self, name)
        value = self.state_variable(_REPORTED[name])
        return float("nan") if value is None else value

    @property
    def fallbacks(self) -> Any:
        """How many updates of inverses met a matrix they could not handle, so far."""
        counts = [
            variable
            for name, variable in self._store.named_variables().items()
            if name.rpartition("/")[2] == "fallbacks"
        ]
        return tf.add_n(counts) if counts else tf.constant(0, tf.int64)

    def __getattr__(self, name: str) -> Any:
        # Only called where normal look-up fails.
        hyper = self.__dict__.get("_hyper")
        if name in MUTABLE and hyper is not None:
            if name in hyper:
                return hyper.read(name)
            chosen = self.state_variable(_REPORTED.get(name, ""))
            return self._options[name] if chosen is None else chosen
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        hyper = self.__dict__.get("_hyper")
        if hyper is not None and name in MUTABLE - {"learning_rate"}:
            if name not in hyper:
                raise AttributeError(
                    f"{name} cannot be changed: it is adapted by the optimizer or was "
                    "not configured. Mutable are "
                    f"{sorted(self.mutable_hyperparameters)}."
                )
            hyper.assign(name, value)
            return
        super().__setattr__(name, value)
