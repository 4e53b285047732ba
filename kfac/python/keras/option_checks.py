"""Which values each argument of `Kfac` may have, checked before anything is made."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kfac.python.keras.private_keras import KerasVariable
from kfac.python.ops import natural_gradient, signals
from kfac.python.ops.optimizer import arguments as graph_arguments

PLACEMENT_STRATEGIES = ("round_robin", "replica_round_robin")


@dataclasses.dataclass(frozen=True)
class Kind:
    """Values of one kind.

    Attributes:
      expected: what they are, for messages.
      plain: gives a legal value as a plain Python one; raises `ValueError` or
        `TypeError` for another.
    """

    expected: str
    plain: Callable[[Any], Any]


def number(value: Any, least: float = 0.0, most: float = math.inf) -> float:
    """A finite number, perhaps in an array without axes, as a float.

    Raises:
      ValueError: it is smaller than `least`, larger than `most`, or not finite.
      TypeError: it is something else, such as a truth value or a string.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, numbers.Real) or isinstance(value, (bool, np.bool_)):
        raise TypeError
    if not (least <= value <= most and math.isfinite(value)):
        raise ValueError
    return float(value)


def _positive(value: Any) -> float:
    return number(value, least=np.nextafter(0.0, 1.0))


def _count(least: float) -> Callable[[Any], int]:
    def count(value):
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        value = operator.index(value)  # Of NumPy's, and of tensors with a value, too.
        if value < least:
            raise ValueError
        return value

    return count


