"""Learned inverse curvature of single layers: what FishLeg needs of a kind of layer.

A `LayerInverse` is a linear map `u -> Q(λ) u` of vectors shaped like a layer's
parameters, symmetric and positive semi-definite for every value of its parameters λ:

| block of the layer | Q |
|---|---|
| dense, convolution (any number of uses) | `L L' (x) R R'` |
| anything else | `diag(d²)` |

Another kind of layer needs Q and a registration:

    @layer_inverses.register(fisher_blocks.ScaleAndShiftFullFB)
    class MyInverse(layer_inverses.LayerInverse):
        def initial_values(self, scale): ...
        def multiply(self, values, vector): ...
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import fisher_blocks as fb
from kfac.python.ops.fisher_blocks.kronecker import from_matrix, to_matrix

Values = Mapping[str, tf.Tensor]

_REGISTRY: dict[type, type] = {}


class LayerInverse(abc.ABC):
    """Q of one group of parameters.

    Args:
      block: the Fisher block that the group is registered with; tells the kind of the
        layer. Its factors need not exist.
      params: the group's variables.
    """

    def __init__(self, block: Any, params: Sequence[Any]):
        del block
        self._shapes = [tuple(v.shape.as_list()) for v in params]

    @abc.abstractmethod
    def initial_values(self, scale: float) -> dict[str, np.ndarray]:
        """λ by name, such that `Q = scale I`."""

    @abc.abstractmethod
    def multiply(self, values: Values, vector: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """`Q u`, differentiable in the values.

        Args:
          values: λ.
          vector: u, one tensor for each parameter.
        """


def register(*block_classes: type) -> Callable[[type], type]:
    """Decorates the `LayerInverse` of some Fisher blocks and of their subclasses."""

    def decorate(cls: type) -> type:
        _REGISTRY.update(dict.fromkeys(block_classes, cls))
        return cls

    return decorate


def of_block(block: Any, params: Sequence[Any]) -> LayerInverse:
    """The layer inverse of a Fisher block, by its most specific registered class."""
    for cls in type(block).__mro__:
        if cls in _REGISTRY:
            return _REGISTRY[cls](block, params)
    return DiagonalInverse(block, params)


class DiagonalInverse(LayerInverse):
    """`diag(d²)`."""

    def initial_values(self, scale):
        return {
            f"diagonal_{i}": np.full(shape, scale**0.5)
            for i, shape in enumerate(self._shapes)
        }

    def multiply(self, values, vector):
        return [
            tf.square(values[f"diagonal_{i}"]) * part for i, part in enumerate(vector)
        ]


@register(fb.KroneckerProductFB, fb.FullyConnectedDiagonalFB, fb.ConvDiagonalFB)
class KroneckerInverse(LayerInverse):
    """`L L' (x) R R'`: the matrix V `[d_in, d_out]` becomes `L L' V R R'`.

    The leading axes of the weights are rows, the bias is the last row.  A side longer
    than `MAX_SIDE` (the words of an embedding) has a diagonal L or R.
    """

    MAX_SIDE = 2048

    def __init__(self, block: Any, params: Sequence[Any]):
        super().__init__(block, params)
        elements = sum(v.shape.num_elements() for v in params)
        if len(params) == 2:
            self._columns = params[1].shape.num_elements()
        else:
            features = getattr(block, "_output_features", None)
            self._columns = features or self._shapes[0][-1]
        self._rows = elements // self._columns

    def initial_values(self, scale):
        def initial(side):
            return scale**0.25 * (np.ones if side > self.MAX_SIDE else np.eye)(side)

        return {"left": initial(self._rows), "right": initial(self._columns)}

    def multiply(self, values, vector):
        vector = list(vector)
        matrix = _square_times(values["left"], to_matrix(vector, columns=self._columns))
        matrix = tf.transpose(_square_times(values["right"], tf.transpose(matrix)))
        templates = [
            tf.ensure_shape(v, s) for v, s in zip(vector, self._shapes, strict=True)
        ]
        return list(from_matrix(templates, matrix))


@register(fb.DepthwiseConvKFCBasicFB, fb.DepthwiseConvDiagonalFB)
class _DepthwiseInverse(DiagonalInverse):
    """A convolution by the blocks' classes, but the filters have no common input."""


def _square_times(root: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    """`L L' V` for L `[n, n]`, or `[n]` of a diagonal one."""
    if root.shape.rank == 1:
        return tf.square(root)[:, tf.newaxis] * matrix
    return tf.matmul(root, tf.matmul(root, matrix, transpose_a=True))
