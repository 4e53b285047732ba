"""Containers keyed by tensors and variables through identity, never through value.

Under TensorFlow 2 semantics variables and tensors of a function graph cannot be
hashed and compare element by element.  These containers look like the built-in ones
and hand back the objects themselves, but find them by `is`.
"""

from __future__ import annotations

import collections
from collections.abc import (
    Hashable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Set,
    ValuesView,
)
from typing import Any

_MISSING = object()


def identity(obj: Any) -> Hashable:
    """A hashable stand-in; equal for two objects iff they are the same tensor.

    Objects without `ref()` stand for themselves if they are hashable (strings,
    numbers, deferred tensors), by `id` otherwise (NumPy arrays).
    """
    if hasattr(obj, "ref"):
        return obj.ref()
    try:
        hash(obj)
    except TypeError:
        return id(obj)
    return obj


def as_tuple(params: Any) -> tuple:
    """The members of a parameter group: a tuple/list's items, else `(params,)`."""
    return tuple(params) if isinstance(params, (tuple, list)) else (params,)


def as_key(params: Any) -> Any:
    """The canonical form of a parameter group: lists become tuples."""
    return tuple(params) if isinstance(params, list) else params


class _Slot:
    """A key as it is stored: the presented object and its identity."""

    __slots__ = ("identity", "presented")

    def __init__(self, presented: Any, identity_: Hashable):
        self.presented = presented
        self.identity = identity_

    def __hash__(self) -> int:
        return hash(self.identity)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Slot) and self.identity == other.identity


class IdentityDict(collections.OrderedDict):
    """Ordered dictionary keyed by an object, or a tuple of objects, by identity.

    A list key means the equal tuple.  Iteration yields the objects.
    """

    def _identity_of(self, key: Any) -> Hashable:
        """Identity of a canonical key; equal identities mean the same entry."""
        if isinstance(key, tuple):
            return tuple(identity(member) for member in key)
        return identity(key)

    def _slot(self, key: Any) -> _Slot:
        if isinstance(key, _Slot):  # OrderedDict's own methods hand slots back.
            return key
        key = as_key(key)
        return _Slot(key, self._identity_of(key))

    def __getitem__(self, key: Any) -> Any:
        slot = self._slot(key)
        if not super().__contains__(slot):
            raise KeyError(slot.presented)
        return super().__getitem__(slot)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(self._slot(key), value)

    def __delitem__(self, key: Any) -> None:
        slot = self._slot(key)
        if not super().__contains__(slot):
            raise KeyError(slot.presented)
        super().__delitem__(slot)

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(self._slot(key))

    def __iter__(self) -> Iterator[Any]:
        return (slot.presented for slot in super().__iter__())

    def __reversed__(self) -> Iterator[Any]:
        return (slot.presented for slot in super().__reversed__())

    def keys(self) -> KeysView:
        return KeysView(self)

    def values(self) -> ValuesView:
        return ValuesView(self)

    def items(self) -> ItemsView:
        return ItemsView(self)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: Any, default: Any = _MISSING) -> Any:
        if key not in self and default is not _MISSING:
            return default
        value = self[key]
        del self[key]
        return value

    def popitem(self, last: bool = True) -> tuple[Any, Any]:
        if not self:
            raise KeyError("the dictionary is empty")
        key = next(reversed(self) if last else iter(self))
        return key, self.pop(key)

    def clear(self) -> None:
        for key in list(self):
            del self[key]

    def move_to_end(self, key: Any, last: bool = True) -> None:
        super().move_to_end(self._slot(key), last)

    def copy(self) -> IdentityDict:
        return type(self)(self.items())

    __copy__ = copy

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        mine = [(self._slot(key), value) for key, value in self.items()]
        theirs = [(self._slot(key), value) for key, value in other.items()]
        if isinstance(other, collections.OrderedDict):
            return mine == theirs
        return dict(mine) == dict(theirs)

    def __ne__(self, other: Any) -> bool:
        return not self == other

    __hash__ = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.items())!r})"


class LayerParametersDict(IdentityDict):
    """Maps parameter groups to values; no parameter may be in two groups.

    A key is a variable (or tensor), or a tuple of them; the members of a tuple are not
    keys themselves.

    Raises:
      ValueError: on setting a key one of whose members is in an existing key (also
        when it is that very key). Nothing is inserted then.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._members: set[Hashable] = set()
        super().__init__(*args, **kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        slot = self._slot(key)
        members = [identity(member) for member in as_tuple(slot.presented)]
        if not self._members.isdisjoint(members):
            present = [
                other
                for other in self
                if not {identity(m) for m in as_tuple(other)}.isdisjoint(members)
            ]
            raise ValueError(
                f"Cannot set {slot.presented!r}: key(s) already present: {present!r}."
            )
        super().__setitem__(slot, value)
        self._members.update(members)

    def __delitem__(self, key: Any) -> None:
        slot = self._slot(key)
        super().__delitem__(slot)
        self._members.difference_update(
            identity(member) for member in as_tuple(slot.presented)
        )


class UseCounts(IdentityDict):
    """Number of registered uses by variable; 0 for others, without an entry."""

    def __getitem__(self, key: Any) -> float:
        return super().__getitem__(key) if key in self else 0

    def get(self, key: Any, default: float = 0) -> float:
        return super().get(key, default)


class FactorDict(IdentityDict):
    """Maps `(class, args)` to factors; tensors inside `args` count by identity.

    Raises:
      TypeError: the pair cannot be hashed, for example because of a list in `args`.
    """

    def _identity_of(self, key: Any) -> Hashable:
        hashable = _nested_identity(key)
        try:
            hash(hashable)
        except TypeError as error:
            cls, args = key
            raise TypeError(
                f"The pair (cls, args) = ({cls!r}, {args!r}) cannot be hashed; factor "
                "arguments must be tensors, numbers, strings or tuples of those, not "
                "lists or arrays."
            ) from error
        return hashable


def _nested_identity(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_nested_identity(item) for item in value)
    return value.ref() if hasattr(value, "ref") else value


class _VariableSet(Set, Hashable):
    """An immutable set of variables by identity; a `frozenset` where that fails."""

    def __init__(self, variables: Iterable[Any]):
        self._by_identity = {identity(v): v for v in variables}

    def __contains__(self, variable: Any) -> bool:
        return identity(variable) in self._by_identity

    def __iter__(self) -> Iterator[Any]:
        return iter(self._by_identity.values())

    def __len__(self) -> int:
        return len(self._by_identity)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Set):
            return NotImplemented
        return same_variables(self, other)

    def __hash__(self) -> int:
        return hash(frozenset(self._by_identity))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)!r})"


def variable_set(variables: Iterable[Any]) -> Set:
    """An immutable set: a `frozenset` in v1 graphs, where variables can be hashed.

    Inside functions it is a set with the same interface that goes by identity.
    """
    variables = tuple(variables)
    try:
        return frozenset(variables)
    except TypeError:
        return _VariableSet(variables)


def same_variables(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Whether two collections hold the same variables, in whatever order."""
    return {identity(v) for v in first} == {identity(v) for v in second}
