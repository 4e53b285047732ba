"""Reads Keras losses: which predictive distribution they are, at which scale.

A Keras loss reduces its values over examples, positions and outputs in its own way
(`sum_over_batch_size`, masks, sample weights, a mean over the last axis).  The
curvature wants the same function as a negative log-likelihood that is *summed* over
the outputs of an example and averaged over the batch.  `OutputLoss` states the exact
factor between the two, so that damping means the same for every loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from kfac.python.keras import private_keras

CATEGORICAL = "categorical"
BERNOULLI = "bernoulli"
SQUARED_ERROR = "squared error"

_CLASSES = {
    keras.losses.SparseCategoricalCrossentropy: CATEGORICAL,
    keras.losses.CategoricalCrossentropy: CATEGORICAL,
    keras.losses.BinaryCrossentropy: BERNOULLI,
    keras.losses.MeanSquaredError: SQUARED_ERROR,
}
_FUNCTIONS = {
    keras.losses.sparse_categorical_crossentropy: CATEGORICAL,
    keras.losses.categorical_crossentropy: CATEGORICAL,
    keras.losses.binary_crossentropy: BERNOULLI,
    keras.losses.mean_squared_error: SQUARED_ERROR,
}
SUPPORTED = ", ".join(sorted(cls.__name__ for cls in _CLASSES))


class UnsupportedLossError(ValueError):
    """The curvature of a loss is not known; says what to do instead."""


@dataclasses.dataclass(frozen=True)
class OutputLoss:
    """What the loss of one model output is to the curvature.

    Attributes:
      distribution: CATEGORICAL, BERNOULLI or SQUARED_ERROR.
      from_logits: the output holds logits (else probabilities).
      reduction: Keras' name of the reduction over loss values.
      weight: the output's loss weight.
      sparse: targets are class indices (categorical only).
    """

    distribution: str
    from_logits: bool
    reduction: str = "sum_over_batch_size"
    weight: float = 1.0
    sparse: bool = False

    def coefficients(
        self,
        y_pred: tf.Tensor,
        sample_weight: tf.Tensor | None = None,
        mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Factor of every loss value's log-likelihood in "mean over the batch" terms.

        The Keras loss equals `1/batch * sum_e coefficients[e] * nll[e]` (up to a
        constant), with one element `e` an example and position, and `nll` summed over
        the last axis of `y_pred`.

        Args:
          y_pred: model output `[batch, ..., outputs]`.
          sample_weight: weights `[batch]`, `[batch, 1]` or `[batch, ...]`.
          mask: Keras mask `[batch, ...]`.

        Returns:
          float32 tensor of the shape of `y_pred` without its last axis.
        """
        shape = tf.shape(y_pred)[:-1]
        weights = tf.ones(shape, tf.float32)
        elements = tf.cast(tf.reduce_prod(shape), tf.float32)
        batch = tf.cast(shape[0], tf.float32)
        if mask is not None:
            mask = tf.broadcast_to(_match_rank(tf.cast(mask, tf.float32), shape), shape)
            weights *= mask
            if self.reduction in ("sum_over_batch_size", "mean"):
                valid = tf.reduce_sum(mask)
                weights *= tf.math.divide_no_nan(elements, valid)
        if sample_weight is not None:
            sample_weight = tf.cast(sample_weight, tf.float32)
            weights *= _match_rank(sample_weight, shape)
        if self.reduction == "sum":
            factor = batch
        elif self.reduction == "mean_with_sample_weight" and (
            sample_weight is not None or mask is not None
        ):
            factor = tf.math.divide_no_nan(batch, tf.reduce_sum(weights))
        else:
            factor = batch / elements
        if self.distribution != CATEGORICAL:  # Keras averages these over outputs.
            factor /= tf.cast(tf.shape(y_pred)[-1], tf.float32)
        return self.weight * factor * weights

    def uniform_coefficient(self, y_pred: tf.Tensor) -> float | None:
        """The one value of `coefficients` without weights and mask, if it is static."""
        inner = y_pred.shape.as_list()[1:]
        if self.reduction == "sum" or None in inner:
            return None
        positions = math.prod(inner[:-1])
        outputs = 1 if self.distribution == CATEGORICAL else inner[-1]
        return self.weight / (positions * outputs)

    def natural_parameters(self, y_pred: tf.Tensor) -> tf.Tensor:
        """Logits (or the mean) behind a model output, in float32 or float64."""
        if self.distribution == SQUARED_ERROR:
            return _at_least_float32(y_pred)
        # Keras' losses take these where they are, also from_logits (with a warning).
        logits = private_keras.logits_of(y_pred)
        if logits is not None or self.from_logits:
            return _at_least_float32(y_pred if logits is None else logits)
        # No trace of the logits: these are equally valid ones, since the Fisher matrix
        # in parameter space does not depend on how the distribution is parametrised.
        probabilities = _at_least_float32(y_pred)
        tiny = keras.config.epsilon()
        clipped = tf.clip_by_value(probabilities, tiny, 1.0 - tiny)
        if self.distribution == CATEGORICAL:
            return tf.math.log(clipped)
        return tf.math.log(clipped) - tf.math.log1p(-clipped)


