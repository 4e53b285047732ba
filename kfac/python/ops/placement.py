"""Where the estimator's thunks run: mix-ins, listed before `FisherEstimator`.

`placement_decision` decides, this module carries out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import errors, placement_decision, utils
from kfac.python.ops.utils import packing, replicas

Thunk = Callable[..., Any]
Thunks = tuple[list[Thunk], list[Thunk], list[Thunk], list[Thunk]]

_INVERSE_ASSIGNMENTS = ("round_robin", "largest_first")


def _make_thunk_on_device(func: Thunk, device: str) -> Thunk:
    """`func`, building its ops on `device`."""

    def thunk(*args, **kwargs):
        with tf.device(device):
            return func(*args, **kwargs)

    return thunk


def _spread(thunks: Sequence[Thunk], devices: Sequence[str]) -> list[Thunk]:
    """Thunk j on device j mod len(devices); as they are if there is none."""
    if not devices:
        return list(thunks)
    device_of = placement_decision.round_robin(range(len(thunks)), devices)
    return [
        _make_thunk_on_device(thunk, device_of[j]) for j, thunk in enumerate(thunks)
    ]


class RoundRobinPlacementMixin:
    """Spreads factors and blocks over devices."""

    def __init__(
        self,
        cov_devices: Iterable[str] | None = None,
        inv_devices: Iterable[str] | None = None,
        trans_devices: Iterable[str] | None = None,
        inv_assignment: str = "round_robin",
        **kwargs: Any,
    ):
        """Stores devices; an empty or missing list means no explicit placement.

        Args:
          cov_devices: for covariance variables and updates, cycling over factors.
          inv_devices: for inverse updates.  (Inverse *variables* stay on the ambient
            device, where the products are taken.)
          trans_devices: for block-wise products, cycling over blocks.
          inv_assignment: how inverse updates are dealt out: "round_robin", or
            "largest_first", which evens out the load by the cubes of the sizes.
          **kwargs: for the estimator.

        Raises:
          ArgumentError: unknown `inv_assignment`.
        """
        super().__init__(**kwargs)
        if inv_assignment not in _INVERSE_ASSIGNMENTS:
            raise errors.ArgumentError(
                f"inv_assignment={inv_assignment!r}; expected one of "
                f"{_INVERSE_ASSIGNMENTS}."
            )
        self._cov_devices = tuple(cov_devices or ())
        self._inv_devices = tuple(inv_devices or ())
        self._trans_devices = tuple(trans_devices or ())
        self._inv_assignment = inv_assignment

    def _place_and_compute_transformation_thunks(
        self, thunks: Sequence[Thunk], params_list: Sequence[Any]
    ) -> list[Any]:
        del params_list
        return [thunk() for thunk in _spread(thunks, self._trans_devices)]

    def create_ops_and_vars_thunks(self, scope: str | None = None) -> Thunks:
        """See `FisherEstimator.create_ops_and_vars_thunks`; thunks carry a device."""
        cov_variables, cov_updates, inv_variables, inv_updates = (
            self._create_ops_and_vars_thunks(scope=scope)
        )
        return (
            _spread(cov_variables, self._cov_devices),
            _spread(cov_updates, self._cov_devices),
            inv_variables,
            self._place_inverses(inv_updates),
        )

    def _place_inverses(self, inv_updates: list[Thunk]) -> list[Thunk]:
        if not self._inv_devices or self._inv_assignment == "round_robin":
            return _spread(inv_updates, self._inv_devices)

        def placed(j: int) -> tf.Operation:
            # Costs are known once the inverses' variables exist.
            costs = {i: f.inverse_flops() for i, f in enumerate(self.factors)}
            device_of = placement_decision.largest_first(costs, self._inv_devices)
            return _make_thunk_on_device(inv_updates[j], device_of[j])()

        return [functools.partial(placed, j) for j in range(len(inv_updates))]


class ReplicaRoundRobinPlacementMixin:
    """Spreads inverse updates and products over the replicas of one model.

    Statistics are computed by every replica, from its own part of the data; factors
    average them.
    """

    def __init__(self, distribute_transformations: bool = True, **kwargs: Any):
        """Checks that there are replicas.

        Args:
          distribute_transformations: whether block-wise products are spread, too;
            otherwise every replica computes all of them.
          **kwargs: for the estimator.

        Raises:
          ValueError: there are no replicas.
          TypeError: devices were given, which belong to the other strategy.
        """
        if not utils.is_replicated():
            raise ValueError(
                "placement_strategy 'replica_round_robin' needs several replicas: "
                "build inside a tf.distribute strategy, or use 'round_robin'."
            )
        super().__init__(**kwargs)
        self._distribute_transformations = distribute_transformations

    def _place_and_compute_transformation_thunks(
        self, thunks: Sequence[Thunk], params_list: Sequence[Any]
    ) -> Sequence[Any]:
        if not self._distribute_transformations:
            return [thunk() for thunk in thunks]
        if utils.get_tf_replicator() is not None:
            return utils.map_gather(thunks)
        results = replicas.shared_out(
            [lambda t=thunk: _dense(t()) for thunk in thunks],
            [[packing.Spec.of(v) for v in tf.nest.flatten(p)] for p in params_list],
            [block.product_flops() for block in self.blocks],
            "preconditioned",
        )
        return [
            tf.nest.pack_sequence_as(params, of_block)
            for params, of_block in zip(params_list, results, strict=True)
        ]

    def create_ops_and_vars_thunks(self, scope: str | None = None) -> Thunks:
        """See `FisherEstimator.create_ops_and_vars_thunks`.

        The list of inverse update thunks holds a single one, which updates all
        factors.
        """
        cov_variables, cov_updates, inv_variables, inv_updates = (
            self._create_ops_and_vars_thunks(scope=scope)
        )
        return (
            cov_variables,
            cov_updates,
            inv_variables,
            [lambda: self._update_inverses(inv_updates)],
        )

    def _update_inverses(self, inv_updates: Sequence[Thunk]) -> tf.Operation:
        """Each factor's inverses on one replica, then assigned on all."""
        variables, thunks, specs, flops = [], [], [], []
        for factor, update in zip(self.factors, inv_updates, strict=True):
            of_factor = list(factor.inverse_variables())
            if not of_factor:
                continue
            specs.append(
                [
                    packing.Spec.of(variable, layout)
                    for variable, layout in zip(
                        of_factor, factor.inverse_layouts(), strict=True
                    )
                ]
            )
            if factor.fallbacks is not None:
                # Counted by one replica, known to all; travels as a float.
                of_factor.append(factor.fallbacks)
                specs[-1].append(packing.Spec((), specs[-1][0].dtype))
            variables.append(of_factor)
            thunks.append(
                lambda u=update, v=of_factor, f=factor: _updated_values(u, v, f._dtype)
            )
            flops.append(factor.inverse_flops())
        if not thunks:
            return tf.no_op()
        if utils.get_tf_replicator() is not None:
            results = utils.map_gather(thunks)
        else:
            results = replicas.shared_out(thunks, specs, flops, "inverses")
        return tf.group(
            *(
                utils.smart_assign(variable, value, force_cast=True, force_sync=False)
                for of_factor, values in zip(variables, results, strict=True)
                for variable, value in zip(of_factor, values, strict=True)
            )
        )


def _updated_values(
    update: Thunk, variables: Sequence[tf.Variable], dtype: tf.DType
) -> tuple[tf.Tensor, ...]:
    with tf.control_dependencies([update()]):
        return tuple(
            tf.cast(tf.identity(variable.read_value()), dtype) for variable in variables
        )


def _dense(product: Any) -> list[tf.Tensor]:
    return [tf.convert_to_tensor(part) for part in tf.nest.flatten(product)]
