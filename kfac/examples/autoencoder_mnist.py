"""Trains the deep MNIST autoencoder with K-FAC, Adam or SGD.

    python -m kfac.examples.autoencoder_mnist --optimizer=kfac,adam --train_seconds=60

K-FAC runs as in the paper: damping by the Levenberg-Marquardt rule, learning rate and
momentum from the exact quadratic model, so there is no learning rate to tune.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from absl import flags

import kfac
from kfac.examples import autoencoder_model, program, training

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)
flags.DEFINE_enum(
    "batch_schedule",
    "fixed",
    ["fixed", "growing"],
    "growing: exponential, the whole data set from update 500 on (paper, section 13).",
)

DEFAULTS = {
    "hidden_widths": list(autoencoder_model.WIDTHS[1:-1]),
    "l2_reg": 1e-5,
    "damping": 150.0,
    "cov_batch_fraction": 0.25,
    "qmodel_batch_fraction": 0.25,
}
LEARNING_RATES = {"adam": 1e-3, "sgd": 3e-3}
IMAGES = tf.TensorSpec([None, 784], tf.float32)


def kfac_step(
    model: autoencoder_model.Autoencoder,
    store: kfac.state.VariableStore,
    *,
    l2_reg: float,
    damping: float = 150.0,
    cov_update_every: int = 1,
    invert_every: int = 5,
    cov_batch_fraction: float = 0.25,
    qmodel_batch_fraction: float = 0.25,
    auto_register_layers: bool = False,
    seed: int = 0,
) -> training.Step:
    """One K-FAC update: everything adaptive, state kept in `store`."""

    @tf.function(input_signature=[IMAGES], autograph=False)
    def step(images):
        def regularized_loss(batch):
            logits, _ = model(batch)
            penalty = l2_reg * model.l2_penalty()
            return autoencoder_model.cross_entropy(logits, batch) + penalty

        with store.as_default():
            logits, calls = model(images)
            loss = autoencoder_model.cross_entropy(logits, images)
            loss += l2_reg * model.l2_penalty()
            collection = kfac.LayerCollection()
            collection.register_multi_bernoulli_predictive_distribution(
                logits, seed=seed, targets=images
            )
            if auto_register_layers:
                collection.auto_register_layers(list(model.trainable_variables))
            else:
                for call in calls:
                    call.register(collection)
            optimizer = kfac.PeriodicInvCovUpdateKfacOpt(
                learning_rate=None,
                momentum=None,
                momentum_type="qmodel",
                damping=damping,
                adapt_damping=True,
                damping_adaptation_interval=5,
                min_damping=1e-5,
                l2_reg=l2_reg,
                cov_update_every=cov_update_every,
                invert_every=invert_every,
                cov_ema_decay=0.95,
                layer_collection=collection,
                var_list=list(model.trainable_variables),
                batch_size=tf.shape(images)[0],
                loss=loss,
                loss_fn=regularized_loss,
                train_batch=images,
                cov_batch_fraction=cov_batch_fraction,
                qmodel_batch_fraction=qmodel_batch_fraction,
            )
            optimizer.minimize(loss)
            return {
                "loss": loss,
                "damping": optimizer.damping,
                "step": optimizer.learning_rate,
                "momentum": optimizer.momentum,
            }

    return step


def keras_step(
    model: autoencoder_model.Autoencoder, name: str, learning_rate: float, l2_reg: float
) -> training.Step:
    """One update of a first-order Keras optimizer."""

    def regularized_loss(images):
        logits, _ = model(images)
        penalty = l2_reg * model.l2_penalty()
        return autoencoder_model.cross_entropy(logits, images) + penalty

    return training.first_order_step(
        name, learning_rate, regularized_loss, model.trainable_variables, [IMAGES]
    )


def batch_size_at(update: int, first: int, total: int, growing: bool) -> int:
    """Batch size before update `update` (from 0); see section 13 of the K-FAC paper."""
    if not growing or first >= total:
        return min(first, total)
    growth = math.log(total / first) / 499
    return min(total, int(first * math.exp(growth * update)))


def batches(
    images: np.ndarray, first_size: int, growing: bool = False, seed: int = 0
) -> Iterator[tuple[np.ndarray]]:
    """Random batches, each without repetition, of the scheduled sizes; endless."""
    rng = np.random.default_rng(seed)
    update = 0
    while True:
        size = batch_size_at(update, first_size, len(images), growing)
        yield (images[rng.choice(len(images), size=size, replace=False)],)
        update += 1


def make_evaluator(
    model: autoencoder_model.Autoencoder, train_images: np.ndarray, test: np.ndarray
) -> Callable[[], dict[str, float]]:
    """Cross-entropy and squared error on training and test images."""

    @tf.function(input_signature=[IMAGES], autograph=False)
    def scores(images):
        logits, _ = model(images)
        return (
            autoencoder_model.cross_entropy(logits, images),
            autoencoder_model.squared_error(logits, images),
        )

    train_images, test = tf.constant(train_images), tf.constant(test)

    def evaluate() -> dict[str, float]:
        entropy, error = scores(train_images)
        test_entropy, test_error = scores(test)
        return {
            "train_entropy": float(entropy),
            "train_error": float(error),
            "test_entropy": float(test_entropy),
            "test_error": float(test_error),
        }

    return evaluate


def _make_step(name: str, model: autoencoder_model.Autoencoder) -> training.Step:
    if name == "kfac":
        return kfac_step(
            model,
            kfac.state.VariableStore(),
            l2_reg=FLAGS.l2_reg,
            damping=FLAGS.damping,
            cov_update_every=FLAGS.cov_update_every,
            invert_every=FLAGS.invert_every,
            cov_batch_fraction=FLAGS.cov_batch_fraction,
            qmodel_batch_fraction=FLAGS.qmodel_batch_fraction,
            auto_register_layers=FLAGS.auto_register_layers,
            seed=FLAGS.seed,
        )
    learning_rate = FLAGS.learning_rate or LEARNING_RATES[name]
    return keras_step(model, name, learning_rate, FLAGS.l2_reg)


def main(argv: list[str]) -> None:
    """Trains with every optimizer asked for, prints a table, writes the plot."""
    del argv
    data = program.load_data().flat()
    widths = [784, *program.hidden_widths(), 784]

    def make_run(name: str) -> training.Run:
        model = autoencoder_model.Autoencoder(widths, seed=FLAGS.seed)
        evaluate = make_evaluator(model, data.x_train[: FLAGS.eval_size], data.x_test)
        return training.Run(_make_step(name, model), evaluate)

    def make_batches() -> Iterator[tuple[np.ndarray]]:
        growing = FLAGS.batch_schedule == "growing"
        return batches(data.x_train, FLAGS.batch_size, growing, FLAGS.seed)

    program.report(
        "MNIST autoencoder",
        program.train_each(make_run, make_batches),
        columns={
            "train_entropy": "cross-entropy",
            "train_error": "squared error",
            "test_entropy": "test cross-entropy",
            "test_error": "test squared error",
        },
        curves={
            "train_entropy": "training cross-entropy",
            "train_error": "training squared error",
        },
    )


if __name__ == "__main__":
    program.start(main, DEFAULTS)
