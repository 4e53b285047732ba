"""The graph optimizer inside one trace of a Keras training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.keras import schedule
from kfac.python.keras.batches import Batch
from kfac.python.keras.models import PureModel
from kfac.python.keras.registration import Registrar
from kfac.python.ops import report, sub_batch, utils
from kfac.python.ops.kfac_utils import periodic_inv_cov_update_kfac_opt
from kfac.python.ops.layer_collection import LayerCollection
from kfac.python.ops.utils.scheduling import run_if


class TracedKfac(periodic_inv_cov_update_kfac_opt.PeriodicInvCovUpdateKfacOpt):
    """The periodic optimizer that registers the model where statistics are due.

    The forward pass for the statistics, its registration, the sampled targets and the
    backward pass are all built inside the conditional branch that updates the
    covariances; on other steps none of it runs.

    Args:
      model: the model as a pure function.
      registrar: registers its losses and layers.
      batch: what this step trains on.
      cov_batch_fraction: part of the batch for the statistics.
      sample_seed: int32 scalar; sampled targets depend on it and on the counter alone.
      strict: refuse variables without a Kronecker-factored or exact block.
      num_burnin_steps: for reports.
      **kwargs: of `PeriodicInvCovUpdateKfacOpt`, without the layer collection.

    Attributes:
      outputs: the model's outputs on which the statistics are registered.
      gradients: those of the step; statistics are taken if they are finite.
    """

    def __init__(
        self,
        model: PureModel,
        registrar: Registrar,
        batch: Batch,
        *,
        cov_batch_fraction: float,
        sample_seed: Any,
        strict: bool,
        num_burnin_steps: int = 0,
        **kwargs: Any,
    ):
        super().__init__(
            layer_collection=LayerCollection(),
            # That of the statistics; the quadratic model has its own.
            batch_size=sub_batch.part_size(cov_batch_fraction, _size_of(batch)),
            **kwargs,
        )
        self._model = model
        self._registrar = registrar
        self._batch = batch
        self._cov_batch_fraction = cov_batch_fraction
        self._sample_seed = sample_seed
        self._strict = strict
        # Whoever builds the step decides which kind, see `burn_in`.
        self._num_burnin_steps = num_burnin_steps
        self.outputs: Any = None
        self.gradients: Sequence[Any] = ()

    # ---------------------------------------------------------------- curvature

    def register(self) -> LayerCollection:
        """Registers the model on part of the batch, in the current graph."""
        part = self._head(self._cov_batch_fraction).of_unknown_size()
        self._layers.move_to_graph(tf.compat.v1.get_default_graph())
        self.outputs = self._model(part.x)
        seed = self._seed_of(self.counter + self._burnin_counter.read_value())
        self._registrar.register_losses(self._layers, self.outputs, part, seed)
        self._registrar.register_layers(
            self._layers, self.registered_variables, part.size()
        )
        return self._layers

    def _seed_of(self, step: Any) -> tf.Tensor:
        """Both words of a stateless seed: the user's, and the step's.

        Replicas, whose cases differ, draw different numbers.
        """
        own_seed = self._sample_seed + tf.cast(utils.get_replica_id(), tf.int32)
        return tf.stack([own_seed, tf.cast(step, tf.int32)])

    def create_state(self) -> list[report.Row]:
        """Makes all variables once registered; returns how parameters are covered."""
        self.make_vars_and_create_op_thunks()
        self.velocities()
        return report.explain(self._layers)

    def update_curvature(self) -> None:
        """Builds both conditional updates of the curvature.

        Cases that make the gradient infinite or NaN would stay in the averages for
        ever; their statistics are left out.
        """
        step = self.counter
        due = schedule.statistics_due(step, self._cov_update_every)
        run_if(due & _are_finite(self.gradients), self._update_statistics)
        due = schedule.inverses_due(step, self._invert_every)
        run_if(due, self.update_inverses)

    def update_inverses(self) -> list:
        """Ops that update all inverses, by the registration of this trace."""
        _, inverse_thunks = self._thunks
        return [thunk() for thunk in inverse_thunks]

    def use_curvature_of(self, other: TracedKfac) -> None:
        """Takes inverses from variables that another trace keeps up to date."""
        self._layers = other._layers
        self._fisher_est = other._fisher_est

    def burn_in(self) -> None:
        """Builds a step that only collects statistics, as plain sums."""
        updates = self._update_statistics(should_decay=False)
        with tf.control_dependencies(updates):
            self._burnin_counter.assign_add(1)

    def _update_statistics(self, should_decay: bool = True) -> list[tf.Operation]:
        self.register()
        if self._strict:
            self._layers.check_strict()
        cov_thunks, _ = self.make_vars_and_create_op_thunks()
        return self._fisher_est.covariance_update_ops(cov_thunks, should_decay)

    def velocities(self) -> list[tf.Variable]:
        """The variables of the momentum."""
        return self._get_or_make_velocities(self.registered_variables)

    def mean_loss(self, batch: Batch) -> tf.Tensor:
        """The loss that damping is adapted by: that of all replicas' cases."""
        return self._average(self._loss_fn(batch), "loss")

    def _average(self, values: Any, name: str) -> Any:
        # Replicas count by all of their cases, not by those of the statistics.
        size = _size_of(self._batch)
        return utils.all_average(values, name, size if tf.is_tensor(size) else None)

    def raise_damping(self) -> Any:
        """Op that makes the adapted damping larger by one adaptation."""
        damping = self._damping.read_value()
        return self._store(self._damping, damping / tf.cast(self._omega, damping.dtype))

    def kfac_update_ops(self) -> tf.Operation:
        """Nothing: `update_curvature` precedes the step."""
        return tf.no_op()

    # ---------------------------------------------------------------- the batch

    def _head(self, fraction: float) -> Batch:
        if fraction == 1.0:
            return self._batch
        return self._batch.head(sub_batch.part_size(fraction, self._batch.size()))

    def _quadratic_model_losses(self) -> tuple[Any, Any]:
        """Losses of a forward pass for exact products, and their number of cases."""
        part = self._head(self._qmodel_batch_fraction)
        collection = LayerCollection()
        self._registrar.register_losses(collection, self._model(part.x), part)
        return collection, _size_of(part)


def _are_finite(gradients: Sequence[Any]) -> tf.Tensor:
    """Whether all are finite, at the cost of one pass over them."""
    sums = [
        tf.cast(tf.reduce_sum(getattr(gradient, "values", gradient)), tf.float32)
        for gradient in gradients
    ]
    return tf.math.is_finite(tf.add_n(sums)) if sums else tf.constant(True)


def _size_of(batch: Batch) -> Any:
    """Number of cases; in a replica always a tensor, which weights its statistics.

    Replicas need not have equally many cases.
    """
    size = batch.size()
    return tf.convert_to_tensor(size) if utils.is_in_replica() else size
