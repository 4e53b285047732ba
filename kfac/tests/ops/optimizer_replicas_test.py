"""Two replicas on half a batch each take the steps of one on the whole batch."""

import json
import pathlib
import subprocess
import sys

import pytest

# A process of its own: the devices must be set up before TensorFlow starts.
PROGRAM = """
import json, sys
import numpy as np
import tensorflow as tf

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
from kfac.python.ops import state
from kfac.tests.ops import kfac_oracle, optimizer_cases

options = json.loads(sys.argv[1])
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
store = state.VariableStore()
params, (x, y) = kfac_oracle.problem()
with strategy.scope():
    variables = [
        tf.Variable(value, name=name)
        for value, name in zip(params, kfac_oracle.NAMES, strict=True)
    ]


def replica(x, y):
    with store.as_default():
        model = optimizer_cases.Model(batch=(x, y), variables=variables)
        opt = optimizer_cases.make_optimizer(
            model, batch_size=3, loss_fn=model.loss_fn, train_batch=model.batch,
            **options,
        )
        opt.minimize(model.loss)
        return {"damping": opt.damping, "rho": opt.rho, "counter": opt.counter}


@tf.function(autograph=False)
def train_step(x, y):
    return strategy.run(replica, args=(x, y))


def halves(array):
    parts = [tf.constant(part) for part in np.split(array, 2)]
    return strategy.experimental_distribute_values_from_function(
        lambda context: parts[context.replica_id_in_sync_group]
    )


oracle = kfac_oracle.Oracle(
    params, (x, y), damping=0.02, train_batch=(x, y), **options
)
for _ in range(3):
    oracle.step()
    found = train_step(halves(x), halves(y))
    for variable, expected in zip(variables, oracle.params, strict=True):
        for copy in strategy.experimental_local_results(variable):
            np.testing.assert_allclose(copy.numpy(), expected, rtol=1e-7, atol=1e-9)
    for name in found:
        for value in strategy.experimental_local_results(found[name]):
            np.testing.assert_allclose(value.numpy(), getattr(oracle, name), rtol=1e-7)
print("equal")
"""

ADAPTED = {"adapt_damping": True, "damping_adaptation_interval": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0.1, "cov_update_every": 2, "invert_every": 2, **ADAPTED},
        {
            "momentum_type": "qmodel",
            "learning_rate": None,
            "momentum": None,
            "use_weight_decay": True,
            **ADAPTED,
        },
    ],
    ids=["adam", "qmodel"],
)
def test_replicas_take_the_steps_of_the_whole_batch(options):
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=pathlib.Path(__file__).parents[3],
    )
    assert finished.stdout.strip() == "equal", finished.stderr[-3000:]
