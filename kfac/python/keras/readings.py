"""Reads what a `Kfac` optimizer knows from its state variables, on the host.

Nothing here adds an op to the training step.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from kfac.python.keras.kfac_optimizer import Kfac

_MOMENT = "/cov/var"
_FALLBACKS = "/fallbacks"
_SCOPE = "FisherEstimator/"
# The state of factors that EKFAC's eigenvalues belong to.
_INPUT_BASIS = "/input_basis"
# Names of factors that are diagonal, whatever the shape of their moments.
_DIAGONAL = re.compile(r"/diagonal(_\d+)?$")


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """How the eigenvalues of one factor are spread.

    Attributes:
      side: number of eigenvalues.
      condition: largest over smallest eigenvalue, where eigenvalues below the
        precision of the stored matrix count as that precision.
      effective_rank: exponential of the entropy of the normalised eigenvalues, from 1
        to `side` (Roy & Vetterli, "The effective rank", EUSIPCO 2007).
    """

    side: int
    condition: float
    effective_rank: float

    @property
    def rank_share(self) -> float:
        """Effective rank over side, in (0, 1]."""
        return self.effective_rank / self.side


def spectrum(moment: np.ndarray) -> Spectrum:
    """The spectrum of a second moment: a matrix, or the diagonal of one.

    Args:
      moment: `[side, side]` symmetric, or of any other shape for a diagonal; any
        positive multiple gives the same result.

    Returns:
      NaN for the figures of a matrix that is zero or not finite.
    """
    is_matrix = moment.ndim == 2 and moment.shape[0] == moment.shape[1]
    side = moment.shape[0] if is_matrix else moment.size
    if not np.all(np.isfinite(moment)) or not np.any(moment):
        return Spectrum(side, np.nan, np.nan)
    precision = np.finfo(moment.dtype).eps
    values = moment.astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(values) if is_matrix else np.sort(values.ravel())
    largest = eigenvalues[-1]
    eigenvalues = np.maximum(eigenvalues, precision * largest)
    shares = eigenvalues / eigenvalues.sum()
    entropy = -np.sum(shares * np.log(shares))
    return Spectrum(side, float(largest / eigenvalues[0]), float(np.exp(entropy)))


class Readings:
    """Current values of an optimizer's state.

    Args:
      optimizer: a `Kfac`, or the `LossScaleOptimizer` around one.

    Raises:
      ValueError: it is another optimizer.
    """

    def __init__(self, optimizer: Any):
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not isinstance(optimizer, Kfac):
            raise ValueError(
                "Only kfac.keras.optimizers.Kfac has a curvature to look at, got "
                f"{type(optimizer).__name__}."
            )
        self._optimizer = optimizer

    @property
    def iterations(self) -> int:
        """Steps taken so far."""
        return int(to_number(self._optimizer.iterations))

    @property
    def steps(self) -> int:
        """Steps of K-FAC, by which its schedule goes.

        Fewer than `iterations` where gradients are accumulated.
        """
        return int(to_number(self._state().get("counter", 0)))

    def scalars(self) -> dict[str, float]:
        """Damping, learning rate and number of fallbacks; what else is adapted.

        That is `rho` with an adapted damping, and `momentum` with a quadratic model.
        What the optimizer has not computed yet is NaN.
        """
        names = ["damping", "learning_rate", "fallbacks"]
        mutable = self._optimizer.mutable_hyperparameters
        if "damping" not in mutable:
            names.append("rho")
        if "learning_rate" not in mutable:
            names.append("momentum")
        current = self._optimizer.scalars()
        return {name: current[name] for name in names}

    def moments(self) -> dict[str, np.ndarray]:
        """Second moments by factor, up to a positive multiple each: see `spectrum`."""
        state = self._factor_state()
        found = {}
        for name, variable in state.items():
            if not name.endswith(_MOMENT):
                continue
            factor, moment = name.removesuffix(_MOMENT), to_array(variable)
            basis = state.get(factor + _INPUT_BASIS)
            if basis is not None:
                moment = _eigenvalues(moment, basis.shape[0])
            elif _DIAGONAL.search(factor):
                moment = moment.ravel()  # May have the shape of square weights.
            found[factor] = moment
        return found

    def fallbacks(self) -> dict[str, int]:
        """By factor, how many of its inverses had to be replaced."""
        return {
            name.removesuffix(_FALLBACKS): int(to_number(variable))
            for name, variable in self._factor_state().items()
            if name.endswith(_FALLBACKS)
        }

    def _state(self) -> Mapping[str, Any]:
        """State of the optimizer proper, by name."""
        return {
            name.partition("/")[2]: self._optimizer.state_variable(name)
            for name in self._optimizer.state_variable_names()
        }

    def _factor_state(self) -> Mapping[str, Any]:
        """State of the factors, by `<factor>/<name>`."""
        return {
            name.removeprefix(_SCOPE): variable
            for name, variable in self._state().items()
            if name.startswith(_SCOPE)
        }


def _eigenvalues(moment: np.ndarray, input_side: int) -> np.ndarray:
    """An EKFAC block's, from `[d_in, d_out]` or the sides one after the other."""
    if moment.ndim == 1:
        moment = np.outer(moment[:input_side], moment[input_side:])
    return moment.ravel()


def to_array(value: Any) -> np.ndarray:
    """A variable, tensor or number as an array; of a replicated one the first copy."""
    values = getattr(value, "values", None)
    return keras.ops.convert_to_numpy(values[0] if values else value)


def to_number(value: Any) -> float:
    """A scalar variable, tensor or number as a Python float."""
    return float(to_array(value))
