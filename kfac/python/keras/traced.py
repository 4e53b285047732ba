"""The graph optimizer inside one trace of a Keras training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from kfac.python.keras.models import Batch, PureModel
from kfac.python.keras.registration import Registrar
from kfac.python.ops import sub_batch
from kfac.python.ops.layer_collection import LayerCollection
from kfac.python.ops.optimizer import KfacOptimizer
from kfac.python.ops.optimizer.conditional import run_if


class TracedKfac(KfacOptimizer):
    """`KfacOptimizer` that registers the model where its statistics are due.

    The forward pass for the statistics, its registration, the sampled targets and the
    backward pass are all built inside the conditional branch that updates the
    covariances; on other steps none of it runs.

    Args:
      model: the model as a pure function.
      registrar: registers its losses and layers.
      batch: what this step trains on.
      cov_update_every: steps between updates of the covariances.
      invert_every: steps between updates of the inverses.
      cov_batch_fraction: part of the batch for the statistics.
      sample_seed: int64 scalar; sampled targets depend on it and on the counter alone.
      strict: refuse variables without a Kronecker-factored or exact block.
      **kwargs: of `KfacOptimizer`, without the layer collection.
    """

    def __init__(
        self,
        model: PureModel,
        registrar: Registrar,
        batch: Batch,
        *,
        cov_update_every: int,
        invert_every: int,
        cov_batch_fraction: float,
        sample_seed: int,
        strict: bool,
        **kwargs: Any,
    ):
        super().__init__(
            layer_collection=LayerCollection(), batch_size=batch.size(), **kwargs
        )
        self._model = model
        self._registrar = registrar
        self._batch = batch
        self._cov_update_every = cov_update_every
        self._invert_every = invert_every
        self._cov_batch_fraction = cov_batch_fraction
        self._sample_seed = sample_seed
        self._strict = strict
        self._inverse_thunks: Sequence[Callable] = ()

    def update_curvature(self, should_decay: bool = True) -> None:
        """Builds both conditional updates of the curvature."""
        run_if(
            tf.equal(self.counter % self._cov_update_every, 0),
            lambda: self.update_statistics(should_decay),
        )
        run_if(
            self._inverses_due(), lambda: [thunk() for thunk in self._inverse_thunks]
        )

    def _inverses_due(self) -> tf.Tensor:
        """Every `invert_every` steps, and before that at steps 1, 2, 4, 8, ...

        At the start the curvature changes fastest and is known from one batch only;
        inverses of the first batch's statistics, kept for a whole period, are what
        makes K-FAC diverge in its first steps.
        """
        k = self.counter
        power_of_two = tf.equal(tf.bitwise.bitwise_and(k, k - 1), 0)
        starting = (k < self._invert_every) & power_of_two
        return tf.equal(k % self._invert_every, 0) | starting

    def update_statistics(self, should_decay: bool = True) -> list[tf.Operation]:
        """Registers the model on part of the batch and updates all covariances."""
        part = self._head(self._cov_batch_fraction)
        collection = self._layers
        collection.move_to_graph(tf.compat.v1.get_default_graph())
        outputs = self._model(part.x)
        # Both words of a stateless seed: the user's, and the step's.
        seed = tf.stack([tf.constant(self._sample_seed, tf.int64), self.counter])
        self._registrar.register_losses(collection, outputs, part, seed)
        self._registrar.register_layers(
            collection, self.registered_variables, part.size()
        )
        if self._strict:
            collection.check_strict()
        cov_thunks, self._inverse_thunks = self.make_vars_and_create_op_thunks()
        return [thunk(should_decay) for thunk in cov_thunks]

    def _head(self, fraction: float) -> Batch:
        if fraction == 1.0:
            return self._batch
        return self._batch.head(sub_batch.part_size(fraction, self._batch.size()))

    def _quadratic_model_losses(self) -> tuple[Any, Any]:
        """Losses of a forward pass for exact products, and their number of cases."""
        part = self._head(self._qmodel_batch_fraction)
        collection = LayerCollection()
        self._registrar.register_losses(collection, self._model(part.x), part)
        return collection, part.size()


def loss_function(model: PureModel, compute_loss: Callable) -> Callable:
    """`loss(batch)` for damping adaptation: the training loss, without side effects.

    The model runs in training mode with the dropout masks that the state of its seed
    generators gives; nothing advances that state between the two losses compared.

    Args:
      model: the model as a pure function.
      compute_loss: of `(x, y, y_pred, sample_weight)`.
    """

    def loss(batch: Batch) -> tf.Tensor:
        outputs = model(batch.x)
        with keras.StatelessScope():  # Metrics inside the losses stay as they are.
            return compute_loss(batch.x, batch.y, outputs, batch.sample_weight)

    return loss