def read(loss: Any, weight: float = 1.0) -> OutputLoss:
    """Interprets one Keras loss: a name, a function or a loss object.

    Raises:
      UnsupportedLossError: its curvature is not known.
    """
    resolved = keras.losses.get(loss)
    distribution = _FUNCTIONS.get(resolved) if callable(resolved) else None
    if distribution is not None:
        sparse = resolved is keras.losses.sparse_categorical_crossentropy
        return OutputLoss(distribution, from_logits=False, weight=weight, sparse=sparse)
    distribution = _CLASSES.get(type(resolved))
    if distribution is None:
        raise UnsupportedLossError(
            f"The curvature of the loss {loss!r} is not known. Supported are "
            f"{SUPPORTED} (names, functions or objects). For another loss pass "
            "`register_losses=`, a callable that registers the predictive "
            "distribution behind it on the layer collection."
        )
    config = resolved.get_config()
    if config.get("axis", -1) != -1:
        raise UnsupportedLossError(
            f"{type(resolved).__name__} over axis {config['axis']} is not supported; "
            "put the classes last (axis=-1)."
        )
    if config.get("ignore_class") is not None:
        raise UnsupportedLossError(
            "SparseCategoricalCrossentropy(ignore_class=...) is not supported; give "
            "the ignored examples sample_weight=0 instead."
        )
    if config["reduction"] in (None, "none"):
        raise UnsupportedLossError(
            f"{type(resolved).__name__}(reduction=None) leaves the loss unreduced; use "
            "'sum_over_batch_size'."
        )
    return OutputLoss(
        distribution,
        from_logits=config.get("from_logits", False),
        reduction=config["reduction"],
        weight=weight,
        sparse=isinstance(resolved, keras.losses.SparseCategoricalCrossentropy),
    )


def read_all(
    loss: Any, loss_weights: Any, y_pred: Any, output_names: Sequence[str] | None = None
) -> list[tuple[OutputLoss, Any]]:
    """Pairs every output that has a loss with the path to it in `y_pred`.

    Args:
      loss: as given to `compile`: one loss, or a list or dict of losses.
      loss_weights: None, a number, or a list or dict like `loss`.
      y_pred: structure of model outputs: a tensor, list, tuple or dict.
      output_names: names a dict of losses may use for a list of outputs.

    Returns:
      Pairs of an `OutputLoss` and the key of its output (`()` for a single output).

    Raises:
      UnsupportedLossError: a loss is not known.
      ValueError: losses and outputs do not correspond.
    """
    found = _by_output(loss, loss_weights, y_pred, output_names)
    return [(read(each, weight), key) for each, weight, key in found]


def total(
    loss: Any,
    loss_weights: Any,
    y_pred: Any,
    batch: Any,
    output_names: Sequence[str] | None = None,
) -> tf.Tensor:
    """The weighted sum of the losses of all outputs, as `compile` would make it.

    Under a strategy it is a replica's share, as Keras' losses are.

    Args:
      loss: see `read_all`.
      loss_weights: likewise.
      y_pred: likewise.
      batch: `Batch` whose targets and weights are used.
      output_names: see `read_all`.
    """
    terms = []
    for each, weight, key in _by_output(loss, loss_weights, y_pred, output_names):
        resolved = keras.losses.get(each)
        y = at(batch.y, key, output_names)
        sample_weight = at(batch.sample_weight, key, output_names)
        if isinstance(resolved, keras.losses.Loss):
            value = resolved(y, at(y_pred, key), sample_weight=sample_weight)
        else:
            values = resolved(y, at(y_pred, key))
            value = tf.reduce_mean(_weighted(values, sample_weight))
            value /= tf.distribute.get_strategy().num_replicas_in_sync
        terms.append(weight * value)
    return tf.add_n(terms)


def total_with(
    reduce_fn: Callable,
    loss: Any,
    loss_weights: Any,
    y_pred: Any,
    y: Any,
    output_names: Sequence[str] | None = None,
) -> tf.Tensor:
    """`total` without sample weights, with another reduction of unreduced losses."""
    return tf.add_n(
        [
            weight
            * reduce_fn(
                keras.losses.get(each)(at(y, key, output_names), at(y_pred, key))
            )
            for each, weight, key in _by_output(
                loss, loss_weights, y_pred, output_names
            )
        ]
    )


