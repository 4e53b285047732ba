"""What is propagated back through the network to estimate curvature.

Second moments of back-propagated signals estimate the Fisher or the Gauss-Newton
matrix.  Each estimation mode is one class here: for a list of tensors it gives, for
one or several *sources*, the gradient of a scalar or the product with a cotangent.

With z the inputs of a loss, c its coefficient and B a factor of its curvature
(B Bᵀ = F), the signal at z is

    gradients           √c ∇ log-likelihood of a target drawn from the model
    empirical           √c ∇ log-likelihood of the actual target
    curvature_prop      √c B u, u random signs (Martens et al. 2012)
    exact               √c B e_i, one source for every coordinate i

so statistics scale with c in every mode.  (`empirical` back-propagates c, not √c, in
the reference API, whose statistics then scale with c² in that mode alone.)

Losses are summed over the batch, hence every case has unit weight.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import errors, utils
from kfac.python.ops.rules import scalars

tf1 = tf.compat.v1

FISHER = "Fisher"
GGN = "GGN"
EMPIRICAL_FISHER = "Empirical_Fisher"

# Sources that one vectorised backward pass carries; bounds the memory it needs.
_MAX_VECTORIZED_SOURCES = 32

Gradient = Any  # tf.Tensor, tf.IndexedSlices or None.


class Signal(abc.ABC):
    """One estimation mode.

    `losses` is a `LayerCollection`, or the copy of its losses on a sub-batch.

    Attributes:
      mat_type: which matrix the signals estimate.
    """

    mat_type: str

    @abc.abstractmethod
    def check(self, losses: Any) -> None:
        """Raises `ValueError` if some loss cannot serve this mode; builds nothing."""

    def num_sources(self, losses: Any) -> int:
        """Number of sources, known without building anything."""
        del losses
        return 1

    @abc.abstractmethod
    def gradients(
        self, losses: Any, wrt: Sequence[Any], colocate: bool
    ) -> list[list[Gradient]]:
        """Back-propagates, in the current graph and control-flow context.

        Args:
          losses: see the class.
          wrt: tensors and variables.
          colocate: whether gradient ops share their op's device.

        Returns:
          Per source a list like `wrt`, None where nothing depends on the entry.
        """

    def params_gradients(
        self, losses: Any, variables: Sequence[Any], colocate: bool
    ) -> list[Gradient] | None:
        """First-order statistics, if they are not the sum of the sources."""
        del losses, variables, colocate


class _TargetSignal(Signal):
    """Gradient of the losses on some targets."""

    target_mode: str

    def gradients(self, losses, wrt, colocate):
        values = losses.eval_losses(target_mode=self.target_mode, coeff_mode="sqrt")
        return [utils.gradients(values, wrt, colocate_gradients_with_ops=colocate)]


class SampledTargets(_TargetSignal):
    """Targets drawn from the model's predictive distribution."""

    mat_type = FISHER
    target_mode = "sample"

    def check(self, losses):
        for loss in losses.losses:
            if not hasattr(loss, "evaluate_on_sample"):
                raise ValueError(
                    f"{type(loss).__name__} has no predictive distribution to sample "
                    "targets from; use estimation_mode 'curvature_prop_GGN'."
                )


class ActualTargets(_TargetSignal):
    """The targets of the training data."""

    mat_type = EMPIRICAL_FISHER
    target_mode = "data"

    def check(self, losses):
        for loss in losses.losses:
            if loss.targets is None:
                raise errors.MissingTargetsError(
                    "estimation_mode 'empirical' needs targets on every loss, but a "
                    f"{type(loss).__name__} has unspecified targets. Pass `targets` "
                    "when registering it."
                )

    def params_gradients(self, losses, variables, colocate):
        if all(_is_one(losses.loss_coeffs[loss]) for loss in losses.losses):
            return None
        values = losses.eval_losses(target_mode="data", coeff_mode="regular")
        return utils.gradients(values, variables, colocate_gradients_with_ops=colocate)


class _FactorSignal(Signal):
    """Products with a factor of the losses' Fisher or GGN matrices."""

    def __init__(self, mat_type: str):
        self.mat_type = mat_type
        self._prefix = {FISHER: "fisher", GGN: "ggn"}[mat_type]

    def _multiply_factor(self, loss: Any, vector: tf.Tensor) -> Any:
        return getattr(loss, f"multiply_{self._prefix}_factor")(vector)

    def _inner_shape(self, loss: Any) -> tf.Tensor:
        return getattr(loss, f"{self._prefix}_factor_inner_shape")

    def _inner_static_shape(self, loss: Any) -> tf.TensorShape:
        return tf.TensorShape(
            getattr(loss, f"{self._prefix}_factor_inner_static_shape")
        )

    def check(self, losses):
        for loss in losses.losses:
            try:
                self._inner_static_shape(loss)
            except (AttributeError, NotImplementedError) as error:
                raise ValueError(
                    f"{type(loss).__name__} offers no {self.mat_type} matrix "
                    f"({error}). Use another estimation_mode."
                ) from error


class RandomSigns(_FactorSignal):
    """Random signs through a factor, one draw for every loss."""

    def gradients(self, losses, wrt, colocate):
        outputs, signals = [], []
        for loss in losses.losses:
            with _near(losses.loss_colocation_ops[loss]):
                signs = utils.generate_random_signs(
                    self._inner_shape(loss), dtype=_dtype(loss)
                )
                signal = self._multiply_factor(loss, signs)
                outputs.extend(tf.nest.flatten(loss.inputs))
                signals.extend(_scaled(signal, losses.loss_coeffs[loss]))
        return [utils.gradients(outputs, wrt, signals, None, colocate)]


