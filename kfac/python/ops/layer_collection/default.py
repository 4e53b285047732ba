"""The default layer collection: a stack, so that `as_default` nests and unwinds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

# Process-wide, as documented; nothing in the package consults it implicitly.
_stack: list[Any] = []


def get_default_layer_collection() -> Any:
    """The innermost default collection.

    Raises:
      ValueError: none is set.
    """
    if not _stack:
        raise ValueError(
            "No default LayerCollection is set. Use `with collection.as_default():` or "
            "set_default_layer_collection(collection)."
        )
    return _stack[-1]


def set_default_layer_collection(layer_collection: Any) -> None:
    """Makes `layer_collection` the default; `None` clears it.

    Raises:
      ValueError: a default is set already and the argument is not `None`.
    """
    if layer_collection is None:
        _stack.clear()
        return
    if _stack:
        raise ValueError(
            "A default LayerCollection is already set. Clear it with "
            "set_default_layer_collection(None) first, or nest `as_default()`."
        )
    _stack.append(layer_collection)


@contextlib.contextmanager
def default_layer_collection(layer_collection: Any) -> Iterator[Any]:
    """Makes `layer_collection` the default within the block, whatever happens in it."""
    before = list(_stack)
    _stack.append(layer_collection)
    try:
        yield layer_collection
    finally:
        _stack[:] = before
