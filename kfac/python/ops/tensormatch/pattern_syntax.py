"""Syntax of the pattern language of `graph_matcher`: its forms and their parts."""

from __future__ import annotations

import inspect
from typing import Any


def is_seq(obj: Any) -> bool:
    """Whether `obj` is a list or a tuple."""
    return isinstance(obj, (list, tuple))


def is_empty_seq(obj: Any) -> bool:
    """Whether `obj` is an empty list or tuple."""
    return is_seq(obj) and not obj


def is_nonempty_seq(obj: Any) -> bool:
    """Whether `obj` is a list or tuple with items."""
    return is_seq(obj) and bool(obj)


def is_pattern(obj: Any) -> bool:
    """Whether `obj` can be a compound pattern: a sequence with items."""
    return is_nonempty_seq(obj)


def _has_tag(pat: Any, tag: str) -> bool:
    return is_pattern(pat) and isinstance(pat[0], str) and pat[0] == tag


def is_element_pattern(pat: Any) -> bool:
    """Whether `pat` is `('?', name, *restrictions)`."""
    return _has_tag(pat, "?")


def element_name(pat: Any) -> str | None:
    """The name that an element pattern binds, or None."""
    return pat[1] if len(pat) > 1 else None


def element_restrictions(pat: Any) -> Any:
    """The predicates of an element pattern."""
    return pat[2:]


def is_choice_pattern(pat: Any) -> bool:
    """Whether `pat` is `('?:choice', *alternatives)`."""
    return _has_tag(pat, "?:choice")


def choice_patterns(pat: Any) -> Any:
    """The alternatives of a choice pattern."""
    return pat[1:]


def is_list_pattern(pat: Any) -> bool:
    """Whether `pat` is `('List', *items)`."""
    return _has_tag(pat, "List")


def list_patterns(pat: Any) -> Any:
    """The item patterns of a list pattern."""
    return pat[1:]


def is_not_pattern(pat: Any) -> bool:
    """Whether `pat` is `('?:not', negated)`."""
    return _has_tag(pat, "?:not")


def negated_pattern(pat: Any) -> Any:
    """What a not-pattern negates."""
    return pat[1]


def is_any_pattern(pat: Any) -> bool:
    """Whether `pat` is `('?:any',)`."""
    return _has_tag(pat, "?:any")


def is_any_noconsume_pattern(pat: Any) -> bool:
    """Whether `pat` is `('?:any_noconsume',)`."""
    return _has_tag(pat, "?:any_noconsume")


def is_internal_node_pattern(pat: Any) -> bool:
    """Whether `pat` is a node pattern with an `In` side, an `Out` side or both."""
    if not (is_pattern(pat) and all(is_nonempty_seq(item) for item in pat)):
        return False
    sides = pat[1:]
    return any(
        len(sides) == len(tags) and all(map(_has_tag, sides, tags))
        for tags in (("In",), ("Out",), ("In", "Out"))
    )


def internal_node_pattern(pat: Any) -> Any:
    """The pattern of the node itself."""
    return pat[0]


def internal_node_input_pattern(pat: Any) -> Any:
    """List pattern of the inputs, or the any-noconsume pattern."""
    return _side(pat, "In")


def internal_node_output_pattern(pat: Any) -> Any:
    """List pattern of the outputs, or the any-noconsume pattern."""
    return _side(pat, "Out")


def internal_patterns(pat: Any) -> list:
    """Patterns of the node, its inputs and its outputs."""
    return [
        internal_node_pattern(pat),
        internal_node_input_pattern(pat),
        internal_node_output_pattern(pat),
    ]


def _side(pat: Any, tag: str) -> Any:
    for side in pat[1:]:
        if _has_tag(side, tag):
            return ("List", *side[1:])
    return ("?:any_noconsume",)


def expand_thunks(pat: Any) -> Any:
    """Replaces callables that need no arguments by what they return, repeatedly.

    Lists stay lists and tuples stay tuples.
    """
    while _is_thunk(pat):
        pat = pat()
    if is_seq(pat):
        items = [expand_thunks(item) for item in pat]
        return items if isinstance(pat, list) else tuple(items)
    return pat


def _is_thunk(obj: Any) -> bool:
    if not callable(obj):
        return False
    try:
        parameters = inspect.signature(obj).parameters.values()
    except (TypeError, ValueError):  # Some builtins do not tell.
        return False
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(
        parameter.kind in optional or parameter.default is not parameter.empty
        for parameter in parameters
    )
