"""What `Kfac` takes: names, defaults, contradictions."""

from __future__ import annotations

import dataclasses
import inspect
import random
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from kfac.python.keras.option_checks import (
    MUTABLE,
    checked,
    is_schedule,
    is_symbolic,
    loss_weight,
)
from kfac.python.ops import optimizer as graph_optimizer
from kfac.python.ops import utils
from kfac.python.ops.kfac_utils import periodic_inv_cov_update_kfac_opt


@dataclasses.dataclass(frozen=True)
class DampingAdaptation:
    """How damping is adapted: `Kfac(adapt_damping=DampingAdaptation(...))`.

    Martens & Grosse 2015, section 6.5.  After every `interval` steps the actual change
    of the loss over the step is compared with the one that the quadratic model
    predicted.

    Attributes:
      decay: the damping's factor per step while the model is good, in (0, 1].
      interval: steps from one adaptation to the next.
      decrease_above: ratio of actual to predicted change above which it falls.
      increase_below: ratio below which it grows.
      min_damping: with `l2_reg` added, the least damping.
      l2_reg: c of a penalty `c/2 |parameters|^2` that the loss contains.
    """

    decay: float = 0.95
    interval: int = 5
    decrease_above: float = 0.75
    increase_below: float = 0.25
    min_damping: float = 1e-8
    l2_reg: float = 0.0

    def flat(self) -> dict[str, Any]:
        """The same as arguments of `Kfac`."""
        return {
            "adapt_damping": True,
            "damping_adaptation_decay": self.decay,
            "damping_adaptation_interval": self.interval,
            "damping_decrease_rho_threshold": self.decrease_above,
            "damping_increase_rho_threshold": self.increase_below,
            "min_damping": self.min_damping,
            "l2_reg": self.l2_reg,
        }


@dataclasses.dataclass(frozen=True)
class CurvatureUpdates:
    """When and from what the curvature is updated: `Kfac(updates=CurvatureUpdates())`.

    Attributes:
      every: steps from one update of the statistics to the next.
      invert_every: steps from one update of the inverses to the next.
      decay: decay of the statistics' moving averages, per step.
      batch_fraction: part of the batch that statistics are taken from, in (0, 1].
      num_burnin_steps: steps before training that only collect statistics.
    """

    every: int = 1
    invert_every: int = 10
    decay: float = 0.95
    batch_fraction: float = 1.0
    num_burnin_steps: int = 0

    def flat(self) -> dict[str, Any]:
        """The same as arguments of `Kfac`."""
        return {
            "cov_update_every": self.every,
            "invert_every": self.invert_every,
            "cov_ema_decay": self.decay,
            "cov_batch_fraction": self.batch_fraction,
            "num_burnin_steps": self.num_burnin_steps,
        }


def _defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


# Every argument with a default of the graph optimizers below, as far as it is known
# here; the `loss` tensor of theirs is `loss_tensor` here.
REFERENCE_DEFAULTS: dict[str, Any] = {
    **_defaults(graph_optimizer.KfacOptimizer.__init__),
    **_defaults(periodic_inv_cov_update_kfac_opt.PeriodicInvCovUpdateKfacOpt.__init__),
}
for _name in ("loss", "name"):
    REFERENCE_DEFAULTS.pop(_name)

# Arguments of the reference API that a traced step answers by itself: they may be
# given, in the form that changes nothing.
_ANSWERED = {
    "loss_tensor": "the training loss is evaluated",
    "prev_train_batch": "the batch of each step is seen",
    "update_damping_immediately": "damping is adapted in the step itself",
    "var_list": "the variables that have gradients are trained",
    "is_chief": "tf.distribute says so",
    "tf_replicator": "use tf.distribute",
}
# What may be given, but has no effect: the batch of the step is used.
_UNUSED = ("batch_size", "train_batch", "use_passed_loss")
# Options of Kfac that the graph optimizer does not have.
_OWN_DEFAULTS: dict[str, Any] = {
    "reject_bad_steps": False,
    "distribute_transformations": True,
}
# Arguments of the Keras base class that make sense for a second-order method.
BASE_DEFAULTS: dict[str, Any] = {
    "weight_decay": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
}
DEFAULTS: dict[str, Any] = {
    "loss_tensor": None,
    **REFERENCE_DEFAULTS,
    **_OWN_DEFAULTS,
    **BASE_DEFAULTS,
}
_BY_REPLICAS = "replica_round_robin"
_CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")
# Options that are not handed to the graph optimizer as they are.
NOT_FORWARDED = frozenset(
    [*_ANSWERED, *_UNUSED, *_OWN_DEFAULTS, *BASE_DEFAULTS, "loss_fn"]
)


def resolve(
    learning_rate: Any, damping: Any, adaptive: bool, given: Mapping[str, Any]
) -> dict[str, Any]:
    """All options, checked and completed.

    Raises:
      ValueError: see the messages.
    """
    given = _flattened(given)
    _check_names(given)
    given = checked(given)
    if damping is None:
        raise ValueError(
            "Kfac needs a damping, for instance damping=0.01; see the tuning guide in "
            "docs/keras.md."
        )
    options = {**DEFAULTS, **given}
    options |= checked({"learning_rate": learning_rate, "damping": damping})
    if adaptive:
        _make_adaptive(options, given)
    _check_step_size(options, given, learning_rate)
    if options["adapt_damping"]:
        _match_periods(options, given)
    _check_combinations(options)
    return options


