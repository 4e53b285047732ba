"""Threads that share the work of K-FAC: they help, and they end."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from kfac.examples import (
    classification,
    convnet,
    convnet_distributed,
    convnet_model,
    datasets,
)
from kfac.tests.examples import example_runs

TRAINERS = {
    "async": convnet_distributed.AsynchronousTrainer,
    "chief_worker": convnet_distributed.ChiefWorkerTrainer,
}


@pytest.fixture(scope="module")
def data():
    full = datasets.load()
    return dataclasses.replace(
        full, x_train=full.x_train[:200], y_train=full.y_train[:200]
    )


def make(kind, data, **settings):
    return TRAINERS[kind](
        lambda: convnet_model.ConvNet([2, 3]),
        data,
        classification.KfacSettings(norm_constraint=1e-2, **settings),
        batch_size=50,
        eval_size=100,
        num_workers=2,
        device="/cpu:0",
    )


def test_both_modes_learn_and_leave_no_thread(tmp_path, monkeypatch):
    folder = example_runs.write_few_images(tmp_path)
    trainers = []
    for kind, trainer in TRAINERS.items():
        close = trainer.close
        monkeypatch.setattr(
            trainer,
            "close",
            lambda self, close=close: (trainers.append(self), close(self)),
        )
        (history,) = example_runs.run(
            convnet,
            monkeypatch,
            **{**example_runs.few_images_flags(folder), "train_steps": 25},
            mode=kind,
            filters=["3", "4"],
            norm_constraint=1e-2,
        )
        losses = history.metrics["train_loss"]
        assert losses[-1] < 0.8 * losses[0]
    asynchronous, chief = trainers
    threads = asynchronous.optimizer._threads + chief._threads
    assert len(threads) == 4
    assert not any(thread.is_alive() for thread in threads)


def test_the_chief_takes_the_mean_of_one_gradient_from_every_worker(data):
    # A batch is the whole data, so every worker has the gradient of all data.
    data = dataclasses.replace(
        data, x_train=data.x_train[:50], y_train=data.y_train[:50]
    )
    trainer = make("chief_worker", data)
    with trainer.graph.as_default():
        logits, _ = trainer.model(tf.constant(data.x_train))
        loss = classification.mean_loss(
            trainer.model, logits, tf.constant(data.y_train), l2_reg=0.0
        )
        gradients = tf.gradients(loss, trainer.variables)
    expected = trainer.session.run(gradients)
    # Velocities start at zero, so after a step they are the gradient.
    trainer.start()
    trainer.step()
    with trainer.graph.as_default():
        velocities = [
            trainer.optimizer.get_slot(variable, "velocity")
            for variable in trainer.variables
        ]
    for velocity, gradient in zip(
        trainer.session.run(velocities), expected, strict=True
    ):
        # The order of summation differs with the order of the batch, float32.
        np.testing.assert_allclose(velocity, gradient, rtol=1e-3, atol=1e-6)
    trainer.close()


def test_every_step_is_made_once_and_inverses_come_round(data):
    trainer = make("chief_worker", data)
    drawn = []
    next_op = trainer._inv_queue.next_op
    trainer._inv_queue.next_op = lambda sess: drawn.append(next_op(sess)) or drawn[-1]
    trainer.start()
    count = len(trainer._inv_ops)
    for _ in range(count):
        trainer.step()
    counter = trainer.session.run(trainer.optimizer._counter)
    trainer.close()
    assert counter == count
    assert {id(op) for op in drawn} == {id(op) for op in trainer._inv_ops}


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_failure_is_raised_and_ends_the_threads(kind, data):
    labels = np.full_like(data.y_train, 99)
    trainer = make(kind, dataclasses.replace(data, y_train=labels))
    with pytest.raises(tf.errors.InvalidArgumentError, match="99"):
        trainer.start()
        trainer.step()
    try:
        trainer.close()
    except tf.errors.InvalidArgumentError:
        pass  # A worker's own.
    threads = getattr(trainer, "_threads", trainer.optimizer.__dict__.get("_threads"))
    assert not any(thread.is_alive() for thread in threads)
