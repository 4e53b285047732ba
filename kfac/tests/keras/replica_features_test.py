"""What an optimizer can do by itself, it can do on replicas, to the same result."""

import collections
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
    "batch normalisation over all cases": {"normalized": True},
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
REFUSED = {"replicas": 2, "normalized": True, "estimation_mode": "empirical"}
JOBS["fishleg, 2"] = {"replicas": 2, "fishleg": True}
# Loops that compute a loss of their own; or shared work, whose owners are counted.
EKFAC = {
    "fisher_approx": {"hidden": "ekfac", "logits": "ekfac"},
    "decompositions": True,
}
SHARED = {**EKFAC, "placement_strategy": "replica_round_robin"}
LOOPS = {
    "alone": {"replicas": 0, "divisions": 1},
    "divided": {"replicas": 2, "divisions": 1},
    "forgotten": {"replicas": 2, "divisions": 0},
    "divided twice": {"replicas": 2, "divisions": 2},
    "ekfac alone": {"replicas": 0, **EKFAC},
    "ekfac": {"replicas": 2, **EKFAC},
    "ekfac, shared": {"replicas": 2, **SHARED},
    "ekfac, partly shared": {
        "replicas": 2,
        "distribute_transformations": False,
        **SHARED,
    },
    "ekfac, nobody to share with": {"replicas": 1, **SHARED},
}
LOOP_JOBS = {name: {"loop": True, **LOOPS[name]} for name in LOOPS}


def run():
    finished = subprocess.run(
        [
            *[sys.executable, "-m", "kfac.tests.keras.replica_features_program"],
            json.dumps({**JOBS, **LOOP_JOBS, "refused": REFUSED}),
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


def test_what_cannot_be_registered_inside_of_a_replica_is_told(found):
    assert "build_for(model)" in found["refused"]["error"]


def test_a_step_that_overflows_on_one_replica_is_skipped_on_all(found):
    # One of the three batches of each of the four epochs.
    assert found["loss scaling and a case that is not finite, 2"]["steps"] == 8


def test_the_features_make_a_difference(found):
    results = [found[f"{name}, 0"]["parameters"][:3] for name in FEATURES]
    for i, one in enumerate(results):
        assert all(one != other for other in results[:i])
    adapted = found["losses of more cases than the statistics, 0"]["damping"]
    assert adapted != pytest.approx(0.3)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("forgotten", "2 times as large"), ("divided twice", "2 times smaller")],
)
def test_a_loss_with_another_scale_than_the_declared_one_is_noticed(
    found, name, complaint
):
    assert complaint in found[name]["error"]
    assert "num_replicas_in_sync" in found[name]["error"]


def test_a_loss_that_is_divided_trains_as_on_one_device(found):
    assert found["divided"]["error"] == ""
    np.testing.assert_allclose(
        found["divided"]["parameters"], found["alone"]["parameters"], atol=1e-10
    )


@pytest.mark.parametrize("name", [name for name in LOOPS if "ekfac" in name])
def test_whoever_decomposes_the_factors_the_steps_are_the_same(found, name):
    np.testing.assert_allclose(
        found[name]["parameters"], found["ekfac alone"]["parameters"], atol=1e-10
    )


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("ekfac alone", [4]),  # Two layers have two factors each.
        ("ekfac", [4, 4]),
        ("ekfac, shared", [2, 2]),
        ("ekfac, partly shared", [2, 2]),
        ("ekfac, nobody to share with", [4]),
    ],
)
def test_each_replica_decomposes_its_share_of_the_factors(found, name, counts):
    per_device = collections.Counter(found[name]["devices"])
    assert sorted(per_device.values()) == counts
