"""Keeps matrix functions of one factor in variables: dampings, names, fallbacks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import errors, state, utils
from kfac.python.ops.fisher_factors import base, naming

tf1 = tf.compat.v1


class InverseStore:
    """The part of a factor that stores functions of its damped covariance.

    Attributes:
      damping_funcs: damping id -> the first damping function registered under it, in
        the order of registration. Equality of ids is equality of dampings.
      fallbacks: int64 variable counting results that had to be replaced; None before
        a variable has been created.
    """

    def __init__(self, factor: base.FisherFactor):
        self._factor = factor
        self.damping_funcs: dict[Hashable, Callable[[], Any]] = {}
        self.fallbacks: tf.Variable | None = None

    def register(self, damping_func: Callable[[], Any]) -> Hashable:
        """The damping function's id, which is remembered."""
        damping_id = naming.graph_func_to_id(damping_func)
        self.damping_funcs.setdefault(damping_id, damping_func)
        return damping_id

    def label(self, damping_id: Hashable) -> str:
        """How variable names refer to a damping.

        Its registration index in a factor with a stable name, since the damping itself
        may have tensor names in its id; else the string form of the id.
        """
        if self._factor._has_stable_name:
            return str(list(self.damping_funcs).index(damping_id))
        return naming.graph_func_to_string(self.damping_funcs[damping_id])

    def create(
        self, name: str, shape: Sequence[int], initializer: Any = None
    ) -> tf.Variable:
        """A new variable in the factor's scope; zeros, or as `inverse_initializer`."""
        self._create_counter()
        with tf1.variable_scope(self._factor.name):
            return state.get_variable(
                naming.legal_variable_name(name),
                tuple(int(dim) for dim in shape),
                self._factor._dtype,
                initializer or base.inverse_initializer,
            )

    def _create_counter(self) -> None:
        if self.fallbacks is not None:
            return
        name = self._factor.name
        # A tensor-derived scope holds exactly what the reference API puts there.
        scope = name if self._factor._has_stable_name else f"fallbacks/{name}"
        with tf1.variable_scope(scope, reuse=tf1.AUTO_REUSE):
            self.fallbacks = state.get_variable("fallbacks", (), tf.int64)

    def dampings(self) -> dict[Hashable, tf.Tensor]:
        """The current value of every registered damping, in the factor's dtype."""
        return {
            damping_id: self._factor._damping(damping_func)
            for damping_id, damping_func in self.damping_funcs.items()
        }

    def has_statistics(self, cov: tf.Tensor) -> tf.Tensor:
        """Whether the running average holds anything, so that it may be inverted.

        An average that is not debiased means what it holds from the start, zeros too;
        so does whatever else somebody has put in the average's place.
        """
        average = self._factor._cov
        if not (
            isinstance(average, utils.MovingAverageVariable)
            and average._normalize_value
        ):
            return tf.constant(True)
        # Somebody may have set the average without its weight.
        return tf.logical_or(
            tf.greater(average._total_weight, 0), tf.reduce_any(tf.not_equal(cov, 0))
        )

    def refresh(
        self,
        variables: Sequence[tf.Variable],
        values: Sequence[tf.Tensor],
        fell_back: tf.Tensor,
        has_statistics: tf.Tensor,
    ) -> list[Any]:
        """Assigns results and counts a fallback; one op per variable.

        Without statistics the variables keep their values and nothing is counted.
        Counting is part of the first op.
        """
        counted = utils.smart_assign(
            self.fallbacks,
            tf.cast(tf.logical_and(fell_back, has_statistics), tf.int64),
            assign_fn=tf1.assign_add,
            force_sync=False,
        )
        # The covariance is the same on all replicas, hence so are the values.
        assigned = [
            utils.smart_assign(
                variable,
                tf.where(has_statistics, value, variable),
                force_sync=False,
            )
            for variable, value in zip(variables, values, strict=True)
        ]
        return [tf.group(assigned[0], counted), *assigned[1:]]

    def lookup(self, table: dict[Any, Any], key: Any, what: str) -> Any:
        """`table[key]`, or a `KeyError` that says what to register."""
        if key not in table:
            raise KeyError(
                f"Factor {self._factor.name!r} keeps no {what} under {key!r}. Register "
                "it before instantiate_inv_variables()."
            )
        return table[key]


def check_matrix(matrix: Any) -> Any:
    """`matrix`, if its static rank is 2 or unknown.

    Raises:
      ArgumentError: it has another rank.
    """
    if matrix.shape.rank not in (None, 2):
        raise errors.ArgumentError(
            f"Expected a matrix [n, n], got shape {matrix.shape}."
        )
    return matrix


def all_finite(tensor: tf.Tensor) -> tf.Tensor:
    """Whether every entry is finite: a scalar boolean."""
    return tf.reduce_all(tf.math.is_finite(tensor))
