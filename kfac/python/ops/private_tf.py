"""Every use of TensorFlow internals, each with the reason why it is needed.

Nothing else in the package may touch a private name of TensorFlow or Keras.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def control_flow_context(graph: tf.Graph) -> Any:
    """The v1 control-flow context (a branch of a v1 `tf.cond`) being built, or None.

    Reason: a tensor made in one branch of a v1 conditional must not be cached for
    use in another, and TensorFlow has no public way to tell the branches apart.
    (Branches of v2 conditionals are graphs of their own.)
    """
    return graph._get_control_flow_context()


def add_optimizer_slot(
    optimizer: tf.compat.v1.train.Optimizer, variable: Any, name: str, slot: Any
) -> None:
    """Makes `slot` what `optimizer.get_slot(variable, name)` returns.

    Reason: a v1 optimizer makes its slots itself, by `tf.compat.v1.get_variable`; ours
    must outlive a function's trace and hence come from the `state` module, and yet be
    found by everything that knows optimizers (`get_slot`, `variables`, checkpoints,
    wrappers).
    """
    from tensorflow.python.training import optimizer as tf_optimizer

    optimizer._restore_slot_variable(name, variable, slot)
    optimizer._slot_dict(name)[tf_optimizer._var_key(variable)] = slot


def set_learning_rate_tensor(
    optimizer: tf.compat.v1.train.GradientDescentOptimizer, rate: tf.Tensor
) -> None:
    """Sets what the optimizer is about to multiply gradients with.

    Reason: it converts a Python number to float32 first, which costs a float64 model
    half of its digits.
    """
    optimizer._learning_rate_tensor = rate


def gradient_function(name: str) -> Any:
    """The gradient function registered under `name`.

    Reason: the copy of a `tf.custom_gradient` needs the original's gradient function;
    TensorFlow's registry can be written to publicly, but not read.
    """
    from tensorflow.python.framework import ops

    return ops.gradient_registry.lookup(name)


def exclude_from_autograph(package: str) -> None:
    """Tells AutoGraph not to convert the functions of a package.

    Reason: in a user's `tf.function` every function of this library that it reaches,
    hundreds of them, would be parsed and converted although none needs it; tracing
    then takes four times as long.  The public decorator works on single functions.
    If a TensorFlow release moves the rules, tracing is slower and nothing else.
    """
    try:
        from tensorflow.python.autograph.core import config, config_lib
    except ImportError:
        return
    rule = config_lib.DoNotConvert(package)
    config.CONVERSION_RULES = (rule, *config.CONVERSION_RULES)
