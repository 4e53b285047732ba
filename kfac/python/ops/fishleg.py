"""FishLeg: the inverse of the Fisher matrix, learned while training.

The inverse image of a vector u is where the Legendre-Fenchel conjugate of the damped
Fisher's quadratic form is attained,

    (F + δ I)^-1 u = argmin_w  1/2 w' (F + δ I) w - u' w.

FishLeg puts `w = Q(λ) u` with a cheap positive semi-definite Q and takes steps of Adam
in λ on that objective, the auxiliary loss A(λ), for normalised gradients u and a Fisher
matrix of other cases than u's.  Only products with F are needed (Garcia et al.,
"Fisher-Legendre (FishLeg) optimization of deep neural networks", ICLR 2023).

Since A is a function of w alone, `dA/dλ = (dw/dλ)' r` with the residual
`r = (F + δ I) w - u`: nothing is differentiated through the Fisher product.  |r| says
how good Q is: it is zero for the exact inverse, and 1 for Q = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from kfac.python.ops import state, utils
from kfac.python.ops.layer_inverses import LayerInverse
from kfac.python.ops.rules import adam, scalars

tf1 = tf.compat.v1

Vector = list[tf.Tensor]
Values = list[dict[str, tf.Tensor]]  # λ, one mapping for each layer.


class Progress(NamedTuple):
    """One evaluation of the auxiliary loss.

    Attributes:
      loss: A(λ), scalar; its least possible value is `-1/2 u' (F + δ I)^-1 u`.
      residual: `|r|` for u of length 1, scalar.
    """

    loss: tf.Tensor
    residual: tf.Tensor


class _Training(NamedTuple):
    """λ with Adam's moments, and the number of steps so far."""

    values: Values
    first: Values
    second: Values
    count: tf.Tensor


