"""Everything this package uses of Keras that Keras does not promise to keep.

Written for Keras 3.6 to 3.15.  Each function or method says what it relies on and why
there is no public way; nothing else in `kfac` touches a member of Keras that begins
with an underscore.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from kfac.python.ops import utils

# The class of all Keras variables. Up to Keras 3.6 `keras.Variable` itself is a
# subclass of what layers make, so that `isinstance` misses theirs.
KerasVariable = next(
    base
    for base in reversed(keras.Variable.__mro__)
    if base.__module__.startswith("keras.")
)


# Whether Keras counts the step in `apply`; before that it did in what we replace.
_APPLY_COUNTS = "assign_add" in keras.optimizers.Optimizer.apply.__code__.co_names


class OptimizerHooks(keras.optimizers.Optimizer):
    """The steps of Keras' optimizer that have to be replaced as a whole.

    Subclasses implement `averaged` and `take_step`.
    """

    def averaged(self, grads: list, variables: list) -> list:
        """Gradients of the mean loss of all replicas' cases."""
        raise NotImplementedError

    def take_step(self, grads: list, variables: list) -> None:
        """Moves `variables` (Keras or TensorFlow ones); no gradient is None."""
        raise NotImplementedError

    def _backend_apply_gradients(self, grads, trainable_variables):
        # The public hook, `update_step`, sees one variable at a time: preconditioning,
        # clipping and the quadratic model need all gradients together.  Also, mirrored
        # replicas cannot meet inside of the branches that Keras builds.
        variables = list(trainable_variables)
        grads = self.averaged(list(grads), variables)
        if self.gradient_accumulation_steps:
            self._accumulate(grads, variables)
        else:
            self.take_step(grads, variables)
        if self.use_ema:
            self._update_model_variables_moving_average(self._trainable_variables)
        if self.use_ema and self.ema_overwrite_frequency:
            utils.smart_cond(
                tf.equal((self.iterations + 1) % self.ema_overwrite_frequency, 0),
                lambda: _assign_all(*zip(*self.averages(), strict=True)),
                lambda: None,
            )
        if not _APPLY_COUNTS:
            self._iterations.assign_add(1)

    def _accumulate(self, grads: list, variables: list) -> None:
        """Adds to the sums of gradients, or takes a step with their mean."""
        steps = self.gradient_accumulation_steps
        sums = [
            self._accumulated_gradients[self._get_variable_index(v)] for v in variables
        ]
        totals = [
            tf.convert_to_tensor(g) + total.value
            for g, total in zip(grads, sums, strict=True)
        ]

        def step():
            self.take_step([total / steps for total in totals], variables)
            _assign_all(sums, [tf.zeros_like(total) for total in totals])

        utils.smart_cond(
            tf.equal((self._iterations + 1) % steps, 0),
            step,
            lambda: _assign_all(sums, totals),
        )

    def decay_weights(self, variables: Sequence[Any]) -> None:
        """Keras' decoupled weight decay of those variables that are not excluded.

        Keras decays before its step.  Here it is for the step to call, after the
        statistics, so that gradient and statistics are of the same weights and burn-in
        changes nothing.
        """
        self._apply_weight_decay(variables)

    def is_known(self, variable: Any) -> bool:
        """Whether `build` has seen the variable."""
        return self._var_key(variable) in self._trainable_variables_indices

    def add_trainable_variables(self, variables: Sequence[Any]) -> None:
        """Makes a built optimizer accept further variables.

        Keras refuses variables that it was not built with, although layers may be
        unfrozen between two fits; its lists are extended, in step with each other.
        """
        for variable in variables:
            index = len(self._trainable_variables_indices)
            self._trainable_variables_indices[self._var_key(variable)] = index
            self._trainable_variables.append(variable)
            if self.use_ema:
                # None for those that Keras does not average either (float8 scales).
                average = None
                if not getattr(variable, "overwrite_with_gradient", False):
                    average = self.add_variable_from_reference(variable, "average")
                self._model_variables_moving_average.append(average)
            if self.gradient_accumulation_steps:
                self._accumulated_gradients.append(
                    self.add_variable_from_reference(variable, "gradient_accumulator")
                )

    def averages(self) -> list[tuple[Any, Any]]:
        """Pairs of a trained variable and its moving average (`use_ema`)."""
        pairs = zip(
            self._trainable_variables, self._model_variables_moving_average, strict=True
        )
        return [pair for pair in pairs if pair[1] is not None]

    def forget_step(self) -> None:
        """Takes back what the end of this step will add to the count of iterations.

        `iterations` is read-only, and Keras counts every call of `apply`; steps of
        burn-in do not count.
        """
        calls = self.gradient_accumulation_steps or 1
        self._iterations.assign_sub(calls)

    @property
    def trained_variables(self) -> list[Any]:
        """The variables that `build` has seen."""
        return list(self._trainable_variables)

    @property
    def configured_learning_rate(self) -> Any:
        """The variable, schedule or callable behind `learning_rate`."""
        return self._learning_rate

    @property
    def step_count(self) -> Any:
        """The variable behind `iterations`, which is derived under accumulation."""
        return self._iterations


def watch_all_replicas(optimizer: Any) -> None:
    """Lets a `LossScaleOptimizer` skip steps that overflow on any of the replicas.

    Keras asks the first replica alone, since it takes gradients to be summed already,
    which they are later.
    """
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return
    check = optimizer.check_finite
    if getattr(check, "asks_all_replicas", False):
        return

    def check_finite(grads):
        count = utils.all_sum(tf.cast(check(grads), tf.float32), "finite")
        return tf.equal(count, float(utils.get_num_replicas()))

    check_finite.asks_all_replicas = True
    optimizer.check_finite = check_finite


def _assign_all(variables: Sequence[Any], values: Sequence[Any]) -> None:
    """Assigns what is equal on all replicas to Keras variables."""
    for variable, value in zip(variables, values, strict=True):
        utils.smart_assign(
            variable.value, tf.convert_to_tensor(value), force_sync=False
        )


def logits_of(output: Any) -> tf.Tensor | None:
    """The logits that Keras' softmax or sigmoid left on a model's output, or None."""
    return getattr(output, "_keras_logits", None)


def mask_of(output: Any) -> Any:
    """The mask that Keras' layers left on a model's output, or None."""
    return getattr(output, "_keras_mask", None)


def loss_weights_of(model: keras.Model) -> Any:
    """The loss weights that a compiled model was given.

    `get_compile_config` has them, too, but serialises the optimizer, losses and metrics
    for it, which warns about or fails for what cannot be saved.
    """
    return model._compile_config.config["loss_weights"]


def as_keras_variable(variable: tf.Variable, name: str, scope: str) -> keras.Variable:
    """A Keras variable around an existing one, with the path `scope/name`.

    Keras makes summaries, HDF5 files and state trees of Keras variables only.  That
    its constructor keeps a `tf.Variable` it is given is not documented.
    """
    with keras.name_scope(scope):
        return keras.Variable(
            variable,
            dtype=variable.dtype.name,
            trainable=False,
            name=name.replace("/", "."),
        )
