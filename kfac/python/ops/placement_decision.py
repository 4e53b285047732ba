"""Who does which piece of work: costs in, owners out.

Pure functions of Python values, so that a decision can be checked with dictionaries
and without devices.  `placement` carries decisions out.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Task = TypeVar("Task", bound=Hashable)
Owner = TypeVar("Owner")


def round_robin(tasks: Sequence[Task], owners: Sequence[Owner]) -> dict[Task, Owner]:
    """Deals tasks out in order: task j goes to owner j mod len(owners).

    Raises:
      ValueError: `owners` is empty.
    """
    _check_owners(owners)
    return {task: owners[j % len(owners)] for j, task in enumerate(tasks)}


def largest_first(
    costs: Mapping[Task, float], owners: Sequence[Owner]
) -> dict[Task, Owner]:
    """Evens out the load: the dearest task left goes to the least loaded owner.

    The makespan is at most 4/3 - 1/(3 len(owners)) of the best possible one (Graham,
    "Bounds on multiprocessing timing anomalies", 1969).  Ties keep the given order,
    so every worker that decides for itself comes to the same decision.

    Args:
      costs: task -> cost, any nonnegative unit (an inverse of size n costs n^3).
      owners: whoever can take tasks.

    Returns:
      task -> owner, in the order of `costs`.

    Raises:
      ValueError: `owners` is empty or a cost is negative.
    """
    _check_owners(owners)
    for task, cost in costs.items():
        if not cost >= 0:
            raise ValueError(f"The cost of {task!r} is {cost!r}; costs are >= 0.")
    load = [(0.0, position) for position in range(len(owners))]
    owner_of = {}
    for task in sorted(costs, key=costs.__getitem__, reverse=True):
        total, position = heapq.heappop(load)
        owner_of[task] = owners[position]
        heapq.heappush(load, (total + costs[task], position))
    return {task: owner_of[task] for task in costs}


def _check_owners(owners: Sequence[Owner]) -> None:
    if not owners:
        raise ValueError("There is no owner to give work to.")
