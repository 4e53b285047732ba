"""Containers that treat several tensors, or several keys, as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import errors


def ensure_sequence(obj: Any) -> Sequence:
    """`obj` if it is a list or tuple, else a tuple holding it."""
    return obj if isinstance(obj, (list, tuple)) else (obj,)


def _as_list(x: Any) -> Sequence:
    """`x` if it is a list or tuple, else a list holding it."""
    return x if isinstance(x, (list, tuple)) else [x]


def cls_name(obj: Any) -> str:
    """Name of the object's class."""
    return type(obj).__name__


class _IdentityKey:
    """Stands for an object that has no hash of its own; equal iff the same object."""

    def __init__(self, obj: Any):
        self.obj = obj

    def __hash__(self) -> int:
        return id(self.obj)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _IdentityKey) and other.obj is self.obj


def _to_key(key: Any) -> Any:
    # Whether tensors and variables can be hashed depends on global switches, so
    # they never are.
    if isinstance(key, (tf.Tensor, tf.Variable)):
        return _IdentityKey(key)
    try:
        hash(key)
    except TypeError:
        return _IdentityKey(key)
    return key


class SequenceDict:
    """A dict that also reads and writes whole sequences of keys.

    `d[[k1, (k2, k3)]]` is `[d[k1], [d[k2], d[k3]]]`, and `d[(k1, k2)] = v1, v2` sets
    two entries; hence a list or tuple is never a key itself.  Tensors and variables
    are keys by identity.

    Args:
      iterable: mapping or iterable of `(key, value)` pairs to start from.
    """

    def __init__(self, iterable: Mapping | Iterable | None = None):
        self._dict = {_to_key(k): v for k, v in _pairs(iterable)}

    def __getitem__(self, key_or_keys: Any) -> Any:
        if isinstance(key_or_keys, (list, tuple)):
            return [self[key] for key in key_or_keys]
        key = _to_key(key_or_keys)
        if key not in self._dict:
            raise KeyError(key_or_keys)
        return self._dict[key]

    def __setitem__(self, key_or_keys: Any, value_or_values: Any) -> None:
        if not isinstance(key_or_keys, (list, tuple)):
            self._dict[_to_key(key_or_keys)] = value_or_values
            return
        values = list(value_or_values)
        if len(values) != len(key_or_keys):
            raise ValueError(
                f"{len(key_or_keys)} keys were given with {len(values)} values; "
                "sequences of equal length are expected."
            )
        for key, value in zip(key_or_keys, values, strict=True):
            self[key] = value

    def items(self) -> list[tuple[Any, Any]]:
        """List of `(key, value)` pairs in insertion order."""
        return [
            (k.obj if isinstance(k, _IdentityKey) else k, v)
            for k, v in self._dict.items()
        ]


def _pairs(iterable: Mapping | Iterable | None) -> Iterable[tuple[Any, Any]]:
    """`(key, value)` pairs of what `dict()` accepts, without hashing any key."""
    if iterable is None:
        return ()
    return iterable.items() if hasattr(iterable, "items") else iterable


class PartitionedTensor:
    """Several tensors presented as their concatenation along axis 0.

    Nothing is concatenated until a tensor is asked for.  Two instances are equal iff
    their members are the same objects in the same order, which makes tuples of
    per-use or per-tower tensors usable as a key of the factor cache.

    Attributes:
      tensors: the sequence of members, as given.

    Args:
      tensors: non-empty list or tuple of tensors (or `DeferredTensor`s) that agree on
        dtype, on all dimensions but the first, and on `one_hot_depth`.

    Raises:
      ValueError: empty sequence, or members that disagree.
    """

    def __init__(self, tensors: Sequence[Any]):
        if not tensors:
            raise ValueError("A PartitionedTensor needs at least one tensor, got none.")
        first = tensors[0]
        for tensor in tensors:
            if tensor.dtype != first.dtype:
                raise ValueError(
                    f"Members must have one dtype; got {first.dtype.name} for "
                    f"{_name(first)} and {tensor.dtype.name} for {_name(tensor)}."
                )
            if not _same_trailing_shape(tensor.shape, first.shape):
                raise ValueError(
                    "Members must agree on all dimensions but the first; got "
                    f"{first.shape} for {_name(first)} and {tensor.shape} for "
                    f"{_name(tensor)}."
                )
            if _one_hot_depth(tensor) != _one_hot_depth(first):
                raise ValueError(
                    f"Members must have one one_hot_depth; got {_one_hot_depth(first)} "
                    f"for {_name(first)} and {_one_hot_depth(tensor)} for "
                    f"{_name(tensor)}."
                )
        self.tensors = tensors

    @property
    def shape(self) -> tf.TensorShape:
        """Static shape of the concatenation."""
        shapes = [tf.TensorShape(tensor.shape) for tensor in self.tensors]
        leading = [tf.compat.dimension_value(shape[0]) for shape in shapes]
        total = None if None in leading else sum(leading)
        return tf.TensorShape([total]).concatenate(shapes[0][1:])

    def get_shape(self) -> tf.TensorShape:
        return self.shape

    @property
    def dtype(self) -> tf.DType:
        return self.tensors[0].dtype

    @property
    def one_hot_depth(self) -> int | None:
        """Number of classes if the members hold integer ids, else None."""
        return _one_hot_depth(self.tensors[0])

    @property
    def device(self) -> str | None:
        """The members' common device, None if they differ."""
        devices = {tensor.device for tensor in self.tensors}
        return devices.pop() if len(devices) == 1 else None

    def as_tensor(
        self,
        dtype: tf.DType | None = None,
        name: str | None = None,
        as_ref: bool = False,
    ) -> tf.Tensor:
        """The concatenation along axis 0, in the current graph.

        Raises:
          ArgumentError: `dtype` is another one than the members', or `as_ref` is set.
        """
        if dtype is not None and tf.as_dtype(dtype) != self.dtype:
            raise errors.ArgumentError(
                f"{self} cannot be converted to {tf.as_dtype(dtype).name}; "
                "use tf.cast on the result."
            )
        if as_ref:
            raise errors.ArgumentError(f"{self} has no reference; use as_ref=False.")
        members = [tf.convert_to_tensor(tensor) for tensor in self.tensors]
        return tf.concat(members, axis=0, name=name or "partitioned_tensor")

    def __getitem__(self, key: Any) -> tf.Tensor:
        return self.as_tensor()[key]

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, PartitionedTensor)
            and len(self.tensors) == len(other.tensors)
            and all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))
        )

    def __hash__(self) -> int:
        return hash(tuple(id(tensor) for tensor in self.tensors))

    def __str__(self) -> str:
        return (
            f"PartitionedTensor([{_name(self.tensors[0])}, ...], "
            f"dtype={self.dtype.name}, shape={self.shape})"
        )

    __repr__ = __str__


def _same_trailing_shape(a: tf.TensorShape, b: tf.TensorShape) -> bool:
    return tf.TensorShape(a)[1:].as_list() == tf.TensorShape(b)[1:].as_list()


def _one_hot_depth(tensor: Any) -> int | None:
    return getattr(tensor, "one_hot_depth", None)


def _name(tensor: Any) -> str:
    return getattr(tensor, "name", None) or cls_name(tensor)


tf.register_tensor_conversion_function(
    PartitionedTensor,
    lambda value, dtype=None, name=None, as_ref=False: value.as_tensor(
        dtype, name, as_ref
    ),
)
