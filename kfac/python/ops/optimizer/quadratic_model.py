"""The quadratic model of `KfacOptimizer`: step size, momentum, predicted change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import config, utils
from kfac.python.ops import curvature_matrix_vector_products as cmvp
from kfac.python.ops.optimizer.update_steps import (
    Pair,
    dense,
    tensors_of,
    variables_of,
)
from kfac.python.ops.rules import quadratic_model as rules
from kfac.python.ops.rules import scalars
from kfac.python.ops.sub_batch import SubBatch


class QuadraticModelMixin:
    """Builds the model from exact curvature products on the mini-batch.

    Weight decay takes no part in any predicted change: it is not a gradient of the
    loss.  A penalty on the weights that is part of the loss should be declared as
    `l2_reg`; the predictions then contain it.
    """

    def _get_qmodel_quantities(
        self, grads_and_vars: Sequence[Pair]
    ) -> tuple[list[Pair], rules.Matrix, rules.Matrix, rules.Matrix]:
        """`(preconditioned pairs, m, c, b)`, see `rules.quadratic_model`."""
        preconditioned = dense(self._multiply_preconditioner(grads_and_vars))
        previous = self._compute_prev_updates(variables_of(grads_and_vars))
        m, c, b = self._compute_qmodel(preconditioned, previous, grads_and_vars)
        return preconditioned, m, c, b

    def _compute_qmodel(
        self,
        raw_updates_and_vars: Sequence[Pair],
        prev_updates_and_vars: Sequence[Pair],
        grads_and_vars: Sequence[Pair],
        should_average_over_replicas: bool = True,
    ) -> rules.Terms:
        """The model of a proposed and a previous update.

        Args:
          raw_updates_and_vars: the proposal d.
          prev_updates_and_vars: the previous update p.
          grads_and_vars: gradients of the mean loss.
          should_average_over_replicas: average the quadratic part over replicas.

        Returns:
          `(m, c, b)`, nested lists of scalars.

        Raises:
          ValueError: the lists are not about the same variables in the same order, or
            the optimizer was given no `batch_size`.
        """
        for pairs in (prev_updates_and_vars, grads_and_vars):
            utils.assert_variables_match_pairs_list(
                raw_updates_and_vars,
                pairs,
                error_message="The quadratic model needs its vectors in one order.",
            )
        if self._batch_size is None:
            raise ValueError(
                "The quadratic model averages over the mini-batch and needs its size; "
                "pass batch_size (per replica) to the optimizer."
            )
        updates = tensors_of(raw_updates_and_vars)
        previous = tensors_of(prev_updates_and_vars)
        losses, cases = self._quadratic_model_losses()
        computer = cmvp.CurvatureMatrixVectorProductComputer(
            losses, variables_of(raw_updates_and_vars)
        )
        images_of = (
            computer.multiply_fisher_factor_transpose
            if self.mat_type == "Fisher"
            else computer.multiply_ggn_factor_transpose
        )
        m, c, b = rules.build_terms(
            updates,
            previous,
            tensors_of(grads_and_vars),
            images_of(updates),
            images_of(previous),
            self._damping,
            cases,
        )
        if should_average_over_replicas:
            weight = cases if tf.is_tensor(cases) else None
            m = utils.all_average(m, "quadratic model", weight)
        return rules.Terms(m, c, b)

    def _quadratic_model_losses(self) -> tuple[Any, Any]:
        """The losses whose curvature is used, and the number of cases they are of."""
        if self._qmodel_batch_fraction == 1:
            return self._layers, self._batch_size
        part = SubBatch(self._layers, self._qmodel_batch_fraction, self._batch_size)
        return part.losses(), part.batch_size

    def _compute_qmodel_hyperparams(
        self,
        m: rules.Matrix,
        c: rules.Matrix,
        b: rules.Matrix,
        fixed_mu: Any = None,
    ) -> rules.Solution:
        """`(alpha, mu, predicted change)`; the step is `alpha d + mu p`, rescaled."""
        rescale = self._qmodel_update_rescale
        return rules.solve(
            m,
            c,
            b,
            fixed_mu=fixed_mu,
            rescale=1.0 if rescale is None else rescale,
            damping_share=self._damping_share_left_out(),
        )

    def _compute_approx_qmodel_change(
        self, updates_and_vars: Sequence[Pair], grads_and_vars: Sequence[Pair]
    ) -> tf.Tensor:
        """Predicted change for given steps by the block-diagonal curvature.

        The product contains the preconditioner's damping (factored, so only
        approximately a multiple of the identity).  What is not part of the loss is
        taken out again, as is the effect of `precon_damping_mult`.
        """
        products = self._fisher_est.multiply(updates_and_vars)
        updates = dense(updates_and_vars)
        norm = utils.ip_p(updates, dense(products))
        damping = scalars.cast(self._damping, norm.dtype)
        multiple = scalars.cast(self._precon_damping_mult, norm.dtype)
        share = scalars.cast(self._damping_share_left_out(), norm.dtype)
        return rules.regular_change(
            norm,
            utils.ip_p(updates, dense(grads_and_vars)),
            utils.ip_p(updates, updates),
            surplus_damping=damping * (multiple - 1 + share),
        )

    @property
    def _sub_damping_out_qmodel_change_coeff(self) -> tf.Tensor:
        """`1 - l2_reg / damping`: the share of the damping that is not in the loss."""
        return rules.l2_complement(
            self._l2_reg, scalars.cast(self._damping, tf.float64)
        )

    def _damping_share_left_out(self) -> Any:
        if config.settings().include_damping_in_qmodel_change:
            return 0.0
        return self._sub_damping_out_qmodel_change_coeff
