"""A pattern language for graphs, compiled to backtracking combinators.

Patterns are nested tuples (or lists):

    ('?', name, *predicates)          any datum that satisfies all predicates
    ('?:choice', p1, p2, ...)         the first alternative with which all goes on well
    ('List', p1, ..., pn)             a sequence of exactly n items
    (p, ('In', q1, ..., qn))          a node that matches p, with these inputs
    (p, ('Out', r1, ..., rm))         a node that matches p, with these outputs
    (p, ('In', ...), ('Out', ...))    both
    ('?:not', p)                      whatever does not match p
    ('?:any',), ('?:any_noconsume',)  anything
    anything else                     a datum equal to it

A name binds the datum; a name that occurs again must meet the same datum.  A callable
that needs no arguments stands for what it returns, so that `Tensor` can be written for
`Tensor()`.

A combinator is called as `(data, bindings, consumed, succeed)`, where `succeed` is the
rest of the match, a function of `(bindings, consumed)`.  It returns what `succeed`
returns, or something falsy if there is no match.  `consumed` is the set of everything
that was matched; tensors that cannot be hashed (those of functions' graphs) are
represented in it by their `ref()`.  Sussman & Hanson, "Software Design for
Flexibility", chapter 4, describes the technique.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kfac.python.ops.tensormatch import tensorflow_graph_util as graph_util
from kfac.python.ops.tensormatch.pattern_syntax import (
    choice_patterns,
    element_name,
    element_restrictions,
    expand_thunks,
    internal_node_input_pattern,
    internal_node_output_pattern,
    internal_node_pattern,
    internal_patterns,
    is_any_noconsume_pattern,
    is_any_pattern,
    is_choice_pattern,
    is_element_pattern,
    is_empty_seq,
    is_internal_node_pattern,
    is_list_pattern,
    is_nonempty_seq,
    is_not_pattern,
    is_pattern,
    is_seq,
    list_patterns,
    negated_pattern,
)

__all__ = [
    "PatternEvaluator",
    "all_matcher",
    "choice_patterns",
    "element_name",
    "element_restrictions",
    "expand_thunks",
    "internal_node_input_pattern",
    "internal_node_output_pattern",
    "internal_node_pattern",
    "internal_patterns",
    "is_any_noconsume_pattern",
    "is_any_pattern",
    "is_choice_pattern",
    "is_element_pattern",
    "is_empty_seq",
    "is_internal_node_pattern",
    "is_list_pattern",
    "is_nonempty_seq",
    "is_not_pattern",
    "is_pattern",
    "is_seq",
    "list_patterns",
    "make_combinators",
    "match_any",
    "match_any_noconsume",
    "match_choice",
    "match_element",
    "match_eqv",
    "match_internal",
    "match_list",
    "match_not",
    "matcher",
    "matcher_with_consumed",
    "negated_pattern",
]

Bindings = dict[str, Any]
Combinator = Callable[[Any, Bindings, set, Callable], Any]


def matcher(pattern: Any) -> Callable[[Any], Any]:
    """Makes a function of a node that finds the first match.

    Returns:
      Function that returns the bindings, True if nothing was bound, or a falsy value
      if the node does not match.
    """
    combinator = make_combinators(expand_thunks(pattern))
    return lambda node: combinator(node, {}, set(), _bindings_or_true)


def all_matcher(pattern: Any) -> Callable[[Any], list]:
    """Makes a function of a node that lists all ways of matching it.

    Returns:
      Function that returns a list of bindings (True where nothing was bound).
    """
    combinator = make_combinators(expand_thunks(pattern))

    def match_all(node: Any) -> list:
        results: list[Any] = []

        def record_and_backtrack(bindings, consumed):
            results.append(_bindings_or_true(bindings, consumed))
            return False

        combinator(node, {}, set(), record_and_backtrack)
        return results

    return match_all


def matcher_with_consumed(pattern: Any) -> Callable[[Any], Any]:
    """Makes a function of a node that finds the first match and what it consumed.

    Returns:
      Function that returns `(bindings, consumed)`, or a falsy value if the node does
      not match.
    """
    combinator = make_combinators(expand_thunks(pattern))
    return lambda node: combinator(
        node, {}, set(), lambda bindings, consumed: (bindings, consumed)
    )


def _bindings_or_true(bindings: Bindings, consumed: set) -> Bindings | bool:
    del consumed
    return bindings or True


# Combinators.


def match_eqv(pattern: Any) -> Combinator:
    """Matches a datum equal to `pattern`; graph nodes are compared by identity."""

    def match(data, bindings, consumed, succeed):
        if not _same(pattern, data):
            return False
        return succeed(bindings, _consume(consumed, data))

    return match


def match_element(variable_name: str | None, restrictions: Iterable) -> Combinator:
    """Matches a datum for which all restrictions hold, and binds it to the name."""
    restrictions = tuple(restrictions)

    def match(data, bindings, consumed, succeed):
        if not _all(restriction(data) for restriction in restrictions):
            return False
        consumed = _consume(consumed, data)
        if not variable_name:
            return succeed(bindings, consumed)
        if variable_name not in bindings:
            return succeed({**bindings, variable_name: data}, consumed)
        if not _same(bindings[variable_name], data):
            return False
        return succeed(bindings, consumed)

    return match


def match_choice(*match_combinators: Combinator) -> Combinator:
    """Matches what one of the alternatives matches, tried from left to right."""

    def match(data, bindings, consumed, succeed):
        return _any(
            alternative(data, bindings, consumed, succeed)
            for alternative in match_combinators
        )

    return match


def match_list(*match_combinators: Combinator) -> Combinator:
    """Matches a sequence item by item; bindings flow from left to right."""

    def match(data, bindings, consumed, succeed):
        if not is_seq(data) or len(data) != len(match_combinators):
            return False

        def match_from(index, bindings, consumed):
            if index == len(match_combinators):
                return succeed(bindings, consumed)
            return match_combinators[index](
                data[index],
                bindings,
                consumed,
                lambda bindings, consumed: match_from(index + 1, bindings, consumed),
            )

        return match_from(0, bindings, consumed)

    return match


def match_not(match_combinator: Combinator) -> Combinator:
    """Matches what the combinator does not; binds and consumes nothing."""

    def match(data, bindings, consumed, succeed):
        if match_combinator(data, bindings, consumed, lambda *_: True):
            return False
        return succeed(bindings, consumed)

    return match


def match_any(data: Any, bindings: Bindings, consumed: set, succeed: Callable) -> Any:
    """Matches and consumes anything."""
    return succeed(bindings, _consume(consumed, data))


def match_any_noconsume(
    data: Any, bindings: Bindings, consumed: set, succeed: Callable
) -> Any:
    """Matches anything and consumes nothing."""
    del data
    return succeed(bindings, consumed)


def match_internal(*match_combinators: Combinator) -> Combinator:
    """Matches a node together with its inputs and outputs.

    Args:
      *match_combinators: of the node, of the list of its inputs, and of the list of
        its outputs. A side that anything matches is not looked at.
    """
    match_node, match_inputs, match_outputs = match_combinators

    def match(data, bindings, consumed, succeed):
        def match_side(side, expand, bindings, consumed, succeed):
            if side is match_any_noconsume:
                return succeed(bindings, consumed)
            try:
                nodes = expand(data)
            except ValueError:  # Tensors of several producers have no common node.
                return False
            return side(nodes, bindings, consumed, succeed)

        def outputs_next(bindings, consumed):
            return match_side(
                match_outputs, graph_util.expand_outputs, bindings, consumed, succeed
            )

        def inputs_next(bindings, consumed):
            return match_side(
                match_inputs, graph_util.expand_inputs, bindings, consumed, outputs_next
            )

        return match_node(data, bindings, consumed, inputs_next)

    return match


class PatternEvaluator:
    """Turns patterns into combinators: a table of `(predicate, handler)` pairs."""

    def __init__(self, default_operation: Callable[[Any], Any] | None = None):
        """Makes an evaluator.

        Args:
          default_operation: what to do with a pattern that no predicate accepts.
        """
        self._default_operation = default_operation
        self._handlers: list[tuple[Callable, Callable]] = []

    def defhandler(
        self, predicate: Callable[[Any], Any], handler: Callable[[Any], Any]
    ) -> None:
        """Adds a handler of the patterns for which `predicate` holds, tried last."""
        self._handlers.append((predicate, handler))

    def __call__(self, pat: Any) -> Any:
        """What the first handler that is responsible for `pat` returns.

        Raises:
          ValueError: none is, and there is no default.
        """
        for predicate, handler in self._handlers:
            if predicate(pat):
                return handler(pat)
        if self._default_operation is None:
            raise ValueError(f"No handler for the pattern {pat!r}.")
        return self._default_operation(pat)


make_combinators = PatternEvaluator(match_eqv)
make_combinators.defhandler(
    is_element_pattern,
    lambda pat: match_element(element_name(pat), element_restrictions(pat)),
)
make_combinators.defhandler(
    is_list_pattern, lambda pat: match_list(*map(make_combinators, list_patterns(pat)))
)
make_combinators.defhandler(
    is_choice_pattern,
    lambda pat: match_choice(*map(make_combinators, choice_patterns(pat))),
)
make_combinators.defhandler(
    is_not_pattern, lambda pat: match_not(make_combinators(negated_pattern(pat)))
)
make_combinators.defhandler(is_any_pattern, lambda pat: match_any)
make_combinators.defhandler(is_any_noconsume_pattern, lambda pat: match_any_noconsume)
make_combinators.defhandler(
    is_internal_node_pattern,
    lambda pat: match_internal(*map(make_combinators, internal_patterns(pat))),
)


def _any(itr: Iterable) -> Any:
    """The first truthy value, or False."""
    for value in itr:
        if value:
            return value
    return False


def _all(itr: Iterable) -> Any:
    """The first falsy value, otherwise the last one; True if there is none."""
    value: Any = True
    for value in itr:
        if not value:
            return value
    return value


def _is_node(obj: Any) -> bool:
    return graph_util.is_op(obj) or graph_util.is_tensor(obj)


def _same(first: Any, second: Any) -> bool:
    """Equality that never asks tensors, whose `==` may be elementwise."""
    if first is second:
        return True
    if _is_node(first) or _is_node(second):
        return False
    if is_seq(first) and is_seq(second):
        return (
            type(first) is type(second)
            and len(first) == len(second)
            and all(map(_same, first, second))
        )
    return bool(first == second)


def _consume(consumed: set, data: Any) -> set:
    """`consumed` and `data`; of something that cannot be hashed, its items."""
    return consumed | set(_hashable(data))


def _hashable(data: Any) -> list:
    try:
        hash(data)
        return [data]
    except TypeError:
        pass
    if graph_util.is_tensor(data):
        return [data.ref()]
    return [item for part in data for item in _hashable(part)] if is_seq(data) else []
