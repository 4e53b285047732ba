"""What an optimizer remembers of traces, out of sight of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kfac.python.keras import batches, models
from kfac.python.keras.prototype import Prototype
from kfac.python.keras.traced import TracedKfac


class Working:
    """What belongs to traces, and must not be tracked for checkpoints.

    Attributes:
      model: the model as a pure function, or None.
      batches: the batch of the step that is being built, by replica.
      prototypes: ids of the trained variables -> their `Prototype`.
      traced: the graph optimizer of the latest trace, or None.
      approximations: layers and what is asked for them, or None before they are known.
      eager_updates: ids of variables and loss -> the function that updates them
        eagerly, and the loss.
      step_function: of `Kfac.step`, and the loss it was made for; or None.
      loss_is_checked: whether the declared loss was compared with the real one.
      measures: whether steps that are built now measure themselves.
      keras_variables: name of state -> the Keras variable around it.
      loaded_weights: values of `weights` or `variables`, until there are these.
    """

    def __init__(self):
        self.model: models.PureModel | None = None
        self.batches: dict[int, batches.Batch | None] = {}
        self.prototypes: dict[tuple, Prototype] = {}
        self.traced: TracedKfac | None = None
        self.approximations: list | None = None
        self.eager_updates: dict[tuple, tuple[Callable, Any]] = {}
        self.step_function: tuple[Callable, Any] | None = None
        self.loss_is_checked = False
        self.measures = False
        self.keras_variables: dict[str, Any] = {}
        self.loaded_weights: list[Any] | None = None

    @property
    def batch(self) -> batches.Batch | None:
        """The batch of the step that is being built; replicas build theirs in turns."""
        return self.batches.get(batches.replica())

    @batch.setter
    def batch(self, value: batches.Batch | None) -> None:
        self.batches[batches.replica()] = value
