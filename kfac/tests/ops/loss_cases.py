"""One description per loss class, for the suites that every loss runs through."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import loss_functions


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A loss class with float64 parameters `[batch, ...]`.

    Attributes:
      params: constructor arguments that are differentiated.
      kind: how targets look: "real", "class", "onehot" or "binary".
    """

    name: str
    cls: type
    params: tuple[np.ndarray, ...]
    kind: str
    kwargs: dict = dataclasses.field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.params[0].shape[0]

    @property
    def natural(self) -> bool:
        return issubclass(self.cls, loss_functions.NaturalParamsNegativeLogProbLoss)

    @property
    def inner_shape(self) -> tuple[int, ...]:
        shape = self.params[0].shape
        return (*shape[:-1], len(self.params) * shape[-1])

    def loss(self, dtype=np.float64, params=None, **kwargs: Any):
        """The loss object, on constants of `dtype` or on the given tensors."""
        if params is None:
            params = [tf.constant(p.astype(dtype)) for p in self.params]
        return self.cls(*params, **self.kwargs, **kwargs)

    def structure(self, arrays):
        """Packs a list like `params` into what products take and return."""
        return arrays[0] if len(self.params) == 1 else tuple(arrays)

    def some_targets(self) -> np.ndarray:
        return self.outcomes()[-1][0]

    def outcomes(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(targets, probability per case) pairs that sum up expectations exactly.

        Normal targets are the nodes of a Gauss-Hermite rule; five nodes integrate
        polynomials up to degree 9, and squares of scores have degree 4 at most.
        """
        shape = self.params[0].shape
        if self.kind == "real":
            mean = self.params[0]
            var = self.params[1] if len(self.params) == 2 else self.kwargs["var"]
            nodes, weights = np.polynomial.hermite.hermgauss(5)
            per_element = [
                (mean + np.sqrt(2 * var) * x, np.full(shape, w / np.sqrt(np.pi)))
                for x, w in zip(nodes, weights, strict=True)
            ]
        elif self.kind == "binary":
            p = 1 / (1 + np.exp(-self.params[0]))
            per_element = [(np.zeros(shape), 1 - p), (np.ones(shape), p)]
        else:
            p = softmax(self.params[0])
            per_element = [
                (np.full(shape[:-1], k), p[..., k]) for k in range(shape[-1])
            ]
        found = []
        element_shape = per_element[0][0].shape
        count = int(np.prod(element_shape[1:]))
        flat = [
            (t.reshape(self.batch, count), w.reshape(self.batch, count))
            for t, w in per_element
        ]
        for choice in itertools.product(range(len(flat)), repeat=count):
            targets = np.stack([flat[c][0][:, i] for i, c in enumerate(choice)], 1)
            weights = np.stack([flat[c][1][:, i] for i, c in enumerate(choice)], 1)
            targets = targets.reshape(element_shape)
            if self.kind in ("class", "onehot"):
                targets = targets.astype(np.int32)
            if self.kind == "onehot":
                targets = np.eye(shape[-1], dtype=np.int32)[targets]
            found.append((targets, weights.prod(1)))
        return found


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


CASES = (
    Case(
        "normal",
        loss_functions.NormalMeanNegativeLogProbLoss,
        (_normal(0, 2, 2),),
        "real",
        {"var": 0.3},
    ),
    Case(
        "normal sequence",
        loss_functions.NormalMeanNegativeLogProbLoss,
        (_normal(1, 2, 2, 1),),
        "real",
        {"var": 2},
    ),
    Case(
        "normal mean and variance",
        loss_functions.NormalMeanVarianceNegativeLogProbLoss,
        (_normal(2, 2, 2), np.exp(_normal(3, 2, 2))),
        "real",
    ),
    Case(
        "categorical",
        loss_functions.CategoricalLogitsNegativeLogProbLoss,
        (_normal(4, 2, 3),),
        "class",
    ),
    Case(
        "categorical sequence",
        loss_functions.CategoricalLogitsNegativeLogProbLoss,
        (_normal(5, 2, 2, 3),),
        "class",
    ),
    Case(
        "one-hot categorical",
        loss_functions.OnehotCategoricalLogitsNegativeLogProbLoss,
        (_normal(6, 2, 3),),
        "onehot",
    ),
    Case(
        "Bernoulli",
        loss_functions.MultiBernoulliNegativeLogProbLoss,
        (_normal(7, 2, 3),),
        "binary",
    ),
    Case(
        "Bernoulli sequence",
        loss_functions.MultiBernoulliNegativeLogProbLoss,
        (_normal(8, 2, 2, 2),),
        "binary",
    ),
)
BY_NAME = {case.name: case for case in CASES}
IDS = [case.name for case in CASES]


def per_case(structure) -> tf.Tensor:
    """Flattens a parameter structure to `[batch, size]`."""
    tensors = tf.nest.flatten(structure)
    return tf.concat([tf.reshape(t, [tf.shape(t)[0], -1]) for t in tensors], 1)


def in_function(build, *inputs):
    """Runs `build` once in the graph of a `tf.function`; NumPy results."""
    results = tf.function(build, autograph=False)(*inputs)
    return tf.nest.map_structure(lambda t: t.numpy(), results)
