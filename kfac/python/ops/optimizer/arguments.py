"""What the optimizer's constructor accepts, checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

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


def check_damping(
    damping: Any,
    min_damping: Any,
    l2_reg: Any,
    damping_adaptation_decay: Any,
    damping_adaptation_interval: Any,
) -> None:
    """Raises `ValueError` for values that no curvature can be damped with."""
    for name, value in (
        ("damping", damping),
        ("min_damping", min_damping),
        ("l2_reg", l2_reg),
    ):
        number = _static_number(value)
        if number is not None and not number >= 0:
            raise ValueError(f"{name} must be at least 0, but is {number}.")
    decay = _static_number(damping_adaptation_decay)
    if decay is not None and not 0 < decay <= 1:
        raise ValueError(f"damping_adaptation_decay must be in (0, 1], not {decay}.")
    interval = _static_number(damping_adaptation_interval)
    if interval is not None and interval < 1:
        raise ValueError(
            f"damping_adaptation_interval counts steps and must be at least 1, not "
            f"{interval}."
        )


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


def check_pre_update_loss(use_passed_loss: bool, train_batch: Any) -> None:
    """Raises `ValueError` if there is no way to compute the loss before a step."""
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
    if isinstance(value, tf.Variable):
        return None
    if tf.is_tensor(value):
        value = tf.get_static_value(value)
        return None if value is None else float(value)
    return float(value)