def _cases(value: Any) -> Any:
    return value if is_symbolic(value) else _count(1)(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError
    return bool(value)


def _instance(*types: type) -> Callable[[Any], Any]:
    def instance(value):
        if not isinstance(value, types):
            raise TypeError
        return value

    return instance


def _callable(value: Any) -> Any:
    if not callable(value):
        raise TypeError
    return value


def _float_type(value: Any) -> Any:
    if not tf.as_dtype(value).is_floating:
        raise ValueError
    return value


def _choice(names: Iterable[str], fold: Callable[[str], str] = str) -> Kind:
    """One of some names, compared after `fold`."""

    def choice(value):
        if not isinstance(value, str) or fold(value) not in map(fold, names):
            raise ValueError
        return value

    return Kind(f"one of {', '.join(map(repr, names))}", choice)


def _or_none(kind: Kind) -> Kind:
    return Kind(
        f"{kind.expected}, or None",
        lambda value: None if value is None else kind.plain(value),
    )


def _keys_are_layers(value: Any) -> Any:
    value = _instance(Mapping, list, tuple, str)(value)
    for key in value if isinstance(value, Mapping) else ():
        _instance(str, type)(key)
    return value


_TRUTH = Kind("True or False", _truth)
_NUMBER = Kind("a finite number, 0 or more", number)
_POSITIVE = Kind("a finite number above 0", _positive)
_FRACTION = Kind(
    "a number in (0, 1]",
    lambda value: number(value, least=np.nextafter(0.0, 1.0), most=1.0),
)
_UNIT = Kind("a number in [0, 1]", lambda value: number(value, most=1.0))
_RATIO = Kind("a finite number", lambda value: number(value, least=-math.inf))
_PERIOD = Kind("an integer that counts steps, from 1", _count(1))
_WEIGHT = Kind("a finite number, 0 or more, or a list or dictionary of them", number)
_CASES = Kind("an integer that counts cases, from 1", _count(1))
_FUNCTION = Kind("a callable", _callable)

# What may also be a scalar tensor or a variable.
SCALARS: dict[str, Kind] = {
    "learning_rate": _NUMBER,
    "damping": _NUMBER,
    "momentum": _NUMBER,
    "weight_decay_coeff": _NUMBER,
    "norm_constraint": _POSITIVE,
    "precon_damping_mult": _POSITIVE,
    "qmodel_update_rescale": _POSITIVE,
    "min_damping": _NUMBER,
    "l2_reg": _NUMBER,
}
# The former that may be a schedule, too: they are read anew at every step.
MUTABLE = frozenset(
    ("learning_rate", "momentum", "damping", "weight_decay_coeff", "norm_constraint")
)
OTHERS: dict[str, Kind] = {
    "adaptive": _TRUTH,
    "strict": _TRUTH,
    "seed": _or_none(Kind("an integer", _count(-math.inf))),
    "fisher_approx": _or_none(
        Kind(
            "a dictionary from layers' names or classes to approximations, a list "
            "with one approximation (or None) a trainable layer, or one approximation "
            "for all layers that have it",
            _keys_are_layers,
        )
    ),
    "register_losses": _or_none(
        Kind("a callable (collection, outputs, batch)", _callable)
    ),
    "cov_ema_decay": _UNIT,
    "momentum_type": _choice(graph_arguments.MOMENTUM_TYPES, str.lower),
    "use_weight_decay": _TRUTH,
    "estimation_mode": _choice(signals.SIGNALS),
    "colocate_gradients_with_ops": _TRUTH,
    "batch_size": _or_none(Kind("an integer that counts cases, from 1", _cases)),
    "placement_strategy": _or_none(_choice(PLACEMENT_STRATEGIES)),
    "compute_params_stats": _TRUTH,
    "adapt_damping": Kind("True, False or a DampingAdaptation", _truth),
    "use_passed_loss": _TRUTH,
    "loss_fn": _or_none(_FUNCTION),
    "damping_adaptation_decay": _FRACTION,
    "damping_adaptation_interval": _PERIOD,
    "damping_decrease_rho_threshold": _RATIO,
    "damping_increase_rho_threshold": _RATIO,
    "print_logs": _TRUTH,
    "dtype": Kind("a floating-point type", _float_type),
    "cov_batch_fraction": _FRACTION,
    "qmodel_batch_fraction": _FRACTION,
    "invert_every": _PERIOD,
    "cov_update_every": _PERIOD,
    "num_burnin_steps": Kind("an integer that counts steps, from 0", _count(0)),
    "reject_bad_steps": _TRUTH,
    "distribute_transformations": _TRUTH,
    "weight_decay": _or_none(_NUMBER),
    "use_ema": _TRUTH,
    "ema_momentum": _UNIT,
    "ema_overwrite_frequency": _or_none(_PERIOD),
    "loss_scale_factor": _or_none(_POSITIVE),
    "gradient_accumulation_steps": _or_none(
        Kind("an integer that counts steps, from 2", _count(2))
    ),
}


# What the relatives of `Kfac` have besides.
NATURAL_GRADIENT: dict[str, Kind] = {
    "curvature": _choice(natural_gradient.MATRICES),
    "preconditioner": _or_none(_choice(("diagonal", "kfac"))),
    "cg_iterations": Kind("an integer that counts iterations, from 1", _count(1)),
    "cg_tolerance": Kind(
        "a number in [0, 1)",
        lambda value: number(value, most=np.nextafter(1.0, 0.0)),
    ),
    "warm_start": _TRUTH,
}
FISHLEG: dict[str, Kind] = {
    "update_aux_every": _PERIOD,
    "aux_learning_rate": _POSITIVE,
    "warmup_steps": _PERIOD,
    "initial_scale": _POSITIVE,
}


def checked_by(kinds: Mapping[str, Kind], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as plain values.

    Raises:
      ValueError: one has a value that makes no sense.
    """
    return {name: _plain(name, value, kinds[name]) for name, value in options.items()}


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, numbers among them as Python's.

    Raises:
      ValueError: one has a value that makes no sense.
    """
    return {name: _checked(name, value) for name, value in options.items()}


def _checked(name: str, value: Any) -> Any:
    if name in SCALARS:
        return None if value is None else scalar(name, value)
    return _plain(name, value, OTHERS[name]) if name in OTHERS else value


def scalar(name: str, value: Any) -> Any:
    """A value for one of `SCALARS`; numbers as floats.

    Raises:
      ValueError: it is none.
    """
    if name in MUTABLE and is_schedule(value):
        return value
    if is_symbolic(value):
        shape = tf.TensorShape(value.shape)
        if shape.rank not in (0, None):
            raise ValueError(f"{name} must be a scalar; got one of shape {shape}.")
        if tf.as_dtype(value.dtype).is_floating:
            return value
        if not isinstance(value, (tf.Variable, KerasVariable)):
            return tf.cast(value, tf.float32)
        raise ValueError(
            f"{name} must be a variable of floating-point numbers, as it takes part in "
            f"arithmetic with them; got {value!r}."
        )
    if name == "learning_rate" and callable(value) and not isinstance(value, type):
        return value
    return _plain(name, value, SCALARS[name])


def loss_weight(value: Any) -> float:
    """A loss weight as a float.

    Raises:
      ValueError: it is none.
    """
    return _plain("loss_weights", value, _WEIGHT)


def batch_size(value: Any) -> int:
    """A number of cases as an int.

    Raises:
      ValueError: it is none.
    """
    return _plain("batch_size", value, _CASES)


def is_schedule(value: Any) -> bool:
    """Whether a hyper-parameter is a function of the number of steps."""
    return isinstance(value, keras.optimizers.schedules.LearningRateSchedule)


def is_symbolic(value: Any) -> bool:
    """Whether a hyper-parameter is a tensor or a variable."""
    return tf.is_tensor(value) or isinstance(value, (tf.Variable, KerasVariable))


def _plain(name: str, value: Any, kind: Kind) -> Any:
    try:
        return kind.plain(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {kind.expected}; got {value!r}.") from error
