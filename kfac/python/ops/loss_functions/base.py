"""What every loss offers: evaluation, sampling, products by curvature matrices."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops.errors import MissingTargetsError
from kfac.python.ops.loss_functions import helpers


class LossFunction(abc.ABC):
    """A scalar loss of some network outputs, with its generalised Gauss-Newton matrix.

    Objects are compared and hashed by identity.  `inputs` is a tensor `[batch, ...]`,
    or a list/tuple of them; products take and return the same structure.
    """

    @property
    @abc.abstractmethod
    def targets(self) -> Any:
        """The targets given at construction, or None."""

    @property
    @abc.abstractmethod
    def inputs(self) -> Any:
        """The tensor(s) that the loss is differentiated against."""

    @property
    def dtype(self) -> Any:
        """Dtype of the (first of the) inputs; NumPy's for an array."""
        inputs = self.inputs
        return (inputs[0] if isinstance(inputs, (list, tuple)) else inputs).dtype

    def evaluate(self) -> tf.Tensor:
        """The loss on the targets, summed over the batch; nothing flows into them.

        Raises:
          MissingTargetsError: constructed without targets.
        """
        if self.targets is None:
            raise MissingTargetsError(
                f"Cannot evaluate {type(self).__name__} with unspecified targets. Pass "
                "`targets` when the loss is registered; only sampled-target curvature "
                "works without them."
            )
        return self._evaluate(tf.nest.map_structure(_without_gradient, self.targets))

    @abc.abstractmethod
    def _evaluate(self, targets: Any) -> tf.Tensor:
        """The loss on the given targets, summed over the batch."""

    @abc.abstractmethod
    def multiply_ggn(self, vector: Any) -> Any:
        """Gauss-Newton matrix of the loss times `vector` (structure of `inputs`)."""

    @abc.abstractmethod
    def multiply_ggn_factor(self, vector: tf.Tensor) -> Any:
        """A factor B of the Gauss-Newton matrix times an inner vector."""

    @abc.abstractmethod
    def multiply_ggn_factor_transpose(self, vector: Any) -> tf.Tensor:
        """Bᵀ times `vector` (structure of `inputs`)."""

    @abc.abstractmethod
    def multiply_ggn_factor_replicated_one_hot(self, index: Sequence[int]) -> Any:
        """B times the vector that is one-hot at `index` for every case."""

    @property
    @abc.abstractmethod
    def ggn_factor_inner_shape(self) -> tf.Tensor:
        """Runtime shape of the vectors B takes, int32 vector, batch first."""

    @property
    @abc.abstractmethod
    def ggn_factor_inner_static_shape(self) -> tf.TensorShape:
        """The same, as far as it is known statically."""


