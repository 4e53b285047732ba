"""What an optimizer remembers of traces, out of sight of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kfac.python.keras import batches, models
from kfac.python.keras.prototype import Prototype
from kfac.python.keras.traced import TracedKfac

# State of `Kfac` itself, beside that of the graph optimizer, begins like this.
OWN_STATE = "keras/"


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
      loss_is_own: whether the training loop computes its loss by itself.
      measures: whether steps that are built now measure themselves.
      owners: names of state for parameters -> `variable.ref()` of whose it is.
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
        self.loss_is_own = False
        self.measures = False
        self.owners: dict[str, Any] = {}
        self.keras_variables: dict[str, Any] = {}
        self.loaded_weights: list[Any] | None = None

    def stale_state(self, names: Mapping[Any, str]) -> Callable[[str], bool] | None:
        """Which state belongs to parameters that are trained no more.

        Layers may have been replaced between two fits, by some whose state has the same
        names; or the whole model.

        Args:
          names: `variable.ref()` -> the state's name for the parameter, of the model.

        Returns:
          Function of the name of state; None if all of it is of use.
        """
        known = self.owners
        new = [n for ref, n in names.items() if known.get(n, ref) != ref]
        is_other_model = known and not set(known.values()) & set(names)
        self.owners = known | {name: ref for ref, name in names.items()}
        if is_other_model:
            return lambda name: not name.startswith(OWN_STATE)
        parts = [f"/{name}/" for name in new]
        return (lambda name: any(part in name for part in parts)) if new else None

    def forget_traces(self) -> None:
        """Lets everything be built anew, for variables of the state are."""
        self.prototypes.clear()
        self.eager_updates.clear()
        self.keras_variables.clear()
        self.traced = self.step_function = None

    @property
    def batch(self) -> batches.Batch | None:
        """The batch of the step that is being built; replicas build theirs in turns."""
        return self.batches.get(batches.replica())

    @batch.setter
    def batch(self, value: batches.Batch | None) -> None:
        self.batches[batches.replica()] = value
