"""Trains a small Keras model under strategies; run as a script by the tests.

    python -m kfac.tests.keras.distributed_program mirrored '{"name": {...}}'

With "mirrored" one process does many jobs on four logical CPUs; with "worker" it is one
of the workers of a cluster.  Prints "FOUND" and a JSON object name -> result.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
import time

import keras
import numpy as np
import tensorflow as tf

from kfac.python.keras.distributed import strategies
from kfac.python.keras.distributed.fit_on_workers import FitOnWorkers
from kfac.python.keras.distributed.loop import DistributedLoop
from kfac.python.keras.optimizers import Kfac
from kfac.python.keras.planning import plan as planning
from kfac.tests.ops.distributed_program import ExecutedWork

FEATURES, CLASSES = 4, 3
# Batches of 8, 8 and 5: on four replicas the last one leaves a replica without data.
CASES, BATCH = 21, 8
SHARED = {"placement_strategy": "replica_round_robin"}


@functools.cache
def mirrored(replicas: int) -> tf.distribute.Strategy:
    """Over the first CPUs, or no strategy; only four of them use collectives."""
    if not replicas:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)],
        None if replicas == 4 else tf.distribute.ReductionToOneDevice(),
    )


def data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(size=(CASES, FEATURES))
    return x, np.argmax(x @ random.normal(size=(FEATURES, CLASSES)), axis=1)


def dataset() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(data()).batch(BATCH)


def make_model() -> keras.Model:
    random = np.random.default_rng(1)
    model = keras.Sequential(
        [
            keras.Input([FEATURES]),
            keras.layers.Dense(3, activation="tanh", name="hidden"),
            keras.layers.Dense(CLASSES, name="logits"),
        ]
    )
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape))
    return model


def make_optimizer(model, **options) -> Kfac:
    return Kfac(
        model=model,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        seed=3,
        **{
            "damping": 0.3,
            "estimation_mode": "exact",
            "cov_update_every": 2,
            "invert_every": 3,
            **({} if options.get("adaptive") else {"learning_rate": 0.3}),
            **options,
        },
    )


def numbers(model, optimizer) -> dict:
    """Parameters, and everything that a checkpoint holds of the optimizer."""

    def flat(variables):
        values = [np.ravel(v.numpy()).astype(float) for v in variables]
        return np.concatenate(values).tolist()

    state = optimizer._store.named_variables()
    return {
        "parameters": flat(model.trainable_variables),
        "state": repr(flat(state.values())),
        "damping": float(optimizer.scalars()["damping"]),
    }


def fit(strategy, epochs=17, **options) -> dict:
    """51 steps, a third of them on the short batch."""
    with strategy.scope():
        model = make_model()
    if strategies.is_multi_worker(strategy):
        model = FitOnWorkers(model)
    with strategy.scope():
        optimizer = make_optimizer(model, **options)
        model.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=False,
        )
        last = LastLoss()
        model.fit(dataset(), epochs=epochs, verbose=0, callbacks=[last])
    return {**numbers(model, optimizer), "last_loss": last.loss}


class LastLoss(keras.callbacks.Callback):
    """The loss of the last batch alone, out of Keras' running mean over the epoch."""

    def on_train_batch_end(self, batch, logs=None):
        seen = min((batch + 1) * BATCH, CASES)
        cases = seen - batch * BATCH
        before = self.total if batch else 0.0
        self.total = seen * float(logs["loss"])
        self.loss = (self.total - before) / cases


def loop(strategy, steps=51, directory=None, **options) -> dict:
    """`DistributedLoop`, from where the directory's checkpoint is."""
    with strategy.scope():
        model = make_model()
        optimizer = make_optimizer(model, **options)
    training = DistributedLoop(strategy, model, optimizer, directory, patience=60)
    started = int(training.step.numpy())
    scalars = training.run(dataset().repeat(), steps, report=lambda *_: None)
    scores = training.evaluate(
        dataset(),
        {"loss": keras.losses.SparseCategoricalCrossentropy(True, reduction="none")},
    )
    return {
        **numbers(model, optimizer),
        "started": started,
        "loss": scalars["loss"],
        "evaluated": scores["loss"],
        "mean_loss": mean_loss(model),
    }


def mean_loss(model) -> float:
    """Over all cases, in NumPy."""
    x, y = data()
    w, b, v, c = (variable.numpy() for variable in model.trainable_variables)
    logits = np.tanh(x @ w + b) @ v + c
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(-np.mean(log_p[np.arange(len(y)), y]))


