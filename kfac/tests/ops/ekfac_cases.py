"""Small networks of every kind of layer that EKFAC covers, and their exact blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import estimator, layer_collection
from kfac.tests import estimator_cases, graph_kinds, oracle

tf1 = tf.compat.v1

KRON, KRON_INDEP = "kron", "kron_indep"
DAMPING = 0.05


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its parameters and its batch, all float64.

    Attributes:
      name: id of the test.
      shapes: of the parameters.
      groups: indices of the parameters of each layer.
      x: inputs `[batch, ...]`.
      forward: `(params, x)` -> output, and per layer the name of the registration
        method, inputs, outputs and further arguments.
      loss: the oracle's loss.
      targets: `[batch, ...]`.
    """

    name: str
    shapes: Sequence[tuple[int, ...]]
    groups: Sequence[tuple[int, ...]]
    x: np.ndarray
    forward: Callable[..., tuple[Any, list]]
    loss: Any
    targets: np.ndarray

    def __str__(self) -> str:
        return self.name

    @property
    def params(self) -> list[np.ndarray]:
        """Random values."""
        rng = np.random.RandomState(3)
        return [0.7 * rng.randn(*shape) for shape in self.shapes]

    def first(self, count: int) -> Case:
        """The same network on the first examples."""
        return dataclasses.replace(self, x=self.x[:count], targets=self.targets[:count])

    def _net(self, params, x):
        return [self.forward(params, x)[0]]

    def _blocks_of(self, matrix: np.ndarray) -> list[np.ndarray]:
        """Diagonal blocks, one per layer."""
        ends = np.cumsum([np.prod(shape, dtype=int) for shape in self.shapes])
        starts = [0, *ends[:-1]]
        ranges = [
            np.concatenate([np.arange(starts[i], ends[i]) for i in group])
            for group in self.groups
        ]
        return [matrix[np.ix_(r, r)] for r in ranges]

    def fisher_blocks(self) -> list[np.ndarray]:
        """Exact blocks of the Fisher matrix, mean over the batch."""
        matrix = oracle.fisher(self._net, self.params, self.x, [self.loss])
        return self._blocks_of(matrix)

    def empirical_blocks(self) -> list[np.ndarray]:
        """Exact blocks of the empirical Fisher matrix."""
        loss = dataclasses.replace(self.loss, coeff=np.sqrt(self.loss.coeff))
        rows = oracle.example_gradients(
            self._net, self.params, self.x, [loss], [self.targets]
        )
        return self._blocks_of(rows.T @ rows / len(rows))

    def blocks(self, mode: str) -> list[np.ndarray]:
        """What the estimation mode estimates."""
        return self.empirical_blocks() if mode == "empirical" else self.fisher_blocks()


def _dense(params, x):
    w, b, v = params
    pre_activation = tf.matmul(x, w) + b
    hidden = tf.tanh(pre_activation)
    out = tf.matmul(hidden, v)
    return out, [
        ("fully_connected", x, pre_activation, {}),
        ("fully_connected", hidden, out, {}),
    ]


def _linear(params, x):
    first, second = params
    hidden = tf.matmul(x, first)
    out = tf.matmul(hidden, second)
    return out, [
        ("fully_connected", x, hidden, {}),
        ("fully_connected", hidden, out, {}),
    ]


def _conv(params, x):
    kernel, bias, v = params
    options = dict(strides=[1, 1, 2, 1], padding="SAME")
    pre_activation = tf.nn.conv2d(x, kernel, **options) + bias
    hidden = tf.reshape(tf.tanh(pre_activation), [-1, 12])
    out = tf.matmul(hidden, v)
    return out, [
        ("conv2d", x, pre_activation, options),
        ("fully_connected", hidden, out, {}),
    ]


def _conv1d(params, x):
    kernel, bias, v = params
    pre_activation = tf.nn.conv1d(x, kernel, stride=1, padding="VALID") + bias
    hidden = tf.reduce_sum(tf.tanh(pre_activation), axis=1)
    out = tf.matmul(hidden, v)
    options = dict(strides=[1, 1, 1], padding="VALID")
    return out, [
        ("conv1d", x, pre_activation, options),
        ("fully_connected", hidden, out, {}),
    ]


def _conv3d(params, x):
    (kernel,) = params
    pre_activation = tf.nn.conv3d(x, kernel, strides=[1] * 5, padding="VALID")
    out = tf.reduce_sum(tf.tanh(pre_activation), axis=[1, 2, 3])
    return out, [("convolution", x, pre_activation, dict(padding="VALID"))]


def _multi(params, x):
    w, b, v = params
    inputs = [x[:, t] for t in range(3)]
    outputs = [tf.matmul(inputs[0], w) + b]
    for t in (1, 2):  # A recurrent layer without recurrent weights of its own.
        inputs[t] += tf.tanh(outputs[-1])[:, :2]
        outputs.append(tf.matmul(inputs[t], w) + b)
    hidden = tf.tanh(outputs[-1]) + tf.tanh(outputs[0])
    out = tf.matmul(hidden, v)
    return out, [
        ("fully_connected_multi", inputs, outputs, {}),
        ("fully_connected", hidden, out, {}),
    ]


def _heads(params, x):
    into, back = params
    options = dict(batch_major=True, num_uses=2)
    heads = tf.einsum("bti,ihd->bthd", x, into)
    hidden = tf.tanh(heads) * tf.reduce_mean(heads, axis=1, keepdims=True)
    sequence = tf.einsum("bthd,hdo->bto", hidden, back)
    out = tf.reduce_sum(tf.sin(sequence), axis=1)
    joined = tf.reshape(hidden, [-1, 2, 6])
    return out, [
        ("fully_connected_multi", x, heads, options),
        ("fully_connected_multi", joined, sequence, options),
    ]


