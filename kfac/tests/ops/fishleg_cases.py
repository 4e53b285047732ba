"""Single layers and small networks whose Fisher matrix FishLeg has to invert."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import fishleg, layer_collection, layer_inverses, utils
from kfac.python.ops.natural_gradient import DampedCurvature
from kfac.tests import graph_kinds


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network on one fixed batch.

    Attributes:
      name: of the case.
      shapes: of the parameters.
      x: inputs `[batch, ...]`.
      register: `(collection, params, x)` registers layers and losses.
      damping: δ.
    """

    name: str
    shapes: Sequence[tuple[int, ...]]
    x: np.ndarray
    register: Callable[..., None]
    damping: float

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass
class Built:
    """A case in the current graph."""

    inverse: fishleg.InverseFisher
    curvature: DampedCurvature

    def random_direction(self, step: Any) -> list[tf.Tensor]:
        """A standard normal vector, another one for each step."""
        return [
            tf.random.stateless_normal(
                v.shape, tf.stack([tf.cast(step, tf.int64), i]), dtype=tf.float64
            )
            for i, v in enumerate(self.inverse.variables)
        ]


def build(case: Case, **kwargs: Any) -> Built:
    """Builds `case` in the current graph, layer kinds as registered."""
    params = [
        graph_kinds.variable(0.5 * _normal(i, *shape), f"p{i}")
        for i, shape in enumerate(case.shapes)
    ]
    collection = layer_collection.LayerCollection()
    case.register(collection, params, tf.constant(case.x))
    groups = [
        (utils.ensure_sequence(group), block)
        for group, block in collection.fisher_blocks.items()
    ]
    inverse = fishleg.InverseFisher(
        [(group, layer_inverses.of_block(block, group)) for group, block in groups],
        **kwargs,
    )
    curvature = DampedCurvature(
        collection, inverse.variables, damping=case.damping, num_cases=len(case.x)
    )
    return Built(inverse, curvature)


def _dense(collection, params, x):
    weights, bias = params
    out = tf.matmul(x, weights) + bias
    collection.register_fully_connected((weights, bias), x, out)
    collection.register_normal_predictive_distribution(out, var=1.0)


def _convolution(collection, params, x):
    filters, bias = params
    out = tf.nn.conv2d(x, filters, 1, "SAME") + bias
    collection.register_conv2d((filters, bias), [1, 1, 1, 1], "SAME", x, out)
    collection.register_normal_predictive_distribution(out, var=1.0)


def _scale_and_shift(collection, params, x):
    scale, shift = params
    out = x * scale + shift
    collection.register_scale_and_shift((scale, shift), x, out)
    collection.register_normal_predictive_distribution(out, var=1.0)


def _two_layers(collection, params, x):
    w1, b1, w2 = params
    pre_activations = tf.matmul(x, w1) + b1
    hidden = tf.tanh(pre_activations)
    logits = tf.matmul(hidden, w2)
    collection.register_fully_connected((w1, b1), x, pre_activations)
    collection.register_fully_connected(w2, hidden, logits)
    collection.register_softmax_cross_entropy_loss(logits)


_SCALES = np.array([2.0, 1.0, 0.7, 0.4, 0.2])
_CENTRED = _normal(5, 32, 5) * _SCALES
_CENTRED -= _CENTRED.mean(0)

# The squared error's Fisher matrix of one layer is A (x) I, whose damped inverse is a
# Kronecker product, too; with inputs of mean zero that of scale and shift is diagonal.
DENSE = Case("dense", [(5, 3), (3,)], _normal(5, 64, 5) * _SCALES, _dense, 0.1)
CONVOLUTION = Case(
    "convolution", [(2, 2, 2, 3), (3,)], _normal(6, 16, 4, 4, 2), _convolution, 0.5
)
SCALE_AND_SHIFT = Case("scale and shift", [(5,), (5,)], _CENTRED, _scale_and_shift, 0.1)
# Here only damping makes up for what no Kronecker product can be.
TWO_LAYERS = Case(
    "two layers", [(5, 6), (6,), (6, 3)], _normal(7, 64, 5) * _SCALES, _two_layers, 2.0
)
CASES = (DENSE, CONVOLUTION, SCALE_AND_SHIFT, TWO_LAYERS)
