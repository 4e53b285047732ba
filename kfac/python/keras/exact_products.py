"""A traced optimizer whose quadratic model has the batch's exact curvature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.keras.traced import TracedKfac
from kfac.python.ops import natural_gradient, utils
from kfac.python.ops.layer_collection import LayerCollection
from kfac.python.ops.optimizer.update_steps import Pair, tensors_of, variables_of
from kfac.python.ops.rules import quadratic_model, scalars


class TracedWithExactProducts(TracedKfac):
    """`TracedKfac` for preconditioners that are no estimate of the curvature.

    K-FAC's own quadratic model, for momentum of the kind "regular", is that of its
    blocks.

    Args:
      *args: of `TracedKfac`.
      curvature: one of `natural_gradient.MATRICES`.
      **kwargs: of `TracedKfac`.
    """

    def __init__(
        self, *args: Any, curvature: str = natural_gradient.FISHER, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self._curvature = curvature
        self._products_part: tuple[LayerCollection, Any] | None = None

    @property
    def mat_type(self) -> str:
        """ "GGN" or "Fisher": the matrix of the quadratic model."""
        return "GGN" if self._curvature == natural_gradient.GGN else "Fisher"

    def _quadratic_model_losses(self) -> tuple[LayerCollection, Any]:
        """One forward pass for all products of a step."""
        if self._products_part is None:
            self._products_part = super()._quadratic_model_losses()
        return self._products_part

    def _damped_curvature(
        self, variables: Sequence[Any]
    ) -> natural_gradient.DampedCurvature:
        collection, cases = self._quadratic_model_losses()
        return natural_gradient.DampedCurvature(
            collection,
            variables,
            damping=scalars.cast(self._fisher_est.damping, variables[0].dtype),
            num_cases=cases,
            matrix=self._curvature,
        )

    def _compute_approx_qmodel_change(
        self, updates_and_vars: Sequence[Pair], grads_and_vars: Sequence[Pair]
    ) -> tf.Tensor:
        """As in K-FAC, with the exact damped curvature."""
        updates = tensors_of(updates_and_vars)
        curvature = self._damped_curvature(variables_of(updates_and_vars))
        norm = utils.ip(updates, curvature.multiply(updates))
        damping = scalars.cast(self._fisher_est.damping, norm.dtype)
        share = scalars.cast(self._damping_share_left_out(), norm.dtype)
        return quadratic_model.regular_change(
            norm,
            utils.ip(updates, tensors_of(grads_and_vars)),
            utils.ip(updates, updates),
            surplus_damping=damping * share,
        )
