"""What the classifiers share: flags of K-FAC, loss, scores, a step, the whole program.

A model maps images `[batch, 28, 28]` to logits `[batch, 10]` and its layers' calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import flags

import kfac
from kfac.examples import datasets, layers, program, training

FLAGS = flags.FLAGS
flags.DEFINE_float("kfac_learning_rate", 0.1, "Of K-FAC with a fixed damping.")
flags.DEFINE_float("momentum", 0.9, "Of K-FAC with a fixed damping.")
flags.DEFINE_float(
    "norm_constraint",
    1e-3,
    "Bound on the squared length of a K-FAC step, in the metric of the curvature.",
)
flags.DEFINE_bool(
    "adaptive",
    False,
    "K-FAC with damping, learning rate and momentum set by themselves, as in the "
    "autoencoder; --damping is then where it starts.",
)

CLASSES = 10
IMAGES = tf.TensorSpec([None, 28, 28], tf.float32)
LABELS = tf.TensorSpec([None], tf.int32)

# A `tf.Module`.
Model = Callable[[tf.Tensor], tuple[tf.Tensor, list[layers.Call]]]


@dataclasses.dataclass(frozen=True)
class KfacSettings:
    """What configures K-FAC; see the flags of the same names.

    `shared_dense_approx` is how layers with several uses are approximated.
    """

    learning_rate: float = 0.1
    momentum: float = 0.9
    norm_constraint: float | None = 1e-3
    damping: float = 1e-2
    adaptive: bool = False
    cov_update_every: int = 1
    invert_every: int = 5
    l2_reg: float = 0.0
    cov_batch_fraction: float = 1.0
    qmodel_batch_fraction: float = 1.0
    auto_register_layers: bool = False
    shared_dense_approx: str = "kron_indep"
    seed: int = 0

    @classmethod
    def from_flags(cls, **more: Any) -> KfacSettings:
        """Settings of the command line, and those that have no common flag."""
        return cls(
            learning_rate=FLAGS.kfac_learning_rate,
            **{
                field.name: FLAGS[field.name].value
                for field in dataclasses.fields(cls)
                if field.name in FLAGS and field.name != "learning_rate"
            },
            **more,
        )

    def fixed(self) -> dict[str, Any]:
        """Optimizer arguments for fixed damping, learning rate and momentum."""
        return {
            "learning_rate": self.learning_rate,
            "momentum": self.momentum,
            "norm_constraint": self.norm_constraint,
            "damping": self.damping,
            "cov_batch_fraction": self.cov_batch_fraction,
        }

    def adapting(self) -> dict[str, Any]:
        """Optimizer arguments for damping, learning rate and momentum that adapt."""
        return {
            "learning_rate": None,
            "momentum": None,
            "momentum_type": "qmodel",
            "damping": self.damping,
            "adapt_damping": True,
            "damping_adaptation_interval": 5,
            "min_damping": 1e-5,
            "l2_reg": self.l2_reg,
            "cov_batch_fraction": self.cov_batch_fraction,
            "qmodel_batch_fraction": self.qmodel_batch_fraction,
        }


def mean_loss(
    model: Model, logits: tf.Tensor, labels: tf.Tensor, l2_reg: float
) -> tf.Tensor:
    """Cross-entropy averaged over the batch, plus the penalty on the parameters."""
    entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    loss = tf.reduce_mean(entropies)
    if l2_reg:
        squares = [tf.nn.l2_loss(v) for v in model.trainable_variables]
        loss += l2_reg * tf.add_n(squares)
    return loss


def register(
    model: Model,
    logits: tf.Tensor,
    calls: list[layers.Call],
    labels: tf.Tensor,
    settings: KfacSettings,
) -> kfac.LayerCollection:
    """A collection with the loss and the layers, listed by hand or searched for."""
    collection = kfac.LayerCollection()
    collection.set_default_fully_connected_multi_approximation(
        settings.shared_dense_approx
    )
    collection.register_softmax_cross_entropy_loss(
        logits, targets=labels, seed=settings.seed
    )
    if settings.auto_register_layers:
        collection.auto_register_layers(list(model.trainable_variables))
    else:
        for call in calls:
            call.register(collection)
    return collection


def kfac_step(
    model: Model, store: kfac.state.VariableStore, settings: KfacSettings
) -> training.Step:
    """One K-FAC update, state kept in `store`."""

    @tf.function(input_signature=[IMAGES, LABELS], autograph=False)
    def step(images, labels):
        def loss_fn(batch):
            logits, _ = model(batch[0])
            return mean_loss(model, logits, batch[1], settings.l2_reg)

        with store.as_default():
            logits, calls = model(images)
            loss = mean_loss(model, logits, labels, settings.l2_reg)
            arguments = settings.fixed()
            if settings.adaptive:
                arguments = {
                    **settings.adapting(),
                    "batch_size": tf.shape(images)[0],
                    "loss": loss,
                    "loss_fn": loss_fn,
                    "train_batch": (images, labels),
                }
            optimizer = kfac.PeriodicInvCovUpdateKfacOpt(
                layer_collection=register(model, logits, calls, labels, settings),
                var_list=list(model.trainable_variables),
                cov_update_every=settings.cov_update_every,
                invert_every=settings.invert_every,
                **arguments,
            )
            optimizer.minimize(loss)
            if not settings.adaptive:
                return {"loss": loss}
            return {
                "loss": loss,
                "damping": optimizer.damping,
                "step": optimizer.learning_rate,
                "momentum": optimizer.momentum,
            }

    return step


def make_evaluator(
    model: Model, data: datasets.ImageData, train_size: int
) -> training.Evaluate:
    """Loss on the first training images; loss, error and accuracy on test images."""

    @tf.function(input_signature=[IMAGES, LABELS], autograph=False)
    def scores(images, labels):
        logits, _ = model(images)
        return mean_loss(model, logits, labels, l2_reg=0.0), accuracy(logits, labels)

    parts = (
        (data.x_train[:train_size], data.y_train[:train_size]),
        (data.x_test, data.y_test),
    )
    return lambda: measurements(*[scores(*map(tf.constant, part)) for part in parts])


def accuracy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Fraction of cases whose largest logit is that of the label."""
    return tf.reduce_mean(tf.cast(tf.math.in_top_k(labels, logits, 1), tf.float32))


