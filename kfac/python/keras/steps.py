"""What `Kfac` does in a step: from gradients to moved weights, in any graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.keras import (
    arguments,
    batches,
    loss_check,
    models,
    registration,
    replica_gradients,
    step_watch,
)
from kfac.python.keras.prototype import Prototype
from kfac.python.keras.traced import TracedKfac
from kfac.python.ops import state, utils

# State of `Kfac` itself, beside that of the graph optimizer.
SAMPLE_SEED = "keras/sample_seed"
_SCOPE = "kfac"


class StepsMixin:
    """The part of `Kfac` that builds steps."""

    # The graph optimizer of a step; other natural-gradient methods have their own.
    _traced_class = TracedKfac

    # ------------------------------------------------------------ before a step

    def build(self, variables: Sequence[Any]) -> None:
        """Makes all state for training `variables`, where the model is known.

        May be called again with other variables: layers can be frozen, unfrozen, added
        and removed between fits.
        """
        variables = list(variables)
        with tf.init_scope():
            if not self.built:
                super().build(variables)
            else:
                new = [v for v in variables if not self.is_known(v)]
                self.add_trainable_variables(new)
            self._prepare(variables)

    def build_for(self, model: Any) -> None:
        """Makes all state for training a model, if the model has its variables."""
        if getattr(model, "built", True) and model.trainable_variables:
            self.build(model.trainable_variables)

    def apply(self, grads: Sequence, trainable_variables: Sequence | None = None):
        """Takes one step; statistics use the batch recorded for it.

        Args:
          grads: gradients of the mean loss; None for variables it does not depend on.
          trainable_variables: their variables; those of `build` by default.

        Raises:
          ValueError: the model, its loss or the batch is not known; the message says
            what to do.
        """
        working = self._working
        if trainable_variables is None:
            trainable_variables = self.trained_variables
        trainable_variables = list(trainable_variables)
        working.batch = self._taken_batch(trainable_variables)
        try:
            self.build(trainable_variables)
            self._check_loss(trainable_variables)
            super().apply(grads, trainable_variables)
        finally:
            working.batch = None

    def _taken_batch(self, variables: Sequence[Any]) -> batches.Batch:
        self._known_model()
        batch = self._recorder.take()
        if batch is None:
            self._check_owner(variables)
            raise ValueError(
                "Kfac has not seen the batch of this step. In fit and in loops that "
                "call model.compute_loss(x, y, y_pred) it does so by itself; in "
                "another loop call optimizer.show_batch(x, y) before applying "
                "gradients (in the same tf.function), or use optimizer.step(x, y)."
            )
        return batch

    def _check_owner(self, variables: Sequence[Any]) -> None:
        """Raises `ValueError` if no variable is the registered model's."""
        model = self._known_model().model
        if set(_key(variables)).isdisjoint(_key(model.trainable_variables)):
            raise ValueError(
                f"Kfac trains {getattr(model, 'name', type(model).__name__)!r}, but is "
                "given variables of another model. Make an optimizer for each model, "
                "or call optimizer.register_layers(model) before training the next one."
            )

    def _known_model(self) -> models.PureModel:
        if self._working.model is None:
            raise ValueError(
                "Kfac must know the model it trains: pass model= to the constructor, "
                "or call optimizer.register_layers(model), for instance after loading."
            )
        return self._working.model

    def _prepare(self, variables: Sequence[Any]) -> None:
        """Registers the model in a scratch graph, and makes the state."""
        working = self._working
        key = _key(variables)
        specs = self._specs()
        if key in working.prototypes or working.model is None or specs is None:
            return
        self._check_owner(variables)
        if utils.is_in_replica() and working.model.meets_replicas:
            raise ValueError(
                "A model with layers that sum over replicas (synchronized batch "
                "normalization) must be registered before replicas are traced: give it "
                "an Input, call optimizer.build_for(model) under strategy.scope(), and "
                "use another estimation_mode than 'empirical', which waits for targets."
            )
        is_stale = working.stale_state(working.model.state_names())
        if is_stale is not None:
            self._store.forget(is_stale)
            working.forget_traces()
        registrar = self._registrar()
        left = registrar.left_to_fallback()
        if left and self._fallback is None:
            raise ValueError(
                'fisher_approx says "fallback" for some layers; pass fallback=, a '
                "Keras optimizer that trains them."
            )
        name = None
        if self.fallback is not None and not self._strict:
            # (Strict means that generic variables are an error; the step raises it.)
            name = type(self.fallback).__name__
        prototype = Prototype(
            self._make_traced,
            self._in_force,
            working.model.paths(),
            variables,
            specs,
            left,
            name,
        )
        if self._fallback is not None:
            refs = prototype.fallback_refs
            self._fallback.build(
                [v for v in variables if models.tf_variable(v).ref() in refs]
            )
        working.prototypes[key] = prototype
        self.set_loaded_weights()
        self._report_unused_state()

    def _specs(self) -> batches.Batch | None:
        """What batches look like, from the last one or from the model."""
        working = self._working
        if working.batch is not None:
            return working.batch.as_tensors().specs()
        if self._recorder.specs is not None:
            return self._recorder.specs
        if self._needs_targets:
            return None
        inputs = None if working.model is None else working.model.input_specs()
        return None if inputs is None else batches.Batch(inputs, None)

    @property
    def _needs_targets(self) -> bool:
        """Whether the model cannot be registered before a batch has been seen."""
        return self._options["estimation_mode"] == "empirical"

    def recheck_loss(self) -> None:
        """Lets the next step compare the declared with the real loss."""
        self._working.loss_is_checked = False

    def _check_loss(self, variables: Sequence[Any]) -> None:
        """Compares the declared with the real loss, at the first step."""
        working = self._working
        model = working.model
        prototype = working.prototypes.get(_key(variables))
        if working.loss_is_checked or prototype is None or prototype.outputs is None:
            return
        working.loss_is_checked = True
        registrar = self._registrar()
        if not registrar.reads_loss or not model.is_compiled:
            return
        if model.has_own_train_step:
            warnings.warn(
                f"{type(model.model).__name__} overrides train_step. The curvature is "
                "that of the declared loss on the batch; if the step minimises "
                "something else, pass register_losses= to Kfac."
            )
        with tf.init_scope():
            declared = registrar.read_losses(prototype.outputs)
            loss_check.check(model, declared, prototype.outputs, self._specs())

    def _report_unused_state(self) -> None:
        unused = self._store.not_yet_loaded()
        if unused:
            warnings.warn(
                f"{len(unused)} variables of the loaded state of Kfac have no "
                f"counterpart in this model, for instance {unused[:3]}. They are kept "
                "in case their layers are trained later."
            )

    def _registrar(self) -> registration.Registrar:
        working = self._working
        if working.approximations is None:
            working.approximations = registration.approximations(
                working.model.model, self._fisher_approx
            )
        return registration.Registrar(
            working.model, working.approximations, self._register_losses
        )

    # ------------------------------------------------------------ the step

    def averaged(self, grads: list, variables: list) -> list:
        """Gradients of the mean loss of all replicas' cases."""
        working = self._working
        batch = working.batch.as_tensors()
        means = replica_gradients.averaged(grads, batch)
        is_unsure = working.loss_is_own and self._registrar().reads_loss
        if not (is_unsure and utils.is_replicated()):
            return means
        is_first = tf.equal(self.step_count, 0)
        checked = replica_gradients.check_scale(
            means, variables, working.model, batch, is_first
        )
        with tf.control_dependencies([checked]):
            return [tf.identity(mean) for mean in means]

    def take_step(self, grads: list, variables: list) -> None:
        """Builds a step in the current graph; executes one eagerly."""
        batch = self._working.batch.as_tensors()
        if not tf.executing_eagerly():
            self._update(grads, variables, batch)
            return
        updates = self._working.eager_updates
        # The loss is kept, since the key has its id.
        loss = self._working.model.declared_loss
        key = (*_key(variables), id(loss))
        if key not in updates:

            def update(grads, x, y, sample_weight):
                self._update(grads, variables, batches.Batch(x, y, sample_weight))

            function = tf.function(update, autograph=False, reduce_retracing=True)
            updates[key] = (function, loss)
        updates[key][0](grads, *batch.parts())

    def _update(self, grads: list, variables: list, batch: batches.Batch) -> None:
        """A step of burn-in or of training."""
        if not self._options["num_burnin_steps"]:
            self._train(grads, variables, batch)
            return
        with self._in_force():
            count = state.get_variable(f"{_SCOPE}/burnin_counter", (), tf.int64)

        def burn_in():
            with self._in_force():
                kept, _ = self._split(variables)
                self._make_traced([variables[i] for i in kept], batch).burn_in()
                self.forget_step()

        utils.smart_cond(
            count < self._options["num_burnin_steps"],
            burn_in,
            lambda: self._train(grads, variables, batch),
        )

    def _train(self, grads: list, variables: list, batch: batches.Batch) -> None:
        """A step of training."""
        kept, left = self._split(variables)
        self._hyper.refresh(self.iterations)
        with self._in_force():
            traced = None
            if kept:
                traced = self._make_traced([variables[i] for i in kept], batch)
                self._working.traced = traced
                if self._fit_hook.updates_curvature:
                    traced.use_curvature_of(self._prototype_for(batch).traced)
                else:
                    traced.gradients = [grads[i] for i in kept]
                    traced.update_curvature()
            watch = self._watch(traced, grads, variables, batch)
            self.decay_weights(variables)
            if kept:
                traced.apply_gradients(
                    [(grads[i], models.tf_variable(variables[i])) for i in kept]
                )
            if left:
                replicas = utils.get_num_replicas()  # Whose gradients Keras sums.
                self._fallback.apply(
                    [grads[i] / replicas for i in left],
                    [variables[i] for i in left],
                    self._rate(),
                )
            watch.finish()

    # ------------------------------------------------------------ apart from steps

    @property
    def can_separate_curvature(self) -> bool:
        """Whether `update_curvature` can do what a step leaves out."""
        return (
            self._traced_class is TracedKfac
            and not self._options["num_burnin_steps"]
            and not self.gradient_accumulation_steps
        )

    def update_curvature(self, x: Any, y: Any, sample_weight: Any = None) -> None:
        """Updates the curvature on a batch, where it is due, apart from the step.

        Runs a `tf.function` of its own. The step that follows must be built while
        somebody says that it need not do that, see `fit_hook`.
        """
        batch = batches.Batch(x, y, sample_weight).as_tensors()
        working = self._working
        prototype = self._prototype_for(batch)
        if prototype.traced is None:
            return
        loss = working.model.declared_loss
        key = ("curvature", id(prototype), id(loss))
        if key not in working.eager_updates:

            def update(x, y, sample_weight):
                with self._in_force():
                    self._hyper.refresh(self.iterations)
                    self._make_traced(
                        prototype.kept, batches.Batch(x, y, sample_weight)
                    ).update_curvature()

            function = tf.function(update, autograph=False, reduce_retracing=True)
            working.eager_updates[key] = (function, loss)
        working.eager_updates[key][0](*batch.parts())

    def _prototype_for(self, batch: batches.Batch) -> Prototype:
        """That of the present trainable variables; makes what is not made yet."""
        working = self._working
        model = self._known_model().model
        if not getattr(model, "built", True):
            model(batch.x, training=False)
        before, working.batch = working.batch, batch  # Its shapes are known.
        try:
            self.build(model.trainable_variables)
        finally:
            working.batch = before
        return working.prototypes[_key(model.trainable_variables)]

    def _watch(self, traced, grads, variables, batch) -> step_watch.StepWatch:
        """Looks at the step from outside: undoes and measures it, if asked to."""
        rejects = self._options["reject_bad_steps"] and traced is not None
        also = []
        if rejects:
            also = traced.velocities()
            if self._fallback is not None:
                also += self._fallback.optimizer.variables
        return step_watch.StepWatch(
            variables,
            also,
            loss=(lambda: traced.mean_loss(batch)) if rejects else None,
            on_rejection=traced.raise_damping if rejects else None,
            gradients=grads if self._working.measures else None,
        )

    def _rate(self) -> Any:
        return None if self._options["learning_rate"] is None else self.learning_rate

    def _split(self, variables: Sequence[Any]) -> tuple[list[int], list[int]]:
        """Positions of the variables that Kfac and that the fallback trains."""
        left_out: set[Any] = set()
        for prototype in self._working.prototypes.values():
            left_out |= prototype.fallback_refs
        is_left = [models.tf_variable(v).ref() in left_out for v in variables]
        positions = range(len(variables))
        return (
            [i for i in positions if not is_left[i]],
            [i for i in positions if is_left[i]],
        )

    @contextlib.contextmanager
    def _in_force(self) -> Iterator[None]:
        """State and parameters' names are found in this context."""
        with (
            self._store.as_default(),
            state.parameter_names(self._working.model.state_names()),
        ):
            yield

    def _make_traced(
        self, variables: Sequence[Any], batch: batches.Batch
    ) -> TracedKfac:
        """The graph optimizer for these variables, in the current graph.

        Must be called with the state in force.
        """
        options = self._options
        current = {name: self._hyper.read(name) for name in self._hyper.names()}
        current["learning_rate"] = self._rate()
        fixed = {
            key: value
            for key, value in options.items()
            if key not in current and key not in arguments.NOT_FORWARDED
        }
        if options["adapt_damping"]:
            own = options["loss_fn"]
            fixed |= {
                "loss_fn": self._loss_of if own is None else _on_pairs(own),
                "train_batch": batch,
                "use_passed_loss": False,
            }
        fixed |= arguments.placement(options)
        step_watch.create_state()
        return self._traced_class(
            self._working.model,
            self._registrar(),
            batch,
            sample_seed=self._sample_seed_variable().read_value(),
            strict=self._strict,
            var_list=[models.tf_variable(v) for v in variables],
            name=_SCOPE,
            **fixed,
            **current,
        )

    def _loss_of(self, batch: batches.Batch) -> tf.Tensor:
        return self._working.model.loss(batch)

    def _sample_seed_variable(self) -> tf.Variable:
        """The seed of sampled targets; state, so that a restart goes on with it."""
        return state.get_variable(SAMPLE_SEED, (), tf.int32, self._sample_seed)


def _key(variables: Sequence[Any]) -> tuple:
    return tuple(id(models.tf_variable(variable)) for variable in variables)


def _on_pairs(loss_fn: Callable) -> Callable:
    """The user's function of `(inputs, targets)` as one of a batch."""
    return lambda batch: loss_fn((batch.x, batch.y))
