"""The contract of Fisher factors: one running second moment, and functions of it."""

from __future__ import annotations

import abc
import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import config, errors, utils
from kfac.python.ops.fisher_factors import naming
from kfac.python.ops.rules import scalars
from kfac.python.ops.utils import packing

tf1 = tf.compat.v1

# Chosen once, at import: changing the `init_*_at_zero` settings later leaves them be.
inverse_initializer = (
    tf1.zeros_initializer
    if config.settings().init_inverses_at_zero
    else tf1.initializers.identity
)
covariance_initializer = (
    tf1.zeros_initializer
    if config.settings().init_covariances_at_zero
    else tf1.initializers.identity
)
diagonal_covariance_initializer = (
    tf1.zeros_initializer
    if config.settings().init_covariances_at_zero
    else tf1.ones_initializer
)


@contextlib.contextmanager
def maybe_place_on_device(device: str | None) -> Iterator[None]:
    """Enters `tf.device(device)` if there is one and towers are kept separate."""
    if device and config.settings().tower_strategy == "separate":
        with tf.device(device):
            yield
    else:
        yield


class FisherFactor(abc.ABC):
    """Running estimate of one second moment, and the matrix functions it serves.

    Statistics of one mini-batch are summed over *sources* (back-propagated signals),
    averaged over *towers* (shards of the batch) and over replicas, and then enter a
    decayed weighted average that is kept in variables.  What a factor serves depends
    on variables only, so that it can be used in another graph (a branch, say) than
    the one the statistics were built in.

    Data may be tensors, `utils.PartitionedTensor`s or `deferred.DeferredTensor`s. Only
    their static properties are read on construction; they are converted to tensors
    when an update is built, in the graph that is current then.

    The order of calls is: construct, `register_*`, `instantiate_cov_variables`,
    `instantiate_inv_variables`, `make_*`, `get_*`.

    Subclasses supply the abstract members; they set their data first and call
    `__init__` of this class last.
    """

    # Own name, see `name`; it stays None until somebody asks.
    _name: str | None = None
    _has_stable_name = False

    def __init__(self):
        self._cov = None
        self._cov_tensor = None
        self._acc_cov = None

    @property
    @abc.abstractmethod
    def _var_scope(self) -> str:
        """Variable scope of a factor used by itself, made from its arguments."""

    @property
    def _identity(self) -> Hashable:
        """What, besides `_var_scope`, tells this factor from others of its class."""
        return ()

    @property
    def name(self) -> str:
        """Variable scope of all state of the factor, relative to the ambient scope.

        The name given to `set_name`, else `_var_scope` (with a suffix if a different
        factor of the same graph has the same one).
        """
        if self._name is None:
            owner = (type(self).__qualname__, self._identity)
            self._name = naming.unique_scope(self._var_scope, owner)
        return self._name

    def set_name(self, name: str) -> None:
        """Gives the factor a stable name, which does not depend on tensor names.

        Variables of functions of the covariance are then named by the order of their
        dampings' registration rather than by the dampings.

        Raises:
          ArgumentError: the covariance variables exist already.
        """
        if self._cov is not None:
            raise errors.ArgumentError(
                f"Factor {self.name!r} has variables already; name it {name!r} before "
                "instantiate_cov_variables()."
            )
        self._name = name
        self._has_stable_name = True

    @property
    @abc.abstractmethod
    def _cov_shape(self) -> Sequence[int]:
        """Shape of the second moment."""

    @property
    @abc.abstractmethod
    def _num_sources(self) -> int:
        """Number of back-propagated signals, whose contributions are summed."""

    @property
    @abc.abstractmethod
    def _num_towers(self) -> int:
        """Number of shards of the mini-batch, whose contributions are averaged."""

    @property
    @abc.abstractmethod
    def _dtype(self) -> tf.DType:
        """Dtype of the second moment and of everything derived from it."""

    @abc.abstractmethod
    def _partial_batch_size(self, source: int = 0, tower: int = 0) -> int | tf.Tensor:
        """Number of cases of one shard: an int if static, else a scalar tensor."""

    def batch_size(self, source: int = 0) -> int | tf.Tensor:
        """Number of cases over all towers: an int if static, else a scalar tensor."""
        return sum(
            self._partial_batch_size(source=source, tower=tower)
            for tower in range(self._num_towers)
        )

    def _shards(self) -> Iterable[tuple[int, int]]:
        """All pairs (source, tower) that have a batch size, source-major."""
        return itertools.product(range(self._num_sources), range(self._num_towers))

    def check_partial_batch_sizes(self) -> tf.Operation:
        """Checks that all shards have as many cases, as averaging them assumes.

        Returns:
          An op that makes the comparisons that need run-time values; it fails with
          `InvalidArgumentError`.

        Raises:
          ValueError: static sizes differ.
        """
        sizes = {
            shard: self._partial_batch_size(source=shard[0], tower=shard[1])
            for shard in self._shards()
        }
        (first, reference), *others = sizes.items()
        checks = []
        for shard, size in others:
            message = (
                f"Inconsistent partial batch sizes in factor {self.name!r} of class "
                f"{type(self).__name__}: {size} at (source, tower) = {shard}, but "
                f"{reference} at {first}. Probably a tensor has the wrong size, or "
                "batch_size, num_uses or num_timesteps is wrong."
            )
            if isinstance(size, int) and isinstance(reference, int):
                if size != reference:
                    raise ValueError(message)
            else:
                checks.append(
                    tf1.assert_equal(
                        tf.cast(reference, tf.int32),
                        tf.cast(size, tf.int32),
                        message=message,
                    )
                )
        return tf.group(*checks) if checks else tf.no_op()

    @property
    def _cov_initializer(self) -> Any:
        return covariance_initializer

    def instantiate_cov_variables(self) -> None:
        """Creates the variables of the moving average, `<name>/cov/...`.

        Raises:
          ArgumentError: this factor has them already.
        """
        if self._cov is not None:
            raise errors.ArgumentError(
                f"Factor {self.name!r} has covariance variables already; "
                "instantiate_cov_variables() may be called once."
            )
        with tf1.variable_scope(self.name):
            self._cov = self._moving_average("cov", self._cov_shape)

    def _moving_average(self, name: str, shape: Sequence[int]) -> Any:
        """A moving average in the current scope, debiased if the settings say so."""
        return utils.MovingAverageVariable(
            name,
            shape=tuple(int(dim) for dim in shape),
            dtype=self._dtype,
            initializer=self._cov_initializer,
            normalize_value=config.settings().zero_debias,
        )

    @abc.abstractmethod
    def _compute_new_cov(self, source: int, tower: int) -> tf.Tensor:
        """Second moment of one shard, of shape `_cov_shape`."""

    def _compute_total_new_cov(self) -> tf.Tensor:
        """Second moment of the mini-batch: all sources, towers and replicas."""
        return utils.all_average(self._compute_local_new_cov())

    def _compute_local_new_cov(self) -> tf.Tensor:
        """Second moment of this replica's cases: all sources and towers."""
        return self._combine_shards(self._compute_new_cov)

    def _combine_shards(self, compute: Callable[[int, int], tf.Tensor]) -> tf.Tensor:
        """Sum over sources, mean over towers of `compute`'s results."""
        total = None
        for source, tower in itertools.product(
            range(self._num_sources), range(self._num_towers)
        ):
            with maybe_place_on_device(self._get_data_device(tower)):
                term = compute(source, tower)
                total = term if total is None else total + term
        if self._num_towers > 1:
            total = total / tf.cast(self._num_towers, total.dtype)
        return total

    def make_covariance_update_op(self, ema_decay: Any, ema_weight: Any) -> Any:
        """Op that takes one step of the moving average with this mini-batch.

        Args:
          ema_decay: float or scalar tensor, multiplies the past.
          ema_weight: float or scalar tensor, multiplies the new second moment.
        """
        if self.averages_by_itself:
            statistics = [self._compute_total_new_cov()]
        else:
            statistics = [utils.all_average(s) for s in self.new_statistics()]
        return self.add_statistics(statistics, ema_decay, ema_weight)

    # The same in two parts, so that the statistics of all factors can be averaged over
    # replicas together, in between.

    @property
    def averages_by_itself(self) -> bool:
        """Whether a subclass has its own way to average over replicas."""
        base, own = FisherFactor, type(self)
        return (
            own._compute_total_new_cov is not base._compute_total_new_cov
            or own.make_covariance_update_op is not base.make_covariance_update_op
        )

    def new_statistics(self) -> list[tf.Tensor]:
        """What the moving averages are about to take in, of this replica's cases."""
        return [self._compute_local_new_cov()]

    def statistics_layouts(self) -> list[packing.Layout]:
        """Which entries of `new_statistics()` have to travel between replicas."""
        return [packing.Layout.FULL]

    def add_statistics(
        self, statistics: Sequence[tf.Tensor], ema_decay: Any, ema_weight: Any
    ) -> Any:
        """Op that takes one step of the moving averages.

        Args:
          statistics: as from `new_statistics`, averaged over replicas.
          ema_decay: float or scalar tensor, multiplies the past.
          ema_weight: float or scalar tensor, multiplies the statistics.
        """
        (self._cov_tensor,) = statistics
        return self._average.add_to_average(
            self._cov_tensor, decay=ema_decay, weight=ema_weight
        )

    @abc.abstractmethod
    def _get_data_device(self, tower: int) -> str | None:
        """Device of a tower's data; None or "" if it has none."""

    @property
    def _average(self) -> Any:
        """The moving average, which must exist."""
        if self._cov is None:
            raise AttributeError(
                f"{type(self).__name__} {self.name!r} has no covariance yet; call "
                "instantiate_cov_variables() first."
            )
        return self._cov

    @property
    def cov(self) -> tf.Tensor:
        """The running second moment, read afresh; zeros before the first update.

        Raises:
          AttributeError: `instantiate_cov_variables` has not been called.
        """
        return self._average.value

    @property
    def fallbacks(self) -> tf.Variable | None:
        """int64 count of inverse updates that met a matrix they could not handle.

        None where nothing can fail: no matrix function is kept in variables.
        """
        return None

    def get_cov_vars(self) -> list[tf.Tensor]:
        """Values (not variables) of the running averages."""
        return [self.cov]

    def cov_variables(self) -> list[tf.Variable]:
        """The variables behind `get_cov_vars`: averages and their total weights."""
        return [self._cov._var, self._cov._total_weight]

    def get_inv_vars(self) -> list[Any]:
        """The variables that `make_inverse_update_ops` refreshes."""
        return []

    def inverse_variables(self) -> list[tf.Variable]:
        """Flat, complete list of what `make_inverse_update_ops` refreshes.

        Placement strategies that compute inverses on one replica send these.
        """
        return self.get_inv_vars()

    def inverse_layouts(self) -> list[packing.Layout]:
        """Which entries of `inverse_variables()` have to travel."""
        return [packing.Layout.FULL] * len(self.inverse_variables())

    def inverse_flops(self) -> float:
        """Floating-point operations of `make_inverse_update_ops`, to leading order.

        For comparing factors with each other, to share the work evenly.
        """
        return 0.0

    @abc.abstractmethod
    def instantiate_inv_variables(self) -> None:
        """Creates the variables of all registered matrix functions."""

    @abc.abstractmethod
    def make_inverse_update_ops(self) -> list[Any]:
        """Ops that refresh the stored matrix functions from the running average."""

    @abc.abstractmethod
    def get_cov_as_linear_operator(self) -> tf.linalg.LinearOperator:
        """The running second moment as an operator."""

    @abc.abstractmethod
    def register_matpower(self, exp: float, damping_func: Callable[[], Any]) -> None:
        """Asks for `(cov + damping I)^exp` to be maintained."""

    @abc.abstractmethod
    def register_cholesky(self, damping_func: Callable[[], Any]) -> None:
        """Asks for the lower Cholesky factor of `cov + damping I`."""

    @abc.abstractmethod
    def register_cholesky_inverse(self, damping_func: Callable[[], Any]) -> None:
        """Asks for the inverse of the lower Cholesky factor of `cov + damping I`."""

    @abc.abstractmethod
    def get_matpower(
        self, exp: float, damping_func: Callable[[], Any]
    ) -> tf.linalg.LinearOperator:
        """`(cov + damping I)^exp` as an operator."""

    @abc.abstractmethod
    def get_cholesky(self, damping_func: Callable[[], Any]) -> tf.linalg.LinearOperator:
        """The lower Cholesky factor of `cov + damping I` as an operator."""

    @abc.abstractmethod
    def get_cholesky_inverse(
        self, damping_func: Callable[[], Any]
    ) -> tf.linalg.LinearOperator:
        """The inverse of the lower Cholesky factor as an operator."""

    def _damping(self, damping_func: Callable[[], Any]) -> tf.Tensor:
        """The value of a damping function, in the factor's dtype."""
        return scalars.cast(damping_func(), self._dtype)
