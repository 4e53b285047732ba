"""What an optimizer can do by itself, it can do on replicas, to the same result."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from kfac.tests import shared_runs

ROOT = pathlib.Path(__file__).parents[3]
NOT_OF_THE_FIRST = 4  # A case of the first batch that the second replica has.
# Every third batch leaves the second replica without data.
FEATURES = {
    "accumulated gradients": {"gradient_accumulation_steps": 2},
    "also averages of weights, burn-in and loss scaling": {
        "scaled": True,
        "weight_decay": 0.1,
        "gradient_accumulation_steps": 2,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "num_burnin_steps": 1,
    },
    "another optimizer for a layer": {
        "fisher_approx": {"logits": "fallback"},
        "fallback": "sgd",
    },
    "loss scaling and a case that is not finite": {
        "scaled": True,
        "spoilt": NOT_OF_THE_FIRST,
    },
    # Half of 3 and of 2 cases are 2 and 1: other proportions.
    "losses of more cases than the statistics": {
        "one_direction": True,
        "cov_batch_fraction": 0.5,
        "adaptive": True,
        "damping_adaptation_interval": 3,
    },
}
JOBS = {
    f"{name}, {replicas}": {"replicas": replicas, **options}
    for name, options in FEATURES.items()
    for replicas in (0, 2)
}
JOBS["fishleg, 2"] = {"replicas": 2, "fishleg": True}


def run():
    finished = subprocess.run(
        [
            *[sys.executable, "-m", "kfac.tests.keras.replica_features_program"],
            json.dumps(JOBS),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.split("FOUND")[1])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return shared_runs.computed_once(tmp_path_factory, "replica_features", run)


@pytest.mark.parametrize("name", list(FEATURES))
def test_replicas_train_as_one_device_does(found, name):
    alone, together = found[f"{name}, 0"], found[f"{name}, 2"]
    # Float64, so only the order of sums differs.
    np.testing.assert_allclose(
        together["parameters"], alone["parameters"], rtol=0, atol=1e-10
    )
    assert together["damping"] == pytest.approx(alone["damping"], rel=1e-6)
    assert together["steps"] == alone["steps"]


@pytest.mark.parametrize("name", JOBS)
def test_all_copies_of_all_variables_are_equal_to_the_bit(found, name):
    assert found[name]["apart"] == 0.0


def test_a_replica_without_data_does_not_spoil_a_learned_inverse(found):
    assert np.all(np.isfinite(found["fishleg, 2"]["parameters"]))


def test_a_step_that_overflows_on_one_replica_is_skipped_on_all(found):
    # One of the three batches of each of the four epochs.
    assert found["loss scaling and a case that is not finite, 2"]["steps"] == 8


def test_the_features_make_a_difference(found):
    results = [found[f"{name}, 0"]["parameters"][:3] for name in FEATURES]
    for i, one in enumerate(results):
        assert all(one != other for other in results[:i])
    adapted = found["losses of more cases than the statistics, 0"]["damping"]
    assert adapted != pytest.approx(0.3)
