"""The bookkeeping of layer registrations: blocks, uses, linked parameters, defaults.

A registration is *planned* first, which checks everything and changes nothing, and
*committed* then; so a call that raises leaves the collection as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import errors
from kfac.python.ops.layer_collection import (
    approximations,
    checks,
    parameters_dict,
    preferences,
)
from kfac.python.ops.layer_collection.parameters_dict import as_key, as_tuple, identity
from kfac.python.ops.layer_collection.reuse import VARIABLE_SCOPE, is_another_tower


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked layer registration.

    Attributes:
      key: canonical parameter group.
      block: the block that takes the tower, stored already or new.
      is_new: whether the block must be stored.
    """

    key: Any
    block: Any
    is_new: bool


def _default_approximation(family: str) -> tuple[property, Callable]:
    """The property `default_<family>_approximation` and its setter method."""

    def get(self):
        return self._default_approximations[family]

    def set_default(self, value: str) -> None:
        approximations.check_in_table(
            value, self._approximation_table(family), f"the default of {family}"
        )
        self._default_approximations[family] = value

    get.__doc__ = f"Approximation of `{family}` layers where none is asked for."
    set_default.__name__ = f"set_default_{family}_approximation"
    set_default.__doc__ = f"""Sets the approximation of later `{family}` registrations.

        Raises:
          ArgumentError: `value` is no approximation of this family; the default
            stays as it was.
        """
    return property(get), set_default


