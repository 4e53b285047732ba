"""Input factor of convolutions under "spatially uncorrelated activations"."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, KeysView, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import config, inverses
from kfac.python.ops.fisher_factors import base, naming, statistics, stored
from kfac.python.ops.rules import scalars
from kfac.python.ops.utils import packing

tf1 = tf.compat.v1


class ConvInputSUAKroneckerFactor(base.FisherFactor):
    """Covariance and mean of the input channels, the same at all kernel offsets.

    Grosse & Martens 2016 (arXiv 1602.01407), section 3.2 and theorem 4. With Σ the
    covariance of the channels, μ their mean and k kernel offsets, the second moment
    of the patches is taken to be

        F = Σ ⊗ I_k + u uᵀ,  u = μ ⊗ 1_k,

    channels slow and offsets fast: *not* the order of a kernel reshaped to
    `[-1, channels_out]`, where channels are fast. With a bias
    `F = blockdiag(Σ ⊗ I_k, 0) + ũ ũᵀ`, `ũ = [u; 1]`. The setting
    `assume_zero_mean_activations` drops the second term.

    Only Σ, μ and the inverse of the damped Σ are stored; operators are composed of
    them, the inverse by the Sherman-Morrison formula. Only the powers 1 and -1 exist.
    All pixels of the inputs count once, whatever the strides and the padding.

    Args:
      inputs: indexed by tower: `[batch, *spatial, channels_in]`.
      filter_shape: `[*filter_spatial, channels_in, channels_out]`.
      has_bias: append the constant 1 of a bias.
    """

    def __init__(
        self, inputs: Any, filter_shape: Sequence[int], has_bias: bool = False
    ):
        settings = config.settings()
        self._inputs = inputs
        self._filter_shape = tuple(int(size) for size in filter_shape)
        self._has_bias = has_bias
        self._kw_kh = math.prod(self._filter_shape[:-2])
        self._in_channels = self._filter_shape[-2]
        self._zero_mean = settings.assume_zero_mean_activations
        self._subtracts_mean = (
            not self._zero_mean or settings.subtract_mean_contrib_from_cov
        )
        self._mu = None
        self._store = stored.InverseStore(self)
        self._matpowers: dict[tuple[float, Hashable], None] = {}
        self._matpower_by_exp_and_damping: dict[tuple[float, Hashable], Any] = {}
        self._damping_var_by_id: dict[Hashable, tf.Variable] = {}
        self._cov_inv_mu_by_damping_id: dict[Hashable, tf.Variable] = {}
        self._rank_one_update_scale_by_damping_id: dict[Hashable, tf.Variable] = {}
        super().__init__()

    @property
    def _var_scope(self) -> str:
        return "ff_convinsuakron_" + naming.scope_string_from_params(
            [*self._inputs, self._filter_shape, self._has_bias]
        )

    @property
    def _identity(self) -> Hashable:
        return naming.fingerprint(self._inputs), self._zero_mean, self._subtracts_mean

    @property
    def _cov_shape(self) -> list[int]:
        return [self._in_channels, self._in_channels]

    @property
    def _num_sources(self) -> int:
        return 1

    @property
    def _num_towers(self) -> int:
        return len(self._inputs)

    @property
    def _dtype(self) -> tf.DType:
        return self._inputs[0].dtype

    @property
    def fallbacks(self) -> tf.Variable | None:
        """int64 count of inverse updates that met a matrix they could not handle."""
        return self._store.fallbacks

    @property
    def _damping_funcs_by_id(self) -> dict[Hashable, Callable[[], Any]]:
        return self._store.damping_funcs

    @property
    def _matpower_registrations(self) -> KeysView:
        return self._matpowers.keys()

    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        statistics.check_only_source(source)
        return statistics.num_rows(self._inputs[tower])

    def _get_data_device(self, tower: int) -> str | None:
        return self._inputs[tower].device

    def instantiate_cov_variables(self) -> None:
        """Creates the variables of the moving averages of Σ and of μ."""
        super().instantiate_cov_variables()
        if not self._zero_mean:
            with tf1.variable_scope(self.name):
                self._mu = self._moving_average("mu", [self._in_channels, 1])

    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        """Second moment `[channels + 1, channels + 1]` of pixels with a 1 appended."""
        statistics.check_only_source(source)
        inputs = tf.convert_to_tensor(self._inputs[tower])
        pixels = tf.reshape(inputs, [-1, self._in_channels])
        return statistics.second_moment(pixels, has_bias=True)

    def statistics_layouts(self) -> list[packing.Layout]:
        """The moment is symmetric."""
        return [packing.Layout.SYMMETRIC]

    def add_statistics(
        self, statistics: Sequence[tf.Tensor], ema_decay: Any, ema_weight: Any
    ) -> Any:
        """Op that takes one step of the moving averages of Σ and of μ."""
        average = self._average
        (moment,) = statistics
        new_cov, new_mu = moment[:-1, :-1], moment[:-1, -1:]
        if self._subtracts_mean:
            new_cov -= tf.matmul(new_mu, new_mu, transpose_b=True)
        updates = [average.add_to_average(new_cov, decay=ema_decay, weight=ema_weight)]
        if not self._zero_mean:
            updates.append(
                self._mu.add_to_average(new_mu, decay=ema_decay, weight=ema_weight)
            )
        return tf.group(*updates)

    @property
    def mu(self) -> tf.Tensor:
        """The running mean of the channels, `[channels_in, 1]`.

        Raises:
          AttributeError: zero mean is assumed, or the variables do not exist yet.
        """
        if self._mu is None:
            raise AttributeError(
                f"Factor {self.name!r} keeps no mean: call instantiate_cov_variables() "
                "first, with assume_zero_mean_activations unset at construction."
            )
        return self._mu.value

    def cov_variables(self) -> list[tf.Variable]:
        """The variables of both moving averages."""
        averages = [self._cov] if self._zero_mean else [self._cov, self._mu]
        return [
            v for average in averages for v in (average._var, average._total_weight)
        ]

    def register_matpower(self, exp: float, damping_func: Callable[[], Any]) -> None:
        """Asks for `(F + damping I)^-1` to be maintained; 1 needs nothing.

        Raises:
          ValueError: another exponent.
        """
        _check_exponent(exp)
        if exp == -1:
            damping_id = self._store.register(damping_func)
            self._matpowers.setdefault((naming.python_scalar(exp), damping_id))

    def register_cholesky(self, damping_func: Callable[[], Any] | None = None) -> None:
        """Raises `NotImplementedError`."""
        raise NotImplementedError(_NO_CHOLESKY)

    def register_cholesky_inverse(
        self, damping_func: Callable[[], Any] | None = None
    ) -> None:
        """Raises `NotImplementedError`."""
        raise NotImplementedError(_NO_CHOLESKY)

    def get_cholesky(self, damping_func: Callable[[], Any]) -> Any:
        """Raises `NotImplementedError`."""
        raise NotImplementedError(_NO_CHOLESKY)

    def get_cholesky_inverse(self, damping_func: Callable[[], Any]) -> Any:
        """Raises `NotImplementedError`."""
        raise NotImplementedError(_NO_CHOLESKY)

    def instantiate_inv_variables(self) -> None:
        """Creates the variables that the inverses are composed of."""
        zeros = tf1.zeros_initializer
        create = self._store.create
        for exp, damping_id in self._matpowers:
            label = self._store.label(damping_id)
            suffix = f"{exp!r}_{label}"
            self._matpower_by_exp_and_damping[(exp, damping_id)] = create(
                f"matpower_exp{exp!r}_damp{label}", self._cov_shape
            )
            self._damping_var_by_id[damping_id] = create(
                f"damping_var_{suffix}", (), zeros
            )
            if not self._zero_mean:
                self._cov_inv_mu_by_damping_id[damping_id] = create(
                    f"cov_inv_mu_{suffix}", (self._in_channels, 1), zeros
                )
                self._rank_one_update_scale_by_damping_id[damping_id] = create(
                    f"rank_one_update_scale_{suffix}", (), zeros
                )

    def get_inv_vars(self) -> list[tf.Variable]:
        """The variables of the inverses of the damped Σ."""
        return list(self._matpower_by_exp_and_damping.values())

    def inverse_variables(self) -> list[tf.Variable]:
        """All variables that the inverses are composed of."""
        return [
            *self.get_inv_vars(),
            *self._damping_var_by_id.values(),
            *self._cov_inv_mu_by_damping_id.values(),
            *self._rank_one_update_scale_by_damping_id.values(),
        ]

    def inverse_flops(self) -> float:
        """As for a dense factor: factorisation, solve and product per inverse."""
        return len(self._matpowers) * 10 / 3 * float(self._in_channels) ** 3

    def make_inverse_update_ops(self) -> list[Any]:
        """Per inverse the ops for the damping, Σ⁻¹μ and the rank-one scale.

        Under zero mean those for the damping and for Σ⁻¹.
        """
        if not self._matpowers:
            return []
        cov = self.cov
        has_statistics = self._store.has_statistics(cov)
        dampings = self._store.dampings()
        ops = []
        for (_, damping_id), variable in self._matpower_by_exp_and_damping.items():
            damping = dampings[damping_id]
            inverse, fell_back = inverses.damped_inverse(
                cov, damping, previous=variable
            )
            variables = [variable, self._damping_var_by_id[damping_id]]
            values = [inverse, damping]
            if not self._zero_mean:
                variables += [
                    self._cov_inv_mu_by_damping_id[damping_id],
                    self._rank_one_update_scale_by_damping_id[damping_id],
                ]
                values += self._rank_one_update(inverse, damping)
            # A mean that is not finite spoils what the inverse's own guard let pass.
            good = tf.reduce_all([stored.all_finite(value) for value in values])
            values = [
                tf.where(good, value, old)
                for value, old in zip(values, variables, strict=True)
            ]
            fell_back = tf.logical_or(fell_back, tf.logical_not(good))
            assign_inverse, assign_damping, *others = self._store.refresh(
                variables, values, fell_back, has_statistics
            )
            ops.append(assign_damping)
            ops += [tf.group(assign_inverse, op) for op in others] or [assign_inverse]
        return ops

    def _rank_one_update(
        self, inverse: tf.Tensor, damping: tf.Tensor
    ) -> list[tf.Tensor]:
        """`v = Σ⁻¹ μ` and the scale of the rank-one term of the inverse."""
        mu = self.mu
        cov_inv_mu = tf.matmul(inverse, mu)
        denominator = 1 + self._kw_kh * tf.reduce_sum(mu * cov_inv_mu)
        if self._has_bias:
            denominator += 1 / damping
        return [cov_inv_mu, 1 / denominator]

    def get_cov_as_linear_operator(self) -> tf.linalg.LinearOperator:
        """F as an operator, read afresh, undamped."""
        return self._make_cov_linear_operator()

    def get_matpower(
        self, exp: float, damping_func: Callable[[], Any]
    ) -> tf.linalg.LinearOperator:
        """`F + damping I`, fresh, or its inverse as of the last inverse update.

        Before the first inverse update the inverse is zero.

        Raises:
          ValueError: the exponent is neither 1 nor -1.
          KeyError: the inverse has no variable.
        """
        _check_exponent(exp)
        if exp == 1:
            return self._make_cov_linear_operator(self._damping(damping_func))
        damping_id = naming.graph_func_to_id(damping_func)
        inverse = self._store.lookup(
            self._matpower_by_exp_and_damping, (exp, damping_id), "matrix power"
        )
        corner = tf.math.divide_no_nan(
            tf.ones([], self._dtype), self._damping_var_by_id[damping_id]
        )
        if self._zero_mean:
            return self._operator(inverse, corner)
        return self._operator(
            inverse,
            corner,
            column=self._over_offsets(
                self._cov_inv_mu_by_damping_id[damping_id], corner
            ),
            scale=-self._rank_one_update_scale_by_damping_id[damping_id],
        )

    def get_inverse(self, damping_func: Callable[[], Any]) -> tf.linalg.LinearOperator:
        """`(F + damping I)^-1` as of the last inverse update."""
        return self.get_matpower(-1, damping_func)

    def _make_cov_linear_operator(
        self, damping: Any = None
    ) -> tf.linalg.LinearOperator:
        """`F + damping I`, read afresh; no damping if it is None."""
        damping = scalars.cast(0 if damping is None else damping, self._dtype)
        cov = self.cov
        damped = tf.linalg.set_diag(cov, tf.linalg.diag_part(cov) + damping)
        if self._zero_mean:
            return self._operator(damped, damping)
        one = tf.ones([], self._dtype)
        column = self._over_offsets(self.mu, one)
        return self._operator(damped, damping, column=column, scale=one)

    def _over_offsets(self, per_channel: Any, corner: tf.Tensor) -> tf.Tensor:
        """`[per_channel ⊗ 1_k; corner]` as a column, the corner if there is a bias."""
        column = tf.repeat(per_channel, self._kw_kh, axis=0)
        if not self._has_bias:
            return column
        return tf.concat([column, tf.reshape(corner, [1, 1])], axis=0)

    def _operator(
        self,
        matrix: Any,
        corner: tf.Tensor,
        column: tf.Tensor | None = None,
        scale: tf.Tensor | None = None,
    ) -> tf.linalg.LinearOperator:
        """`blockdiag(matrix ⊗ I_k, corner) + scale column columnᵀ`."""
        hints = {"is_self_adjoint": True, "is_square": True}
        operator = tf.linalg.LinearOperatorKronecker(
            [
                tf.linalg.LinearOperatorFullMatrix(matrix, **hints),
                tf.linalg.LinearOperatorIdentity(self._kw_kh, dtype=self._dtype),
            ],
            **hints,
        )
        if self._has_bias:
            bias = tf.linalg.LinearOperatorFullMatrix(
                tf.reshape(corner, [1, 1]), **hints
            )
            operator = tf.linalg.LinearOperatorBlockDiag([operator, bias], **hints)
        if column is None:
            return operator
        return tf.linalg.LinearOperatorLowRankUpdate(
            operator, column, diag_update=tf.reshape(scale, [1]), **hints
        )


_NO_CHOLESKY = (
    "ConvInputSUAKroneckerFactor keeps no Cholesky factors. Use "
    "ConvInputKroneckerFactor where they are needed."
)


def _check_exponent(exp: float) -> None:
    if exp not in (1, -1):
        raise ValueError(
            f"ConvInputSUAKroneckerFactor has the powers 1 and -1 only, got {exp}. Use "
            "ConvInputKroneckerFactor for others."
        )
