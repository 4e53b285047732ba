"""`KfacOptimizer`: a curvature estimate as preconditioner, and the step around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import config, estimator, sub_batch, utils
from kfac.python.ops.estimator import batch_sizes
from kfac.python.ops.optimizer import arguments
from kfac.python.ops.optimizer import damping as damping_adaptation
from kfac.python.ops.optimizer.quadratic_model import QuadraticModelMixin
from kfac.python.ops.optimizer.reporting import ReportingMixin
from kfac.python.ops.optimizer.scalar_state import ScalarStateMixin
from kfac.python.ops.optimizer.update_steps import (
    Pair,
    UpdateStepsMixin,
    tensors_of,
    variables_of,
)
from kfac.python.ops.rules import levenberg_marquardt
from kfac.python.ops.utils.subgraph import without_wrapper

tf1 = tf.compat.v1

_GATE_OP = tf1.train.Optimizer.GATE_OP


class KfacOptimizer(
    UpdateStepsMixin,
    QuadraticModelMixin,
    damping_adaptation.DampingAdaptationMixin,
    ScalarStateMixin,
    ReportingMixin,
    tf1.train.GradientDescentOptimizer,
):
    """Preconditions gradients with a Kronecker-factored curvature estimate.

    Each step moves the parameters by `-learning_rate * r`, where r comes from the
    gradient, the preconditioner `P = (F + damping I)^-1` and momentum; see
    `kfac.python.ops.rules` for the formulas.  This class never updates the curvature
    by itself: build the thunks' ops and run them, or use
    `PeriodicInvCovUpdateKfacOpt`, which does.

        optimizer = KfacOptimizer(0.1, 1e-3, layer_collection)
        cov_thunks, inv_thunks = optimizer.make_vars_and_create_op_thunks()
        cov_ops = [thunk() for thunk in cov_thunks]
        inv_ops = [thunk() for thunk in inv_thunks]   # after a first run of cov_ops
        train_op = optimizer.minimize(loss)

    Losses (`minimize`'s, `loss`, `loss_fn`'s) are means over the batch of one replica,
    never divided by the number of replicas.

    In a `tf.function` the collection and the optimizer are built inside the trace,
    with a `kfac.state.VariableStore` in force; every trace finds the same state.

    See Martens & Grosse, "Optimizing neural networks with Kronecker-factored
    approximate curvature", ICML 2015.
    """

    def __init__(
        self,
        learning_rate: Any,
        damping: Any,
        layer_collection: Any,
        cov_ema_decay: float = 0.95,
        var_list: Iterable[Any] | None = None,
        momentum: Any = 0.9,
        momentum_type: str = "adam",
        use_weight_decay: bool = False,
        weight_decay_coeff: Any = 0.1,
        qmodel_update_rescale: Any = None,
        norm_constraint: Any = None,
        name: str = "KFAC",
        estimation_mode: str = "gradients",
        colocate_gradients_with_ops: bool = True,
        batch_size: Any = None,
        placement_strategy: str | None = None,
        compute_params_stats: bool = False,
        adapt_damping: bool = False,
        update_damping_immediately: bool = True,
        is_chief: bool = True,
        prev_train_batch: Any = None,
        loss: tf.Tensor | None = None,
        loss_fn: Callable[[Any], tf.Tensor] | None = None,
        min_damping: float = 1e-8,
        l2_reg: float = 0.0,
        damping_adaptation_decay: float = 0.95,
        damping_adaptation_interval: int = 5,
        damping_decrease_rho_threshold: float = 0.75,
        damping_increase_rho_threshold: float = 0.25,
        precon_damping_mult: Any = 1.0,
        use_passed_loss: bool = True,
        train_batch: Any = None,
        print_logs: bool = False,
        tf_replicator: Any = None,
        dtype: Any = "float32",
        cov_batch_fraction: float = 1.0,
        qmodel_batch_fraction: float = 1.0,
        **kwargs: Any,
    ):
        """Checks the arguments and makes the scalar state; needs no layers yet.

        Args:
          learning_rate: number, scalar tensor or variable; None for qmodel types.
          damping: multiple of the identity added to the curvature, in units of the
            loss: number, scalar tensor or variable.  Only the start if adapted.
          layer_collection: registered layers and losses; must be complete when the
            thunks or the train op are built.
          cov_ema_decay: decay of the curvature's moving averages per update.
          var_list: variables to train, all that are registered.  Defaults to the
            graph's trainable variables (in a `tf.function`: the collection's).
          momentum: decay for "regular" and "adam", the fixed momentum for
            "qmodel_fixedmu"; None for "qmodel".
          momentum_type: "regular", "adam", "qmodel" or "qmodel_fixedmu".
          use_weight_decay: whether to add `weight_decay_coeff * parameter` to r.
          weight_decay_coeff: see there; decoupled from the curvature and, for the
            qmodel types, from the learning rate.
          qmodel_update_rescale: factor of the qmodel types' steps; None is 1.
          norm_constraint: bound on the squared length of a step in the damped
            curvature, for "regular" and "adam".
          name: scope of the state.  Optimizers of one graph need different names.
          estimation_mode: what is back-propagated, see `estimator`.
          colocate_gradients_with_ops: for the estimator's gradients.
          batch_size: cases per replica, int or int32 scalar; needed by the qmodel
            types and `compute_params_stats`.
          placement_strategy: None, "round_robin" or "replica_round_robin".
          compute_params_stats: whether to keep first-order statistics per variable.
          adapt_damping: whether to adapt the damping (Levenberg-Marquardt).
          update_damping_immediately: adapt right after the step; otherwise at the
            start of the next one, on the previous batch.
          is_chief: whether this worker adapts the damping.
          prev_train_batch: what `loss_fn` gets in the delayed mode.
          loss: the loss before a step; by default the one given to `minimize`.
          loss_fn: function of a batch that builds the loss anew, with the same
            dropout masks, if any, as the loss it is compared with.
          min_damping: with `l2_reg` added, the least damping.
          l2_reg: c of a term `c/2 |parameters|^2` that the loss contains already.
          damping_adaptation_decay: factor of the damping per step, in (0, 1].
          damping_adaptation_interval: steps from one adaptation to the next.
          damping_decrease_rho_threshold: on the ratio of actual to predicted change.
          damping_increase_rho_threshold: likewise.
          precon_damping_mult: the preconditioner's damping in units of `damping`.
          use_passed_loss: use `loss` before a step; otherwise `loss_fn(train_batch)`.
          train_batch: what `loss_fn` gets in the immediate mode.
          print_logs: whether each step prints its scalars.
          tf_replicator: used for `tf.distribute`, see `utils.set_global_constants`.
          dtype: of the scalar state.
          cov_batch_fraction: part of the batch used for the statistics, in (0, 1].
          qmodel_batch_fraction: part of the batch used for the curvature of the
            quadratic model, in (0, 1].
          **kwargs: for the estimator and its placement (`cov_devices`, ...).

        Raises:
          ValueError: values that contradict each other, or a taken `name`.
          RuntimeError: called eagerly.
          TypeError: unknown keyword, or an unusable `tf_replicator`.
        """
        self._momentum_type = arguments.normalized_momentum_type(momentum_type)
        arguments.check_graph_mode("KfacOptimizer")
        arguments.check_step_size(
            self._momentum_type,
            learning_rate,
            momentum,
            norm_constraint,
            qmodel_update_rescale,
        )
        arguments.check_scalars(
            learning_rate=learning_rate,
            damping=damping,
            cov_ema_decay=cov_ema_decay,
            momentum=momentum,
            weight_decay_coeff=weight_decay_coeff,
            qmodel_update_rescale=qmodel_update_rescale,
            norm_constraint=norm_constraint,
            min_damping=min_damping,
            l2_reg=l2_reg,
            damping_adaptation_decay=damping_adaptation_decay,
            damping_adaptation_interval=damping_adaptation_interval,
            damping_decrease_rho_threshold=damping_decrease_rho_threshold,
            damping_increase_rho_threshold=damping_increase_rho_threshold,
            precon_damping_mult=precon_damping_mult,
        )
        arguments.check_loss(loss_fn, use_passed_loss, train_batch)
        sub_batch.check_fraction("cov_batch_fraction", cov_batch_fraction)
        sub_batch.check_fraction("qmodel_batch_fraction", qmodel_batch_fraction)
        if self._uses_quadratic_model:
            learning_rate = (
                1.0 if qmodel_update_rescale is None else qmodel_update_rescale
            )
        super().__init__(learning_rate, name=name)

        self._momentum = momentum
        self._norm_constraint = norm_constraint
        self._use_weight_decay = use_weight_decay
        self._weight_decay_coeff = weight_decay_coeff
        self._qmodel_update_rescale = qmodel_update_rescale
        self._batch_size = batch_sizes.checked_argument(batch_size)
        self._qmodel_batch_fraction = qmodel_batch_fraction
        self._adapt_damping = adapt_damping
        self._update_damping_immediately = update_damping_immediately
        self._is_chief = is_chief
        self._train_batch = train_batch
        self._prev_train_batch = prev_train_batch
        self._loss_tensor = loss
        self._loss_was_set = loss is not None
        self._loss_fn = loss_fn
        self._use_passed_loss = use_passed_loss
        self._min_damping = min_damping
        self._l2_reg = l2_reg
        self._omega = levenberg_marquardt.decay_per_adaptation(
            damping_adaptation_decay, damping_adaptation_interval
        )
        self._damping_adaptation_interval = damping_adaptation_interval
        self._damping_decrease_rho_threshold = damping_decrease_rho_threshold
        self._damping_increase_rho_threshold = damping_increase_rho_threshold
        self._precon_damping_mult = precon_damping_mult
        self._print_logs = print_logs
        self._dtype = arguments.floating_dtype(dtype)
        self._layers = layer_collection
        self._last_train_op = None
        self._slot_paths: dict[str, Any] = {}

        with config.restored_on_error():
            if tf_replicator is not None:
                utils.set_global_constants(tf_replicator=tf_replicator)
            # First, for it checks arguments and makes no variable.
            self._fisher_est = estimator.make_fisher_estimator(
                placement_strategy=placement_strategy,
                variables=self._variables_to_train(var_list),
                cov_ema_decay=cov_ema_decay,
                damping=self._preconditioner_damping(damping),
                layer_collection=layer_collection,
                exps=(-1,),
                estimation_mode=estimation_mode,
                colocate_gradients_with_ops=colocate_gradients_with_ops,
                compute_params_stats=compute_params_stats,
                batch_size=self._batch_size,
                cov_batch_fraction=cov_batch_fraction,
                **kwargs,
            )
            self._create_scalar_state(damping)

    def _variables_to_train(self, var_list: Iterable[Any] | None) -> list[Any]:
        if var_list is not None:
            return [without_wrapper(variable) for variable in var_list]
        with tf.init_scope():
            in_function = tf.executing_eagerly()
        if in_function:
            # A trace has no collection of trainable variables.
            return list(self._layers.registered_variables)
        return list(tf1.trainable_variables())

    @property
    def _uses_quadratic_model(self) -> bool:
        return arguments.uses_quadratic_model(self._momentum_type)

    @property
    def factors(self) -> Sequence[Any]:
        """The curvature's factors, in creation order."""
        return self._fisher_est.factors

    @property
    def registered_variables(self) -> list[Any]:
        """The variables that are trained."""
        return self._fisher_est.variables

    @property
    def layers(self) -> Any:
        """The layer collection."""
        return self._layers

    @property
    def mat_type(self) -> str:
        """ "Fisher", "GGN" or "Empirical_Fisher"."""
        return self._fisher_est.mat_type

    @property
    def params_stats(self) -> tuple:
        """First-order statistics per variable, see the estimator."""
        return self._fisher_est.params_stats

    def get_cov_vars(self) -> tuple:
        """Current covariances, a list per factor."""
        return self._fisher_est.get_cov_vars()

    def get_inv_vars(self) -> tuple:
        """Inverse variables, a list per factor."""
        return self._fisher_est.get_inv_vars()

    # ---------------------------------------------------------------- curvature

    def create_ops_and_vars_thunks(self) -> tuple:
        """`(cov variable, cov update, inverse variable, inverse update)` thunks."""
        return self._fisher_est.create_ops_and_vars_thunks(scope=self._curvature_scope)

    def make_vars_and_create_op_thunks(self) -> tuple:
        """Makes the curvature's variables; returns `(cov, inverse)` update thunks."""
        return self._fisher_est.make_vars_and_create_op_thunks(
            scope=self._curvature_scope
        )

    @property
    def _curvature_scope(self) -> str:
        return f"{self.get_name()}/{self._fisher_est.name}"

    # ---------------------------------------------------------------- steps

    def check_var_list(self, var_list: Iterable[Any]) -> None:
        """Raises `ValueError` unless `var_list` is the set of variables to train."""
        given = {v.ref(): v for v in map(without_wrapper, var_list)}
        trained = {variable.ref(): variable for variable in self.registered_variables}
        missing = [v.name for ref, v in trained.items() if ref not in given]
        unknown = [v.name for ref, v in given.items() if ref not in trained]
        if missing or unknown:
            raise ValueError(
                "var_list must hold exactly the variables the optimizer was made for. "
                f"Missing: {missing}. Not among them: {unknown}. Leave var_list out, "
                "or pass it to the constructor."
            )

    def set_loss(self, loss: tf.Tensor) -> None:
        """Sets the loss used for damping adaptation, metrics and logs."""
        self._loss_tensor = loss
        self._loss_was_set = True

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
        """Op that takes a step; see `compute_gradients` and `apply_gradients`."""
        return super().minimize(
            loss,
            global_step=global_step,
            var_list=self._checked_var_list(var_list),
            gate_gradients=gate_gradients,
            aggregation_method=aggregation_method,
            colocate_gradients_with_ops=colocate_gradients_with_ops,
            name=name,
            grad_loss=grad_loss,
            **kwargs,
        )

    def compute_gradients(
        self,
        loss: tf.Tensor,
        var_list: Iterable[Any] | None = None,
        gate_gradients: int = _GATE_OP,
        aggregation_method: int | None = None,
        colocate_gradients_with_ops: bool = True,
        grad_loss: tf.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Pair, ...]:
        """Gradients of the loss, averaged over replicas.

        Args:
          loss: scalar, mean over the batch of a replica.  Remembered for damping
            adaptation, metrics and logs unless one was set explicitly.
          var_list: if given, must equal the optimizer's set of variables.
          gate_gradients: as for `tf.compat.v1.train.Optimizer`.
          aggregation_method: likewise.
          colocate_gradients_with_ops: likewise.
          grad_loss: gradient of what is really minimized, with respect to `loss`.
          **kwargs: for the base class.

        Returns:
          `(gradient, variable)` pairs.

        Raises:
          ValueError: another set of variables, or the loss does not depend on one.
        """
        arguments.check_graph_mode("compute_gradients")
        pairs = super().compute_gradients(
            loss,
            var_list=self._checked_var_list(var_list),
            gate_gradients=gate_gradients,
            aggregation_method=aggregation_method,
            colocate_gradients_with_ops=colocate_gradients_with_ops,
            grad_loss=grad_loss,
            **kwargs,
        )
        arguments.check_gradients(pairs)
        if not self._loss_was_set:
            self._loss_tensor = loss
        gradients = self._average([gradient for gradient, _ in pairs], "gradients")
        for gradient, (_, variable) in zip(gradients, pairs, strict=True):
            if tf.is_tensor(gradient) and not isinstance(gradient, tf.IndexedSlices):
                gradient.set_shape(variable.shape)
        return tuple(zip(gradients, variables_of(pairs), strict=True))

    def apply_gradients(
        self, grads_and_vars: Iterable[Pair], *args: Any, **kwargs: Any
    ) -> tf.Operation:
        """Op that takes a step.

        In this order: the loss before the step is recorded (if damping is adapted), r
        is computed, the parameters move, `global_step` is incremented, the damping is
        adapted, logs are printed, and the step is counted.

        Args:
          grads_and_vars: pairs that cover all registered variables.
          *args: `global_step` and `name`, for the base class.
          **kwargs: likewise.

        Raises:
          ValueError: a gradient is missing, or something that damping adaptation
            evaluates; or the curvature has no variables yet.
        """
        arguments.check_graph_mode("apply_gradients")
        grads_and_vars = tuple(grads_and_vars)
        arguments.check_gradients(grads_and_vars)
        with tf.control_dependencies([self._maybe_update_prev_loss()]):
            steps = self._compute_raw_update_steps(grads_and_vars)
            if self._use_weight_decay:
                steps = self._add_weight_decay(steps)
        # All of r is computed from the parameters as they were.
        with tf.control_dependencies(tensors_of(steps)):
            moved = self._move(steps, *args, **kwargs)
        with tf.control_dependencies([moved]):
            adapted = self._maybe_post_update_adapt_damping()
        with tf.control_dependencies([adapted]):
            logged = self._maybe_print_logging_info()
        with tf.control_dependencies([logged]):
            counted = utils.smart_assign(
                self._counter, 1, assign_fn=tf1.assign_add, force_sync=False
            )
        self._last_train_op = tf.group(counted)
        return self._last_train_op

    @staticmethod
    def _scale_loss(loss_value: tf.Tensor) -> tf.Tensor:
        """Identity: the loss is the replica's mean, gradients are averaged here."""
        return loss_value

    def _checked_var_list(self, var_list: Iterable[Any] | None) -> list[Any]:
        if var_list is None:
            return list(self.registered_variables)
        var_list = [without_wrapper(variable) for variable in var_list]
        self.check_var_list(var_list)
        return var_list