def measurements(train: tuple[Any, Any], test: tuple[Any, Any]) -> dict[str, float]:
    """Names for (loss, accuracy) on training and on test images."""
    return {
        "train_loss": float(train[0]),
        "test_loss": float(test[0]),
        "test_error": 100.0 * (1.0 - float(test[1])),
        "test_accuracy": 100.0 * float(test[1]),
    }


def make_run(
    name: str,
    model: Model,
    data: datasets.ImageData,
    settings: KfacSettings,
    learning_rates: Mapping[str, float],
) -> training.Run:
    """The optimizer `name` at work on `model`, on fed batches."""
    if name == "kfac":
        step = kfac_step(model, kfac.state.VariableStore(), settings)
    else:

        def loss_fn(images, labels):
            logits, _ = model(images)
            return mean_loss(model, logits, labels, settings.l2_reg)

        step = training.first_order_step(
            name,
            FLAGS.learning_rate or learning_rates[name],
            loss_fn,
            model.trainable_variables,
            [IMAGES, LABELS],
        )
    return training.Run(step, make_evaluator(model, data, FLAGS.eval_size))


def batches(
    data: datasets.ImageData, batch_size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches of training images and labels, epoch by epoch."""
    for rows in datasets.batches(len(data.x_train), batch_size, seed):
        yield data.x_train[rows], data.y_train[rows]


def report(title: str, histories: list[Any]) -> None:
    """The classifiers' table and plot."""
    program.report(
        title,
        histories,
        columns={
            "train_loss": "training loss",
            "test_loss": "test loss",
            "test_accuracy": "test accuracy %",
        },
        curves={"train_loss": "training loss", "test_error": "test error, %"},
    )


def run_program(
    title: str,
    make_model: Callable[[], Model],
    learning_rates: Mapping[str, float],
    **settings: Any,
) -> None:
    """Trains a model with every optimizer asked for and reports.

    Args:
      title: of table and plot.
      make_model: makes an equal model for each run.
      learning_rates: of "adam" and "sgd", where the command line gives none.
      **settings: of K-FAC, beyond the flags.
    """
    data = program.load_data()
    kfac_settings = KfacSettings.from_flags(**settings)
    histories = program.train_each(
        lambda name: make_run(name, make_model(), data, kfac_settings, learning_rates),
        lambda: batches(data, FLAGS.batch_size, FLAGS.seed),
    )
    report(title, histories)