def own_loop(strategy, steps=51, own_loss=False, **options) -> dict:
    """A loop of one's own: a tape, `apply_gradients`.

    The loss is `model.compute_loss`, or a mean that is divided by hand.
    """
    with strategy.scope():
        model = make_model()
        optimizer = make_optimizer(model, **options)
        model.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        optimizer.build_for(model)

    @tf.function
    def step(batch):
        def replica(x, y):
            with tf.GradientTape() as tape:
                logits = model(x, training=True)
                if own_loss:
                    loss = tf.reduce_mean(
                        tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
                    )
                    loss /= strategy.num_replicas_in_sync
                else:
                    loss = model.compute_loss(x, y, logits)
            if own_loss:
                optimizer.show_batch(x, y)
            variables = model.trainable_variables
            gradients = tape.gradient(loss, variables)
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

        strategy.run(replica, args=batch)

    batches = iter(strategy.experimental_distribute_dataset(dataset().repeat()))
    for _ in range(steps):
        step(next(batches))
    return numbers(model, optimizer)


def resumed(strategies_and_steps, directory, **options) -> dict:
    """One training in parts, each on another number of replicas."""
    for replicas, steps in strategies_and_steps:
        found = loop(mirrored(replicas), steps, directory, **options)
    return found


def convnet() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(3, 3, 2, "same"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )


def language_model() -> keras.Model:
    """Embedding, attention, normalisation; the vocabulary's factor is diagonal."""
    words = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(11, 4)(words)
    x += keras.layers.MultiHeadAttention(2, 3)(x, x)
    x = keras.layers.LayerNormalization()(x)
    return keras.Model(words, keras.layers.Dense(11, name="vocabulary")(x))


def counted(strategy, model, steps=4, **options) -> dict:
    """What steps execute, and the model's layers as `replica_cost` knows them."""
    replicas = strategy.num_replicas_in_sync
    with strategy.scope():
        net = {"convnet": convnet, "language_model": language_model}[model]()
        optimizer = Kfac(
            learning_rate=0.1, damping=0.1, model=net, loss="mse", **options
        )
        optimizer.build_for(net)
    batch = [
        np.ones([2 * replicas, *t.shape[1:]]) for t in (net.inputs[0], net.outputs[0])
    ]
    batches = tf.data.Dataset.from_tensors(tuple(batch)).repeat()
    training = DistributedLoop(strategy, net, optimizer)
    with ExecutedWork(replicas).counted() as work:
        training.run(batches, steps, report=lambda *_: None)
    kept = [
        v.numpy().nbytes
        for v in optimizer._store.named_variables().values()
        if v.shape.rank
    ]
    planned = planning.plan(net, 2, optimizer=optimizer, print_fn=None)
    return {
        "cubes": work.cubes,
        "collectives": work.collectives,
        "kept_bytes": sum(kept),
        "layers": [dataclasses.asdict(layer) for layer in planned.on_replicas()],
    }


def run_mirrored(jobs: dict) -> dict:
    strategies.make_strategy("mirrored", 4)  # Divides the CPU.
    functions = {"fit": fit, "loop": loop, "own loop": own_loop, "count": counted}
    found = {}
    for name, job in jobs.items():
        do = job.pop("do")
        began = time.process_time()
        if do == "resumed":
            found[name] = resumed(**job)
        else:
            found[name] = functions[do](mirrored(job.pop("replicas")), **job)
        print(name, round(time.process_time() - began, 1), "s", file=sys.stderr)
    return found


def run_worker(job: dict) -> dict:
    """A loop during which a worker may come to grief; also `fit`, if it is asked for.

    Args:
      job: "directory" for checkpoints, "grief" (step -> "kill" or "hang", each to
        happen once to worker 1), "timeout", "also_fit".
    """
    strategy = strategies.make_strategy("multi_worker", timeout=job["timeout"])
    index = strategy.cluster_resolver.task_id

    def grief(step: int) -> None:
        what = job["grief"].get(str(step))
        mark = os.path.join(job["directory"], f"grief_{step}")
        if index != 1 or what is None or os.path.exists(mark):
            return
        open(mark, "w").close()
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    found = {"loop": interrupted(strategy, job["directory"], grief)}
    if job["also_fit"]:
        found["fit"] = fit(strategy)
    return found


def interrupted(strategy, directory, grief) -> dict:
    """51 steps, a checkpoint every 5; `grief(step)` is called after each step."""
    with strategy.scope():
        model = make_model()
        optimizer = make_optimizer(model, adaptive=True, **SHARED)
    training = DistributedLoop(strategy, model, optimizer, directory, patience=60)
    started = int(training.step.numpy())
    training.run(
        dataset().repeat(),
        51,
        checkpoint_every=5,
        evaluate=lambda: grief(int(training.step.numpy())) or {},
        evaluate_every=1,
        report=lambda *_: None,
    )
    return {**numbers(model, optimizer), "started": started}


def main() -> None:
    # Only the order of sums differs between numbers of replicas; in float32 fifty
    # steps would blow that up to 1e-4.
    keras.config.set_floatx("float64")
    kind, jobs = sys.argv[1], json.loads(sys.argv[2])
    found = run_mirrored(jobs) if kind == "mirrored" else run_worker(jobs)
    print("FOUND" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
