"""Approximations that are asked for parameters whose grouping is not known yet.

A layer of a high-level library may consist of several layers to the curvature: the
kernel of a recurrent cell with its bias and the recurrent kernel, the two filters of a
separable convolution, projections of attention. Each gets the approximation that is
asked for all of them if its family has it, and what it would get anyway otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kfac.python.ops import errors
from kfac.python.ops.layer_collection import approximations, checks
from kfac.python.ops.layer_collection.parameters_dict import as_tuple, identity


@dataclasses.dataclass
class _Preference:
    """What is asked for some variables, and what has come of it."""

    variables: Sequence[Any]
    approximation: str
    is_met: bool = False
    # What a family has -> names of its groups.
    refusals: dict[tuple[str, ...], list[str]] = dataclasses.field(default_factory=dict)

    def covers(self, params: Any) -> bool:
        """Whether all of the group's members are among the variables."""
        identities = {identity(v) for v in self.variables}
        return all(identity(member) in identities for member in as_tuple(params))


class Preferences:
    """What is asked for which variables; later ones count more than earlier ones."""

    def __init__(self):
        self._preferences: list[_Preference] = []

    def add(self, variables: Sequence[Any], approximation: str) -> None:
        """Asks for an approximation of all groups of these variables."""
        self._preferences.insert(0, _Preference(tuple(variables), approximation))

    def approximation_of(self, params: Any) -> str | None:
        """What is asked for a group, if anything."""
        preference = self._of(params)
        return None if preference is None else preference.approximation

    def name_in(
        self, params: Any, table: Mapping[str, approximations.BlockFactory]
    ) -> str | None:
        """The same as a name of the group's family; None if the family has it not."""
        preference = self._of(params)
        if preference is None:
            return None
        name = approximations.name_in(preference.approximation, table)
        if name in table:
            preference.is_met = True
            return name
        groups = preference.refusals.setdefault(tuple(sorted(table)), [])
        groups.append(checks.parameter_name(params))
        return None

    def check(self) -> None:
        """Refuses what no group at all has got, once layers are registered.

        Raises:
          ArgumentError: as said, with what the groups can have.
        """
        problems = [
            f"Bad value {preference.approximation!r}: {', '.join(groups)} can have one "
            f"of {list(names)}."
            for preference in self._preferences
            if not preference.is_met
            for names, groups in preference.refusals.items()
        ]
        if problems:
            raise errors.ArgumentError(
                "An approximation is asked for that a layer cannot have:\n  "
                + "\n  ".join(problems)
            )

    def _of(self, params: Any) -> _Preference | None:
        covering = (p for p in self._preferences if p.covers(params))
        return next(covering, None)
