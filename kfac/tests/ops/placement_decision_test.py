"""Who does what, decided on plain numbers."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac.python.ops import placement_decision

OWNERS = ("a", "b", "c")


def loads(costs, owner_of, owners=OWNERS):
    return {
        owner: sum(costs[t] for t, o in owner_of.items() if o == owner)
        for owner in owners
    }


def test_round_robin_deals_in_order_and_restarts_at_the_first_owner():
    assert placement_decision.round_robin("uvwxy", OWNERS) == {
        "u": "a",
        "v": "b",
        "w": "c",
        "x": "a",
        "y": "b",
    }


def test_largest_first_balances_where_round_robin_does_not():
    costs = {"conv": 1.0, "fc": 27.0, "conv2": 1.0, "fc2": 27.0}
    owners = ("a", "b")
    greedy = placement_decision.largest_first(costs, owners)
    assert list(greedy) == list(costs)
    assert loads(costs, greedy, owners) == {"a": 28.0, "b": 28.0}
    assert greedy == {"fc": "a", "fc2": "b", "conv": "a", "conv2": "b"}
    in_turn = placement_decision.round_robin(list(costs), owners)
    assert loads(costs, in_turn, owners) == {"a": 2.0, "b": 54.0}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_largest_first_is_within_grahams_bound_of_the_best_assignment(sizes):
    costs = dict(enumerate(sizes))
    greedy = max(loads(costs, placement_decision.largest_first(costs, OWNERS)).values())
    best = min(
        max(loads(costs, dict(zip(costs, owners, strict=True))).values())
        for owners in itertools.product(OWNERS, repeat=len(costs))
    )
    assert greedy <= best * (4 / 3 - 1 / (3 * len(OWNERS))) + 1e-9


@pytest.mark.parametrize(
    "decide",
    [
        lambda: placement_decision.round_robin(["t"], []),
        lambda: placement_decision.largest_first({"t": 1.0}, []),
        lambda: placement_decision.largest_first({"t": -1.0}, OWNERS),
        lambda: placement_decision.largest_first({"t": float("nan")}, OWNERS),
    ],
)
def test_impossible_questions_are_refused(decide):
    with pytest.raises(ValueError):
        decide()


def test_no_tasks_need_no_owner_to_do_anything():
    assert placement_decision.largest_first({}, OWNERS) == {}
    assert placement_decision.round_robin([], OWNERS) == {}