class AllCoordinates(_FactorSignal):
    """Every column of a factor, each a source of its own."""

    def check(self, losses):
        super().check(losses)
        for loss in losses.losses:
            if not self._coordinate_shape(loss).is_fully_defined():
                raise ValueError(
                    "The exact estimation modes need static output sizes, but a "
                    f"{type(loss).__name__} has the inner shape "
                    f"{self._inner_static_shape(loss)}."
                )

    def num_sources(self, losses):
        return sum(self._num_coordinates(loss) for loss in losses.losses)

    def gradients(self, losses, wrt, colocate):
        sources = []
        for loss in losses.losses:
            with _near(losses.loss_colocation_ops[loss]):
                sources.extend(
                    self._columns(loss, losses.loss_coeffs[loss], wrt, colocate)
                )
        return sources

    def _columns(self, loss, coeff, wrt, colocate) -> list[list[Gradient]]:
        """One backward pass per coordinate, several at a time."""
        connected: list[int] = []

        def back_propagate(coordinate):
            signal = self._multiply_factor(loss, self._one_hot(loss, coordinate))
            gradients = utils.gradients(
                tf.nest.flatten(loss.inputs),
                wrt,
                _scaled(signal, coeff),
                None,
                colocate,
            )
            connected[:] = [i for i, g in enumerate(gradients) if g is not None]
            return [tf.convert_to_tensor(gradients[i]) for i in connected] or [signal]

        columns = []
        size = 1 if _may_meet_replicas(loss.inputs) else _MAX_VECTORIZED_SOURCES
        for chunk in _chunks(self._num_coordinates(loss), size):
            if len(chunk) == 1:
                stacked = [g[None] for g in back_propagate(chunk[0])]
            else:
                stacked = tf.vectorized_map(back_propagate, tf.constant(chunk))
            for row in range(len(chunk)):
                column: list[Gradient] = [None] * len(wrt)
                for i, gradients in zip(connected, stacked, strict=False):
                    column[i] = gradients[row]
                columns.append(column)
        return columns

    def _one_hot(self, loss: Any, coordinate: Any) -> tf.Tensor:
        """For every case 1 at the given flat coordinate, 0 elsewhere."""
        shape = self._coordinate_shape(loss).as_list()
        one_case = tf.one_hot(coordinate, math.prod(shape), dtype=_dtype(loss))
        one_hot = tf.broadcast_to(tf.reshape(one_case, shape), self._inner_shape(loss))
        one_hot.set_shape(self._inner_static_shape(loss))
        return one_hot

    def _coordinate_shape(self, loss: Any) -> tf.TensorShape:
        shape = self._inner_static_shape(loss)
        # Outputs of rank 1 are those of a single case.
        return shape if shape.rank in (None, 1) else shape[1:]

    def _num_coordinates(self, loss: Any) -> int:
        return self._coordinate_shape(loss).num_elements()


SIGNALS: dict[str, Signal] = {
    "gradients": SampledTargets(),
    "empirical": ActualTargets(),
    "curvature_prop": RandomSigns(FISHER),
    "curvature_prop_GGN": RandomSigns(GGN),
    "exact": AllCoordinates(FISHER),
    "exact_GGN": AllCoordinates(GGN),
}


def signal_of(estimation_mode: str) -> Signal:
    """The signal of an estimation mode.

    Raises:
      ValueError: there is no such mode.
    """
    if estimation_mode not in SIGNALS:
        raise ValueError(
            f"Unrecognised value for estimation_mode: {estimation_mode!r}. Use one of "
            f"{', '.join(map(repr, SIGNALS))}."
        )
    return SIGNALS[estimation_mode]


def _near(tensor: Any) -> Any:
    """Ops built in this context are placed on the tensor's device."""
    return tf.device(getattr(tensor, "device", None) or "")


def _scaled(signal: Any, coeff: Any) -> list[tf.Tensor]:
    """√coeff times a tensor or tuple of tensors, flattened."""
    flat = [tf.convert_to_tensor(part) for part in tf.nest.flatten(signal)]
    return [tf.sqrt(scalars.cast(coeff, part.dtype)) * part for part in flat]


def _dtype(loss: Any) -> tf.DType:
    return tf.as_dtype(loss.dtype).base_dtype


def _is_one(coeff: Any) -> bool:
    value = tf.get_static_value(coeff) if tf.is_tensor(coeff) else coeff
    return value is not None and bool(np.all(np.asarray(value) == 1))


def _chunks(count: int, size: int) -> Iterator[list[int]]:
    coordinates = iter(range(count))
    while chunk := list(itertools.islice(coordinates, size)):
        yield chunk


def _may_meet_replicas(inputs: Any) -> bool:
    """Whether tensors may depend on other replicas' cases (batch normalisation can).

    The backward pass then sums over replicas, which no vectorised loop can contain:
    that of one replica would take the loop variables of the others for constants.
    Such sums are ops with a gradient of their own, as are some activations.
    """
    if not (utils.is_in_replica() and utils.is_replicated()):
        return False
    tensors = tf.nest.flatten(inputs)
    operations = [
        op
        for op in tensors[0].graph.get_operations()
        if op.type == "IdentityN" and "_gradient_op_type" in op.node_def.attr
    ]
    return bool(utils.SubGraph(tensors).filter_list(operations))
