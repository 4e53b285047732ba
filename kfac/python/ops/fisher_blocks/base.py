"""`FisherBlock`: one diagonal block of the Fisher or GGN matrix.

A block models the curvature of one parameter group.  It asks the collection for
factors (which own all statistics, inverses and variables), owns the damping
functions, and turns matrices served by factors into products with vectors shaped
like the parameters.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import fisher_factors, state

# One tensor, `tf.IndexedSlices` where a class says so, or a list or tuple of tensors.
Vector = Any


def maybe_tuple(obj: Any) -> Any:
    """`tuple(obj)` for a list, anything else unchanged."""
    return tuple(obj) if isinstance(obj, list) else obj


def is_sequence(obj: Any) -> bool:
    """Whether `obj` is a list or tuple, of parameters or of tensors."""
    return isinstance(obj, (list, tuple))


@dataclasses.dataclass(frozen=True)
class BlockDescription:
    """What covers a parameter group, for reports.

    Attributes:
      block: name of the block's class.
      approximation: name of the approximation, as in registrations.
      factor_sides: shape of every factor's covariance, input side first; empty
        before `instantiate_factors`.
      uses: how often a case uses the weights (locations, time steps), `None` if
        that is not known (generic blocks, or no tower yet).
      towers: number of registered towers.
      factor_bytes: memory of the factors' covariances.
      inverse_bytes: memory of the inverse-type variables made so far.
    """

    block: str
    approximation: str
    factor_sides: tuple[tuple[int, ...], ...]
    uses: int | None
    towers: int
    factor_bytes: int
    inverse_bytes: int


def _same(value: Any) -> Any:
    return value


class FisherBlock(abc.ABC):
    """Base class of all blocks.

    Life cycle: construct; `register_additional_tower` once or more;
    `instantiate_factors`; then the registrations and products.  Power 1 needs no
    registration and uses the current statistics; every other matrix function of a
    dense factor must be registered before the factor's `instantiate_inv_variables`
    and is as old as the last inverse update.

    Products take one tensor or a list or tuple of tensors like the parameters, of
    static shapes; for a list or tuple the result is a tuple.
    """

    # Name of the approximation in registrations; concrete classes say it.
    approximation = ""

    # Identity unless `use_sub_batch` was called; class attributes, so that a
    # subclass need not call the constructor before it uses them.
    _map_tensor: Callable[[Any], Any] = staticmethod(_same)
    _map_batch_size: Callable[[Any], Any] = staticmethod(_same)

    def __init__(self, layer_collection: Any):
        self._layer_collection = layer_collection

    @abc.abstractmethod
    def instantiate_factors(self, grads_list: Sequence[Any], damping: Any) -> None:
        """Makes or fetches the factors and makes the damping functions.

        Args:
          grads_list: one entry a source, each structured like
            `tensors_to_compute_grads()`; nested tuples.
          damping: float, scalar tensor or variable.
        """

    @abc.abstractmethod
    def register_matpower(self, exp: float) -> None:
        """Asks for the matrix power `exp` of the damped block to be maintained."""

    @abc.abstractmethod
    def register_cholesky(self) -> None:
        """Asks for the lower Cholesky factor of the damped block."""

    @abc.abstractmethod
    def register_cholesky_inverse(self) -> None:
        """Asks for the inverse of the lower Cholesky factor."""

    def register_inverse(self) -> None:
        """Asks for the inverse of the damped block."""
        self.register_matpower(-1)

    @abc.abstractmethod
    def multiply_matpower(self, vector: Vector, exp: float) -> Vector:
        """Product of the damped block raised to `exp` with `vector`."""

    def multiply_inverse(self, vector: Vector) -> Vector:
        """Product of the damped block's inverse with `vector`."""
        return self.multiply_matpower(vector, -1)

    def multiply(self, vector: Vector) -> Vector:
        """Product of the damped block with `vector`, from current statistics."""
        return self.multiply_matpower(vector, 1)

    @abc.abstractmethod
    def multiply_cholesky(self, vector: Vector, transpose: bool = False) -> Vector:
        """Product of the Cholesky factor (or its transpose) with `vector`."""

    @abc.abstractmethod
    def multiply_cholesky_inverse(
        self, vector: Vector, transpose: bool = False
    ) -> Vector:
        """Product of the inverse Cholesky factor (or its transpose) with `vector`."""

    @abc.abstractmethod
    def tensors_to_compute_grads(self) -> Any:
        """Structure of the tensors with respect to which gradients are needed."""

    @property
    @abc.abstractmethod
    def num_registered_towers(self) -> int:
        """Number of registered towers."""

    def use_sub_batch(
        self,
        map_tensor: Callable[[Any], Any],
        map_batch_size: Callable[[Any], Any],
    ) -> None:
        """Takes statistics from a part of the batch.

        Args:
          map_tensor: registered tensor -> the tensor of the part that the factors
            get in its place; equal arguments must give the identical result, for
            factors are shared by the identity of their tensors.
          map_batch_size: batch size -> size of the part.
        """
        self._map_tensor = map_tensor
        self._map_batch_size = map_batch_size

    def configuration(self) -> dict[str, Any]:
        """The options that all towers of one parameter group must agree on."""
        return {}

    def rebuild_gradient(self, source_grads: Any) -> Any:
        """The parameters' gradient from captured inputs and output gradients.

        Where it agrees with the true gradient of the same loss, the block has seen
        every use of its parameters, with the right scale, sharing and masking.

        Args:
          source_grads: one source's entry of `grads_list`.

        Returns:
          A tensor, or a tuple of tensors when the layer has a bias or a shift,
          shaped like the registered parameters; `None` when the block captures
          nothing to rebuild from.
        """
        del source_grads
        return None

    def description(self) -> BlockDescription:
        """What this block is and costs."""
        factors = self._factors()
        return BlockDescription(
            block=type(self).__name__,
            approximation=self.approximation,
            factor_sides=tuple(
                tuple(int(side) for side in factor._cov_shape) for factor in factors
            ),
            uses=self._uses_per_case(),
            towers=self.num_registered_towers,
            factor_bytes=sum(
                math.prod(int(side) for side in factor._cov_shape) * factor._dtype.size
                for factor in factors
            ),
            inverse_bytes=sum(
                variable.shape.num_elements() * variable.dtype.size
                for factor in factors
                for variable in tf.nest.flatten(factor.get_inv_vars())
            ),
        )

    def product_flops(self) -> float:
        """Floating-point operations of `multiply_inverse`, to leading order.

        For comparing blocks with each other, to share the work evenly: products with
        full matrices count, of which an eigenbasis takes two for each factor.
        """
        factors = self._factors()
        kronecker = factors[:2]
        entries = math.prod(int(factor._cov_shape[0]) for factor in kronecker)
        sides = [
            int(factor._cov_shape[0])
            for factor in kronecker
            if not isinstance(factor, fisher_factors.DiagonalFactor)
        ]
        return 2.0 * entries * sum(sides) * (2 if len(factors) > 2 else 1)

    @property
    def registered_params(self) -> Any:
        """The key the collection holds this block under, `None` if it does not."""
        blocks = getattr(self._layer_collection, "fisher_blocks", None)
        if isinstance(blocks, Mapping):
            for params, block in blocks.items():
                if block is self:
                    return params
        return None

    def _factors(self) -> tuple[Any, ...]:
        """The instantiated factors, input side first."""
        return ()

    def _uses_per_case(self) -> int | None:
        """How often a case uses the weights, `None` if unknown."""
        return None

    def _make_or_get_factor(self, role: str, cls: type, args: tuple) -> Any:
        """The collection's factor, with a stable name if the block is registered.

        A stand-alone block has no parameter path, its factors are named after their
        tensors.
        """
        params = self.registered_params
        if params is None:
            return self._layer_collection.make_or_get_factor(cls, args)
        return self._layer_collection.make_or_get_factor(
            cls, args, name=f"{state.parameter_path(params)}/{role}"
        )

    def _shaped_like_params(self, gradient: Any) -> Any:
        """Reshapes a rebuilt gradient to the registered parameters, if there are."""
        params = self.registered_params
        if params is None:
            return gradient
        params = params if is_sequence(params) else (params,)
        parts = gradient if is_sequence(gradient) else (gradient,)
        parts = tuple(
            tf.reshape(part, param.shape.as_list())
            for part, param in zip(parts, params, strict=True)
        )
        return parts if is_sequence(self.registered_params) else parts[0]
