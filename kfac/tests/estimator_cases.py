"""Small networks for estimator tests, with explicit curvature matrices to compare.

A case gives the same network to the oracle (eager, `net(params, x)`) and to a
`LayerCollection`, with all its parameters in one generic full block unless a test
registers layers itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import estimator, layer_collection
from kfac.python.ops.layer_collection import LayerCollection
from kfac.tests import graph_kinds, oracle

tf1 = tf.compat.v1


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).randn(*shape)


@dataclasses.dataclass(frozen=True)
class Case:
    """One network with its losses.

    Attributes:
      params: initial values, float64.
      x: inputs `[batch, ...]`.
      net: `net(params, x)` gives one output (tensor or tuple) per loss.
      losses: the oracle's losses.
      targets: one array `[batch, ...]` per loss.
    """

    name: str
    params: Sequence[np.ndarray]
    x: np.ndarray
    net: Callable[..., list]
    losses: Sequence[Any]
    targets: Sequence[np.ndarray]

    def __str__(self) -> str:
        return self.name

    def first(self, count: int) -> Case:
        """The same network on the first cases."""
        return dataclasses.replace(
            self, x=self.x[:count], targets=[t[:count] for t in self.targets]
        )

    def fisher(self) -> np.ndarray:
        """Exact Fisher matrix, mean over the batch."""
        return oracle.fisher(self.net, self.params, self.x, self.losses)

    def example_gradients(self, square_root: bool) -> np.ndarray:
        """Gradients `[batch, P]` of the losses times coefficients or their roots."""
        losses = [
            dataclasses.replace(
                loss, coeff=np.sqrt(loss.coeff) if square_root else loss.coeff
            )
            for loss in self.losses
        ]
        return oracle.example_gradients(
            self.net, self.params, self.x, losses, self.targets
        )


_REGISTER = {
    oracle.Categorical: lambda lc, out, loss, kw: (
        lc.register_softmax_cross_entropy_loss(out, **kw)
    ),
    oracle.Bernoulli: lambda lc, out, loss, kw: lc.register_sigmoid_cross_entropy_loss(
        out, **kw
    ),
    oracle.Normal: lambda lc, out, loss, kw: lc.register_normal_predictive_distribution(
        out, var=loss.var, **kw
    ),
    oracle.NormalMeanVariance: lambda lc, out, loss, kw: (
        lc.register_normal_mean_variance_predictive_distribution(*out, **kw)
    ),
}


@dataclasses.dataclass
class Model:
    """A case in the current graph.

    Attributes:
      collection: with the losses, and a generic block unless told otherwise.
      variables: of the parameters.
      x: the batch, fed through a placeholder.
      outputs: one per loss.
    """

    case: Case
    collection: LayerCollection
    variables: list[tf.Variable]
    x: tf.Tensor
    outputs: list

    def estimator(self, **kwargs: Any) -> estimator.FisherEstimator:
        """An estimator of the collection."""
        arguments = dict(
            variables=self.variables,
            cov_ema_decay=0.9,
            damping=0.3,
            layer_collection=self.collection,
        )
        return estimator.make_fisher_estimator(**(arguments | kwargs))


def build(
    case: Case, generic: bool = True, dynamic: bool = False, targets: bool = True
) -> Model:
    """Builds `case` in the current graph.

    Args:
      case: the case.
      generic: whether to register all parameters as one generic full block.
      dynamic: whether the batch size is unknown statically.
      targets: whether to register targets.
    """

    def feed(value):
        shape = [None if dynamic else len(value), *value.shape[1:]]
        return tf1.placeholder_with_default(value, shape)

    x = feed(case.x)
    variables = [
        graph_kinds.variable(value, f"p{i}") for i, value in enumerate(case.params)
    ]
    outputs = case.net(variables, x)
    collection = layer_collection.LayerCollection()
    for out, loss, target in zip(outputs, case.losses, case.targets, strict=True):
        keywords = {"coeff": loss.coeff}
        if targets:
            keywords["targets"] = feed(target)
        _REGISTER[type(loss)](collection, out, loss, keywords)
    if generic:
        batch = tf.shape(x)[0] if dynamic else len(case.x)
        collection.register_generic(tuple(variables), batch, approx="full")
    return Model(case, collection, variables, x, outputs)


def update_all(thunks: Sequence[Callable], **kwargs: Any) -> tf.Operation:
    """One op for all covariance (or inverse) updates."""
    return tf.group(*(thunk(**kwargs) for thunk in thunks))


def after(op: Any, read: Callable[[], Any]) -> Any:
    """What `read` builds, evaluated after `op`."""
    with tf.control_dependencies([op]):
        return tf.nest.map_structure(tf.identity, read())


def _dense_net(params, x):
    hidden = tf.tanh(tf.matmul(x, params[0]) + params[1])
    return [tf.matmul(hidden, params[2])]


def _conv_net(params, x):
    hidden = tf.nn.conv2d(x, params[0], strides=[1, 1, 1, 1], padding="SAME")
    hidden = tf.nn.sigmoid(hidden)
    return [tf.matmul(tf.reshape(hidden, [-1, 8]), params[1])]


def _two_headed_net(params, x):
    hidden = tf.tanh(tf.matmul(x, params[0]))
    return [tf.matmul(hidden, params[1]), tf.matmul(hidden, params[2])]


def _mean_variance_net(params, x):
    hidden = tf.tanh(tf.matmul(x, params[0]))
    mean = tf.matmul(hidden, params[1])
    return [(mean, tf.nn.softplus(tf.matmul(hidden, params[2])) + 0.1)]


DENSE_SOFTMAX = Case(
    "dense, softmax",
    [_normal(1, 3, 4), _normal(2, 4), _normal(3, 4, 3)],
    _normal(4, 5, 3),
    _dense_net,
    [oracle.Categorical()],
    [np.array([2, 0, 1, 1, 0])],
)
CONV_SIGMOID = Case(
    "convolution, sigmoid",
    [_normal(1, 2, 2, 1, 2), _normal(2, 8, 2)],
    _normal(3, 3, 2, 2, 1),
    _conv_net,
    [oracle.Bernoulli(coeff=0.5)],
    [np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])],
)
TWO_LOSSES = Case(
    "two losses",
    [_normal(1, 3, 3), _normal(2, 3, 2), _normal(3, 3, 2)],
    _normal(4, 4, 3),
    _two_headed_net,
    [oracle.Categorical(coeff=2.0), oracle.Normal(var=0.7, coeff=0.3)],
    [np.array([1, 0, 0, 1]), _normal(5, 4, 2)],
)
MEAN_VARIANCE = Case(
    "mean and variance",
    [_normal(1, 2, 3), _normal(2, 3, 2), _normal(3, 3, 2)],
    _normal(4, 3, 2),
    _mean_variance_net,
    [oracle.NormalMeanVariance(coeff=1.5)],
    [_normal(5, 3, 2)],
)
CASES = (DENSE_SOFTMAX, CONV_SIGMOID, TWO_LOSSES, MEAN_VARIANCE)
