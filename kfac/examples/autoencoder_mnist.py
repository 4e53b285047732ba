"""Trains the deep MNIST autoencoder with K-FAC, Adam or SGD.

    python -m kfac.examples.autoencoder_mnist --optimizer=kfac,adam --train_seconds=60

K-FAC runs as in the paper: damping by the Levenberg-Marquardt rule, learning rate and
momentum from the exact quadratic model, so there is no learning rate to tune.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf
from absl import app, flags

import kfac
from kfac.examples import autoencoder_model, datasets, reporting

OPTIMIZERS = ("kfac", "adam", "sgd")

FLAGS = flags.FLAGS
flags.DEFINE_list("optimizer", ["kfac"], f"One or more of {', '.join(OPTIMIZERS)}.")
flags.DEFINE_enum("dataset", "mnist", datasets.DATASETS, "Data set.")
flags.DEFINE_string("data_dir", None, "Folder with the full data (idx or npz files).")
flags.DEFINE_bool("download", False, "Fetch the full data set with keras.datasets.")
flags.DEFINE_integer("seed", 0, "Seed of initialisation, batches and samples.")
flags.DEFINE_integer("train_steps", None, "Updates an optimizer.")
flags.DEFINE_float("train_seconds", None, "Training seconds an optimizer.")
flags.DEFINE_integer("batch_size", 1024, "Batch size, or the first one of a schedule.")
flags.DEFINE_enum(
    "batch_schedule",
    "fixed",
    ["fixed", "growing"],
    "growing: exponential, the whole data set from update 500 on (paper, section 13).",
)
flags.DEFINE_float("l2_reg", 1e-5, "Coefficient of half the squared parameter norm.")
flags.DEFINE_float("learning_rate", None, "Of Adam (default 1e-3) or SGD (3e-3).")
flags.DEFINE_float("damping", 150.0, "Initial damping of K-FAC; adapted from there.")
flags.DEFINE_float("cov_batch_fraction", 0.25, "Part of the batch for statistics.")
flags.DEFINE_float("qmodel_batch_fraction", 0.25, "Part for the quadratic model.")
flags.DEFINE_integer("invert_every", 5, "Updates between inversions.")
flags.DEFINE_bool("auto_register_layers", False, "Let the scanner find the layers.")
flags.DEFINE_string("device", None, "For instance /cpu:0 or /gpu:0.")
flags.DEFINE_integer("eval_every", 10, "Updates between evaluations.")
flags.DEFINE_integer("eval_size", 10000, "Training images in an evaluation.")
flags.DEFINE_string("plot", None, "Where to write a PNG of the loss curves.")

# A step maps a batch of images to named scalars for the progress line.
Step = Callable[[tf.Tensor], Mapping[str, tf.Tensor]]
IMAGES = tf.TensorSpec([None, 784], tf.float32)


def kfac_step(
    model: autoencoder_model.Autoencoder,
    store: kfac.state.VariableStore,
    *,
    l2_reg: float,
    damping: float = 150.0,
    invert_every: int = 5,
    cov_batch_fraction: float = 0.25,
    qmodel_batch_fraction: float = 0.25,
    auto_register_layers: bool = False,
    seed: int = 0,
) -> Step:
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
                    collection.register_fully_connected(
                        call.params, call.inputs, call.outputs
                    )
            optimizer = kfac.PeriodicInvCovUpdateKfacOpt(
                learning_rate=None,
                momentum=None,
                momentum_type="qmodel",
                damping=damping,
                adapt_damping=True,
                damping_adaptation_interval=5,
                min_damping=1e-5,
                l2_reg=l2_reg,
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
) -> Step:
    """One update of a first-order Keras optimizer."""
    import keras  # Imported late: the K-FAC path does without it.

    if name == "adam":
        optimizer = keras.optimizers.Adam(learning_rate)
    else:
        optimizer = keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True)
    variables = list(model.trainable_variables)
    optimizer.build(variables)

    @tf.function(input_signature=[IMAGES], autograph=False)
    def step(images):
        with tf.GradientTape() as tape:
            logits, _ = model(images)
            loss = autoencoder_model.cross_entropy(logits, images)
            loss += l2_reg * model.l2_penalty()
        optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}

    return step


def batch_size_at(update: int, first: int, total: int, growing: bool) -> int:
    """Batch size before update `update` (from 0); see section 13 of the K-FAC paper."""
    if not growing or first >= total:
        return min(first, total)
    growth = math.log(total / first) / 499
    return min(total, int(first * math.exp(growth * update)))


def train(
    name: str,
    step: Step,
    evaluate: Callable[[], Mapping[str, float]],
    images: np.ndarray,
    *,
    train_steps: int | None,
    train_seconds: float | None,
    batch_size: int,
    growing: bool = False,
    eval_every: int = 10,
    seed: int = 0,
) -> reporting.History:
    """Runs `step` until the first of the two limits is reached."""
    history = reporting.History(name)
    clock = reporting.TrainingClock()
    rng = np.random.default_rng(seed)
    update = 0
    history.record(0, 0.0, evaluate())
    with reporting.Progress(name, train_steps, train_seconds) as progress:
        while not (
            (train_steps is not None and update >= train_steps)
            or (train_seconds is not None and clock.seconds >= train_seconds)
        ):
            size = batch_size_at(update, batch_size, len(images), growing)
            with clock:
                rows = rng.choice(len(images), size=size, replace=False)
                scalars = step(tf.constant(images[rows]))
                scalars = {key: float(value) for key, value in scalars.items()}
            update += 1
            progress.update(update, clock.seconds, scalars)
            if update % eval_every == 0:
                history.record(update, clock.seconds, evaluate())
    if history.updates[-1] != update:
        history.record(update, clock.seconds, evaluate())
    return history


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


def _make_step(name: str, model: autoencoder_model.Autoencoder) -> Step:
    if name == "kfac":
        return kfac_step(
            model,
            kfac.state.VariableStore(),
            l2_reg=FLAGS.l2_reg,
            damping=FLAGS.damping,
            invert_every=FLAGS.invert_every,
            cov_batch_fraction=FLAGS.cov_batch_fraction,
            qmodel_batch_fraction=FLAGS.qmodel_batch_fraction,
            auto_register_layers=FLAGS.auto_register_layers,
            seed=FLAGS.seed,
        )
    default = {"adam": 1e-3, "sgd": 3e-3}[name]
    return keras_step(model, name, FLAGS.learning_rate or default, FLAGS.l2_reg)


def main(argv: list[str]) -> None:
    """Trains with every optimizer asked for, prints a table, writes the plot."""
    del argv
    unknown = sorted(set(FLAGS.optimizer) - set(OPTIMIZERS))
    if unknown:
        raise app.UsageError(f"--optimizer: unknown {unknown}; expected {OPTIMIZERS}.")
    steps, seconds = FLAGS.train_steps, FLAGS.train_seconds
    if steps is None and seconds is None:
        steps = 300
    data = datasets.load(FLAGS.dataset, FLAGS.data_dir, FLAGS.download).flat()
    print(
        f"Data: {data.description}; batch {FLAGS.batch_size} ({FLAGS.batch_schedule})"
    )
    histories = []
    for name in FLAGS.optimizer:
        tf.random.set_seed(FLAGS.seed)
        with tf.device(FLAGS.device):
            model = autoencoder_model.Autoencoder(seed=FLAGS.seed)
            evaluate = make_evaluator(
                model, data.x_train[: FLAGS.eval_size], data.x_test
            )
            history = train(
                name,
                _make_step(name, model),
                evaluate,
                data.x_train,
                train_steps=steps,
                train_seconds=seconds,
                batch_size=FLAGS.batch_size,
                growing=FLAGS.batch_schedule == "growing",
                eval_every=FLAGS.eval_every,
                seed=FLAGS.seed,
            )
        histories.append(history)
    columns = [
        "optimizer", "updates", "seconds", "cross-entropy", "squared error",
        "test cross-entropy", "test squared error",
    ]  # fmt: skip
    keys = ("train_entropy", "train_error", "test_entropy", "test_error")
    rows = [
        [h.name, str(h.updates[-1]), f"{h.seconds[-1]:.1f}"]
        + [f"{h.metrics[key][-1]:.2f}" for key in keys]
        for h in histories
    ]
    reporting.print_table("MNIST autoencoder, after training", columns, rows)
    if FLAGS.plot:
        reporting.plot(
            histories,
            FLAGS.plot,
            "MNIST autoencoder",
            {
                "train_entropy": "training cross-entropy",
                "train_error": "training squared error",
            },
        )


if __name__ == "__main__":
    app.run(main)
