"""K-FAC whose train op also updates the curvature, on a fixed schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from kfac.python.ops import optimizer, utils
from kfac.python.ops.optimizer import arguments
from kfac.python.ops.utils.scheduling import done, run_if

tf1 = tf.compat.v1

_GATE_OP = tf1.train.Optimizer.GATE_OP
_DEFAULT_COV_EMA_DECAY = (
    inspect.signature(optimizer.KfacOptimizer).parameters["cov_ema_decay"].default
)


class PeriodicInvCovUpdateKfacOpt(optimizer.KfacOptimizer):
    """`KfacOptimizer` that needs nothing but its train op to be run.

    At step k (counted from 0), in this order:

    1. statistics of all factors, if k is a multiple of `cov_update_every`, and the
       delayed damping adaptation, if it is due;
    2. all inverses, if k is a multiple of `invert_every`, with the damping of 1.;
    3. the step itself, with the inverses of 2.

    Statistics are built inside one conditional branch: where none are due, neither the
    sampling of targets nor the backward pass to them is executed.

    The first `num_burnin_steps` runs of `minimize`'s op only collect statistics, as
    plain sums; parameters and counters other than the burn-in's do not change.
    """

    def __init__(
        self,
        invert_every: int = 10,
        cov_update_every: int = 1,
        num_burnin_steps: int = 0,
        **kwargs: Any,
    ):
        """Makes the optimizer.

        Args:
          invert_every: steps from one inverse update to the next.
          cov_update_every: steps from one statistics update to the next.
            `cov_ema_decay` is per step: it is raised to this power.
          num_burnin_steps: steps that only collect statistics.
          **kwargs: of `KfacOptimizer`.

        Raises:
          ValueError: a period is not positive; burn-in inside a mirrored strategy; see
            also `KfacOptimizer`.
        """
        invert_every = arguments.checked_count("invert_every", invert_every, least=1)
        cov_update_every = arguments.checked_count(
            "cov_update_every", cov_update_every, least=1
        )
        num_burnin_steps = arguments.checked_count(
            "num_burnin_steps", num_burnin_steps, least=0
        )
        if num_burnin_steps and _in_mirrored_replica():
            raise ValueError(
                "num_burnin_steps > 0 is not supported under MirroredStrategy: its "
                "replicas cannot take different branches of the training step. Run "
                "the statistics' ops by hand before training instead."
            )
        decay = kwargs.pop("cov_ema_decay", _DEFAULT_COV_EMA_DECAY)
        arguments.check_scalars(cov_ema_decay=decay)
        super().__init__(cov_ema_decay=decay**cov_update_every, **kwargs)
        self._invert_every = invert_every
        self._cov_update_every = cov_update_every
        self._num_burnin_steps = num_burnin_steps
        with tf1.variable_scope(self._scope, auxiliary_name_scope=False):
            self._burnin_counter = self._step_counter("burnin_counter")
        self._made_vars_already = False
        interval = self._damping_adaptation_interval
        if self._adapt_damping and interval % invert_every != 0:
            tf.get_logger().warning(
                "damping_adaptation_interval (%s) is not a multiple of invert_every "
                "(%s): a new damping waits for the next inverse update.",
                interval,
                invert_every,
            )

    def make_vars_and_create_op_thunks(self) -> tuple:
        """As in the base class; `minimize` then uses these thunks."""
        self._thunks = super().make_vars_and_create_op_thunks()
        self._made_vars_already = True
        return self._thunks

    def kfac_update_ops(self) -> tf.Operation:
        """Op of everything that precedes the step: statistics, damping, inverses."""
        if not self._made_vars_already:
            tf.get_logger().warning(
                "kfac_update_ops (or apply_gradients) was called before minimize; the "
                "curvature's variables are made now, and there is no burn-in."
            )
            self.make_vars_and_create_op_thunks()
        cov_thunks, inv_thunks = self._thunks
        updated = self._run_every(
            self._cov_update_every,
            lambda: self._fisher_est.covariance_update_ops(cov_thunks),
        )
        adapted = self.maybe_pre_update_adapt_damping()
        with tf.control_dependencies([updated, adapted]):
            inverted = self._run_every(
                self._invert_every, lambda: [thunk() for thunk in inv_thunks]
            )
        return tf.group(updated, adapted, inverted)

    def _run_every(self, period: int, run: Callable[[], list]) -> tf.Operation:
        if period == 1:
            return tf.group(run())
        return run_if(tf.equal(self.counter % period, 0), run)

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Any, Any]],
        global_step: Any = None,
        name: str | None = None,
    ) -> tf.Operation:
        """Op that updates the curvature where due, then takes a step."""
        with tf.control_dependencies([self.kfac_update_ops()]):
            return super().apply_gradients(
                grads_and_vars, global_step=global_step, name=name
            )

    def minimize(
        self,
        loss: tf.Tensor,
        global_step: Any = None,
        var_list: Iterable[Any] | None = None,
        gate_gradients: int = _GATE_OP,
        aggregation_method: int | None = None,
        colocate_gradients_with_ops: bool = True,
        name: str | None = None,
        grad_loss: tf.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What to run at each step; may be called again.

        Returns:
          An op; with burn-in, a tensor.
        """
        var_list = self._checked_var_list(var_list)
        if not self._made_vars_already:
            self.make_vars_and_create_op_thunks()
        grads_and_vars = self.compute_gradients(
            loss,
            var_list=var_list,
            gate_gradients=gate_gradients,
            aggregation_method=aggregation_method,
            colocate_gradients_with_ops=colocate_gradients_with_ops,
            grad_loss=grad_loss,
            **kwargs,
        )

        def step():
            return self.apply_gradients(
                grads_and_vars, global_step=global_step, name=name
            )

        if not self._num_burnin_steps:
            return step()
        # Not inside the branch: variables outlive it.
        self._get_or_make_velocities(var_list)
        result = utils.smart_cond(
            self._burnin_counter.read_value() < self._num_burnin_steps,
            lambda: done(self._burn_in()),
            lambda: done(step()),
        )
        self._last_train_op = tf.group(result)
        return result

    def _burn_in(self) -> list:
        cov_thunks, _ = self._thunks
        counted = utils.smart_assign(
            self._burnin_counter, 1, assign_fn=tf1.assign_add, force_sync=False
        )
        updates = self._fisher_est.covariance_update_ops(cov_thunks, should_decay=False)
        return [*updates, counted]


def _in_mirrored_replica() -> bool:
    return (
        tf.distribute.has_strategy()
        and not tf.distribute.in_cross_replica_context()
        and isinstance(
            tf.distribute.get_strategy(),
            (tf.distribute.MirroredStrategy, tf1.distribute.MirroredStrategy),
        )
    )