class NegativeLogProbLoss(LossFunction):
    """Negative log-likelihood of a predictive distribution, with its Fisher matrix.

    Args:
      seed: default seed of `evaluate_on_sample`: None, an int (stateful sampling, a
        new draw at every execution), or an int32/int64 tensor of shape [2] (stateless
        sampling, the draw is a function of it; change it every step).
    """

    def __init__(self, seed: Any = None):
        self._default_seed = seed
        super().__init__()

    @property
    def inputs(self) -> Any:
        """Same as `params`."""
        return self.params

    @property
    @abc.abstractmethod
    def params(self) -> Any:
        """The distribution's parameter(s), exactly as given at construction."""

    @abc.abstractmethod
    def sample(self, seed: Any = None) -> Any:
        """Targets drawn from the predictive distribution."""

    def evaluate_on_sample(self, seed: Any = None) -> tf.Tensor:
        """The loss on freshly drawn targets, which count as constants.

        Args:
          seed: overrides the constructor's unless None.
        """
        sample = self.sample(self._default_seed if seed is None else seed)
        return self._evaluate(tf.nest.map_structure(tf.stop_gradient, sample))

    @abc.abstractmethod
    def multiply_fisher(self, vector: Any) -> Any:
        """Fisher matrix of the loss times `vector` (structure of `inputs`)."""

    @abc.abstractmethod
    def multiply_fisher_factor(self, vector: tf.Tensor) -> Any:
        """A factor B, B Bᵀ = F, times an inner vector; structure of `inputs`."""

    @abc.abstractmethod
    def multiply_fisher_factor_transpose(self, vector: Any) -> tf.Tensor:
        """Bᵀ times `vector` (structure of `inputs`); an inner vector."""

    def multiply_fisher_factor_replicated_one_hot(self, index: Sequence[int]) -> Any:
        """B times the vector that is one-hot at `index` for every case.

        Args:
          index: one entry per axis of the inner shape but the batch axis: Python ints
            or scalar integer tensors (then `tf.vectorized_map` over them works).

        Raises:
          ArgumentError: wrong number of entries.
          ValueError: an int outside the static inner shape.
        """
        one_hot = helpers.replicated_one_hot(
            index,
            self.fisher_factor_inner_shape,
            self.fisher_factor_inner_static_shape,
            tf.as_dtype(self.dtype).base_dtype,
        )
        return self.multiply_fisher_factor(one_hot)

    @property
    def fisher_factor_inner_shape(self) -> tf.Tensor:
        """Runtime shape of inner vectors, int32 vector; by default that of `inputs`."""
        return tf.shape(self.inputs)

    @property
    def fisher_factor_inner_static_shape(self) -> tf.TensorShape:
        """Static shape of inner vectors; by default that of `inputs`."""
        return tf.TensorShape(self.inputs.shape)


class NaturalParamsNegativeLogProbLoss(NegativeLogProbLoss):
    """Loss whose `params` are natural parameters of an exponential family.

    Then the Gauss-Newton matrix, the Fisher matrix and the Hessian with respect to
    the parameters coincide (Martens 2014, section 9.2), so every Gauss-Newton member
    is the Fisher member of the same name.
    """

    @helpers.vector_or_vecs
    def multiply_ggn(self, vector: Any) -> Any:
        return self.multiply_fisher(vector)

    @helpers.vector_or_vecs
    def multiply_ggn_factor(self, vector: tf.Tensor) -> Any:
        return self.multiply_fisher_factor(vector)

    @helpers.vector_or_vecs
    def multiply_ggn_factor_transpose(self, vector: Any) -> tf.Tensor:
        return self.multiply_fisher_factor_transpose(vector)

    def multiply_ggn_factor_replicated_one_hot(self, index: Sequence[int]) -> Any:
        return self.multiply_fisher_factor_replicated_one_hot(index)

    @property
    def ggn_factor_inner_shape(self) -> tf.Tensor:
        return self.fisher_factor_inner_shape

    @property
    def ggn_factor_inner_static_shape(self) -> tf.TensorShape:
        return self.fisher_factor_inner_static_shape


class DistributionNegativeLogProbLoss(NegativeLogProbLoss):
    """Loss with a TensorFlow Probability distribution.

    The classes of this package compute by core TensorFlow and build `dist` on request
    only; a subclass of one's own that just supplies `dist` works too.
    """

    def __init__(self, seed: Any = None):
        super().__init__(seed=seed)

    @property
    @abc.abstractmethod
    def dist(self) -> Any:
        """The `tfp.distributions.Distribution` of the targets, built at each access."""

    def _evaluate(self, targets: Any) -> tf.Tensor:
        return tf.reduce_sum(-self.dist.log_prob(targets))

    def sample(self, seed: Any = None) -> Any:
        return self.dist.sample(seed=seed)


def import_distributions() -> Any:
    """`tfp.distributions`, imported when the first `dist` is asked for.

    Raises:
      ImportError: TensorFlow Probability is not installed.
    """
    try:
        import tensorflow_probability as tfp
    except ImportError as error:
        raise ImportError(
            "The `dist` property of losses needs tensorflow_probability, which could "
            "not be imported. Install it; everything else works without it."
        ) from error
    return tfp.distributions


def _without_gradient(target: Any) -> Any:
    """Arrays and numbers are constants already, and keep their conversion rules."""
    if isinstance(target, (np.ndarray, np.generic)) or not hasattr(target, "dtype"):
        return target
    return tf.stop_gradient(target)
