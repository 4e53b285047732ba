"""Strategies from a word, and the model whose `fit` runs on workers, in one process."""

import inspect
import json
import re
import textwrap
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import kfac
from kfac.python.keras.distributed import loop as distributed_loop
from kfac.python.keras.distributed import strategies
from kfac.python.keras.distributed.fit_on_workers import FitOnWorkers
from kfac.python.keras.optimizers import Kfac
from kfac.tests.keras import keras_cases as cases


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "two_machines"}, "'two_machines'; use one of.*'multi_worker'"),
        ({"kind": "none", "num_replicas": 2}, "num_replicas=2 is for 'mirrored'"),
        ({"kind": "tpu", "num_replicas": 8}, "num_replicas=8.*'tpu' knows its own"),
        ({"kind": "mirrored", "tpu": "local"}, "tpu='local' is for kind 'tpu'"),
        ({"kind": "mirrored", "num_replicas": 0}, "num_replicas=0.*at least 1"),
        ({"kind": "multi_worker", "timeout": 0.0}, "timeout is 0.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        strategies.make_strategy(**arguments)


@pytest.mark.parametrize(
    "config", (None, "", "{", "[1]", "{}", '{"task": {"index": 0}}', '{"cluster": {}}')
)
def test_workers_need_a_cluster(config, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match="TF_CONFIG.*launch_local"):
        strategies.make_strategy("multi_worker")


def test_more_replicas_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["one"])
    with pytest.raises(ValueError, match="num_replicas=2.*has 1 GPUs"):
        strategies.make_strategy("mirrored", 2)
    assert strategies._devices(None) == ["GPU:0"]


def test_a_processor_cannot_be_divided_once_tensorflow_has_started(monkeypatch):
    tf.constant(1) + 1
    devices = {"GPU": [], "CPU": tf.config.list_physical_devices("CPU")}
    monkeypatch.setattr(tf.config, "list_physical_devices", devices.get)
    with pytest.raises(RuntimeError, match="into 3 devices.*before anything else"):
        strategies.make_strategy("mirrored", 3)


def test_one_replica_and_none_need_no_preparation():
    mirrored = strategies.make_strategy("mirrored", 1)
    none = strategies.make_strategy("none")
    assert mirrored.num_replicas_in_sync == none.num_replicas_in_sync == 1
    assert strategies.is_chief(mirrored) and strategies.is_chief(none)
    assert not strategies.is_multi_worker(mirrored)


@pytest.mark.parametrize(
    "cluster, task, is_chief",
    [
        ({"worker": ["a:1", "b:1"]}, ("worker", 0), True),
        ({"worker": ["a:1", "b:1"]}, ("worker", 1), False),
        ({"chief": ["a:1"], "worker": ["b:1"]}, ("chief", 0), True),
        ({"chief": ["a:1"], "worker": ["b:1"]}, ("worker", 0), False),
        ({}, ("worker", 0), True),
    ],
)
def test_one_worker_is_the_chief(cluster, task, is_chief, monkeypatch):
    monkeypatch.setattr(strategies, "is_multi_worker", lambda strategy: True)
    resolver = types.SimpleNamespace(
        cluster_spec=lambda: tf.train.ClusterSpec(json.loads(json.dumps(cluster))),
        task_type=task[0],
        task_id=task[1],
    )
    strategy = types.SimpleNamespace(cluster_resolver=resolver)
    assert strategies.is_chief(strategy) == is_chief


# ---------------------------------------------------------------- FitOnWorkers


def test_the_wrapper_is_created_outside_of_the_scope():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        inner = cases.sequential()
        with pytest.raises(ValueError, match="outside of strategy.scope"):
            FitOnWorkers(inner)
    FitOnWorkers(inner)


def test_the_wrapper_wraps_models():
    with pytest.raises(ValueError, match="got Dense"):
        FitOnWorkers(keras.layers.Dense(2))


def trained(wraps):
    keras.utils.set_random_seed(3)
    inner = cases.sequential()
    before = inner.get_weights()
    model = FitOnWorkers(inner) if wraps else inner
    optimizer = Kfac(learning_rate=0.1, damping=0.1, model=model, seed=1)
    model.compile(optimizer=optimizer, loss=cases.sparse_logits(), metrics=["accuracy"])
    fitted = model.fit(*cases.data(), batch_size=16, shuffle=False, verbose=0)
    scores = model.evaluate(*cases.data(), verbose=0, return_dict=True)
    assert np.abs(inner.get_weights()[0] - before[0]).max() > 1e-3
    history = {name: value[-1] for name, value in fitted.history.items()}
    return inner.get_weights(), history, scores


def test_fit_of_the_wrapper_is_that_of_the_model():
    weights, *results = trained(wraps=False)
    weights_too, *results_too = trained(wraps=True)
    for one, other in zip(weights, weights_too, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(results, results_too, strict=True):
        assert one == pytest.approx(other) and set(one) == {"accuracy", "loss"}


@pytest.mark.parametrize("of", (distributed_loop, FitOnWorkers))
def test_examples_of_docstrings_run(of, tmp_path, monkeypatch):
    blocks = re.findall(r"(?:^ {4,}.*\n|^\n)+", inspect.getdoc(of), re.MULTILINE)
    (example,) = [block for block in blocks if "strategy.scope()" in block]
    example = textwrap.dedent(example)
    for given, small in (('"multi_worker"', '"none"'), ("1000", "2"), ("=5", "=1")):
        example = example.replace(given, small)
    data = np.ones([8, 784], np.float32), np.ones([8, 10], np.float32)
    names = {
        "DistributedLoop": distributed_loop.DistributedLoop,
        "FitOnWorkers": FitOnWorkers,
        "Kfac": Kfac,
        "dataset": tf.data.Dataset.from_tensors(data).repeat(2),
        "kfac": kfac,
        "keras": keras,
        "strategies": strategies,
        "strategy": strategies.make_strategy("none"),
    }
    monkeypatch.chdir(tmp_path)
    exec(example, names)
    assert int(names["optimizer"].iterations) == 2


def test_the_inner_model_predicts_and_is_saved(tmp_path):
    inner = cases.sequential()
    model = FitOnWorkers(inner)
    x, _ = cases.data()
    np.testing.assert_array_equal(model(x), inner(x))
    model.inner.save(tmp_path / "inner.keras")
    loaded = keras.saving.load_model(tmp_path / "inner.keras")
    np.testing.assert_array_equal(loaded(x), inner(x))
