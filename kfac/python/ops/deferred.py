"""Tensors that are computed in whichever graph uses them.

Second-moment factors are described once (which input, which output gradient), but
their data must be computed *inside* the conditional branch that updates them, so
that a step with no statistics due executes none of it.  A `DeferredTensor` has a
static shape, a dtype, a name and an identity like a tensor; converting it to a
tensor computes it in the current graph and control-flow context, once per context.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from kfac.python.ops import private_tf


class PerContextCache:
    """Caches `compute()` per (graph, v1 control-flow context).

    A tensor made in one branch of a conditional cannot be used in another one, so
    each context computes its own value; within a context everybody shares it (and
    hence shares the sampled targets and the one backward pass).
    """

    def __init__(self, compute: Callable[[], Any]):
        self._compute = compute
        self._values: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def get(self) -> Any:
        if tf.executing_eagerly():  # A value would outlive the next assignment.
            return self._compute()
        graph = tf.compat.v1.get_default_graph()
        by_context = self._values.setdefault(graph, {})
        context = private_tf.control_flow_context(graph)
        if context not in by_context:
            by_context[context] = self._compute()
        return by_context[context]


class DeferredTensor:
    """Stands for the tensor that `resolve()` returns in the current graph.

    Attributes:
      shape: static `tf.TensorShape`.
      dtype: `tf.DType`.
      name: name of the tensor it is derived from; for messages and scope strings.
      device: device of that tensor.
      one_hot_depth: number of classes when it holds integer ids, else None.
    """

    def __init__(
        self,
        resolve: Callable[[], tf.Tensor],
        shape: Any,
        dtype: tf.DType,
        name: str,
        device: str = "",
        one_hot_depth: int | None = None,
    ):
        self._resolve = resolve
        self.shape = tf.TensorShape(shape)
        self.dtype = tf.as_dtype(dtype)
        self.name = name
        self.device = device
        self.one_hot_depth = one_hot_depth

    def get_shape(self) -> tf.TensorShape:
        return self.shape

    def resolve(self) -> tf.Tensor:
        """The dense tensor, in the current graph and control-flow context."""
        value = tf.convert_to_tensor(self._resolve())
        value.set_shape(self.shape)
        return value

    def __repr__(self) -> str:
        return f"DeferredTensor({self.name!r}, {self.shape}, {self.dtype.name})"


class AtLeastFloat32:
    """Casts half-precision tensors, when they are used; others are left as they are.

    Second moments overflow in float16 and lose what matters in bfloat16, and there
    are no factorisations of such matrices.  The same argument gives the identical
    result, so that factors are shared.
    """

    HALF = (tf.float16, tf.bfloat16)

    def __init__(self):
        # Keeps what was asked for, since the key is its id.
        self._made: dict[int, tuple[Any, DeferredTensor]] = {}

    def __call__(self, tensor: Any) -> Any:
        if tensor.dtype not in self.HALF:
            return tensor
        if id(tensor) not in self._made:
            cast = DeferredTensor(
                lambda: tf.cast(tf.convert_to_tensor(tensor), tf.float32),
                shape=tensor.shape,
                dtype=tf.float32,
                name=tensor.name,
                device=tensor.device,
            )
            self._made[id(tensor)] = (tensor, cast)
        return self._made[id(tensor)][1]


def _to_tensor(value, dtype=None, name=None, as_ref=False):
    del as_ref  # Required by the conversion protocol.
    if dtype is not None and not dtype.is_compatible_with(value.dtype):
        raise ValueError(f"{value!r} cannot be converted to {dtype.name}.")
    tensor = value.resolve()
    return tf.identity(tensor, name=name) if name else tensor


tf.register_tensor_conversion_function(DeferredTensor, _to_tensor)