class LayerRegistry:
    """Which block covers which parameters.

    Attributes:
      fisher_blocks: mapping from parameter groups to blocks, in registration order.
        May be replaced by a plain dict.
      generic_reasons: `variable.ref()` -> why the variable has no layer-specific
        approximation; the scanner fills it.
    """

    def __init__(self):
        self.fisher_blocks: Any = parameters_dict.LayerParametersDict()
        self.generic_reasons: dict[Any, str] = {}
        self._finalized = False
        self._vars_to_uses = parameters_dict.UseCounts()
        self._linked_parameters: dict[Any, str | None] = {}
        self._preferences = preferences.Preferences()
        self._default_approximations = dict(approximations.DEFAULT_APPROXIMATIONS)
        for family, table in approximations.BLOCK_TYPES.items():
            setattr(self, f"_{family}_approx_to_block_types", dict(table))

    default_generic_approximation, set_default_generic_approximation = (
        _default_approximation("generic")
    )
    default_fully_connected_approximation, set_default_fully_connected_approximation = (
        _default_approximation("fully_connected")
    )
    default_conv2d_approximation, set_default_conv2d_approximation = (
        _default_approximation("conv2d")
    )
    (
        default_fully_connected_multi_approximation,
        set_default_fully_connected_multi_approximation,
    ) = _default_approximation("fully_connected_multi")
    default_conv2d_multi_approximation, set_default_conv2d_multi_approximation = (
        _default_approximation("conv2d_multi")
    )
    default_scale_and_shift_approximation, set_default_scale_and_shift_approximation = (
        _default_approximation("scale_and_shift")
    )

    def set_default_approximation(self, value: str) -> None:
        """Sets the approximation of later registrations in all families that have it.

        Layers of other families, and embeddings looked up by integer ids if it is
        none for ids, keep their defaults.

        Raises:
          ArgumentError: no layer family has that approximation.
        """
        self._check_some_family_has(value, "the default of all layers")
        for family in approximations.BLOCK_TYPES:
            table = self._approximation_table(family)
            name = approximations.name_in(value, table)
            if name in table:
                self._default_approximations[family] = name

    def _check_some_family_has(self, approximation: Any, what: str) -> None:
        tables = map(self._approximation_table, approximations.BLOCK_TYPES)
        all_tables = {name: make for table in tables for name, make in table.items()}
        approximations.check_in_table(approximation, all_tables, what)

    @property
    def registered_variables(self) -> tuple[Any, ...]:
        """All registered variables, groups expanded, in registration order."""
        return tuple(v for key in self.fisher_blocks for v in as_tuple(key))

    @property
    def linked_parameters(self) -> Mapping[Any, str | None]:
        """Linked groups (sets of variables) and their approximations, or None."""
        return self._linked_parameters

    def get_blocks(self) -> tuple[Any, ...]:
        """All blocks, in registration order."""
        return tuple(self.fisher_blocks.values())

    def define_linked_parameters(
        self, params: Any, approximation: str | None = None
    ) -> None:
        """Says that some parameters belong to one layer.

        The scanner then drops every match that overlaps the group without being equal
        to it. Registrations of exactly this set use `approximation` unless they are
        given another one; "kron" and its diagonal variants mean "kron_indep" and so on
        where a case uses the layer several times.

        Args:
          params: a variable, or a tuple or list of them, in any order.
          approximation: name of an approximation, or None.

        Raises:
          ArgumentError: one of the variables is registered in another group, or linked
            already; or no layer family has that approximation.
        """
        group = as_tuple(params)
        if approximation is not None:
            self._check_some_family_has(
                approximation, "the approximation of linked parameters"
            )
        for key in self.fisher_blocks:
            if parameters_dict.same_variables(as_tuple(key), group):
                continue
            for variable in _common(as_tuple(key), group):
                raise errors.ArgumentError(
                    f"{checks.parameter_name(variable)!r} was already registered, with "
                    f"{checks.parameter_name(key)}; link parameters before registering "
                    "their layer."
                )
        for linked in self._linked_parameters:
            for variable in _common(linked, group):
                raise errors.ArgumentError(
                    f"{checks.parameter_name(variable)!r} was already linked, in "
                    f"{checks.parameter_name(tuple(linked))}."
                )
        self._linked_parameters[parameters_dict.variable_set(group)] = approximation

    def prefer_approximation(
        self, variables: Sequence[Any], approximation: str
    ) -> None:
        """Asks for an approximation of all groups that the scanner makes of variables.

        Other than linked parameters, they need not belong together. A group whose
        family does not have the approximation is treated as if nothing had been asked.

        Args:
          variables: of one or several layers.
          approximation: name of an approximation.

        Raises:
          ArgumentError: no layer family has that approximation.
        """
        self._check_some_family_has(approximation, "the approximation of a layer")
        self._preferences.add(variables, approximation)

    def check_preferences(self) -> None:
        """Checks that each preference was of use for some group.

        Raises:
          ArgumentError: groups were registered, but none of them could have it.
        """
        self._preferences.check()

    def _get_linked_approx(self, params: Any) -> str | None:
        """The approximation linked to exactly this set of parameters, or None.

        Without such a link it is the one that is preferred for all of them.
        """
        for linked, approximation in self._linked_parameters.items():
            if parameters_dict.same_variables(linked, as_tuple(params)):
                return approximation
        return self._preferences.approximation_of(params)

    def _approximation_table(
        self, family: str
    ) -> Mapping[str, approximations.BlockFactory]:
        return getattr(self, f"_{family}_approx_to_block_types")

    def _get_block_type(
        self,
        params: Any,
        approx: str | None,
        default: str,
        approx_to_type: Mapping[str, approximations.BlockFactory],
    ) -> tuple[approximations.BlockFactory, str]:
        """Resolves the approximation: as asked, else as linked, else the default.

        Returns:
          What makes the block, and the resolved name.

        Raises:
          ArgumentError: the result is not in the family's table.
        """
        if approx is None:
            approx = self._asked_for(params, approx_to_type)
        if approx is None:
            approx = default
        approximations.check_in_table(
            approx, approx_to_type, f"approx of {checks.parameter_name(params)}"
        )
        return approx_to_type[approx], approx

    def _asked_for(
        self, params: Any, table: Mapping[str, approximations.BlockFactory]
    ) -> str | None:
        """What is linked, or preferred and in the family's table; None otherwise."""
        is_linked = any(
            parameters_dict.same_variables(linked, as_tuple(params))
            for linked in self._linked_parameters
        )
        if not is_linked:
            return self._preferences.name_in(params, table)
        return approximations.name_in(self._get_linked_approx(params), table)

    def _block_type_of(
        self, family: str, params: Any, approx: str | None
    ) -> tuple[approximations.BlockFactory, str]:
        return self._get_block_type(
            params,
            approx,
            self._default_approximations[family],
            self._approximation_table(family),
        )

    def _register_block(
        self, layer_key: Any, fisher_block: Any, reuse: Any = VARIABLE_SCOPE
    ) -> Any:
        """Stores the block, or finds the one that `reuse` refers to.

        Returns:
          The block that the collection holds for the key.

        Raises:
          ValueError: see `_plan`.
        """
        plan = self._plan(layer_key, fisher_block, reuse)
        self._store(plan)
        return plan.block

    def _plan(self, layer_key: Any, fisher_block: Any, reuse: Any) -> Plan:
        """Decides what a registration would do.

        Args:
          layer_key: parameter, or tuple or list of them.
          fisher_block: the new block; discarded if an existing one is extended.
          reuse: see `reuse.is_another_tower`.

        Raises:
          ArgumentError: the collection is finalised; the key is known (or unknown)
            against what `reuse` says; the stored block is of another class or has
            another configuration; a variable is registered in another group.
        """
        self._check_open()
        key = as_key(layer_key)
        name = checks.parameter_name(key)
        known = key in self.fisher_blocks
        if is_another_tower(reuse, known):
            if not known:
                raise errors.ArgumentError(
                    f"reuse is set, but {name} has not been registered; register its "
                    "first tower with reuse=False (or tf.compat.v1.AUTO_REUSE)."
                )
            stored = self.fisher_blocks[key]
            _check_same_configuration(name, stored, fisher_block)
            return Plan(key, stored, is_new=False)
        if known:
            raise errors.ArgumentError(
                f"{name} is already in LayerCollection. To add another tower (the same "
                "layer on another part of the batch), register with reuse=True."
            )
        for other in self.fisher_blocks:
            for variable in _common(as_tuple(other), as_tuple(key)):
                raise errors.ArgumentError(
                    f"{checks.parameter_name(variable)!r} was already registered, as "
                    f"part of {checks.parameter_name(other)}; cannot register {name}."
                )
        return Plan(key, fisher_block, is_new=True)

    def _store(self, plan: Plan) -> None:
        if plan.is_new:
            self.fisher_blocks[plan.key] = plan.block

    def _commit(self, plan: Plan, tower: Sequence[Any], uses: float) -> None:
        """Carries out a planned registration.

        Args:
          plan: from `_plan`.
          tower: arguments of the block's `register_additional_tower`.
          uses: uses that the tower adds to each parameter.
        """
        plan.block.register_additional_tower(*tower)
        self._store(plan)
        self._add_uses(plan.key, uses)

    def _check_open(self) -> None:
        if self._finalized:
            raise errors.ArgumentError(
                "Cannot register after finalisation: this LayerCollection is in use by "
                "an optimizer or estimator. Register all layers and losses first."
            )

    def _add_uses(self, params: Any, uses: float) -> None:
        """Adds `uses` to the registered uses of every parameter of the group."""
        for variable in as_tuple(params):
            self._vars_to_uses[variable] += uses

    def _get_use_count_map(self) -> Mapping[Any, float]:
        """The live mapping from variables to registered uses."""
        return self._vars_to_uses