def _conv_multi(params, x):
    kernel, bias = params
    options = dict(strides=[1, 1, 1, 1], padding="VALID")
    inputs = [x[:, t] for t in range(2)]
    outputs = [tf.nn.conv2d(image, kernel, **options) + bias for image in inputs]
    out = tf.reduce_sum(tf.tanh(outputs[0]) * tf.sigmoid(outputs[1]), axis=[1, 2])
    return out, [("conv2d_multi", inputs, outputs, options)]


def _x(*shape):
    return np.random.RandomState(1).randn(*shape) + 0.3


_labels = np.random.RandomState(2).randint
_reals = np.random.RandomState(2).randn

DENSE = Case(
    "dense",
    [(3, 4), (4,), (4, 3)],
    [(0, 1), (2,)],
    _x(7, 3),
    _dense,
    oracle.Categorical(),
    _labels(3, size=7),
)
# Several layers of K-FAC's theory are exact here.
LINEAR = Case(
    "deep linear",
    [(3, 4), (4, 2)],
    [(0,), (1,)],
    _x(6, 3),
    _linear,
    oracle.Normal(var=0.5),
    _reals(6, 2),
)
CONV = Case(
    "conv2d",
    [(2, 2, 1, 2), (2,), (12, 2)],
    [(0, 1), (2,)],
    _x(5, 3, 3, 1),
    _conv,
    oracle.Bernoulli(coeff=0.5),
    _labels(2, size=(5, 2)).astype(float),
)
CONV1D = Case(
    "conv1d",
    [(2, 2, 3), (3,), (3, 2)],
    [(0, 1), (2,)],
    _x(5, 4, 2),
    _conv1d,
    oracle.Normal(var=0.7),
    _reals(5, 2),
)
CONV3D = Case(
    "conv3d",
    [(2, 1, 2, 1, 2)],
    [(0,)],
    _x(4, 3, 2, 2, 1),
    _conv3d,
    oracle.Categorical(coeff=2.0),
    _labels(2, size=4),
)
MULTI = Case(
    "dense, three uses",
    [(2, 3), (3,), (3, 3)],
    [(0, 1), (2,)],
    _x(6, 3, 2),
    _multi,
    oracle.Categorical(),
    _labels(3, size=6),
)
# Weights into two heads of three features, and from them, as attention layers have.
HEADS = Case(
    "attention heads",
    [(3, 2, 3), (2, 3, 2)],
    [(0,), (1,)],
    _x(6, 2, 3),
    _heads,
    oracle.Normal(var=0.5),
    _reals(6, 2),
)
CONV_MULTI = Case(
    "conv2d, two uses",
    [(2, 2, 1, 2), (2,)],
    [(0, 1)],
    _x(4, 2, 3, 3, 1),
    _conv_multi,
    oracle.Normal(var=0.5),
    _reals(4, 2),
)
CASES = (DENSE, CONV, CONV1D, CONV3D, MULTI, CONV_MULTI)


@dataclasses.dataclass
class Model:
    """A case in the current graph.

    Attributes:
      collection: with layers and loss registered.
      variables: of the parameters.
      x: the batch.
      out: the network's output.
    """

    collection: Any
    variables: list[tf.Variable]
    x: tf.Tensor
    out: tf.Tensor

    def estimator(self, **kwargs: Any) -> estimator.FisherEstimator:
        """An estimator of the collection."""
        arguments = dict(
            variables=self.variables,
            cov_ema_decay=0.9,
            damping=DAMPING,
            layer_collection=self.collection,
            estimation_mode="exact",
        )
        return estimator.make_fisher_estimator(**(arguments | kwargs))


def build(case: Case, approx: str, dynamic: bool = False) -> Model:
    """Builds `case` in the current graph.

    Args:
      case: the case.
      approx: "ekfac", "ekfac_product", or "kron", which becomes "kron_indep" where
        layers are used several times.
      dynamic: whether the batch size is unknown statically.
    """

    def feed(value):
        shape = [None if dynamic else len(value), *value.shape[1:]]
        return tf1.placeholder_with_default(value, shape)

    x = feed(case.x)
    variables = [
        graph_kinds.variable(value, f"p{i}") for i, value in enumerate(case.params)
    ]
    out, layers = case.forward(variables, x)
    collection = layer_collection.LayerCollection()
    for group, (kind, inputs, outputs, options) in zip(
        case.groups, layers, strict=True
    ):
        params = tuple(variables[i] for i in group)
        params = params if len(params) > 1 else params[0]
        name = approx
        if approx == KRON and kind.endswith("multi"):
            name = KRON_INDEP
        getattr(collection, f"register_{kind}")(
            params, inputs=inputs, outputs=outputs, approx=name, **options
        )
    estimator_cases._REGISTER[type(case.loss)](
        collection,
        out,
        case.loss,
        {"coeff": case.loss.coeff, "targets": feed(case.targets)},
    )
    return Model(collection, variables, x, out)


def in_turn(steps: Sequence[Callable[[], Any]]) -> Any:
    """Builds one thing after the other, each to run after the one before.

    Returns:
      What the last one returns.
    """
    result = None
    for step in steps:
        flat = [t for t in tf.nest.flatten(result) if t is not None]
        with tf.control_dependencies(flat):
            result = step()
    return result


def update(thunks: Sequence[Callable], **kwargs: Any) -> Callable[[], Any]:
    """A step for `in_turn` that runs all thunks."""
    return lambda: estimator_cases.update_all(thunks, **kwargs)


def relative_distance(actual: np.ndarray, exact: np.ndarray) -> float:
    """Frobenius distance, relative to the exact matrix."""
    return oracle.relative_error(actual, exact)
