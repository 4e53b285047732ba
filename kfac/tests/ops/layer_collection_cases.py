"""One small layer for every registration method, and snapshots of collections."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import fisher_blocks as fb
from kfac.tests import graph_kinds

BATCH = 6


def variable(shape, name="v", dtype="float32"):
    """A variable with a name of its own in a v1 graph."""
    taken = {v.op.name for v in tf.compat.v1.global_variables()}
    unique = name
    while unique in taken:
        unique += "x"
    return graph_kinds.variable(np.zeros(shape), unique, dtype)


def data(*shape, dtype=tf.float32):
    """A tensor `[batch, *shape]`; every call makes another one."""
    return tf.zeros([BATCH, *shape], dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """A registration method with arguments that it accepts.

    Attributes:
      arguments: makes keyword arguments: new variables, new tensors.
      block: class of the block of the (last) parameter group.
      uses: registered uses that a call adds.
      another_approx: an approximation with another class of block, if there is one.
      another_option: makes arguments that another tower must not have.
    """

    arguments: Callable[[], dict[str, Any]]
    block: type
    uses: float = 1
    another_approx: str | None = None
    another_option: Callable[[], dict[str, Any]] | None = None


def _dense():
    params = variable([3, 2], "w"), variable([2], "b")
    return dict(params=params, inputs=data(3), outputs=data(2))


def _dense_multi():
    params = variable([3, 2], "w"), variable([2], "b")
    inputs, outputs = [data(3), data(3)], [data(2), data(2)]
    return dict(params=params, inputs=inputs, outputs=outputs)


def _embedding():
    return dict(
        params=variable([7, 2], "table"),
        inputs=data(dtype=tf.int32),
        outputs=data(2),
        dense_inputs=False,
    )


def _conv1d():
    params = variable([3, 2, 4], "filter"), variable([4], "bias")
    return dict(
        params=params,
        strides=[1, 1, 1],
        padding="SAME",
        inputs=data(5, 2),
        outputs=data(5, 4),
    )


def _conv2d():
    params = variable([3, 3, 2, 4], "filter"), variable([4], "bias")
    return dict(
        params=params,
        strides=[1, 1, 1, 1],
        padding="SAME",
        inputs=data(5, 5, 2),
        outputs=data(5, 5, 4),
    )


def _conv2d_multi():
    arguments = _conv2d()
    arguments["inputs"] = [data(5, 5, 2), data(5, 5, 2), data(5, 5, 2)]
    arguments["outputs"] = [data(5, 5, 4), data(5, 5, 4), data(5, 5, 4)]
    return arguments


def _convolution():
    arguments = _conv2d()
    arguments["strides"] = [1, 1]
    return arguments


def _depthwise():
    return dict(
        params=variable([3, 3, 2, 2], "depthwise"),
        inputs=data(5, 5, 2),
        outputs=data(5, 5, 4),
        strides=[1, 1, 1, 1],
        padding="SAME",
    )


def _separable():
    return dict(
        depthwise_params=variable([3, 3, 2, 2], "depthwise"),
        pointwise_params=(variable([1, 1, 4, 3], "pointwise"), variable([3], "bias")),
        inputs=data(5, 5, 2),
        depthwise_outputs=data(5, 5, 4),
        pointwise_outputs=data(5, 5, 3),
        strides=[1, 1, 1, 1],
        padding="SAME",
    )


def _scale_and_shift():
    params = variable([3], "scale"), variable([3], "shift")
    return dict(params=params, inputs=data(5, 3), outputs=data(5, 3))


CASES = {
    "register_fully_connected": Case(
        _dense,
        fb.FullyConnectedKFACBasicFB,
        another_approx="diagonal",
        another_option=lambda: {"approx": "kron_in_diag"},
    ),
    "register_conv1d": Case(
        _conv1d, fb.ConvKFCBasicFB, another_option=lambda: {"dilations": [1, 2, 1]}
    ),
    "register_conv2d": Case(
        _conv2d,
        fb.ConvKFCBasicFB,
        another_approx="diagonal",
        another_option=lambda: {"strides": [1, 2, 2, 1]},
    ),
    "register_convolution": Case(
        _convolution, fb.ConvKFCBasicFB, another_option=lambda: {"padding": "VALID"}
    ),
    "register_depthwise_conv2d": Case(
        _depthwise,
        fb.DepthwiseConvDiagonalFB,
        another_approx="kron_depthwise",
        another_option=lambda: {"rate": [2, 2]},
    ),
    "register_separable_conv2d": Case(
        _separable, fb.ConvKFCBasicFB, another_approx="diagonal"
    ),
    "register_generic": Case(
        lambda: dict(params=variable([3], "p"), batch_size=BATCH),
        fb.NaiveDiagonalFB,
        uses=math.inf,
        another_approx="full",
    ),
    "register_fully_connected_multi": Case(
        _dense_multi,
        fb.FullyConnectedMultiIndepFB,
        uses=2,
        another_approx="kron_series_1",
        another_option=lambda: {"inputs": [data(3)], "outputs": [data(2)]},
    ),
    "register_conv2d_multi": Case(
        _conv2d_multi,
        fb.ConvKFCBasicMultiIndepFB,
        uses=3,
        another_option=lambda: {"dilations": [1, 2, 2, 1]},
    ),
    "register_scale_and_shift": Case(
        _scale_and_shift, fb.ScaleAndShiftFullFB, another_approx="diagonal"
    ),
}
EMBEDDING = Case(_embedding, fb.FullyConnectedKFACBasicFB)


def register(collection, method, arguments, **overrides):
    """Calls the method with some arguments replaced."""
    getattr(collection, method)(**{**arguments, **overrides})


def groups(arguments) -> list[Any]:
    """The parameter groups that a call with these arguments registers."""
    names = ("params", "depthwise_params", "pointwise_params")
    return [arguments[name] for name in names if name in arguments]


def snapshot(collection) -> Any:
    """Everything that registrations change, in comparable form."""
    return {
        "blocks": [
            (tuple(map(id, tf.nest.flatten(key))), id(block), _towers(block))
            for key, block in collection.fisher_blocks.items()
        ],
        "uses": [(id(v), n) for v, n in collection._vars_to_uses.items()],
        "losses": {name: list(map(id, t)) for name, t in collection._loss_dict.items()},
        "coeffs": {id(loss): id(c) for loss, c in collection.loss_coeffs.items()},
        "colocation": {
            id(loss): id(op) for loss, op in collection.loss_colocation_ops.items()
        },
        "linked": [
            (set(map(id, group)), approximation)
            for group, approximation in collection.linked_parameters.items()
        ],
        "defaults": dict(collection._default_approximations),
        "factors": list(map(id, collection.get_factors())),
        "finalized": collection._finalized,
        "subgraph": collection.subgraph is None,
        "reasons": dict(collection.generic_reasons),
    }


def _towers(block):
    return getattr(block, "num_registered_towers", None)


@contextlib.contextmanager
def unchanged(collection) -> Iterator[None]:
    """Fails if the block within changes the collection."""
    before = snapshot(collection)
    yield
    assert snapshot(collection) == before
