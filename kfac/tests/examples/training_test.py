"""The training loop and the first-order updates it is compared with."""

import itertools
import time

import numpy as np
import pytest
import tensorflow as tf

from kfac.examples import training


class Counter:
    """A run that counts what is done to it."""

    def __init__(self, seconds=0.0, now=None):
        self.batches, self.evaluations = [], 0
        self._seconds, self._now = seconds, now

    def step(self, *batch):
        self.batches.append([part.numpy().tolist() for part in batch])
        if self._now:
            self._now[0] += self._seconds
        return {"loss": tf.constant(1.0)}

    def evaluate(self):
        self.evaluations += 1
        return {"loss": float(len(self.batches))}

    def run(self):
        return training.Run(self.step, self.evaluate)


def numbers():
    return ((np.array([i]), np.array([10 * i])) for i in itertools.count())


def test_training_stops_at_the_number_of_steps():
    counter = Counter()
    history = training.train(
        "x", counter.run(), numbers(), train_steps=7, train_seconds=None, eval_every=3
    )
    assert counter.batches == [[[i], [10 * i]] for i in range(7)]
    assert history.updates == [0, 3, 6, 7]
    assert history.metrics["loss"] == [0, 3, 6, 7]


def test_training_stops_when_the_time_is_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    counter = Counter(seconds=1.0, now=now)
    history = training.train(
        "x", counter.run(), numbers(), train_steps=None, train_seconds=3.5
    )
    assert history.updates == [0, 4]
    assert history.seconds == [0.0, 4.0]


def test_an_evaluation_that_is_due_at_the_end_is_made_once():
    counter = Counter()
    history = training.train(
        "x", counter.run(), numbers(), train_steps=4, train_seconds=None, eval_every=2
    )
    assert history.updates == [0, 2, 4]
    assert counter.evaluations == 3


def first_step(name, learning_rate):
    """Change of two parameters under the gradient (1, -2)."""
    variable = tf.Variable([3.0, 4.0])
    step = training.first_order_step(
        name,
        learning_rate,
        lambda slope: tf.reduce_sum(slope * variable),
        [variable],
        [tf.TensorSpec([2], tf.float32)],
    )
    loss = step(tf.constant([1.0, -2.0]))["loss"]
    return variable.numpy() - [3.0, 4.0], float(loss)


def test_sgd_steps_along_the_gradient_with_nesterov_momentum():
    change, loss = first_step("sgd", 0.1)
    # v = -lr g, then the step is momentum * v - lr g.
    np.testing.assert_allclose(change, [-0.19, 0.38], rtol=1e-5)
    assert loss == -5.0


def test_the_first_step_of_adam_has_the_size_of_the_learning_rate():
    change, _ = first_step("adam", 0.1)
    np.testing.assert_allclose(change, [-0.1, 0.1], rtol=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_first_order_steps_descend(name):
    variable = tf.Variable([1.0, -1.0])
    step = training.first_order_step(
        name, 0.05, lambda: tf.reduce_sum(variable**2), [variable], []
    )
    losses = [float(step()["loss"]) for _ in range(10)]
    assert losses[-1] < losses[0]
