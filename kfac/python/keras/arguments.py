"""What `Kfac` takes: names, defaults, contradictions."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from kfac.python.keras.hyperparameters import MUTABLE
from kfac.python.keras.registration import CLASS_PREFIX

# Options with their defaults, forwarded to the graph optimizer unless noted below.
DEFAULTS: dict[str, Any] = {
    "cov_ema_decay": 0.95,
    "momentum": 0.9,
    "momentum_type": "adam",
    "use_weight_decay": False,
    "weight_decay_coeff": 0.1,
    "norm_constraint": None,
    "qmodel_update_rescale": None,
    "estimation_mode": "gradients",
    "colocate_gradients_with_ops": True,
    "placement_strategy": None,
    "compute_params_stats": False,
    "adapt_damping": False,
    "min_damping": 1e-8,
    "l2_reg": 0.0,
    "damping_adaptation_decay": 0.95,
    "damping_adaptation_interval": 5,
    "damping_decrease_rho_threshold": 0.75,
    "damping_increase_rho_threshold": 0.25,
    "precon_damping_mult": 1.0,
    "print_logs": False,
    "dtype": "float32",
    "invert_every": 10,
    "cov_update_every": 1,
    "cov_batch_fraction": 1.0,
    "qmodel_batch_fraction": 1.0,
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
# Arguments of the reference API that a traced step answers by itself.
_ANSWERED = {
    "batch_size": "the batch of each step is seen",
    "loss_fn": "the compiled loss is evaluated",
    "loss_tensor": "the compiled loss is evaluated",
    "prev_train_batch": "the batch of each step is seen",
    "update_damping_immediately": "damping is adapted in the step itself",
    "use_passed_loss": "the compiled loss is evaluated",
    "var_list": "the variables that have gradients are trained",
    "is_chief": "tf.distribute says so",
    "tf_replicator": "use tf.distribute",
}
_CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")
NOT_FORWARDED = frozenset(BASE_DEFAULTS)


def resolve(
    learning_rate: Any, damping: Any, adaptive: bool, given: Mapping[str, Any]
) -> dict[str, Any]:
    """All options, checked and completed.

    Raises:
      ValueError: see the messages.
    """
    for name in _CLIPPING:
        if name in given:
            raise ValueError(
                f"{name} is not supported: clipping a gradient before preconditioning "
                "destroys its scale. Bound the step with norm_constraint instead."
            )
    for name in sorted(set(given) & set(_ANSWERED)):
        raise ValueError(f"{name} is not an argument of Kfac: {_ANSWERED[name]}.")
    known = {**DEFAULTS, **BASE_DEFAULTS}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"Kfac got unknown arguments {unknown}; known ones are "
            f"{sorted(known)} and the named ones."
        )
    if damping is None:
        raise ValueError(
            "Kfac needs a damping, for instance damping=0.01; see the tuning guide in "
            "docs/keras.md."
        )
    options = {**known, **given, "learning_rate": learning_rate, "damping": damping}
    if adaptive:
        _make_adaptive(options, given)
    uses_model = str(options["momentum_type"]).lower().startswith("qmodel")
    if uses_model:
        if learning_rate is not None:
            raise ValueError(
                "learning_rate must be None with momentum_type "
                f"{options['momentum_type']!r}: the quadratic model chooses it."
            )
        if options["momentum_type"].lower() == "qmodel":
            if given.get("momentum") is not None:
                raise ValueError(
                    "momentum must be None with momentum_type 'qmodel': the quadratic "
                    "model chooses it. Use 'qmodel_fixedmu' to keep it fixed."
                )
            options["momentum"] = None
    elif learning_rate is None:
        raise ValueError(
            "Kfac needs a learning_rate, for instance 0.05, or adaptive=True."
        )
    if options["adapt_damping"]:
        _match_periods(options, given)
    return options


def _make_adaptive(options: dict[str, Any], given: Mapping[str, Any]) -> None:
    conflicts = {
        "momentum_type": given.get("momentum_type", "qmodel") not in ("qmodel",),
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


def base_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the Keras base class."""
    return {name: options[name] for name in BASE_DEFAULTS}


def for_keras(learning_rate: Any) -> Any:
    """`learning_rate` in a form that the Keras base class accepts."""
    if learning_rate is None:
        return 1.0  # Not used: the quadratic model chooses the step.
    if isinstance(learning_rate, Mapping):
        return keras.optimizers.schedules.deserialize(learning_rate)
    schedule = keras.optimizers.schedules.LearningRateSchedule
    if isinstance(learning_rate, schedule) or callable(learning_rate):
        return learning_rate
    if tf.is_tensor(learning_rate) or isinstance(
        learning_rate, (tf.Variable, keras.Variable)
    ):
        return lambda: learning_rate
    return float(learning_rate)


def mutable_names(options: Mapping[str, Any]) -> frozenset[str]:
    """Hyper-parameters that are configured and not chosen by the optimizer."""
    fixed = set()
    if options["adapt_damping"]:
        fixed.add("damping")
    if str(options["momentum_type"]).lower().startswith("qmodel"):
        fixed |= {"learning_rate", "momentum"}
    return frozenset(n for n in MUTABLE - fixed if options[n] is not None)


def sample_seed(seed: int | None) -> int:
    """The seed of sampled targets; a fresh one where none is given."""
    return secrets.randbits(31) if seed is None else int(seed)


def config_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as plain values."""
    return {key: _plain(value) for key, value in options.items()}


def _plain(value: Any) -> Any:
    schedule = keras.optimizers.schedules.LearningRateSchedule
    if isinstance(value, schedule):
        return keras.optimizers.schedules.serialize(value)
    if tf.is_tensor(value) or isinstance(value, (tf.Variable, keras.Variable)):
        return float(keras.ops.convert_to_numpy(value))
    return value


def serialize_fisher_approx(fisher_approx: Any) -> Any:
    """Layer classes as `kfac_class_<name>`; everything else unchanged."""
    if not isinstance(fisher_approx, Mapping):
        return fisher_approx
    return {
        key if isinstance(key, str) else CLASS_PREFIX + key.__name__: value
        for key, value in fisher_approx.items()
    }


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
