"""`Kfac`: K-FAC as a Keras 3 optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kfac.python.keras import arguments, models, traced
from kfac.python.keras.hyperparameters import MUTABLE, Hyperparameters
from kfac.python.keras.registration import Registrar, compiled_loss_weights
from kfac.python.ops import state


@keras.saving.register_keras_serializable(package="kfac")
class Kfac(keras.optimizers.Optimizer):
    """Preconditions gradients with a Kronecker-factored curvature estimate.

        optimizer = kfac.keras.optimizers.Kfac(
            learning_rate=0.05, damping=0.01, model=model)
        model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
        model.fit(x, y, batch_size=512, epochs=5)

    The layers are found by scanning the model's forward pass, the loss is read from
    `compile`.  See `docs/keras.md` for choosing damping, learning rate and periods.

    Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate
    curvature", ICML 2015.
    """

    def __init__(
        self,
        _sentinel: None = None,
        learning_rate: Any = None,
        damping: Any = None,
        model: Any = None,
        loss: Any = None,
        loss_weights: Any = None,
        fisher_approx: Mapping | Sequence | None = None,
        layer_collection: Any = None,
        adaptive: bool = False,
        train_batch: Any = None,
        name: str | None = None,
        seed: int | None = None,
        register_losses: Callable | None = None,
        strict: bool = False,
        **kfac_kwargs: Any,
    ):
        """Checks the arguments; the model is registered at the first step.

        Args:
          _sentinel: catches positional arguments.
          learning_rate: number, schedule, scalar tensor or variable; None with a
            quadratic-model momentum (`adaptive=True`), which chooses it itself.
          damping: multiple of the identity added to the curvature, in units of the
            loss: number, schedule, tensor or variable; only the start if adapted.
          model: Keras model, or any callable with `trainable_variables`.
          loss: overrides the loss given to `compile`.
          loss_weights: overrides the loss weights given to `compile`.
          fisher_approx: approximations by layer name or class, or a list.
          layer_collection: not usable with a traced training step, see below.
          adaptive: adapt damping, learning rate and momentum by the quadratic model.
          train_batch: accepted for compatibility; the batch of the step is used.
          name: of the optimizer.
          seed: of the sampled targets.
          register_losses: callable `(collection, outputs, batch)` that registers the
            predictive distribution of a custom loss.
          strict: refuse variables that no layer pattern covers.
          **kfac_kwargs: see `kfac.python.keras.arguments.DEFAULTS`.

        Raises:
          ValueError: arguments are missing, unknown or contradict each other.
        """
        if _sentinel is not None:
            raise ValueError(
                "Do not pass positional arguments to Kfac; for instance write "
                "Kfac(learning_rate=0.05, damping=0.01, model=model)."
            )
        if layer_collection is not None:
            raise ValueError(
                "A LayerCollection holds tensors of one graph, and Keras traces a new "
                "one for every training function. Pass model=, fisher_approx= and "
                "register_losses= instead, or use kfac.PeriodicInvCovUpdateKfacOpt."
            )
        options = arguments.resolve(learning_rate, damping, adaptive, kfac_kwargs)
        base = arguments.base_options(options)
        given_rate = options["learning_rate"]
        super().__init__(
            learning_rate=arguments.for_keras(given_rate), name=name, **base
        )
        self._options = options
        self._seed = seed
        self._sample_seed = arguments.sample_seed(seed)
        self._loss = loss
        self._loss_weights = loss_weights
        self._fisher_approx = arguments.serialize_fisher_approx(fisher_approx)
        self._register_losses = register_losses
        self._strict = strict
        self._hyper = Hyperparameters(
            {
                key: options[key]
                for key in arguments.mutable_names(options) - {"learning_rate"}
            }
        )
        self._store = state.VariableStore(name="kfac_state")
        self._recorder = models.BatchRecorder()
        self._model: models.PureModel | None = None
        self._eager_update: Callable | None = None
        self._traced: traced.TracedKfac | None = None
        self._batch: models.Batch | None = None
        if model is not None:
            self.register_model(model)

    # ------------------------------------------------------------ model and batch

    def register_model(self, model: Any) -> None:
        """Tells the optimizer which model it trains, before the first step.

        Raises:
          ValueError: it is neither a Keras model nor a callable with
            `trainable_variables`.
        """
        self._model = models.PureModel(model)
        self._recorder.attach(model)

    def show_batch(self, x: Any, y: Any, sample_weight: Any = None) -> None:
        """Shows the batch of this step, in loops that do not call `compute_loss`."""
        self._recorder.show(x, y, sample_weight)

    # ------------------------------------------------------------ the step

    def apply(self, grads: Sequence, trainable_variables: Sequence | None = None):
        """Takes one step; statistics use the batch recorded for it."""
        self._batch = self._taken_batch()
        try:
            super().apply(grads, trainable_variables)
        finally:
            self._batch = None

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        # Overridden rather than `update_step`, which sees one variable at a time:
        # preconditioning, clipping and the quadratic model need all gradients.
        variables = [models.tf_variable(v) for v in trainable_variables]
        batch = self._batch.as_tensors()
        if not tf.executing_eagerly():
            self._update(grads, variables, batch)
            return
        if self._eager_update is None:
            self._eager_update = tf.function(
                lambda grads, x, y, sample_weight: self._update(
                    grads, variables, models.Batch(x, y, sample_weight)
                ),
                autograph=False,
                reduce_retracing=True,
            )
        self._eager_update(grads, *batch.parts())

    def _update(self, grads, variables, batch: models.Batch) -> None:
        """Builds one step in the current graph."""
        with (
            self._store.as_default(),
            state.parameter_names(self._model.paths()),
        ):
            self._traced = self._make_traced(variables, batch)
            self._traced.update_curvature()
            self._traced.apply_gradients(list(zip(grads, variables, strict=True)))

    def _make_traced(self, variables, batch) -> traced.TracedKfac:
        options = self._options
        current = {
            name: self._hyper.current(name, self.iterations)
            for name in self._hyper.names()
        }
        if options["learning_rate"] is not None:
            current["learning_rate"] = self._get_current_learning_rate()
        fixed = {
            key: value
            for key, value in options.items()
            if key not in current and key not in arguments.NOT_FORWARDED
        }
        if options["adapt_damping"]:
            fixed |= {
                "loss_fn": traced.loss_function(self._model, self._compute_loss),
                "train_batch": batch,
                "use_passed_loss": False,
            }
        return traced.TracedKfac(
            self._model,
            self._registrar(),
            batch,
            sample_seed=self._sample_seed,
            strict=self._strict,
            var_list=variables,
            name="kfac",
            **fixed,
            **current,
        )

    def _registrar(self) -> Registrar:
        model = self._model.model
        loss = self._loss if self._loss is not None else getattr(model, "loss", None)
        weights = self._loss_weights
        if weights is None:
            weights = compiled_loss_weights(model)
        if loss is None and self._register_losses is None:
            raise ValueError(
                "Kfac must know the loss: compile the model with one, or pass loss= or "
                "register_losses= to the optimizer."
            )
        return Registrar(
            self._model, loss, weights, self._fisher_approx, self._register_losses
        )

    def _compute_loss(self, x, y, y_pred, sample_weight):
        return self._model.model.compute_loss(x, y, y_pred, sample_weight)

    def _taken_batch(self) -> models.Batch:
        if self._model is None:
            raise ValueError(
                "Kfac must know the model it trains: pass model= to the constructor, "
                "or call optimizer.register_model(model)."
            )
        batch = self._recorder.take()
        if batch is None:
            raise ValueError(
                "Kfac has not seen the batch of this step. In fit and in loops that "
                "call model.compute_loss(x, y, y_pred) it does so by itself; in another "
                "loop call optimizer.show_batch(x, y) before applying gradients, or "
                "use optimizer.step(x, y)."
            )
        return batch

    # ------------------------------------------------------------ hyper-parameters

    @property
    def mutable_hyperparameters(self) -> frozenset[str]:
        """Names of the hyper-parameters that can be assigned while training."""
        return arguments.mutable_names(self._options)

    @property
    def lr(self) -> Any:
        """Alias of `learning_rate`."""
        return self.learning_rate

    @lr.setter
    def lr(self, value: Any) -> None:
        self.learning_rate = value

    def __getattr__(self, name: str) -> Any:
        # Only called where normal look-up fails.
        hyper = self.__dict__.get("_hyper")
        if name in MUTABLE and hyper is not None and name in hyper:
            return hyper.read(name)
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        hyper = self.__dict__.get("_hyper")
        if hyper is not None and name in MUTABLE - {"learning_rate"}:
            if name not in hyper:
                raise AttributeError(
                    f"{name} cannot be changed: it is adapted by the optimizer or was "
                    f"not configured. Mutable are {sorted(self.mutable_hyperparameters)}."
                )
            hyper.assign(name, value)
            return
        super().__setattr__(name, value)

    # ------------------------------------------------------------ saving

    def save_own_variables(self, store: Any) -> None:
        """Saves the base variables by position and the curvature state by name."""
        super().save_own_variables(store)
        for name, variable in self._store.named_variables().items():
            store[_escaped(name)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Restores them; what the first step will create is set when it does."""
        keys = set(store.keys())
        own = [str(i) for i in range(len(self.variables)) if str(i) in keys]
        for i in own:
            self.variables[int(i)].assign(store[i])
        self._store.load(
            {_unescaped(k): np.asarray(store[k]) for k in keys if not k.isdigit()}
        )

    def get_config(self) -> dict[str, Any]:
        """Configuration with the current hyper-parameters; not the model."""
        config = arguments.config_of(self._options)
        config |= self._hyper.numbers()
        config["name"] = self.name
        config["seed"] = self._seed
        config["strict"] = self._strict
        config["loss"] = arguments.serialize_loss(self._loss)
        config["loss_weights"] = self._loss_weights
        config["fisher_approx"] = self._fisher_approx
        if self._options["learning_rate"] is not None:
            config["learning_rate"] = self._serialized_learning_rate()
        return config

    def _serialized_learning_rate(self) -> Any:
        rate = self._learning_rate
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            return keras.optimizers.schedules.serialize(rate)
        if callable(rate) and not isinstance(rate, keras.Variable):
            warnings.warn("A callable learning rate is not part of the saved config.")
            return None
        return float(keras.ops.convert_to_numpy(rate))


def _escaped(name: str) -> str:
    # HDF5 would make groups of "/".
    return "state|" + name.replace("/", "|")


def _unescaped(key: str) -> str:
    return key.removeprefix("state|").replace("|", "/")
