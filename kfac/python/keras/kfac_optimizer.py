"""`Kfac`: K-FAC as a Keras 3 optimizer."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from kfac.python.keras import arguments, models, private_keras, registration
from kfac.python.keras import fallback as fallback_lib
from kfac.python.keras.access import AccessMixin
from kfac.python.keras.batches import BatchRecorder
from kfac.python.keras.fit_hook import FitHook
from kfac.python.keras.hyperparameters import Hyperparameters
from kfac.python.keras.loops import LoopsMixin
from kfac.python.keras.option_checks import checked
from kfac.python.keras.persistence import PersistenceMixin
from kfac.python.keras.steps import StepsMixin
from kfac.python.keras.working import Working
from kfac.python.ops import state


@keras.saving.register_keras_serializable(package="kfac")
class Kfac(
    StepsMixin, LoopsMixin, AccessMixin, PersistenceMixin, private_keras.OptimizerHooks
):
    """Preconditions gradients with a Kronecker-factored curvature estimate.

        optimizer = kfac.keras.optimizers.Kfac(
            learning_rate=0.05, damping=0.01, model=model)
        model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
        model.fit(x, y, batch_size=512, epochs=5)

    The layers are found by scanning the model's forward pass, the loss is read from
    `compile`.  See `docs/keras.md` for choosing damping, learning rate and periods.

    Steps are of the real batch, whose statistics are taken in a forward pass of their
    own, where they are due.  With `gradient_accumulation_steps` statistics are taken
    from the last of the accumulated batches.

    Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate
    curvature", ICML 2015.

    Attributes:
      fallback: the Keras optimizer that trains what Kfac does not, or None.
    """

    def __init__(
        self,
        _sentinel: None = None,
        learning_rate: Any = None,
        damping: Any = None,
        model: Any = None,
        loss: Any = None,
        loss_weights: Any = None,
        fisher_approx: Mapping | Sequence | str | None = None,
        layer_collection: Any = None,
        adaptive: bool = False,
        train_batch: Any = None,
        name: str | None = None,
        seed: int | None = None,
        register_losses: Callable | None = None,
        strict: bool = False,
        fallback: Any = fallback_lib.GENERIC,
        **kfac_kwargs: Any,
    ):
        """Checks the arguments; the model is registered when training starts.

        Args:
          _sentinel: catches positional arguments.
          learning_rate: number, schedule, scalar tensor or variable; None with a
            quadratic-model momentum (`adaptive=True`), which chooses it itself.
          damping: multiple of the identity added to the curvature, in units of the
            loss: number, schedule, tensor or variable; only the start if adapted.
          model: Keras model, or any callable with `trainable_variables`.
          loss: overrides the loss given to `compile`.
          loss_weights: overrides the loss weights given to `compile`.
          fisher_approx: approximations by layer name, path or class, or a list with
            one entry a trainable layer, or one for all layers that have it; "kron"
            means "kron_indep" for layers used several times a case, and "fallback"
            leaves a layer to `fallback`. A layer with several groups of parameters
            has the approximation for those of them that can have it.
          layer_collection: not usable with a traced training step, see the error.
          adaptive: adapt damping, learning rate and momentum by the quadratic model.
          train_batch: accepted for compatibility; the batch of the step is used.
          name: of the optimizer.
          seed: of the sampled targets.
          register_losses: callable `(collection, outputs, batch)` that registers the
            predictive distribution of a custom loss; `batch` has `x`, `y` (which may
            be None) and `sample_weight`.
          strict: refuse variables that no layer pattern covers.
          fallback: what trains those variables: "generic" (a diagonal curvature) or a
            Keras optimizer, whose learning rate then follows this one's.
          **kfac_kwargs: see `kfac.python.keras.arguments.DEFAULTS`; among them
            `reject_bad_steps`: with adapted damping, undo a step after which the loss
            of its batch is higher or not finite (`updates=CurvatureUpdates(...)` and
            `adapt_damping=DampingAdaptation(...)` group the rarely used ones).

        Raises:
          ValueError: arguments are missing, unknown or contradict each other.
        """
        if _sentinel:
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
        given = {
            "adaptive": adaptive,
            "seed": seed,
            "strict": strict,
            "fisher_approx": fisher_approx,
            "register_losses": register_losses,
        }
        given = checked(given)
        loss = arguments.deserialize_loss(loss)
        arguments.check_loss(loss, loss_weights)
        learning_rate = arguments.schedule(learning_rate)
        damping = arguments.schedule(damping)
        options = arguments.resolve(
            learning_rate, damping, given["adaptive"], kfac_kwargs
        )
        options["train_batch"] = train_batch
        if train_batch is not None and options["adapt_damping"]:
            arguments.check_train_batch(train_batch, options["batch_size"])
        if model is not None:
            models.check(model)
        super().__init__(
            learning_rate=arguments.for_keras(options["learning_rate"]),
            name=name,
            **arguments.base_options(options),
        )
        # Not a dictionary, which would be tracked for checkpoints.
        self._options = types.MappingProxyType(options)
        self._seed = given["seed"]
        self._sample_seed = arguments.sample_seed(self._seed)
        self._loss = loss
        self._loss_weights = loss_weights
        self._fisher_approx = registration.serialize_fisher_approx(fisher_approx)
        self._register_losses = register_losses
        self._strict = given["strict"]
        mutable = arguments.mutable_names(options) - {"learning_rate"}
        self._hyper = Hyperparameters({key: options[key] for key in mutable})
        self._store = state.VariableStore(name="kfac_state")
        self._recorder = BatchRecorder()
        self._fit_hook = FitHook(self)
        self._working = Working()
        self._fallback = fallback_lib.make(fallback, options["learning_rate"])
        # As an attribute, Keras' files and checkpoints find it.
        self.fallback = self._fallback and self._fallback.optimizer
        if model is not None:
            self.register_model(model)
