"""What the optimizer's constructor accepts, checked before anything is built."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from kfac.python.ops.rules import scalars

MOMENTUM_TYPES = ("regular", "adam", "qmodel", "qmodel_fixedmu")


def uses_quadratic_model(momentum_type: str) -> bool:
    """Whether this (lower-case) momentum type takes its step size from the model."""
    return momentum_type.startswith("qmodel")


def check_graph_mode(what: str) -> None:
    """Raises `RuntimeError` when called eagerly."""
    if tf.executing_eagerly():
        raise RuntimeError(
            f"{what} was called eagerly. The graph API needs a tf.Graph, or a "
            "tf.function that builds it inside `with store.as_default():` of a "
            "kfac.state.VariableStore; for eager or Keras training use kfac.keras."
        )


def normalized_momentum_type(momentum_type: Any) -> str:
    """The momentum type in lower case.

    Raises:
      ValueError: there is no such type.
    """
    name = str(momentum_type).lower()
    if name not in MOMENTUM_TYPES:
        raise ValueError(
            f"momentum_type is {momentum_type!r}; use one of "
            f"{', '.join(repr(kind) for kind in MOMENTUM_TYPES)}."
        )
    return name


def check_step_size(
    momentum_type: str,
    learning_rate: Any,
    momentum: Any,
    norm_constraint: Any,
    qmodel_update_rescale: Any,
) -> None:
    """Raises `ValueError` for combinations that contradict the momentum type."""
    kind = f"momentum_type={momentum_type!r}"
    if callable(learning_rate) and not isinstance(learning_rate, tf.Variable):
        raise ValueError(
            "learning_rate is a callable; pass a number, a scalar tensor or a "
            "variable, e.g. the schedule evaluated at the global step."
        )
    if not uses_quadratic_model(momentum_type):
        if learning_rate is None:
            raise ValueError(f"{kind} needs a learning_rate, but it is None.")
        if momentum is None:
            raise ValueError(f"{kind} needs a momentum, but it is None (use 0.0).")
        if qmodel_update_rescale is not None:
            raise ValueError(
                f"qmodel_update_rescale is for the qmodel types, not for {kind}; "
                "scale learning_rate instead."
            )
        return
    if learning_rate is not None:
        raise ValueError(
            f"{kind} computes the learning rate itself; learning_rate must be None, "
            f"but is {learning_rate!r}. qmodel_update_rescale scales its steps."
        )
    if norm_constraint is not None:
        raise ValueError(
            f"norm_constraint is for 'regular' and 'adam'; {kind} bounds its steps "
            "by the quadratic model."
        )
    if momentum_type == "qmodel" and momentum is not None:
        raise ValueError(
            f"{kind} computes the momentum itself; momentum must be None, but is "
            f"{momentum!r}. To keep it fixed use 'qmodel_fixedmu'."
        )
    if momentum_type == "qmodel_fixedmu" and momentum is None:
        raise ValueError(
            f"{kind} needs the momentum to keep, but it is None. To have it computed "
            "use 'qmodel'."
        )


class _Range(NamedTuple):
    """Legal values; `words` says which."""

    contains: Callable[[float], bool]
    words: str


_FINITE = _Range(math.isfinite, "finite")
_NOT_NEGATIVE = _Range(lambda x: 0 <= x < math.inf, "at least 0, and finite")
_NOT_NAN = _Range(lambda x: not math.isnan(x), "a number")
_RANGES = {
    "learning_rate": _FINITE,
    "momentum": _FINITE,
    "weight_decay_coeff": _FINITE,
    "qmodel_update_rescale": _FINITE,
    "norm_constraint": _Range(lambda x: x >= 0, "at least 0"),
    "damping": _NOT_NEGATIVE,
    "min_damping": _NOT_NEGATIVE,
    "l2_reg": _NOT_NEGATIVE,
    "precon_damping_mult": _NOT_NEGATIVE,
    "cov_ema_decay": _Range(lambda x: 0 <= x <= 1, "in [0, 1]"),
    "damping_adaptation_decay": _Range(lambda x: 0 < x <= 1, "in (0, 1]"),
    "damping_adaptation_interval": _Range(
        lambda x: x >= 1 and x == x // 1, "at least 1, a whole number of steps"
    ),
    "damping_decrease_rho_threshold": _NOT_NAN,
    "damping_increase_rho_threshold": _NOT_NAN,
}
_OPTIONAL = ("learning_rate", "momentum", "qmodel_update_rescale", "norm_constraint")


def check_scalars(**values: Any) -> None:
    """Raises `ValueError` for hyper-parameters that are no scalars in their range.

    Args:
      **values: by name: numbers, scalar tensors and variables; what is known only when
        it is run passes.
    """
    for name, value in values.items():
        if value is None and name in _OPTIONAL:
            continue
        shape = getattr(value, "shape", None)
        if isinstance(value, numbers.Real):
            shape = ()
        if shape is None or tf.TensorShape(shape).rank not in (0, None):
            raise ValueError(
                f"{name} must be a number, a scalar tensor or a variable; it is "
                f"{value!r}."
            )
        number = _static_number(value)
        if number is not None and not _RANGES[name].contains(number):
            raise ValueError(f"{name} must be {_RANGES[name].words}, but is {number}.")


def checked_count(name: str, value: Any, least: int) -> int:
    """A number of steps; raises `ValueError` unless it is whole and from `least` on."""
    count = scalars.whole(value)
    if not isinstance(count, int) or count < least:
        raise ValueError(f"{name} counts steps, from {least}; it is {value!r}.")
    return count


def floating_dtype(dtype: Any) -> tf.DType:
    """The dtype of the scalar state.

    Raises:
      ValueError: it is not a floating dtype.
    """
    result = tf.as_dtype(dtype)
    if not result.is_floating:
        raise ValueError(
            f"dtype={dtype!r} is that of the damping and other scalars; use "
            "'float32' or 'float64'."
        )
    return result


def check_loss(loss_fn: Any, use_passed_loss: bool, train_batch: Any) -> None:
    """Raises `ValueError` if there is no way to compute the loss before a step."""
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(
            f"loss_fn must be a function of a batch that returns the scalar loss; it "
            f"is {loss_fn!r}."
        )
    if not use_passed_loss and train_batch is None:
        raise ValueError(
            "use_passed_loss=False evaluates loss_fn(train_batch) before each "
            "adaptation, but train_batch is None."
        )


def check_gradients(grads_and_vars: Sequence[tuple[Any, Any]]) -> None:
    """Raises `ValueError` unless there are pairs and all of them have a gradient."""
    if not grads_and_vars:
        raise ValueError("There are no variables to train.")
    missing = [
        variable.name for gradient, variable in grads_and_vars if gradient is None
    ]
    if missing:
        raise ValueError(
            f"The loss does not depend on {', '.join(missing)}. Every registered "
            "variable needs a gradient; remove these from the layer collection or make "
            "the loss use them."
        )


def _static_number(value: Any) -> float | None:
    """The value of a number or constant tensor; None if it is known only later."""
    if isinstance(value, (numbers.Real, np.ndarray)):
        return float(value)
    if isinstance(value, tf.Variable) or not tf.is_tensor(value):
        return None
    static = tf.get_static_value(value)
    return None if static is None else float(static)
