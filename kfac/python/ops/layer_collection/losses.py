"""Registration and evaluation of the losses that define the curvature."""

from __future__ import annotations

import collections
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from kfac.python.ops import errors
from kfac.python.ops import loss_functions as lf
from kfac.python.ops.layer_collection import checks
from kfac.python.ops.layer_collection.registry import LayerRegistry
from kfac.python.ops.layer_collection.reuse import VARIABLE_SCOPE, is_another_tower
from kfac.python.ops.rules import scalars

_EVALUATE: Mapping[str, Callable[[lf.LossFunction], tf.Tensor]] = {
    "data": lambda loss: loss.evaluate(),
    "sample": lambda loss: loss.evaluate_on_sample(),
}


class LossNameError(KeyError, errors.ArgumentError):
    """A loss name is taken, or not known; a `KeyError` with a readable message."""

    def __str__(self) -> str:
        return str(self.args[0])


class LossRegistry(LayerRegistry):
    """The `register_*_loss` and `register_*_predictive_distribution` methods.

    The objective is the sum over all losses and towers of coefficient times negative
    log-likelihood, each summed (not averaged) over its batch.

    Arguments common to all registrations:
      seed: default seed for sampling targets; None, or an int: with a fixed graph seed,
        losses of equal seed and parameters draw equal samples.
      targets: needed only for evaluation on data (empirical Fisher, `total_loss`).
      name: of the loss; several towers of one loss share it. None for a new one.
      coeff: number or scalar tensor that scales the loss, and its Fisher matrix.
      reuse: True adds a tower to the loss `name`, see `reuse.is_another_tower`.

    Errors common to all registrations:
      LossNameError: the name is taken, or to be reused and not known.
      ArgumentError: the collection is finalised, the parameters of the distribution
        are no tensors, or a tower's class, variance or coefficient is not that of the
        loss's first tower.

    Attributes:
      loss_colocation_ops: loss -> tensor whose device computes it.
      loss_coeffs: loss -> coefficient, as given.
    """

    def __init__(self):
        super().__init__()
        self._loss_dict: collections.OrderedDict[str, list[lf.LossFunction]] = (
            collections.OrderedDict()
        )
        self.loss_colocation_ops: dict[lf.LossFunction, Any] = {}
        self.loss_coeffs: dict[lf.LossFunction, Any] = {}

    @property
    def losses(self) -> list[lf.LossFunction]:
        """All losses, loss by loss, and in a loss tower by tower."""
        return [loss for towers in self._loss_dict.values() for loss in towers]

    @property
    def towers_by_loss(self) -> tuple[tuple[lf.LossFunction, ...], ...]:
        """The losses' towers."""
        return tuple(tuple(towers) for towers in self._loss_dict.values())

    def register_categorical_predictive_distribution(
        self,
        logits: Any,
        seed: Any = None,
        targets: Any = None,
        name: str | None = None,
        coeff: Any = 1.0,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Registers a distribution over classes.

        Args:
          logits: `[batch, classes]`.
          targets: class ids `[batch]`.
          seed, name, coeff, reuse: see the class.
        """
        checks.network_output(logits, "logits")
        loss = lf.CategoricalLogitsNegativeLogProbLoss(
            logits, targets=targets, seed=seed
        )
        self._register_loss_function(
            loss, logits, "categorical_predictive_distribution", name, coeff, reuse
        )

    def register_softmax_cross_entropy_loss(
        self,
        logits: Any,
        seed: Any = None,
        targets: Any = None,
        name: str | None = None,
        coeff: Any = 1.0,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Registers a softmax cross-entropy; same as a categorical distribution.

        Args:
          logits: `[batch, classes]`.
          targets: class ids `[batch]`.
          seed, name, coeff, reuse: see the class.
        """
        checks.network_output(logits, "logits")
        loss = lf.CategoricalLogitsNegativeLogProbLoss(
            logits, targets=targets, seed=seed
        )
        self._register_loss_function(
            loss, logits, "sparse_softmax_cross_entropy_loss", name, coeff, reuse
        )

    def register_onehot_categorical_predictive_distribution(
        self,
        logits: Any,
        seed: Any = None,
        targets: Any = None,
        name: str | None = None,
        coeff: Any = 1.0,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Registers a distribution over classes with one-hot (or soft) targets.

        Args:
          logits: `[batch, classes]`.
          targets: probabilities `[batch, classes]`.
          seed, name, coeff, reuse: see the class.
        """
        checks.network_output(logits, "logits")
        loss = lf.OnehotCategoricalLogitsNegativeLogProbLoss(
            logits, targets=targets, seed=seed
        )
        base_name = "onehot_categorical_predictive_distribution"
        self._register_loss_function(loss, logits, base_name, name, coeff, reuse)

    def register_normal_predictive_distribution(
        self,
        mean: Any,
        var: float = 0.5,
        seed: Any = None,
        targets: Any = None,
        name: str | None = None,
        coeff: Any = 1.0,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Registers independent normal distributions of a fixed variance.

        Args:
          mean: `[batch, ...]`.
          var: the variance; 0.5 makes the loss the squared error up to a constant, 1.0
            half of that.
          targets: of the shape of `mean`.
          seed, name, coeff, reuse: see the class.
        """
        checks.network_output(mean, "mean")
        loss = lf.NormalMeanNegativeLogProbLoss(mean, var, targets=targets, seed=seed)
        self._register_loss_function(
            loss, mean, "normal_predictive_distribution", name, coeff, reuse
        )

    def register_squared_error_loss(
        self,
        prediction: Any,
        seed: Any = None,
        targets: Any = None,
        name: str | None = None,
        coeff: Any = 1.0,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Registers the squared error, summed over the batch and the outputs.

        Args:
          prediction: `[batch, ...]`.
          targets: of the shape of `prediction`.
          seed, name, coeff, reuse: see the class.
        """
        checks.network_output(prediction, "prediction")
        loss = lf.NormalMeanNegativeLogProbLoss(
            prediction, 0.5, targets=targets, seed=seed
        )
        self._register_loss_function(
            loss, prediction, "squared_error_loss", name, coeff, reuse
        )

    def register_normal_mean_variance_predictive_distribution(
        self,
        mean: Any,
        variance: Any,
        seed: Any = None,
        targets: Any = None,
        name: str | None = None,
        coeff: Any = 1.0,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Registers independent normal distributions of predicted mean and variance.

        Args:
          mean: `[batch, n]`.
          variance: `[batch, n]`, positive.
          targets: `[batch, n]`.
          seed, name, coeff, reuse: see the class.
        """
        checks.network_output(mean, "mean")
        checks.network_output(variance, "variance")
        loss = lf.NormalMeanVarianceNegativeLogProbLoss(
            mean, variance, targets=targets, seed=seed
        )
        base_name = "normal_mean_variance_predictive_distribution"
        self._register_loss_function(loss, mean, base_name, name, coeff, reuse)

    def register_multi_bernoulli_predictive_distribution(
        self,
        logits: Any,
        seed: Any = None,
        targets: Any = None,
        name: str | None = None,
        coeff: Any = 1.0,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Registers independent Bernoulli distributions.

        Args:
          logits: `[batch, ...]`.
          targets: of the shape of `logits`, in [0, 1].
          seed, name, coeff, reuse: see the class.
        """
        checks.network_output(logits, "logits")
        loss = lf.MultiBernoulliNegativeLogProbLoss(logits, targets=targets, seed=seed)
        base_name = "multi_bernoulli_predictive_distribution"
        self._register_loss_function(loss, logits, base_name, name, coeff, reuse)

    def register_sigmoid_cross_entropy_loss(
        self,
        logits: Any,
        seed: Any = None,
        targets: Any = None,
        name: str | None = None,
        coeff: Any = 1.0,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Registers a sigmoid cross-entropy; same as Bernoulli distributions.

        Args:
          logits: `[batch, ...]`.
          targets: of the shape of `logits`, in [0, 1].
          seed, name, coeff, reuse: see the class.
        """
        checks.network_output(logits, "logits")
        loss = lf.MultiBernoulliNegativeLogProbLoss(logits, targets=targets, seed=seed)
        self._register_loss_function(
            loss, logits, "sigmoid_cross_entropy_loss", name, coeff, reuse
        )

    def _register_loss_function(
        self,
        loss: lf.LossFunction,
        colocation_op: Any,
        base_name: str,
        name: str | None = None,
        coeff: Any = 1.0,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Stores a loss object, as a new loss or as a tower of one.

        Args:
          loss: the object.
          colocation_op: tensor whose device computes the loss.
          base_name: what a name is derived from if there is none.
          name, coeff, reuse: see the class.
        """
        self._check_open()
        _check_coefficient(coeff)
        if not isinstance(name, (str, type(None))):
            raise errors.ArgumentError(
                f"name={name!r}; a loss is named by a string, or None for a new name."
            )
        if is_another_tower(reuse, bool(name) and name in self._loss_dict):
            self._check_tower(loss, name, coeff)
        else:
            name = name or self._new_loss_name(base_name)
            if name in self._loss_dict:
                raise LossNameError(
                    f"The loss {name!r} exists already. Give another name, or "
                    "reuse=True to register another tower of it."
                )
        self._loss_dict.setdefault(name, []).append(loss)
        self.loss_colocation_ops[loss] = colocation_op
        self.loss_coeffs[loss] = coeff

    def _new_loss_name(self, base_name: str) -> str:
        """`base_name`, or with the first free number behind it."""
        name, number = base_name, 0
        while name in self._loss_dict:
            number += 1
            name = f"{base_name}_{number}"
        return name

    def _check_tower(self, loss: lf.LossFunction, name: str | None, coeff: Any) -> None:
        """Checks that `loss` can be a tower of the loss `name`."""
        if not name:
            raise LossNameError(
                "reuse is set for a loss without a name. Name the loss, in all its "
                "towers, to say which one this is a tower of."
            )
        if name not in self._loss_dict:
            raise LossNameError(
                f"reuse is set, but there is no loss {name!r}; there are "
                f"{list(self._loss_dict)}."
            )
        first = self._loss_dict[name][0]
        if type(loss) is not type(first):
            raise errors.ArgumentError(
                f"The loss {name!r} is a {type(first).__name__}; another tower of it "
                f"cannot be a {type(loss).__name__}."
            )
        # Only the normal loss with a fixed variance has one.
        variances = getattr(first, "_var", None), getattr(loss, "_var", None)
        if variances[0] != variances[1]:
            raise errors.ArgumentError(
                f"The loss {name!r} has variance {variances[0]}; another tower of it "
                f"cannot have {variances[1]}."
            )
        first_coeff = self.loss_coeffs[first]
        if not (coeff is first_coeff or _both_equal_numbers(coeff, first_coeff)):
            raise errors.ArgumentError(
                f"The loss {name!r} has the coefficient {first_coeff!r}; another tower "
                f"of it cannot have {coeff!r}."
            )

    def eval_losses(
        self, target_mode: str = "data", coeff_mode: str = "regular"
    ) -> list[tf.Tensor]:
        """Scalar values of all losses, in the order of `losses`.

        Args:
          target_mode: "data", the registered targets; or "sample", fresh targets drawn
            from the model.
          coeff_mode: "regular" multiplies by the coefficients, "sqrt" by their square
            roots, "off" by one.

        Raises:
          ArgumentError: unknown mode, or the square root of a negative coefficient.
          MissingTargetsError: mode "data" and a loss without targets.
        """
        if target_mode not in _EVALUATE:
            raise errors.ArgumentError(
                f"target_mode={target_mode!r}; expected one of {sorted(_EVALUATE)}."
            )
        if coeff_mode not in ("regular", "sqrt", "off"):
            raise errors.ArgumentError(
                f"coeff_mode={coeff_mode!r}; expected 'regular', 'sqrt' or 'off'."
            )
        values = []
        for loss in self.losses:
            device = getattr(self.loss_colocation_ops[loss], "device", None)
            with tf.device(device or ""):
                value = _EVALUATE[target_mode](loss)
                if coeff_mode != "off":
                    value = value * _multiplier(
                        self.loss_coeffs[loss], coeff_mode == "sqrt", value.dtype
                    )
            values.append(value)
        return values

    def total_loss(self, coeff_mode: str = "regular") -> tf.Tensor:
        """Sum of `eval_losses` on the registered targets.

        Raises:
          ArgumentError: no loss is registered, or the mode is unknown.
        """
        return self._sum_losses("data", coeff_mode)

    def total_sampled_loss(self, coeff_mode: str = "regular") -> tf.Tensor:
        """Sum of `eval_losses` on sampled targets.

        Raises:
          ArgumentError: no loss is registered, or the mode is unknown.
        """
        return self._sum_losses("sample", coeff_mode)

    def _sum_losses(self, target_mode: str, coeff_mode: str) -> tf.Tensor:
        values = self.eval_losses(target_mode, coeff_mode)
        self._check_has_losses()
        return tf.add_n(values)

    def _check_has_losses(self) -> None:
        if not self._loss_dict:
            raise errors.ArgumentError(
                "No loss is registered; call one of the register_*_loss or "
                "register_*_predictive_distribution methods."
            )


def _check_coefficient(coeff: Any) -> None:
    if isinstance(coeff, numbers.Real):
        return
    if not hasattr(coeff, "shape") or checks.static_sizes(coeff) not in ([], None):
        raise errors.ArgumentError(
            f"coeff={coeff!r}; expected a number or a scalar tensor."
        )


def _both_equal_numbers(first: Any, second: Any) -> bool:
    if not isinstance(first, numbers.Real) or not isinstance(second, numbers.Real):
        return False
    return first == second


def _multiplier(coeff: Any, square_root: bool, dtype: tf.DType) -> tf.Tensor:
    """The coefficient or its root in the loss's dtype, at that dtype's precision."""
    if not isinstance(coeff, numbers.Real):
        coeff = tf.cast(coeff, dtype)
        return tf.sqrt(coeff) if square_root else coeff
    if not square_root:
        return scalars.cast(coeff, dtype)
    if coeff < 0:
        raise errors.ArgumentError(
            f"A loss has the coefficient {coeff}; curvature needs it not negative."
        )
    return scalars.cast(math.sqrt(coeff), dtype)
