"""Names of factors and of their variables, derived from tensors and dampings.

Inside a `LayerCollection` a factor gets a stable name made from parameter paths
(`FisherFactor.set_name`).  A factor used by itself falls back on the strings of this
module, which are built from tensor names and constructor arguments.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import config, utils


def scope_string_from_params(params: Any) -> str:
    """Builds a variable-scope name out of constructor arguments.

    Args:
      params: a value or a list/tuple of values. A value is `None`, a string, an int,
        a bool, a tensor, a variable, a `utils.PartitionedTensor`, a list/tuple of
        ints, or a (nested) list/tuple of tensors.

    Returns:
      One fragment per value, joined by `_`.

    Raises:
      ValueError: a value is none of the above.
      AttributeError: a list mixes ints with something that has no name.
    """
    if not isinstance(params, (list, tuple)):
        params = [params]
    return "_".join(_fragment(param) for param in params)


def _fragment(param: Any) -> str:
    if param is None:
        return "None"
    if isinstance(param, (list, tuple)):
        if all(isinstance(item, int) for item in param):
            return "-".join(str(item) for item in param)
        return scope_string_from_name(param)
    if isinstance(param, (str, int)):
        return str(param)
    if isinstance(param, utils.PartitionedTensor) or _is_named_tensor(param):
        return scope_string_from_name(param)
    raise ValueError(
        f"No scope name can be made from {param!r} of type {type(param).__name__}. "
        "Expected None, a string, an int, a bool, a tensor or variable, or a "
        "list/tuple of ints or of tensors."
    )


def _is_named_tensor(value: Any) -> bool:
    """Whether `value` looks like a tensor (also a deferred one) that has a name."""
    return hasattr(value, "name") and hasattr(value, "shape")


def scope_string_from_name(tensor: Any) -> str:
    """Name of a tensor, or of a nest of tensors, usable in a variable scope.

    `/` and `:` become `_`, then the `get_sanitized_name_fn` setting is applied.
    Members of a sequence (or of a `PartitionedTensor`) are joined by `__`.

    Raises:
      AttributeError: something has no name (an eager tensor, a number).
    """
    if isinstance(tensor, utils.PartitionedTensor):
        tensor = tuple(tensor.tensors)
    if isinstance(tensor, (list, tuple)):
        return "__".join(scope_string_from_name(member) for member in tensor)
    name = tensor.name.replace("/", "_").replace(":", "_")
    return config.settings().get_sanitized_name_fn(name)


def scalar_or_tensor_to_string(val: Any) -> str:
    """`repr` of a scalar (NumPy scalars as Python ones), or a tensor's scope name."""
    if np.isscalar(val):
        return repr(python_scalar(val))
    return scope_string_from_name(val)


def python_scalar(val: Any) -> Any:
    """NumPy scalars as Python numbers, whose `repr` is legal in a variable name."""
    return val.item() if isinstance(val, np.generic) else val


def list_to_string(lst: Sequence[Any]) -> str:
    """Joins strings, scalars, tensors and sequences of tensors with `_`."""
    return "_".join(
        item if isinstance(item, str) else scalar_or_tensor_to_string(item)
        for item in lst
    )


def graph_func_to_id(func: Callable[[], Any]) -> Hashable:
    """The identity of a damping function, its `func_id`, in hashable form.

    Tensors and variables in the id are replaced by their references where TensorFlow
    does not let them be hashed.

    Raises:
      AttributeError: the function carries no `func_id`.
    """
    func_id = func.func_id
    try:
        hash(func_id)
    except TypeError:
        return _by_reference(func_id)
    return func_id


def _by_reference(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple(_by_reference(item) for item in value)
    return value.ref() if hasattr(value, "ref") else value


def graph_func_to_string(func: Callable[[], Any]) -> str:
    """String form of a damping function's identity."""
    return list_to_string(func.func_id)


def legal_variable_name(name: str) -> str:
    """`name` with the characters that TensorFlow refuses in names replaced by `_`."""
    return re.sub(r"[^A-Za-z0-9_.\-/]", "_", name)


_scopes_in_use: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def unique_scope(scope: str, owner: Hashable) -> str:
    """`scope`, or `scope_<i>` if other owners in this graph have taken it.

    Scope strings leave out some constructor arguments and are not injective, so
    different factors may arrive at the same one; sharing variables would then mix up
    their statistics.  Equal owners get equal names, in the order of their arrival.

    Args:
      scope: the wanted name.
      owner: what distinguishes the owner; must hold no reference to the graph.
    """
    by_scope = _scopes_in_use.setdefault(tf.compat.v1.get_default_graph(), {})
    owners = by_scope.setdefault(scope, [])
    if owner not in owners:
        owners.append(owner)
    index = owners.index(owner)
    return f"{scope}_{index}" if index else scope


def fingerprint(value: Any) -> Hashable:
    """Hashable description of constructor arguments that holds on to no tensor."""
    if isinstance(value, utils.PartitionedTensor):
        value = tuple(value.tensors)
    if isinstance(value, (list, tuple)):
        return tuple(fingerprint(item) for item in value)
    return value.name if _is_named_tensor(value) else repr(value)
