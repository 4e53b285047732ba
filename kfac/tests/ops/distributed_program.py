"""Trains a small network under strategies; run as a script by the tests.

    python -m kfac.tests.ops.distributed_program 4 '{"name": {"replicas": 2, ...}}'

Devices are configured before TensorFlow starts, hence a process of its own; one
process does many jobs.  Prints "FOUND" and a JSON object name -> result.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys

import numpy as np
import tensorflow as tf

import kfac
from kfac.python.ops import inverses
from kfac.python.ops.utils import collectives

LAYERS = (6, 5, 3)
CASES = 16


def make_devices(count: int) -> None:
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * count
    )


@functools.cache
def mirrored(replicas: int, collective: bool = False) -> tf.distribute.Strategy:
    """Over the first CPUs; no strategy at all for zero replicas.

    TensorFlow gives the collectives of all strategies of a process the same keys, so
    one of them at most can use collectives.
    """
    if not replicas:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)],
        None if collective else tf.distribute.ReductionToOneDevice(),
    )


def problem(widths=LAYERS) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(size=(CASES, widths[0]))
    y = np.argmax(x @ random.normal(size=(widths[0], widths[-1])), axis=1)
    return x, y


class Trainer:
    """A multilayer perceptron in float64 and a K-FAC step on it."""

    def __init__(self, strategy, sizes=None, static=True, widths=LAYERS, **options):
        self.strategy = strategy
        self.features = widths[0]
        self.options = {
            "learning_rate": 0.3,
            "damping": 0.05,
            "estimation_mode": "exact",
            "momentum": 0.5,
            "invert_every": 3,
            "cov_update_every": 2,
            "dtype": "float64",
            **options,
        }
        self.store = kfac.state.VariableStore()
        random = np.random.default_rng(1)
        with strategy.scope():
            self.variables = []
            for i, (rows, columns) in enumerate(zip(widths, widths[1:], strict=False)):
                for name, shape in (("w", (rows, columns)), ("b", (columns,))):
                    value = random.normal(size=shape) * 0.5
                    self.variables.append(tf.Variable(value, name=f"{name}{i}"))
        self.batches = self.distribute(problem(widths), sizes)
        self.static = static
        self.trace_count = 0
        self.step = tf.function(self._step, autograph=False)

    def distribute(self, batch, sizes=None):
        """Splits a batch over replicas, evenly or into parts of these sizes."""
        count = self.strategy.num_replicas_in_sync
        sizes = sizes or [len(batch[0]) // count] * count
        ends = np.cumsum(sizes)

        def part(context):
            i = context.replica_id_in_sync_group
            rows = slice(ends[i] - sizes[i], ends[i])
            return tuple(tf.constant(array[rows]) for array in batch)

        return self.strategy.experimental_distribute_values_from_function(part)

    def forward(self, x):
        layers = []
        for i in range(0, len(self.variables), 2):
            w, b = self.variables[i : i + 2]
            out = tf.matmul(x, w) + b
            layers.append(((w, b), x, out))
            x = tf.tanh(out)
        return layers

    def loss(self, batch):
        x, y = batch
        logits = self.forward(x)[-1][-1]
        return tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)
        )

    def _step(self, batch):
        self.trace_count += 1
        return self.strategy.run(self.replica_step, args=(batch,))

    def replica_step(self, batch):
        x, y = batch
        if not self.static:
            x = tf.raw_ops.PlaceholderWithDefault(input=x, shape=[None, self.features])
            y = tf.raw_ops.PlaceholderWithDefault(input=y, shape=[None])
            batch = (x, y)
        with self.store.as_default():
            layers = self.forward(x)
            logits = layers[-1][-1]
            collection = kfac.LayerCollection()
            for params, inputs, outputs in layers:
                collection.register_fully_connected(params, inputs, outputs)
            collection.register_softmax_cross_entropy_loss(logits, targets=y)
            options = dict(self.options)
            if options.get("adapt_damping"):
                options |= {"loss_fn": self.loss, "train_batch": batch}
            cases = x.shape[0] if self.static else tf.shape(x)[0]
            optimizer = kfac.PeriodicInvCovUpdateKfacOpt(
                layer_collection=collection,
                var_list=self.variables,
                batch_size=cases,
                **options,
            )
            optimizer.minimize(self.loss(batch))
            return optimizer.damping

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step(self.batches)

    def parameters(self) -> list:
        """Of every replica: all parameters in one list."""
        copies = [self.strategy.experimental_local_results(v) for v in self.variables]
        return [
            np.concatenate([np.ravel(of[i].numpy()) for of in copies]).tolist()
            for i in range(len(copies[0]))
        ]

    def state(self) -> dict[str, list]:
        """Every state variable's copies."""
        return {
            name: [
                np.ravel(copy.numpy()).tolist()
                for copy in self.strategy.experimental_local_results(variable)
            ]
            for name, variable in self.store.named_variables().items()
        }


class ExecutedWork:
    """Counts factorisations and collectives when they are executed, not when built.

    Attributes:
      cubes: per replica the sum of n^3 over executed Cholesky factorisations (with
        their further attempts, if one fails).
      collectives: purpose -> `[number, bytes]` of replica 0.
    """

    def __init__(self, replicas: int):
        self.cubes = [0] * max(replicas, 1)
        self.collectives: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def counted(self):
        factorise, all_reduce = inverses.with_fallbacks, collectives._all_reduce

        def counting_factorise(attempt, matrix, *args, **kwargs):
            replica = collectives.static_replica_id() if self.cubes[1:] else 0
            size = matrix.shape[-1]

            def note():
                self.cubes[replica] += size**3
                return np.int64(0)

            with tf.control_dependencies([tf.numpy_function(note, [], tf.int64)]):
                return factorise(attempt, tf.identity(matrix), *args, **kwargs)

        def counting_all_reduce(tensors, purpose):
            size = sum(t.shape.num_elements() * t.dtype.size for t in tensors)

            def note():
                number = self.collectives.setdefault(purpose, [0, size])
                number[0] += 1
                return np.int64(0)

            if collectives.static_replica_id() > 0:
                return all_reduce(tensors, purpose)
            with tf.control_dependencies([tf.numpy_function(note, [], tf.int64)]):
                return all_reduce([tf.identity(t) for t in tensors], purpose)

        inverses.with_fallbacks = counting_factorise
        collectives._all_reduce = counting_all_reduce
        try:
            yield self
        finally:
            inverses.with_fallbacks = factorise
            collectives._all_reduce = all_reduce


def train(replicas: int, steps: int = 50, collective=False, **options) -> dict:
    trainer = Trainer(mirrored(replicas, collective), **options)
    with ExecutedWork(replicas).counted() as work:
        trainer.run(steps)
    copies = trainer.parameters()
    state = {name: [repr(c) for c in of] for name, of in trainer.state().items()}
    return {
        "parameters": copies[0],
        "replicas_agree": all(c == copies[0] for c in copies)
        and all(c == of[0] for of in state.values() for c in of),
        "damping": state.get("KFAC/damping", ["[0.0]"])[0],
        "traces": trainer.trace_count,
        "cubes": work.cubes,
        "collectives": work.collectives,
    }


def main() -> None:
    make_devices(int(sys.argv[1]))
    found = {name: train(**job) for name, job in json.loads(sys.argv[2]).items()}
    print("FOUND" + json.dumps(found))


if __name__ == "__main__":
    main()
