"""Training loop and first-order updates of the examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.examples import reporting

# A step trains on the arrays of one batch and returns scalars for the progress line.
Step = Callable[..., Mapping[str, Any]]
Evaluate = Callable[[], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """An optimizer at work on a model.

    Attributes:
      step: one update.
      evaluate: named measurements.
      close: called after the run, also after a failed one.
    """

    step: Step
    evaluate: Evaluate
    close: Callable[[], None] = lambda: None


def train(
    name: str,
    run: Run,
    batches: Iterator[Sequence[np.ndarray]],
    *,
    train_steps: int | None,
    train_seconds: float | None,
    eval_every: int = 10,
) -> reporting.History:
    """Updates until the first of the two limits is reached.

    Drawing a batch counts as training time, evaluating does not.
    """
    history = reporting.History(name)
    clock = reporting.TrainingClock()
    update = 0
    history.record(0, 0.0, run.evaluate())
    with reporting.Progress(name, train_steps, train_seconds) as progress:
        while not (
            (train_steps is not None and update >= train_steps)
            or (train_seconds is not None and clock.seconds >= train_seconds)
        ):
            with clock:
                scalars = run.step(*map(tf.constant, next(batches)))
                scalars = {key: float(value) for key, value in scalars.items()}
            update += 1
            progress.update(update, clock.seconds, scalars)
            if update % eval_every == 0:
                history.record(update, clock.seconds, run.evaluate())
    if history.updates[-1] != update:
        history.record(update, clock.seconds, run.evaluate())
    return history


def first_order_step(
    name: str,
    learning_rate: float,
    loss_fn: Callable[..., tf.Tensor],
    variables: Sequence[tf.Variable],
    input_signature: Sequence[tf.TensorSpec],
) -> Step:
    """One update by Keras' Adam, or by SGD with Nesterov momentum of 0.9."""
    import keras  # Imported late: the K-FAC path does without it.

    if name == "adam":
        optimizer = keras.optimizers.Adam(learning_rate)
    else:
        optimizer = keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True)
    variables = list(variables)
    optimizer.build(variables)

    @tf.function(input_signature=input_signature, autograph=False)
    def step(*batch):
        with tf.GradientTape() as tape:
            loss = loss_fn(*batch)
        optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}

    return step
