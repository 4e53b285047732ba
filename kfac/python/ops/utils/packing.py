"""Many tensors as one vector, for collectives: triangles of symmetric matrices only.

A collective costs a latency of its own, so whatever travels at the same point of a
step travels together.  Shapes are static and nothing but slices, pads and
concatenations is used, so that it also compiles for TPUs.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence

import tensorflow as tf


class Layout(enum.Enum):
    """Which entries of a matrix have to travel.

    FULL: all; also for tensors that are no matrices.
    SYMMETRIC: the lower triangle, since the upper one is its mirror image.
    LOWER: the lower triangle, since the rest is zero.
    """

    FULL = "full"
    SYMMETRIC = "symmetric"
    LOWER = "lower"


@dataclasses.dataclass(frozen=True)
class Spec:
    """A tensor's static shape and dtype, and which part of it travels."""

    shape: tuple[int, ...]
    dtype: tf.DType
    layout: Layout = Layout.FULL

    @classmethod
    def of(cls, tensor: tf.Tensor | tf.Variable, layout: Layout = Layout.FULL) -> Spec:
        """The spec of a tensor or variable with a fully defined static shape."""
        shape = tuple(tf.TensorShape(tensor.shape).as_list())
        return cls(shape, tf.as_dtype(tensor.dtype).base_dtype, layout)

    @property
    def size(self) -> int:
        """Number of entries that travel."""
        if self.layout is Layout.FULL:
            return math.prod(self.shape)
        n = self.shape[0]
        return n * (n + 1) // 2

    @property
    def num_bytes(self) -> int:
        """Bytes that travel."""
        return self.size * self.dtype.size


class Packing:
    """How tensors of given specs become one vector per dtype, and back."""

    def __init__(self, specs: Sequence[Spec]):
        self._specs = list(specs)
        self._positions: dict[tf.DType, list[int]] = {}
        for position, spec in enumerate(self._specs):
            self._positions.setdefault(spec.dtype, []).append(position)

    @property
    def sizes(self) -> dict[tf.DType, int]:
        """Length of the vector of each dtype."""
        return {
            dtype: sum(self._specs[i].size for i in positions)
            for dtype, positions in self._positions.items()
        }

    def pack(self, tensors: Sequence[tf.Tensor | None]) -> list[tf.Tensor]:
        """One vector per dtype, in the order of `sizes`; zeros in the place of None."""
        return [
            tf.concat([self._packed(i, tensors[i]) for i in positions], axis=0)
            for positions in self._positions.values()
        ]

    def _packed(self, position: int, tensor: tf.Tensor | None) -> tf.Tensor:
        spec = self._specs[position]
        if tensor is None:
            return tf.zeros([spec.size], spec.dtype)
        if spec.layout is Layout.FULL:
            return tf.reshape(tensor, [-1])
        return pack_triangle(tf.ensure_shape(tensor, spec.shape))

    def unpack(self, vectors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The inverse of `pack`."""
        tensors: list[tf.Tensor | None] = [None] * len(self._specs)
        for vector, positions in zip(vectors, self._positions.values(), strict=True):
            sizes = [self._specs[i].size for i in positions]
            for i, part in zip(positions, tf.split(vector, sizes), strict=True):
                spec = self._specs[i]
                if spec.layout is Layout.FULL:
                    tensors[i] = tf.reshape(part, spec.shape)
                else:
                    tensors[i] = unpack_triangle(part, spec.shape[0], spec.layout)
        return tensors


def pack_triangle(matrix: tf.Tensor) -> tf.Tensor:
    """The lower triangle of `[n, n]` as a vector `[n (n + 1) / 2]`.

    The diagonal blocks are folded into one rectangle: the lower triangle of the first
    fills what the transposed lower triangle of the second leaves free ("rectangular
    full packed format", Gustavson et al., ACM Trans. Math. Softw. 37, 2010).
    """
    n = matrix.shape[0]
    head, odd = (n + 1) // 2, n % 2
    first = tf.linalg.band_part(matrix[:head, :head], -1, 0)
    second = tf.transpose(tf.linalg.band_part(matrix[head:, head:], -1, 0))
    folded = tf.pad(first, [[1 - odd, 0], [0, 0]])
    folded += tf.pad(second, [[0, 1], [odd, 0]])
    return tf.reshape(tf.concat([folded, matrix[head:, :head]], axis=0), [-1])


def unpack_triangle(vector: tf.Tensor, n: int, layout: Layout) -> tf.Tensor:
    """The matrix `[n, n]` that `pack_triangle` made a vector of."""
    head, odd = (n + 1) // 2, n % 2
    rectangle = tf.reshape(vector, [n + 1 - odd, head])
    folded, below = tf.split(rectangle, [head + 1 - odd, n - head])
    first = tf.linalg.band_part(folded[1 - odd :], -1, 0)
    second = tf.transpose(tf.linalg.band_part(folded[:-1, odd:], 0, -1))
    lower = tf.concat(
        [
            tf.concat([first, tf.zeros([head, n - head], vector.dtype)], axis=1),
            tf.concat([below, second], axis=1),
        ],
        axis=0,
    )
    if layout is Layout.LOWER:
        return lower
    return tf.linalg.set_diag(lower + tf.transpose(lower), tf.linalg.diag_part(lower))
