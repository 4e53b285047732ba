"""Training without `fit`: showing the model and the batch, and whole steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.keras import arguments, batches, models


class LoopsMixin:
    """The part of `Kfac` for training loops of one's own."""

    def register_model(self, model: Any) -> None:
        """Tells the optimizer which model it trains.

        Raises:
          ValueError: it is neither a Keras model nor a callable with
            `trainable_variables`.
        """
        working = self._working
        working.model = models.PureModel(model, self._loss, self._loss_weights)
        working.approximations = None
        working.loss_is_checked = False
        self._recorder.attach(model)
        self._fit_hook.attach(model)

    def register_layers(
        self, model: Any = None, loss: Any = None, layer_collection: Any = None
    ) -> None:
        """Registers a model; makes the curvature's state if its inputs are known.

        Needed after loading, since an optimizer's configuration does not hold its
        model.

        Args:
          model: the model; the one that is registered already by default.
          loss: overrides the loss given to `compile`.
          layer_collection: not usable with a traced training step, see the error.

        Raises:
          ValueError: there is no model, or no loss.
        """
        if layer_collection is not None:
            raise ValueError(
                "A LayerCollection holds tensors of one graph, and Keras traces a new "
                "one for every training function. Pass the model and its loss."
            )
        if loss is not None:
            self._loss = loss
        if model is None and self._working.model is not None:
            model = self._working.model.model
        if model is None:
            raise ValueError("Kfac must be told: provide a model with a loss.")
        self.register_model(model)
        self._registrar()
        self.build_for(model)

    def register_train_batch(self, train_batch: Any, batch_size: Any = None) -> None:
        """Accepted for compatibility: the batch of every step is seen anyway.

        Args:
          train_batch: tuple of (structures of) tensors.
          batch_size: by default the static size of the first tensor.

        Raises:
          ValueError: see the messages.
        """
        if batch_size is None:
            batch_size = self._options["batch_size"]
        batch_size = arguments.check_train_batch(train_batch, batch_size)
        self._options = type(self._options)(
            {**self._options, "train_batch": train_batch, "batch_size": batch_size}
        )

    def show_batch(self, x: Any, y: Any, sample_weight: Any = None) -> None:
        """Shows the batch of this step, in loops that do not call `compute_loss`.

        Under `tf.distribute` the loss of a replica is its mean over the replica's
        cases, divided by the number of replicas. Keras' losses do that by themselves;
        others have to be divided in the loop. The first step compares the gradients
        with the declared loss's, and fails if they are that many times too large.
        """
        self._working.loss_is_own = True
        self._recorder.show(x, y, sample_weight)

    def step(self, x: Any, y: Any, sample_weight: Any = None) -> dict[str, tf.Tensor]:
        """Forward pass, backward pass, curvature and update on one batch.

        Called eagerly it runs a `tf.function` of its own; it can also be called in
        one. (With `jit_compile=True` there, XLA compiles the factorisations, too, which
        takes seconds for each factor on a CPU.)

        Args:
          x: inputs.
          y: targets.
          sample_weight: weights of the cases.

        Returns:
          Scalars: "loss" (before the update), "damping", "rho" (last ratio of actual
          to predicted change), "learning_rate", "momentum", "update_norm" (of all
          parameters), "cosine" (between the update and the negative gradient),
          "fallbacks" (of inverses, so far), and "rejected_steps" (so far).
        """
        self._known_model()
        if not tf.executing_eagerly():
            return self._build_step(x, y, sample_weight)
        working = self._working
        loss = working.model.declared_loss  # Another one after compiling again.
        if working.step_function is None or working.step_function[1] is not loss:
            function = tf.function(
                self._build_step, autograph=False, reduce_retracing=True
            )
            working.step_function = (function, loss)
        batch = batches.Batch(x, y, sample_weight).as_tensors()
        # Before it is traced: a trace that makes variables and fails leaves a function
        # that can make none.
        self._prototype_for(batch)
        return working.step_function[0](*batch.parts())

    def _build_step(self, x: Any, y: Any, sample_weight: Any) -> dict[str, tf.Tensor]:
        working = self._working
        batch = batches.Batch(x, y, sample_weight)
        with tf.GradientTape() as tape:
            loss = working.model.compute_loss(batch, working.model.call(x))
            scaled = self.scale_loss(loss)
        variables = working.model.model.trainable_variables
        gradients = tape.gradient(scaled, variables)
        self._recorder.show(x, y, sample_weight)
        working.measures = True
        try:
            self.apply(gradients, variables)
        finally:
            working.measures = False
        # Undoes what Keras divides losses by.
        loss *= models.num_replicas()
        return {"loss": loss, **self.scalars(as_tensors=True)}

    def minimize(
        self,
        loss: Any,
        var_list: Sequence[Any] | Callable[[], Sequence[Any]] | None = None,
        tape: tf.GradientTape | None = None,
    ) -> Any:
        """Computes gradients and applies them; the batch must be shown as for `apply`.

        Args:
          loss: function without arguments that computes the loss, or the loss itself
            together with the tape it was computed under.
          var_list: the variables, or a function that returns them; those of the model
            by default.
          tape: see `loss`.

        Returns:
          The count of iterations.

        Raises:
          ValueError: the loss is a tensor and there is no tape.
        """
        if callable(loss):
            with tf.GradientTape() as tape:
                loss = loss()
        elif tape is None:
            raise ValueError(
                "minimize needs a function that computes the loss, or the loss and the "
                "tape: minimize(loss, variables, tape=tape)."
            )
        if callable(var_list):
            var_list = var_list()
        if var_list is None:
            var_list = self._known_model().model.trainable_variables
        variables = list(var_list)
        with tape:
            loss = self.scale_loss(loss)
        values = [models.tf_variable(variable) for variable in variables]
        return self.apply_gradients(
            zip(tape.gradient(loss, values), variables, strict=True)
        )

    def apply_gradients(
        self, grads_and_vars: Iterable[tuple], name: str | None = None
    ) -> Any:
        """As `apply`, for pairs; `name` is accepted for compatibility."""
        del name
        return super().apply_gradients(grads_and_vars)

    def get_updates(self, loss: Any, params: Any) -> None:
        """Not available: Keras 3 has no symbolic training function."""
        raise NotImplementedError(
            "get_updates belongs to Keras' graph mode, which Keras 3 has not. Use fit, "
            "optimizer.step(x, y) or optimizer.minimize(loss, variables, tape=tape)."
        )

    def get_gradients(self, loss: Any, params: Any) -> None:
        """Not available: use a `tf.GradientTape`."""
        raise NotImplementedError(
            "get_gradients belongs to Keras' graph mode, which Keras 3 has not. Use "
            "tf.GradientTape, or optimizer.step(x, y)."
        )