def _flattened(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with config objects replaced by the arguments they stand for."""
    flat = dict(given)
    for name, kind in (("updates", CurvatureUpdates), ("adapt_damping", None)):
        value = flat.get(name)
        if kind is None and isinstance(value, DampingAdaptation):
            kind = DampingAdaptation
        if kind is None or name not in flat:
            continue
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be a {kind.__name__}, got {value!r}.")
        del flat[name]
        twice = sorted(set(flat) & set(value.flat()))
        if twice:
            raise ValueError(f"{twice} are given twice: also in {name}={value!r}.")
        flat |= value.flat()
    return flat


def _check_names(given: Mapping[str, Any]) -> None:
    for name in _CLIPPING:
        if given.get(name) is not None:
            raise ValueError(
                f"{name} is not supported: clipping a gradient before preconditioning "
                "destroys its scale. Bound the step with norm_constraint instead."
            )
    known = set(DEFAULTS) | set(_CLIPPING)
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"Kfac got unknown arguments {unknown}; known ones are "
            f"{sorted(set(DEFAULTS) | {'updates'})} and the named ones."
        )
    for name in sorted(set(given) & set(_ANSWERED)):
        if given[name] != DEFAULTS[name]:
            raise ValueError(
                f"{name}={given[name]!r} cannot be given to Kfac: {_ANSWERED[name]}."
            )


def _make_adaptive(options: dict[str, Any], given: Mapping[str, Any]) -> None:
    conflicts = {
        "momentum_type": str(given.get("momentum_type", "qmodel")).lower() != "qmodel",
        "momentum": given.get("momentum") is not None,
        "adapt_damping": given.get("adapt_damping", True) is False,
    }
    for name, conflicting in conflicts.items():
        if conflicting:
            raise ValueError(
                f"adaptive=True chooses {name} itself; got {name}={given[name]!r}. "
                "Leave it out, or set the parts you want without adaptive=True."
            )
    options.update(adapt_damping=True, momentum_type="qmodel", momentum=None)


def uses_quadratic_model(options: Mapping[str, Any]) -> bool:
    """Whether the step size comes from the quadratic model."""
    return str(options["momentum_type"]).lower().startswith("qmodel")


def _check_step_size(
    options: dict[str, Any], given: Mapping[str, Any], learning_rate: Any
) -> None:
    if not uses_quadratic_model(options):
        if learning_rate is None:
            raise ValueError(
                "Kfac needs a learning_rate, for instance 0.05, or adaptive=True."
            )
        return
    kind = options["momentum_type"]
    if learning_rate is not None:
        raise ValueError(
            f"learning_rate must be None with momentum_type {kind!r}: the quadratic "
            f"model chooses it; got {learning_rate!r}."
        )
    if kind.lower() == "qmodel":
        if given.get("momentum") is not None:
            raise ValueError(
                f"momentum must be None with momentum_type {kind!r}: the quadratic "
                "model chooses it. Use 'qmodel_fixedmu' to keep it fixed."
            )
        options["momentum"] = None


def _match_periods(options: dict[str, Any], given: Mapping[str, Any]) -> None:
    """The adaptation interval must be a multiple of the inversion period."""
    if "invert_every" not in given and "damping_adaptation_interval" not in given:
        options.update(invert_every=5, damping_adaptation_interval=5)
    elif "invert_every" not in given:
        options["invert_every"] = given["damping_adaptation_interval"]
    elif "damping_adaptation_interval" not in given:
        options["damping_adaptation_interval"] = given["invert_every"]
    if options["damping_adaptation_interval"] % options["invert_every"]:
        raise ValueError(
            "damping_adaptation_interval must be a multiple of invert_every, so that "
            "the inverses see a new damping at once; got "
            f"{options['damping_adaptation_interval']} and {options['invert_every']}."
        )


def _check_combinations(options: Mapping[str, Any]) -> None:
    if options["weight_decay"] is not None and uses_quadratic_model(options):
        raise ValueError(
            "weight_decay is multiplied by the learning rate, which the quadratic "
            "model chooses anew at every step. Use use_weight_decay=True with "
            "weight_decay_coeff, or put a penalty into the loss and declare it as "
            "l2_reg."
        )
    if options["gradient_accumulation_steps"] and options["adapt_damping"]:
        raise ValueError(
            "Damping cannot be adapted with gradient_accumulation_steps: the loss "
            "before and after a step is compared on one batch, but the step is of "
            "several. Use larger batches, with cov_batch_fraction and "
            "qmodel_batch_fraction to save time, or a fixed damping."
        )
    if options["reject_bad_steps"] and not options["adapt_damping"]:
        raise ValueError(
            "reject_bad_steps undoes a step that raises the loss and then raises the "
            "damping; it needs adaptive=True or adapt_damping=True."
        )
    if (
        not options["distribute_transformations"]
        and options["placement_strategy"] != _BY_REPLICAS
    ):
        raise ValueError(
            "distribute_transformations=False is for "
            f"placement_strategy={_BY_REPLICAS!r}, whose replicas share the products "
            f"out; placement_strategy is {options['placement_strategy']!r}."
        )


def placement(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the graph optimizer about where work is done."""
    if options["placement_strategy"] != _BY_REPLICAS:
        return {}
    if tf.distribute.has_strategy() and utils.get_num_replicas() == 1:
        return {"placement_strategy": None}  # Nobody to share with.
    return {"distribute_transformations": options["distribute_transformations"]}


def base_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the Keras base class."""
    return {name: options[name] for name in BASE_DEFAULTS}


def schedule(value: Any) -> Any:
    """`value`, or the learning-rate schedule whose config it is."""
    if isinstance(value, Mapping) and "class_name" in value:
        return keras.optimizers.schedules.deserialize(dict(value))
    return value


def for_keras(learning_rate: Any) -> Any:
    """`learning_rate` in a form that the Keras base class accepts."""
    if learning_rate is None:
        return 1.0  # Not used: the quadratic model chooses the step.
    if is_symbolic(learning_rate):
        return lambda: learning_rate
    if callable(learning_rate):
        return learning_rate
    return learning_rate


def mutable_names(options: Mapping[str, Any]) -> frozenset[str]:
    """Hyper-parameters that are configured and not chosen by the optimizer."""
    fixed = set()
    if options["adapt_damping"]:
        fixed.add("damping")
    if uses_quadratic_model(options):
        fixed |= {"learning_rate", "momentum"}
    return frozenset(n for n in MUTABLE - fixed if options[n] is not None)


def sample_seed(seed: int | None) -> int:
    """The seed of sampled targets; where none is given one that is drawn.

    Like Keras' own it is drawn from Python's generator, so that
    `keras.utils.set_random_seed` makes training reproducible.
    """
    return random.getrandbits(31) if seed is None else int(seed)


def config_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as plain values; what cannot be saved is left at its default."""
    config = {}
    for key, value in options.items():
        config[key] = _plain(value)
        if key in ("loss_fn", "train_batch") and value is not None:
            warnings.warn(f"{key} is not part of the saved configuration of Kfac.")
            config[key] = None
    return config


def _plain(value: Any) -> Any:
    if is_schedule(value):
        return keras.optimizers.schedules.serialize(value)
    if is_symbolic(value):
        return float(keras.ops.convert_to_numpy(value))
    if isinstance(value, tf.DType):
        return value.name
    return value


def check_train_batch(train_batch: Any, batch_size: Any = None) -> Any:
    """The number of cases in a batch of the reference API.

    Args:
      train_batch: tuple of (structures of) tensors.
      batch_size: by default the static size of the first tensor.

    Raises:
      ValueError: it is no such tuple, or its size is not known.
    """
    if not isinstance(train_batch, tuple):
        raise ValueError(
            f"train_batch must be a tuple (inputs, labels); got {train_batch!r}."
        )
    tensors = tf.nest.flatten(train_batch)
    if not all(tf.is_tensor(tensor) for tensor in tensors):
        raise ValueError("train_batch must use TF tensors only.")
    if batch_size is None and tensors[0].shape.rank:
        batch_size = tf.compat.dimension_value(tensors[0].shape[0])
    if batch_size is None:
        raise ValueError(
            "Could not infer batch_size from train_batch; pass batch_size."
        )
    return checked({"batch_size": batch_size})["batch_size"]


def check_loss(loss: Any, loss_weights: Any) -> None:
    """Raises `ValueError` for what no model could be compiled with.

    Whether the curvature of the loss is known shows when it is registered.
    """
    for each in tf.nest.flatten(loss):
        if isinstance(each, str):
            keras.losses.get(each)
        elif each is not None and (not callable(each) or isinstance(each, type)):
            raise ValueError(
                "loss must be a Keras loss: a name, a function or an object, or a list "
                f"or dictionary of them by output; got {each!r}."
            )
    for each in tf.nest.flatten(loss_weights):
        if each is not None:
            loss_weight(each)


def serialize_loss(loss: Any) -> Any:
    """A loss as plain data: names, configs of objects, or structures of them."""
    if not loss or isinstance(loss, str):
        return loss
    if isinstance(loss, Mapping):
        return {key: serialize_loss(value) for key, value in loss.items()}
    if isinstance(loss, (list, tuple)):
        return [serialize_loss(value) for value in loss]
    if isinstance(loss, keras.losses.Loss):
        return keras.losses.serialize(loss)
    return loss.__name__


def deserialize_loss(loss: Any) -> Any:
    """The inverse of `serialize_loss`; losses themselves are left alone."""
    if isinstance(loss, Mapping):
        if "class_name" in loss and "config" in loss:
            return keras.losses.deserialize(dict(loss))
        return {key: deserialize_loss(value) for key, value in loss.items()}
    if isinstance(loss, (list, tuple)):
        return [deserialize_loss(value) for value in loss]
    return loss
