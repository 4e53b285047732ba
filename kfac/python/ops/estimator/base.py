"""`FisherEstimator`: statistics, inverses and products, block by block."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import deferred, signals, sub_batch, utils
from kfac.python.ops.estimator import backward, batch_sizes, covariances
from kfac.python.ops.rules import scalars
from kfac.python.ops.utils.subgraph import without_wrapper

tf1 = tf.compat.v1

Thunk = Callable[..., Any]
VectorsAndVariables = Sequence[tuple[Any, Any]]


class FisherEstimator(abc.ABC):
    """Estimates the Fisher (or Gauss-Newton) matrix of a `LayerCollection`'s losses.

    The estimator back-propagates signals (see `signals`), hands them to the
    collection's blocks, and makes thunks that create variables and update ops.  It
    never runs anything by itself.

    **Nothing is computed where it is not due.**  Finalisation builds no backward
    pass.  Sampling, backward pass and second moments are built by the covariance
    update thunks, in the graph and control-flow branch they are called in; thunks
    called in the same branch share one backward pass (and hence one sample).

    Subclasses decide about placement, see `placement`.
    """

    def __init__(
        self,
        variables: Sequence[Any],
        cov_ema_decay: float,
        damping: Any,
        layer_collection: Any,
        exps: Sequence[float] = (-1,),
        estimation_mode: str = "gradients",
        colocate_gradients_with_ops: bool = True,
        name: str = "FisherEstimator",
        compute_cholesky: bool = False,
        compute_cholesky_inverse: bool = False,
        compute_params_stats: bool = False,
        batch_size: Any = None,
        cov_batch_fraction: float = 1.0,
        strict: bool = False,
    ):
        """Stores the arguments; builds nothing and looks at no registration.

        Args:
          variables: the variables to cover; must be those registered in
            `layer_collection` once the estimator is finalised.
          cov_ema_decay: decay of the moving averages of the covariances.
          damping: multiple of the identity added (approximately) to the curvature.
            Float, scalar tensor, variable, or `deferred.DeferredTensor`; the latter
            two are read anew inside every inverse update.
          layer_collection: source of blocks, factors and losses.
          exps: matrix powers to maintain. Power 1 always works.
          estimation_mode: "gradients", "empirical", "curvature_prop", "exact",
            "curvature_prop_GGN" or "exact_GGN"; see `signals`.
          colocate_gradients_with_ops: whether gradient ops share their op's device.
          name: default variable scope of everything the thunks create.
          compute_cholesky: whether to maintain Cholesky factors of the blocks.
          compute_cholesky_inverse: whether to maintain their inverses.
          compute_params_stats: whether `params_stats` is wanted.
          batch_size: cases per replica, int or scalar integer tensor, which every
            factor is checked against. Needed for `compute_params_stats`.
          cov_batch_fraction: part of the batch to take statistics from, in (0, 1]:
            its first ceil(fraction * batch) cases.
          strict: whether to refuse variables without a layer-specific approximation,
            at finalisation.

        Raises:
          ValueError: `compute_params_stats` without `batch_size`, a batch size that
            is no positive integer, or a fraction out of range.
        """
        if compute_params_stats and batch_size is None:
            raise ValueError(
                "compute_params_stats=True needs batch_size, the number of cases per "
                "replica that the statistics are averaged over."
            )
        sub_batch.check_fraction("cov_batch_fraction", cov_batch_fraction)
        self._variables = [without_wrapper(variable) for variable in variables]
        self._cov_ema_decay = cov_ema_decay
        self._damping = damping
        self._layers = layer_collection
        self._exps = tuple(exps)
        self._estimation_mode = estimation_mode
        self._colocate_gradients_with_ops = colocate_gradients_with_ops
        self._name = name
        self._compute_cholesky = compute_cholesky
        self._compute_cholesky_inverse = compute_cholesky_inverse
        self._compute_params_stats = compute_params_stats
        self._batch_size = batch_sizes.checked_argument(batch_size)
        self._cov_batch_fraction = cov_batch_fraction
        self._strict = strict
        self._sub_batch: sub_batch.SubBatch | None = None
        self._backward: backward.BackwardPass | None = None
        self._params_stats = deferred.PerContextCache(self._make_params_stats)

    @property
    def variables(self) -> list[Any]:
        """The covered variables."""
        return self._variables

    @property
    def damping(self) -> Any:
        """The damping, as given."""
        return self._damping

    @property
    def name(self) -> str:
        """Default variable scope of the thunks."""
        return self._name

    @property
    def layers(self) -> Any:
        """The layer collection."""
        return self._layers

    @property
    def blocks(self) -> tuple[Any, ...]:
        """All blocks, in registration order."""
        return self._layers.get_blocks()

    @property
    def factors(self) -> tuple[Any, ...]:
        """All factors, in creation order; empty before finalisation."""
        return self._layers.get_factors()

    @property
    def mat_type(self) -> str:
        """Which matrix is estimated: "Fisher", "GGN" or "Empirical_Fisher".

        Raises:
          ValueError: the estimation mode is unknown.
        """
        return signals.signal_of(self._estimation_mode).mat_type

    @property
    def params_stats(self) -> tuple[tf.Tensor, ...]:
        """First-order statistics: per variable the mean signal, over all replicas.

        In mode "empirical" the gradient of the registered (coefficient-weighted)
        loss, averaged over the batch; otherwise the sum over sources of the signals
        over the batch size.  Computed in the current graph and branch, from the same
        backward pass as the covariance updates built there.

        Raises:
          AttributeError: not asked for, or the estimator is not finalised yet.
        """
        if not self._compute_params_stats or self._backward is None:
            raise AttributeError(
                "params_stats exist after the first make_vars_and_create_op_thunks() "
                "or create_ops_and_vars_thunks(), with compute_params_stats=True."
            )
        return self._params_stats.get()

    def multiply_inverse(self, vecs_and_vars: VectorsAndVariables) -> list:
        """Products of the blocks' damped inverses, see `multiply_matpower`."""
        return self.multiply_matpower(-1, vecs_and_vars)

    def multiply(self, vecs_and_vars: VectorsAndVariables) -> list:
        """Products of the damped blocks from current statistics."""
        return self.multiply_matpower(1, vecs_and_vars)

    def multiply_matpower(
        self, exp: float, vecs_and_vars: VectorsAndVariables
    ) -> list[tuple[Any, Any]]:
        """Products of powers of the damped blocks with parameter-shaped vectors.

        Args:
          exp: power; 1, or one of `exps`.
          vecs_and_vars: `(vector, variable)` pairs for all registered variables.

        Returns:
          `(product, variable)` pairs in the order given.

        Raises:
          KeyError: a variable is missing or unknown, or a dense factor does not
            maintain the power.
        """
        return self._transform(
            lambda block, vector: block.multiply_matpower(vector, exp), vecs_and_vars
        )

    def multiply_cholesky(
        self, vecs_and_vars: VectorsAndVariables, transpose: bool = False
    ) -> list[tuple[Any, Any]]:
        """Products with L (or Lᵀ), L Lᵀ the damped block."""
        return self._transform(
            lambda block, vector: block.multiply_cholesky(vector, transpose=transpose),
            vecs_and_vars,
        )

    def multiply_cholesky_inverse(
        self, vecs_and_vars: VectorsAndVariables, transpose: bool = False
    ) -> list[tuple[Any, Any]]:
        """Products with L⁻¹ (or L⁻ᵀ).

        L⁻ᵀ times standard normal noise has the inverse damped block as covariance.
        """
        return self._transform(
            lambda block, v: block.multiply_cholesky_inverse(v, transpose=transpose),
            vecs_and_vars,
        )

    def _transform(
        self, product: Callable[[Any, Any], Any], vecs_and_vars: VectorsAndVariables
    ) -> list[tuple[Any, Any]]:
        if not self.factors:
            raise ValueError(
                "The curvature has no variables yet; call "
                "make_vars_and_create_op_thunks() and run its updates, or use "
                "PeriodicInvCovUpdateKfacOpt."
            )
        vecs_and_vars = list(vecs_and_vars)
        vectors = utils.SequenceDict((var, vec) for vec, var in vecs_and_vars)
        params_list, thunks = [], []
        for params, block in self._layers.fisher_blocks.items():
            params_list.append(params)
            thunks.append(lambda b=block, v=vectors[params]: product(b, v))
        products = self._place_and_compute_transformation_thunks(thunks, params_list)
        results = utils.SequenceDict()
        for params, result in zip(params_list, products, strict=True):
            results[params] = result
        return [(results[var], var) for _, var in vecs_and_vars]

    @abc.abstractmethod
    def _place_and_compute_transformation_thunks(
        self, thunks: Sequence[Thunk], params_list: Sequence[Any]
    ) -> Sequence[Any]:
        """What the thunks return, one a block, in order."""

    # Variables and reports.

    def get_cov_vars(self) -> tuple[list[tf.Tensor], ...]:
        """Per factor, the current covariance values (tensors)."""
        return tuple(factor.get_cov_vars() for factor in self.factors)

    def get_inv_vars(self) -> tuple[list[Any], ...]:
        """Per factor, the variables of its inverses; empty where there are none."""
        return tuple(factor.get_inv_vars() for factor in self.factors)

    def state_variables(self) -> list[tf.Variable]:
        """All state, each once: moving averages and weights, inverses, counters."""
        found = []
        for factor in self.factors:
            found += [*factor.cov_variables(), *factor.inverse_variables()]
            if factor.fallbacks is not None:
                found.append(factor.fallbacks)
        # An average that an inverse update changes, too, is in both lists.
        return list({id(variable): variable for variable in found}.values())

    def fallbacks(self) -> tf.Tensor:
        """Number of inverse updates, over all factors, that fell back so far.

        int64 scalar.  Rising numbers mean that some covariance is not finite or far
        from positive definite; `factor.fallbacks` tells which.
        """
        counts = [f.fallbacks for f in self.factors if f.fallbacks is not None]
        return tf.add_n(counts) if counts else tf.constant(0, tf.int64)

    def explain(self, **kwargs: Any) -> Any:
        """The collection's report on what covers each variable."""
        return self._layers.explain(**kwargs)

    # Finalisation.

    def _finalize(self) -> None:
        """Checks the registration and connects the blocks; only the first time."""
        if self._backward is not None:
            return
        signal = signals.signal_of(self._estimation_mode)
        self._layers.finalize()
        try:
            self._layers.check_registration(self._variables)
            if self._strict:
                self._layers.check_strict()
            signal.check(self._layers)
            part = self._make_sub_batch()
            backward_pass = backward.BackwardPass(
                signal,
                self._layers,
                wrt=[block.tensors_to_compute_grads() for block in self.blocks],
                variables=self._variables if self._compute_params_stats else (),
                part=part,
                colocate=self._colocate_gradients_with_ops,
            )
        except Exception:
            # Nothing was changed: more can be registered, for another attempt.
            self._layers._finalized = False
            raise
        self._instantiate_factors(backward_pass, part)
        self._sub_batch, self._backward = part, backward_pass

    def _make_sub_batch(self) -> sub_batch.SubBatch | None:
        if self._cov_batch_fraction == 1:
            return None
        return sub_batch.SubBatch(
            self._layers, self._cov_batch_fraction, self._batch_size
        )

    def _instantiate_factors(
        self, backward_pass: backward.BackwardPass, part: sub_batch.SubBatch | None
    ) -> None:
        grads_lists = backward_pass.grads_lists()
        in_float32 = deferred.AtLeastFloat32()
        for block, grads_list in zip(self.blocks, grads_lists, strict=True):
            covariances.map_inputs(block, part, in_float32)
            block.instantiate_factors(grads_list, self._damping)
        for block in self.blocks:
            for exp in self._exps:
                block.register_matpower(exp)
            if self._compute_cholesky:
                block.register_cholesky()
            if self._compute_cholesky_inverse:
                block.register_cholesky_inverse()

    def _statistics_batch_size(self) -> Any:
        """Number of cases the statistics are taken from, if it was given."""
        if self._batch_size is None or self._sub_batch is None:
            return self._batch_size
        return self._sub_batch.batch_size

    def _replica_weight(self) -> Any:
        """How much this replica counts, or None if all have equally many cases."""
        size = self._statistics_batch_size()
        return size if tf.is_tensor(size) else None

    def _make_params_stats(self) -> tuple[tf.Tensor, ...]:
        size = self._statistics_batch_size()
        sums = self._backward.params_gradients()
        means = tuple(total / scalars.cast(size, total.dtype) for total in sums)
        return tuple(
            utils.all_average(means, "first-order statistics", self._replica_weight())
        )

    # Thunks.

    @abc.abstractmethod
    def create_ops_and_vars_thunks(
        self, scope: str | None = None
    ) -> tuple[list[Thunk], list[Thunk], list[Thunk], list[Thunk]]:
        """Thunks that make variables and update ops, one of each kind a factor.

        Args:
          scope: variable scope, relative to the current one, that a thunk opens while
            it runs; the estimator's name by default.

        Returns:
          `(cov_variable_thunks, cov_update_thunks, inv_variable_thunks,
          inv_update_thunks)`, in the order of `factors`.  Call those of the first and
          third list once.  `cov_update_thunk(should_decay=True)` returns an op that
          adds the batch's statistics to the moving average (a plain running mean
          while `should_decay`, a bool or boolean tensor, is false).  At run time the
          first covariance update must precede the first inverse update, and that the
          first product with an inverse.

        Raises:
          ValueError: the first call finds an unknown estimation mode, a registration
            that does not match the graph, or a collection in use by another
            estimator.
        """

    def make_vars_and_create_op_thunks(
        self, scope: str | None = None
    ) -> tuple[list[Thunk], list[Thunk]]:
        """Makes all variables; returns `(cov_update_thunks, inv_update_thunks)`."""
        cov_variables, cov_updates, inv_variables, inv_updates = (
            self.create_ops_and_vars_thunks(scope=scope)
        )
        for thunk in cov_variables:
            thunk()
        for thunk in inv_variables:
            thunk()
        return cov_updates, inv_updates

    def _create_ops_and_vars_thunks(
        self, scope: str | None = None
    ) -> tuple[list[Thunk], list[Thunk], list[Thunk], list[Thunk]]:
        """The thunks before any placement."""
        self._finalize()
        scope = self._name if scope is None else scope

        def thunks(function: Callable[..., Any]) -> list[Thunk]:
            return [self._make_thunk(function, f, scope) for f in self.factors]

        return (
            thunks(lambda factor: factor.instantiate_cov_variables()),
            thunks(self._cov_update_op),
            thunks(lambda factor: factor.instantiate_inv_variables()),
            thunks(lambda factor: tf.group(factor.make_inverse_update_ops())),
        )

    def _make_thunk(self, function: Callable[..., Any], factor: Any, scope: str):
        def thunk(*args, **kwargs):
            with tf1.variable_scope(scope):
                return function(factor, *args, **kwargs)

        return thunk

    def _cov_update_op(self, factor: Any, should_decay: Any = True) -> tf.Operation:
        with self._checked(factor):
            decay, weight = covariances.decay_and_weight(
                factor, self._cov_ema_decay, should_decay
            )
            return factor.make_covariance_update_op(decay, weight)

    def _checked(self, factor: Any) -> Any:
        """Context whose ops run after the factor's batch size was found right."""
        return batch_sizes.checked(factor, *self._expected_batch_size())

    def covariance_update_ops(
        self, thunks: Sequence[Thunk], should_decay: Any = True
    ) -> list[tf.Operation]:
        """Ops that update all covariances, with one exchange between replicas.

        Without replicas these are simply the ops of the thunks.

        Args:
          thunks: the covariance update thunks, one a factor.
          should_decay: see there.
        """
        if not utils.is_replicated() or utils.get_tf_replicator() is not None:
            return [thunk(should_decay) for thunk in thunks]
        return covariances.update_together(
            self.factors,
            thunks,
            should_decay,
            self._cov_ema_decay,
            checked=self._checked,
            weight=self._replica_weight(),
        )

    def _expected_batch_size(self) -> tuple[Any, str]:
        size = self._statistics_batch_size()
        if size is not None:
            return size, "batch_size as passed to the optimizer or estimator"
        first = self.factors[0]
        return first.batch_size(), (
            f"batch size of factor {first.name!r} of class {utils.cls_name(first)}"
        )
