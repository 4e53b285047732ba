"""Trains a small Keras model with one feature after another, on replicas and without.

    python -m kfac.tests.keras.replica_features_program '{"name": {"replicas": 2, ...}}'

Run as a script by the tests.  Prints "FOUND" and a JSON object name -> result.
"""

from __future__ import annotations

import json
import sys

import keras
import numpy as np
import tensorflow as tf

from kfac.python.keras.distributed import strategies
from kfac.python.keras.fishleg import FishLeg
from kfac.tests.keras import distributed_program as program

# On two replicas 3 and 3 cases, then 3 and 2, then 1 and 0.  (Keras' `fit` needs a
# first batch that can be divided evenly, and rounds 1/3 to float32.)
BATCHES = (6, 5, 1)
CASES = sum(BATCHES)


def data(spoilt=None, one_direction=False) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and classes of the cases.

    Args:
      spoilt: index of a case whose inputs are NaN.
      one_direction: all inputs are the same up to their signs.
    """
    x, y = (array[:CASES].copy() for array in program.data())
    if one_direction:
        x = np.sign(x[:, :1]) * x[:1]
    if spoilt is not None:
        x[spoilt] = np.nan
    return x, y


def dataset(x, y) -> tf.data.Dataset:
    ends = np.cumsum(BATCHES)
    parts = [
        tf.data.Dataset.from_tensors((x[end - size : end], y[end - size : end]))
        for size, end in zip(BATCHES, ends, strict=True)
    ]
    first, second, third = (part.unbatch().batch(max(BATCHES)) for part in parts)
    return first.concatenate(second).concatenate(third)


def linear_model() -> keras.Model:
    random = np.random.default_rng(1)
    layer = keras.layers.Dense(program.CLASSES, use_bias=False)
    model = keras.Sequential([keras.Input([program.FEATURES]), layer])
    layer.kernel.assign(random.normal(size=layer.kernel.shape))
    return model


def normalized_model() -> keras.Model:
    random = np.random.default_rng(1)
    model = keras.Sequential(
        [
            keras.Input([program.FEATURES]),
            keras.layers.Dense(3, use_bias=False, name="hidden"),
            keras.layers.BatchNormalization(synchronized=True),
            keras.layers.Activation("tanh"),
            keras.layers.Dense(program.CLASSES, name="logits"),
        ]
    )
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape))
    return model


def fit(
    replicas,
    spoilt=None,
    one_direction=False,
    normalized=False,
    scaled=False,
    fishleg=False,
    **options,
) -> dict:
    """Four epochs of three steps.

    Args:
      replicas: how many; 0 for no strategy.
      spoilt: see `data`.
      one_direction: likewise; the model is a linear one for squared errors then.
      normalized: whether the model has batch normalisation over all replicas' cases,
        which is trained on the first batch alone.
      scaled: whether the optimizer is in a `LossScaleOptimizer`.
      fishleg: whether it is `FishLeg`.
      **options: of the optimizer.
    """
    strategy = program.mirrored(replicas)
    x, y = data(spoilt, one_direction)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if one_direction:
        loss, y = "mse", np.eye(program.CLASSES)[y] * np.arange(CASES)[:, None]
    with strategy.scope():
        make_model = program.make_model
        if normalized or one_direction:
            make_model = normalized_model if normalized else linear_model
        model = make_model()
        if fishleg:
            optimizer = FishLeg(0.1, 0.3, model, warmup_steps=3, seed=3)
        else:
            optimizer = program.make_optimizer(model, **options)
        optimizer.register_layers(model, loss)
        outer = keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer
        model.compile(outer, loss=loss, jit_compile=False)
        batches = dataset(x, y)
        try:
            model.fit(batches.take(1) if normalized else batches, epochs=4, verbose=0)
        except ValueError as error:
            return {"error": str(error)}
    found = program.numbers(model, optimizer)
    variables = [*model.variables, *outer.variables]
    return {
        **{key: found[key] for key in ("parameters", "damping")},
        "steps": int(optimizer.iterations + 0),  # (Mirrored ones have no int.)
        "apart": max(copies_apart(strategy, v.value) for v in variables),
    }


def loop(replicas, divisions=None, decompositions=False, **options) -> dict:
    """Six steps in a loop of one's own.

    Args:
      replicas: how many; 0 for no strategy.
      divisions: how often a loss that is not Keras' is divided by the number of
        replicas; None takes `optimizer.step`.
      decompositions: whether to count them.
      **options: of the optimizer.
    """
    strategy = program.mirrored(replicas)
    with strategy.scope():
        model = program.make_model()
        optimizer = program.make_optimizer(model, **options)
        optimizer.build_for(model)

    def on_replica(x, y):
        if divisions is None:
            optimizer.step(x, y)
            return
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
            loss = tf.reduce_mean(losses) / max(replicas, 1) ** divisions
        optimizer.show_batch(x, y)
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    step = tf.function(lambda batch: strategy.run(on_replica, args=batch))
    batches = strategy.experimental_distribute_dataset(dataset(*data()).repeat())
    batches = iter(batches)
    found = {"error": ""}
    try:
        for _ in range(6):
            step(next(batches))
    except tf.errors.InvalidArgumentError as error:
        found["error"] = str(error)
    if decompositions:
        graph = step.get_concrete_function(next(batches)).graph.as_graph_def()
        functions = [function.node_def for function in graph.library.function]
        nodes = [node for nodes in [graph.node, *functions] for node in nodes]
        found["devices"] = [n.device for n in nodes if n.op == "SelfAdjointEigV2"]
    return {"parameters": program.numbers(model, optimizer)["parameters"], **found}


def copies_apart(strategy, variable) -> float:
    """The largest difference between a variable's copies, of which NaN is one value."""
    first, *others = (
        np.asarray(copy.numpy(), np.float64)
        for copy in strategy.experimental_local_results(variable)
    )
    differences = [np.abs(np.where(first == o, 0.0, first - o)) for o in others]
    both_nan = [np.isnan(first) & np.isnan(other) for other in others]
    return max(
        (
            float(np.max(np.where(nan, 0.0, difference)))
            for nan, difference in zip(both_nan, differences, strict=True)
        ),
        default=0.0,
    )


def main() -> None:
    keras.config.set_floatx("float64")
    strategies.make_strategy("mirrored", 2)  # Divides the CPU.
    found = {
        name: loop(**job) if job.pop("loop", False) else fit(**job)
        for name, job in json.loads(sys.argv[1]).items()
    }
    print("FOUND" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
