"""`NaturalGradient` and `FishLeg` on two replicas, in a process of its own."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, keras, tensorflow as tf

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
from kfac.python.keras.fishleg import FishLeg
from kfac.python.keras.natural_gradient import NaturalGradient
from kfac.tests.keras import keras_cases as cases

strategy = tf.distribute.MirroredStrategy(
    ["CPU:0", "CPU:1"], tf.distribute.ReductionToOneDevice()
)
x, y = cases.data()
found = {}
for name, make in (
    ("natural", lambda m: NaturalGradient(0.2, 0.3, m, preconditioner="diagonal")),
    ("fishleg", lambda m: FishLeg(0.2, 0.3, m, warmup_steps=5, seed=1)),
):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = cases.sequential()
        optimizer = make(model)
        model.compile(optimizer, loss=cases.sparse_logits(), jit_compile=False)
    losses = cases.losses_of_fit(model, x, y, epochs=4)
    apart = 0.0
    for variable in optimizer.variables + model.variables:
        copies = strategy.experimental_local_results(variable.value)
        values = [tf.cast(copy, tf.float64).numpy() for copy in copies]
        # Iterations are the first replica's; NaN says that there is no value.
        is_number = (values[0] == values[0]).all()
        if is_number and not variable.path.endswith("cg_iterations"):
            apart = max(apart, float(abs(values[0] - values[-1]).max()))
    found[name] = {"losses": losses, "apart": apart}
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True
    )
    assert "FOUND" in finished.stdout, finished.stderr[-3000:]
    return json.loads(finished.stdout.split("FOUND")[1])


@pytest.mark.parametrize("method", ["natural", "fishleg"])
def test_replicas_train_and_stay_the_same(found, method):
    losses = found[method]["losses"]
    assert losses[-1] < 0.8 * losses[0]
    assert found[method]["apart"] == 0.0
