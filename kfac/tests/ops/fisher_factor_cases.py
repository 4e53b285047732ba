"""Every Fisher factor class with data, and its statistic by slow NumPy loops."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import deferred
from kfac.python.ops import fisher_factors as ff
from kfac.python.ops.fisher_blocks import _package_func

tf1 = tf.compat.v1


def damping_func(value: float, func_id: Any = None):
    return _package_func(lambda: value, (value if func_id is None else func_id,))


def slow_patches(x, filter_shape, padding, strides=None, dilations=None):
    """`[batch, locations, filter_size * channels]` of `[batch, *spatial, channels]`."""
    sizes = filter_shape[:-2]
    n = len(sizes)
    strides = strides or [1] * n
    dilations = dilations or [1] * n
    counts, before = [], []
    for axis in range(n):
        length = x.shape[1 + axis]
        extent = (sizes[axis] - 1) * dilations[axis] + 1
        if padding == "SAME":
            count = math.ceil(length / strides[axis])
            total = max((count - 1) * strides[axis] + extent - length, 0)
            before.append(total // 2)
        else:
            count = math.ceil((length - extent + 1) / strides[axis])
            before.append(0)
        counts.append(count)
    result = np.zeros((len(x), math.prod(counts), math.prod(sizes), x.shape[-1]))
    for b in range(len(x)):
        for loc, start in enumerate(itertools.product(*map(range, counts))):
            for off, step in enumerate(itertools.product(*map(range, sizes))):
                where = tuple(
                    start[a] * strides[a] + step[a] * dilations[a] - before[a]
                    for a in range(n)
                )
                if all(0 <= where[a] < x.shape[1 + a] for a in range(n)):
                    result[b, loc, off] = x[(b, *where)]
    return result.reshape(len(x), math.prod(counts), -1)


def with_ones(rows, has_bias=True):
    return (
        np.concatenate([rows, np.ones((*rows.shape[:-1], 1))], -1) if has_bias else rows
    )


def mean_outer(rows):
    return sum(np.outer(row, row) for row in rows) / len(rows)


def located(grads):
    return grads.reshape(len(grads), -1, grads.shape[-1])


def example_gradients(inputs, grads):
    """Weight gradient of each case from `[batch, uses, features]` data."""
    return [
        sum(np.outer(a, g) for a, g in zip(a_b, g_b, strict=True))
        for a_b, g_b in zip(inputs, grads, strict=True)
    ]


def mean_square(gradients):
    return sum(g**2 for g in gradients) / len(gradients)


@dataclasses.dataclass
class Case:
    """A factor class, how to build it from shards, and what one shard's cov is.

    Attributes:
      name: id of the parametrised tests.
      build: (inputs by tower, grads by source and tower) -> factor.
      expected: (input shard or None, gradient shard or None) -> cov of the shard.
      input_shape: of an input shard; None if the class takes none.
      grad_shape: of a gradient shard; None if the class takes none.
      batch: cases of one shard.
      towers: number of towers.
      sources: number of sources.
      kind: "dense", "diagonal" or "sua".
      ids: number of classes if inputs are integer ids.
    """

    name: str
    build: Callable[[Any, Any], ff.FisherFactor]
    expected: Callable[[Any, Any], np.ndarray]
    input_shape: tuple[int, ...] | None = None
    grad_shape: tuple[int, ...] | None = None
    batch: int = 3
    towers: int = 2
    sources: int = 2
    kind: str = "dense"
    ids: int | None = None

    def data(self, seed: int):
        """Random shards: inputs by tower, gradients by source and tower."""
        rng = np.random.RandomState(seed)
        inputs = grads = None
        if self.input_shape is not None:
            inputs = tuple(
                rng.randint(self.ids, size=self.input_shape)
                if self.ids
                else rng.randn(*self.input_shape) + 0.5
                for _ in range(self.towers)
            )
        if self.grad_shape is not None:
            grads = tuple(
                tuple(rng.randn(*self.grad_shape) for _ in range(self.towers))
                for _ in range(self.sources)
            )
        return inputs, grads

    def expected_total(self, data) -> np.ndarray:
        """Sum over sources, mean over towers."""
        inputs, grads = data
        sources = self.sources if grads is not None else 1
        return (
            sum(
                self.expected(
                    None if inputs is None else inputs[tower],
                    None if grads is None else grads[source][tower],
                )
                for source in range(sources)
                for tower in range(self.towers)
            )
            / self.towers
        )

    def tensors(self, data, dtype=tf.float64):
        """The data as graph tensors, of names that tell nothing."""
        return map_data(
            lambda array: tf1.placeholder_with_default(
                array
                if array.dtype.kind == "i"
                else array.astype(dtype.as_numpy_dtype),
                array.shape,
            ),
            data,
            self.ids,
        )

    def feed(self, tensors, data):
        keys, values = [], []
        map_data(keys.append, tensors)
        map_data(values.append, data)
        return dict(zip(keys, values, strict=True))


def map_data(function, data, ids=None):
    inputs, grads = data

    def of_input(value):
        result = function(value)
        if ids:
            result.one_hot_depth = ids
        return result

    inputs = None if inputs is None else tuple(of_input(x) for x in inputs)
    if grads is not None:
        grads = tuple(tuple(function(g) for g in towers) for towers in grads)
    return inputs, grads


def deferred_of(tensor):
    return deferred.DeferredTensor(
        lambda: tf.identity(tensor),
        tensor.shape,
        tensor.dtype,
        name=tensor.name,
        device=tensor.device,
        one_hot_depth=getattr(tensor, "one_hot_depth", None),
    )


X2 = (3, 2)
IMAGE = (3, 4, 4, 2)
FILTER = (2, 3, 2, 3)
SEQUENCE = (3, 2, 2)  # uses, batch, features


def _fc_diagonal(x, g):
    return mean_square(example_gradients(with_ones(x)[:, None], g[:, None]))


def _conv_diagonal(x, g):
    patches = slow_patches(x, FILTER, "SAME")
    return mean_square(example_gradients(with_ones(patches), located(g)))


def _depthwise(x, g):
    """Filter `[2, 3, 2, 2]`: each channel has its own two outputs."""
    patches = slow_patches(x, FILTER, "SAME").reshape(len(x), -1, 6, 2)
    grads = located(g).reshape(len(x), -1, 2, 2)
    return mean_square(
        [
            sum(p[:, :, None] * d[None] for p, d in zip(p_b, g_b, strict=True))
            for p_b, g_b in zip(patches, grads, strict=True)
        ]
    ).reshape(6, 4)


def _conv_input(x, g):
    rows = with_ones(slow_patches(x, FILTER, "SAME"))
    return mean_outer(rows.reshape(-1, rows.shape[-1]))


def _scale_shift_rows(x, g):
    return np.concatenate([(x * g).sum(1), g.reshape(len(g), -1)], axis=1)


def _sua(x, g):
    pixels = x.reshape(-1, x.shape[-1])
    return np.cov(pixels.T, bias=True)


def _folded(data):
    return data.reshape(-1, data.shape[-1])


CASES = [
    Case(
        "NaiveFull",
        lambda x, g: ff.NaiveFullFactor(tuple(source for source in g), 5),
        lambda x, g: np.outer(g, g) / 5,
        grad_shape=(2, 2),
        batch=5,
        towers=1,
    ),
    Case(
        "NaiveDiagonal",
        lambda x, g: ff.NaiveDiagonalFactor(tuple(source[0] for source in g), 5),
        lambda x, g: g**2 / 5,
        grad_shape=(2, 3),
        batch=5,
        towers=1,
        kind="diagonal",
    ),
    Case(
        "DiagonalKronecker",
        lambda x, g: ff.DiagonalKroneckerFactor(g, True),
        lambda x, g: np.mean(with_ones(g) ** 2, axis=0),
        grad_shape=X2,
        kind="diagonal",
    ),
    Case(
        "DiagonalKronecker of ids",
        lambda x, g: ff.DiagonalKroneckerFactor((x,), False, tf.float64),
        lambda x, g: np.mean(np.eye(4)[x], axis=0),
        input_shape=(3,),
        ids=4,
        kind="diagonal",
    ),
    Case(
        "DiagonalMultiKF",
        lambda x, g: ff.DiagonalMultiKF(g, 3, True),
        lambda x, g: np.mean(with_ones(_folded(g)) ** 2, axis=0),
        grad_shape=SEQUENCE,
        batch=2,
        kind="diagonal",
    ),
    Case(
        "DiagonalMultiKF of ids",
        lambda x, g: ff.DiagonalMultiKF((x,), 3, False, tf.float64),
        lambda x, g: np.mean(np.eye(4)[x.ravel()], axis=0),
        input_shape=(3, 2),
        ids=4,
        batch=2,
        kind="diagonal",
    ),
    Case(
        "FullyConnectedDiagonal",
        lambda x, g: ff.FullyConnectedDiagonalFactor(x, g, True),
        _fc_diagonal,
        input_shape=X2,
        grad_shape=(3, 4),
        kind="diagonal",
    ),
    Case(
        "FullyConnectedKronecker",
        lambda x, g: ff.FullyConnectedKroneckerFactor(g),
        lambda x, g: mean_outer(g),
        grad_shape=X2,
    ),
    Case(
        "FullyConnectedKronecker with bias",
        lambda x, g: ff.FullyConnectedKroneckerFactor((x,), True),
        lambda x, g: mean_outer(with_ones(x)),
        input_shape=X2,
    ),
    Case(
        "FullyConnectedMultiKF",
        lambda x, g: ff.FullyConnectedMultiKF(g, 3, True),
        lambda x, g: mean_outer(with_ones(_folded(g))),
        grad_shape=SEQUENCE,
        batch=2,
    ),
    Case(
        "FullyConnectedMultiKF of folded data",
        lambda x, g: ff.FullyConnectedMultiKF((x,), 3),
        lambda x, g: mean_outer(x),
        input_shape=(6, 2),
        batch=2,
    ),
    Case(
        "FullyConnectedReduce mean",
        lambda x, g: ff.FullyConnectedReduceKroneckerFactor((x,), 3, "mean", True),
        lambda x, g: mean_outer(with_ones(x.reshape(3, 2, 2).mean(0))),
        input_shape=(6, 2),
        batch=2,
    ),
    Case(
        "FullyConnectedReduce sum",
        lambda x, g: ff.FullyConnectedReduceKroneckerFactor(g, None, "sum"),
        lambda x, g: mean_outer(g.sum(0)),
        grad_shape=SEQUENCE,
        batch=2,
    ),
    Case(
        "ScaleAndShiftFull",
        lambda x, g: ff.ScaleAndShiftFullFactor(x, g, (1,), ()),
        lambda x, g: mean_outer(_scale_shift_rows(x, g)),
        input_shape=(3, 2, 2),
        grad_shape=(3, 2, 2),
    ),
    Case(
        "ScaleAndShiftDiagonal",
        lambda x, g: ff.ScaleAndShiftDiagonalFactor(x, g, (1,), ()),
        lambda x, g: np.mean(_scale_shift_rows(x, g) ** 2, axis=0),
        input_shape=(3, 2, 2),
        grad_shape=(3, 2, 2),
        kind="diagonal",
    ),
    Case(
        "ConvDiagonal",
        lambda x, g: ff.ConvDiagonalFactor(
            x, g, FILTER, (1, 1, 1, 1), "SAME", has_bias=True
        ),
        _conv_diagonal,
        input_shape=IMAGE,
        grad_shape=(3, 4, 4, 3),
        kind="diagonal",
    ),
    Case(
        "DepthwiseConvDiagonal",
        lambda x, g: ff.DepthwiseConvDiagonalFactor(
            x, g, (2, 3, 2, 2), (1, 1, 1, 1), "SAME"
        ),
        _depthwise,
        input_shape=IMAGE,
        grad_shape=(3, 4, 4, 4),
        kind="diagonal",
    ),
    Case(
        "ConvInput",
        lambda x, g: ff.ConvInputKroneckerFactor(x, FILTER, "SAME", has_bias=True),
        _conv_input,
        input_shape=IMAGE,
    ),
    Case(
        "ConvInputMulti",
        lambda x, g: ff.ConvInputMultiKF(x, FILTER, "SAME", 3, has_bias=True),
        _conv_input,
        input_shape=IMAGE,
        batch=1,
    ),
    Case(
        "ConvInputReduce",
        lambda x, g: ff.ConvInputReduceKroneckerFactor(
            x, FILTER, "SAME", has_bias=True
        ),
        lambda x, g: mean_outer(with_ones(slow_patches(x, FILTER, "SAME").mean(1))),
        input_shape=IMAGE,
    ),
    Case(
        "ConvInputSUA",
        lambda x, g: ff.ConvInputSUAKroneckerFactor(x, FILTER, True),
        _sua,
        input_shape=IMAGE,
        towers=1,
        kind="sua",
    ),
    Case(
        "ConvOutput",
        lambda x, g: ff.ConvOutputKroneckerFactor(g),
        lambda x, g: mean_outer(_folded(g)),
        grad_shape=IMAGE,
    ),
    Case(
        "ConvOutputMulti",
        lambda x, g: ff.ConvOutputMultiKF(g, 3),
        lambda x, g: mean_outer(_folded(g)),
        grad_shape=IMAGE,
        batch=1,
    ),
    Case(
        "ConvOutputReduce",
        lambda x, g: ff.ConvOutputReduceKroneckerFactor(g),
        lambda x, g: mean_outer(located(g).sum(1)),
        grad_shape=IMAGE,
    ),
]
BY_NAME = {case.name: case for case in CASES}
DENSE = [case for case in CASES if case.kind == "dense"]
DIAGONAL = [case for case in CASES if case.kind == "diagonal"]