class InverseFisher:
    """Q(λ): one `LayerInverse` for each group of parameters, and their state.

    The state lives in the ambient variable scope, under the parameters' paths, and is
    made by the first instance; later traces of a function find it again.

    Args:
      groups: `(params, layer inverse)` pairs that share no parameters.
      initial_scale: Q is that multiple of the identity at the start.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Sequence[Any], LayerInverse]],
        initial_scale: float = 1.0,
    ):
        if not initial_scale > 0:
            raise ValueError(f"initial_scale must be positive, got {initial_scale!r}.")
        self._params = [list(params) for params, _ in groups]
        self._layers = [layer for _, layer in groups]
        initial = [layer.initial_values(initial_scale) for layer in self._layers]
        self._values = self._make_variables(initial)
        self._first = self._make_variables(initial, "_first_moment")
        self._second = self._make_variables(initial, "_second_moment")
        self._count = _reusing("steps", (), tf.int64)

    @property
    def variables(self) -> list[Any]:
        """The parameters, in the order of vectors."""
        return [v for params in self._params for v in params]

    def multiply(self, vector: Sequence[Any]) -> Vector:
        """`Q u`, for vectors like `variables`."""
        return self._multiply(self._read(self._values), vector)

    def train(
        self,
        direction: Callable[[tf.Tensor], Sequence[Any]],
        product: Callable[[Vector], Vector],
        *,
        learning_rate: Any = 1e-3,
        num_steps: Any = 1,
        weight: Any = None,
    ) -> tuple[tf.Operation, Progress]:
        """Takes Adam steps on the auxiliary loss.

        Replicas take them apart from each other; λ and the progress become means.

        Args:
          direction: step -> u of any length, not zero.  The step, an int64 scalar,
            counts all steps ever taken, from 0.
          product: `w -> (F + δ I) w`.
          learning_rate: of Adam.
          num_steps: number of steps; an int, or an integer scalar.
          weight: how much this replica counts, see `utils.all_average`.

        Returns:
          An op that stores λ, and the last step's progress (before its update). A step
          whose progress is not finite is counted, but does not change λ.
        """
        initial = _Training(
            self._read(self._values),
            self._read(self._first),
            self._read(self._second),
            self._count.read_value(),
        )
        dtype = tf.nest.flatten(initial.values)[0].dtype
        nothing = Progress(tf.zeros((), dtype), tf.ones((), dtype))

        def body(i, training, _):
            u = _normalized(direction(training.count))
            training, progress = self._step(training, u, product, learning_rate)
            return i + 1, training, progress

        if isinstance(num_steps, int) and num_steps == 1:
            _, after, progress = body(0, initial, nothing)
        else:
            num_steps = tf.cast(num_steps, tf.int32)
            _, after, progress = tf.while_loop(
                lambda i, *_: i < num_steps,
                body,
                (tf.constant(0), initial, nothing),
                parallel_iterations=1,
            )
        *means, progress = utils.all_average(
            [*after[:3], progress], "learned inverse", weight
        )
        return self._store(_Training(*means, after.count)), progress

    def residual(
        self, vector: Sequence[Any], product: Callable[[Vector], Vector]
    ) -> tf.Tensor:
        """`|(F + δ I) Q u - u| / |u|`, a scalar: how good Q is for u."""
        u = _normalized(vector)
        image = product(self.multiply(u))
        difference = [a - b for a, b in zip(image, u, strict=True)]
        return tf.sqrt(utils.ip(difference, difference))

    def _multiply(self, values: Values, vector: Sequence[Any]) -> Vector:
        remaining = iter(vector)
        result = []
        for params, layer, value in zip(
            self._params, self._layers, values, strict=True
        ):
            own = [tf.convert_to_tensor(next(remaining)) for _ in params]
            result.extend(layer.multiply(value, own))
        return result

    def _step(
        self,
        training: _Training,
        u: Vector,
        product: Callable[[Vector], Vector],
        learning_rate: Any,
    ) -> tuple[_Training, Progress]:
        """One step, and where it started."""
        values = tf.nest.map_structure(tf.identity, training.values)
        w = self._multiply(values, u)
        image = product([tf.stop_gradient(part) for part in w])
        r = [a - b for a, b in zip(image, u, strict=True)]
        gradients = tf.gradients(
            w,
            tf.nest.flatten(values),
            grad_ys=r,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        count = training.count + 1
        steps = [
            adam.step(adam.Step(*before), gradient, count, learning_rate)
            for *before, gradient in zip(
                *(tf.nest.flatten(part) for part in training[:3]),
                gradients,
                strict=True,
            )
        ]
        packed = (
            tf.nest.pack_sequence_as(training.values, list(part))
            for part in zip(*steps, strict=True)
        )
        # 1/2 w' (F + δ I) w - u' w, where (F + δ I) w = r + u.
        loss = 0.5 * (utils.ip(w, r) - utils.ip(w, u))
        progress = Progress(loss, tf.sqrt(utils.ip(r, r)))
        # A batch that is not finite would stay in λ for ever.
        good = tf.reduce_all([tf.math.is_finite(number) for number in progress])
        kept = tf.nest.map_structure(
            lambda new, old: tf.where(good, new, old), list(packed), list(training[:3])
        )
        return _Training(*kept, count), progress

    def _store(self, training: _Training) -> tf.Operation:
        variables = (self._values, self._first, self._second, self._count)
        return tf.group(
            *(
                # Equal on all replicas.
                utils.smart_assign(variable, value, force_sync=False)
                for variable, value in zip(
                    tf.nest.flatten(variables), tf.nest.flatten(training), strict=True
                )
            )
        )

    def _make_variables(
        self, initial: Sequence[dict[str, np.ndarray]], moment: str = ""
    ) -> list[dict[str, tf.Variable]]:
        """Variables of λ, or of zeros shaped like it for a moment."""
        made = []
        for params, values in zip(self._params, initial, strict=True):
            path = state.parameter_path(params)
            dtype = tf.as_dtype(params[0].dtype).base_dtype
            made.append(
                {
                    name: _reusing(
                        f"{path}/{name}{moment}",
                        value.shape,
                        dtype,
                        None if moment else _constant(value),
                    )
                    for name, value in values.items()
                }
            )
        return made

    @staticmethod
    def _read(variables: list[dict[str, tf.Variable]]) -> Values:
        return [{k: v.read_value() for k, v in layer.items()} for layer in variables]


def _constant(value: np.ndarray) -> Callable[..., tf.Tensor]:
    return lambda shape, dtype: tf.constant(value, dtype, shape)


def _reusing(*args: Any) -> tf.Variable:
    """`state.get_variable` that finds a variable of a v1 graph again, too."""
    scope = tf1.get_variable_scope()
    with tf1.variable_scope(scope, reuse=tf1.AUTO_REUSE, auxiliary_name_scope=False):
        return state.get_variable(*args)


def _normalized(vector: Sequence[Any]) -> Vector:
    """The vector of length 1; zero stays zero."""
    vector = [tf.convert_to_tensor(part) for part in vector]
    scale = tf.math.divide_no_nan(
        tf.ones((), vector[0].dtype), tf.sqrt(utils.ip(vector, vector))
    )
    return [scalars.cast(scale, part.dtype) * part for part in vector]
