"""Vector algebra on lists of tensors and on lists of (tensor, variable) pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

Pair = tuple[Any, Any]


def _check_same_length(list1: Sequence, list2: Sequence) -> None:
    if len(list1) != len(list2):
        raise ValueError(
            f"Lists of equal length are expected, got {len(list1)} and {len(list2)}."
        )


def _check_match_lists_of_pairs(list1: Sequence[Pair], list2: Sequence[Pair]) -> None:
    """Raises `ValueError` unless both lists hold the same variable objects in order."""
    _check_same_length(list1, list2)
    assert_variables_match_pairs_list(
        list1, list2, error_message="The lists must hold the same variables in order."
    )


def assert_variables_match_pairs_list(
    a_and_vars: Sequence[Pair],
    b_and_vars: Sequence[Pair],
    error_message: str | None = None,
) -> None:
    """Checks that two lists of (tensor, variable) pairs are about the same variables.

    Lists of different length are compared up to the shorter one.

    Raises:
      ValueError: other variable objects at some positions; lists those positions and
        both lists, after `error_message`.
    """
    mismatches = [
        position
        for position, ((_, a), (_, b)) in enumerate(
            zip(a_and_vars, b_and_vars, strict=False)
        )
        if a is not b
    ]
    if mismatches:
        raise ValueError(
            f"{error_message or 'The variables of two lists of pairs differ.'} "
            f"Mismatching positions: {mismatches}. First list: "
            f"{_variable_names(a_and_vars)}; second list: "
            f"{_variable_names(b_and_vars)}."
        )


def _variable_names(pairs: Sequence[Pair]) -> list[str]:
    return [getattr(variable, "name", str(variable)) for _, variable in pairs]


def sprod(scalar: Any, list_: Sequence[Any]) -> tuple:
    """Scalar times every item."""
    return tuple(scalar * item for item in list_)


def sprod_p(scalar: Any, list_: Sequence[Pair]) -> tuple:
    """Scalar times the tensor of every pair."""
    return tuple((scalar * item, variable) for item, variable in list_)


def sum_(list1: Sequence[Any], list2: Sequence[Any]) -> tuple:
    """Elementwise sum of two lists of tensors."""
    _check_same_length(list1, list2)
    return tuple(a + b for a, b in zip(list1, list2, strict=True))


def sum_p(list1: Sequence[Pair], list2: Sequence[Pair]) -> tuple:
    """Elementwise sum of two lists of pairs about the same variables."""
    _check_match_lists_of_pairs(list1, list2)
    return tuple((a + b, v) for (a, v), (b, _) in zip(list1, list2, strict=True))


def ip(list1: Sequence[Any], list2: Sequence[Any]) -> tf.Tensor:
    """Inner product of two vectors given as lists of tensors; a scalar.

    Raises:
      ValueError: empty lists, or lists of different length.
    """
    _check_same_length(list1, list2)
    if not list1:
        raise ValueError("An inner product needs at least one pair of tensors.")
    terms = [tf.reduce_sum(a * b) for a, b in zip(list1, list2, strict=True)]
    return tf.add_n(terms)


def ip_p(list1: Sequence[Pair], list2: Sequence[Pair]) -> tf.Tensor:
    """Inner product of two vectors given as pairs about the same variables."""
    _check_match_lists_of_pairs(list1, list2)
    return ip([a for a, _ in list1], [b for b, _ in list2])
