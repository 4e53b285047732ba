"""The network of `kfac_oracle` in TensorFlow, with a K-FAC optimizer on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import layer_collection, optimizer
from kfac.python.ops.kfac_utils import periodic_inv_cov_update_kfac_opt as periodic
from kfac.tests import graph_kinds
from kfac.tests.ops import kfac_oracle

tf1 = tf.compat.v1

SCALARS = (
    "rho",
    "prev_loss",
    "qmodel_learning_rate",
    "qmodel_momentum",
    "qmodel_change",
)


class Model:
    """Parameters, registered layers and loss, in the current graph."""

    def __init__(
        self,
        dtype="float64",
        l2_reg=0.0,
        hook=None,
        batch=None,
        variables=None,
    ):
        params, data = kfac_oracle.problem()
        self.dtype = tf.as_dtype(dtype)
        self.l2_reg = l2_reg
        self.hook = hook or (lambda tensor: tensor)
        self.variables = variables or [
            graph_kinds.variable(value, name, self.dtype.as_numpy_dtype)
            for value, name in zip(params, kfac_oracle.NAMES, strict=True)
        ]
        self.data = data
        self.batch = self.constant(data) if batch is None else batch
        self.layers = layer_collection.LayerCollection()
        x, y = self.batch
        hidden, pre_activation, logits = self.forward(x)
        w1, b1, w2, b2 = self.variables
        self.layers.register_fully_connected((w1, b1), x, pre_activation)
        self.layers.register_fully_connected((w2, b2), hidden, logits)
        self.layers.register_softmax_cross_entropy_loss(
            logits, targets=tf.argmax(y, axis=1)
        )
        self.loss = self.mean_loss(logits, y)

    def constant(self, batch):
        # Not a constant: sub-batches need a source that can be cut.
        return tuple(
            tf1.placeholder_with_default(
                part.astype(self.dtype.as_numpy_dtype), part.shape
            )
            for part in batch
        )

    def forward(self, x):
        w1, b1, w2, b2 = self.variables
        pre_activation = tf.matmul(x, w1) + b1
        hidden = self.hook(tf.tanh(pre_activation))
        return hidden, pre_activation, tf.matmul(hidden, w2) + b2

    def mean_loss(self, logits, y):
        entropy = tf.nn.softmax_cross_entropy_with_logits(labels=y, logits=logits)
        squares = tf.add_n([tf.reduce_sum(tf.square(v)) for v in self.variables])
        return tf.reduce_mean(entropy) + 0.5 * self.l2_reg * squares

    def loss_fn(self, batch):
        x, y = batch
        return self.mean_loss(self.forward(x)[2], y)

    def values(self):
        return [tf.identity(variable) for variable in self.variables]


def make_optimizer(model: Model, **kwargs: Any) -> periodic.PeriodicInvCovUpdateKfacOpt:
    """The periodic optimizer on exact statistics, unless `kwargs` say otherwise."""
    defaults = {
        "invert_every": 1,
        "estimation_mode": "exact",
        "damping": 0.02,
        "layer_collection": model.layers,
        "dtype": model.dtype,
        "batch_size": len(model.data[0]),
    }
    return periodic.PeriodicInvCovUpdateKfacOpt(**{**defaults, **kwargs})


def make_base_optimizer(model: Model | None = None, **kwargs: Any):
    """`KfacOptimizer` with plain arguments; on an empty collection without a model."""
    defaults = {
        "learning_rate": 0.1,
        "damping": 0.02,
        "layer_collection": model.layers
        if model
        else layer_collection.LayerCollection(),
    }
    return optimizer.KfacOptimizer(**{**defaults, **kwargs})


def state_of(model: Model, opt: optimizer.KfacOptimizer) -> dict[str, Any]:
    """Tensors of everything that `expected_state` gives."""
    return {
        "params": model.values(),
        "velocity": [tf.identity(opt.get_slot(v, "velocity")) for v in model.variables],
        "damping": opt.damping,
        "counter": opt.counter,
        **{name: tf.identity(getattr(opt, f"_{name}")) for name in SCALARS},
    }


def expected_state(oracle: kfac_oracle.Oracle) -> dict[str, Any]:
    return {
        "params": oracle.params,
        "velocity": oracle.velocity,
        "damping": oracle.damping,
        "counter": oracle.counter,
        "rho": oracle.rho,
        "prev_loss": oracle.prev_loss,
        "qmodel_learning_rate": oracle.model_rate,
        "qmodel_momentum": oracle.model_momentum,
        "qmodel_change": oracle.qmodel_change,
    }


def assert_state(actual, expected, rtol, atol):
    for name, value in expected.items():
        for got, want in zip(
            tf.nest.flatten(actual[name]), tf.nest.flatten(value), strict=True
        ):
            # A number is served in float32 even to a float64 model, as by TensorFlow.
            relative = max(rtol, 1e-7 if np.asarray(got).dtype == np.float32 else 0)
            np.testing.assert_allclose(got, want, relative, atol, err_msg=name)