def _weighted(values: tf.Tensor, sample_weight: Any) -> tf.Tensor:
    """Loss values `[batch, ...]` times the weights of their cases, if there are."""
    if sample_weight is None:
        return values
    weights = tf.cast(sample_weight, values.dtype)
    return values * _match_rank(weights, tf.shape(values))


def _by_output(
    loss: Any, loss_weights: Any, y_pred: Any, output_names: Sequence[str] | None
) -> list[tuple[Any, float, Any]]:
    """The loss, its weight and the key of every output that has one."""
    keys = list(by_key(y_pred))
    if keys == [()]:
        if isinstance(loss, Mapping):
            loss = next(iter(loss.values())) if len(loss) == 1 else loss
        if isinstance(loss, (list, tuple)) and len(loss) == 1:
            loss = loss[0]
        if isinstance(loss, (Mapping, list, tuple)):
            raise ValueError(f"The model has one output, but the loss is {loss!r}.")
        return [(loss, _only(loss_weights), ())]
    names = list(output_names or keys)
    losses = _spread(loss, keys, names, "loss")
    weights = _spread(loss_weights, keys, names, "loss_weights")
    return [
        (losses[key], 1.0 if weights[key] is None else float(weights[key]), key)
        for key in keys
        if losses[key] is not None
    ]


def at(structure: Any, key: Any, names: Sequence[str] | None = None) -> Any:
    """What a structure of targets or weights holds for the output at a key.

    Args:
      structure: like the outputs, or one value for all of them.
      key: of `read_all`.
      names: the outputs' names, which a dictionary may use for a list of outputs.
    """
    if key == () or not isinstance(structure, (Mapping, list, tuple)):
        return structure
    return structure[name_of(structure, key, names)]


def name_of(structure: Any, key: Any, names: Sequence[str] | None) -> Any:
    """The key under which `structure` has the output at `key`."""
    if isinstance(structure, Mapping) and key not in structure and names:
        return names[key]
    return key


def by_key(y_pred: Any) -> dict[Any, Any]:
    """The outputs of a model by the keys of `read_all`."""
    if isinstance(y_pred, Mapping):
        return dict(y_pred)
    if isinstance(y_pred, (list, tuple)):
        return dict(enumerate(y_pred))
    return {(): y_pred}


def from_keys(y_pred: Any, values: Mapping[Any, Any]) -> Any:
    """`values` in the structure of the outputs `y_pred`."""
    if isinstance(y_pred, Mapping):
        return dict(values)
    if isinstance(y_pred, (list, tuple)):
        return [values[i] for i in range(len(y_pred))]
    return values[()]


def scale_signal(tensor: tf.Tensor, coefficients: tf.Tensor) -> tf.Tensor:
    """`tensor` with its derivatives scaled by `sqrt(coefficients)`.

    Registering the result instead of `tensor` weights every element's log-likelihood:
    the Fisher matrix, sampled gradients' second moments and curvature products all
    come out multiplied by `coefficients`.

    Args:
      tensor: parameters of a distribution `[batch, ..., outputs]`.
      coefficients: non-negative, `[batch, ...]`.
    """
    scale = tf.cast(tf.sqrt(coefficients), tensor.dtype)[..., tf.newaxis]
    return tensor * scale + tf.stop_gradient(tensor * (1.0 - scale))


def _only(weights: Any) -> float:
    if isinstance(weights, Mapping):
        weights = list(weights.values())
    if isinstance(weights, (list, tuple)):
        (weights,) = weights or (None,)
    return 1.0 if weights is None else float(weights)


def _spread(values: Any, keys: list, names: list[str], what: str) -> dict:
    """`values` as a dictionary over `keys`."""
    if values is None:
        return dict.fromkeys(keys)
    if isinstance(values, Mapping):
        known = dict(zip(names, keys, strict=True)) | {key: key for key in keys}
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(
                f"{what} names the outputs {unknown}, but the model has {names}."
            )
        by_key = {known[name]: value for name, value in values.items()}
        return {key: by_key.get(key) for key in keys}
    if isinstance(values, (list, tuple)):
        if len(values) != len(keys):
            raise ValueError(
                f"{what} has {len(values)} entries, but the model has {len(keys)} "
                f"outputs {names}."
            )
        return dict(zip(keys, values, strict=True))
    return dict.fromkeys(keys, values)


def _match_rank(weights: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """Squeezes or expands trailing axes until the rank is that of the loss values."""
    rank = shape.shape[0]
    while weights.shape.rank > rank and weights.shape[-1] == 1:
        weights = tf.squeeze(weights, axis=-1)
    while weights.shape.rank < rank:
        weights = weights[..., tf.newaxis]
    return weights


def _at_least_float32(tensor: tf.Tensor) -> tf.Tensor:
    low = tensor.dtype in (tf.float16, tf.bfloat16)
    return tf.cast(tensor, tf.float32) if low else tensor