def _common(first: Any, second: Any) -> list[Any]:
    """Members of `first` that are in `second`."""
    identities = {identity(v) for v in second}
    return [v for v in first if identity(v) in identities]


def _check_same_configuration(name: str, stored: Any, new: Any) -> None:
    if type(stored) is not type(new):
        raise errors.ArgumentError(
            f"{name} was registered with a {type(stored).__name__}; another tower of "
            f"it cannot use a {type(new).__name__}. Give the same approx."
        )
    if not hasattr(stored, "configuration"):
        return
    stored_options, new_options = stored.configuration(), new.configuration()
    for option, value in new_options.items():
        if not _same_option(option, stored_options[option], value):
            raise errors.ArgumentError(
                f"{name} was registered with {option}={stored_options[option]!r}; "
                f"another tower of it cannot have {option}={value!r}."
            )


def _same_option(option: str, stored: Any, new: Any) -> bool:
    if option == "num_uses" and None in (stored, new):
        return True  # Inferred from the data, which the factors compare.
    stored, new = _without_spelling(stored), _without_spelling(new)
    if stored is new:
        return True
    arrays = [_static_array(stored), _static_array(new)]
    if any(array is not None for array in arrays):
        return all(array is not None for array in arrays) and np.array_equal(*arrays)
    return stored == new


def _without_spelling(value: Any) -> Any:
    """One form for what means the same: "same" and "SAME", None and all ones."""
    if isinstance(value, str):
        return value.upper()
    if isinstance(value, (tuple, list)):
        return None if all(item == 1 for item in value) else tuple(value)
    return value


def _static_array(value: Any) -> np.ndarray | None:
    """The value of an array or constant tensor; None for anything else."""
    if isinstance(value, np.ndarray):
        return value
    return tf.get_static_value(value) if tf.is_tensor(value) else None
