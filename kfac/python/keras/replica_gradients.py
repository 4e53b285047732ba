"""Gradients of several replicas: their means, and whether they have the right scale.

Keras' losses are divided by the number of replicas.  In a loop that computes another
loss the division is easily forgotten; gradients would then be as many times too large
as there are replicas, while the curvature is not.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.keras.batches import Batch
from kfac.python.keras.models import PureModel, tf_variable
from kfac.python.ops import utils
from kfac.python.ops.utils.scheduling import run_if

# Dropout draws other masks for the comparison, so that gradients are not the same.
_MIN_COSINE = 0.9
_TOLERANCE = 0.1

_MESSAGE = (
    "Kfac was given gradients that are {} the declared loss's. Under tf.distribute the "
    "loss of a replica is its mean over the replica's cases, divided once by "
    "strategy.num_replicas_in_sync. model.compute_loss, keras.losses and "
    "optimizer.step(x, y) divide by themselves; other losses have to be divided in the "
    "loop. The ratio to the declared loss's gradient is"
)


def averaged(gradients: Sequence[Any], batch: Batch) -> list[Any]:
    """Gradients of the mean loss of all cases; unchanged outside of replicas.

    Args:
      gradients: of a replica's share of the loss.
      batch: what the replica trains on.

    Raises:
      ValueError: replicas are executed eagerly.
    """
    if not utils.is_in_replica():
        return list(gradients)
    if tf.executing_eagerly():
        raise ValueError(
            "Under a tf.distribute strategy Kfac's step has to be traced, because "
            "replicas meet inside of it: use compile(run_eagerly=False), or call "
            "strategy.run in a tf.function."
        )
    replicas = utils.get_num_replicas()
    means = [replicas * tf.convert_to_tensor(gradient) for gradient in gradients]
    return utils.all_average(means, "gradients", batch.size())


def check_scale(
    gradients: Sequence[Any],
    variables: Sequence[Any],
    model: PureModel,
    batch: Batch,
    is_first: tf.Tensor,
) -> tf.Operation:
    """Op that compares the gradients with the declared loss's, in replicas.

    Fails with `InvalidArgumentError` if their ratio is the number of replicas, or one
    over it.  (Compiled by XLA, it does nothing.)  Costs a forward and a backward pass
    where it is due, and nothing elsewhere.

    Args:
      gradients: means over all replicas' cases.
      variables: their variables.
      model: knows the declared loss.
      batch: what the replica trains on.
      is_first: whether it is due, scalar.
    """
    replicas = float(utils.get_num_replicas())

    def check():
        with tf.GradientTape() as tape:
            try:
                loss = model.loss(batch)
            except Exception as error:
                warnings.warn(
                    "Kfac could not compare the scale of the gradients with the "
                    f"declared loss's ({type(error).__name__}: {error}). Make sure "
                    "that the loss of a replica is divided by the number of replicas."
                )
                return []
        declared = tape.gradient(
            loss,
            [tf_variable(variable) for variable in variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        declared = utils.all_average(declared, "check of gradients", batch.size())
        given = [tf.convert_to_tensor(gradient) for gradient in gradients]
        product = _inner(given, declared)
        squared = _inner(declared, declared)
        cosine = tf.math.divide_no_nan(
            product, tf.sqrt(squared) * tf.sqrt(_inner(given, given))
        )
        ratio = tf.math.divide_no_nan(product, squared)

        def is_off_by(factor: float) -> tf.Tensor:
            near = tf.abs(ratio - factor) < _TOLERANCE * factor
            return near & (cosine > _MIN_COSINE)

        count = int(replicas)
        return [
            tf.debugging.Assert(~is_off_by(factor), [_MESSAGE.format(words), ratio])
            for factor, words in (
                (replicas, f"{count} times as large as"),
                (1.0 / replicas, f"{count} times smaller than"),
            )
        ]

    return run_if(is_first, check)


def _inner(left: Sequence[tf.Tensor], right: Sequence[tf.Tensor]) -> tf.Tensor:
    products = [
        tf.reduce_sum(tf.cast(a, tf.float32) * tf.cast(b, tf.float32))
        for a, b in zip(left, right, strict=True)
    ]
    return tf.add_n(products)
