"""Replicas of a MirroredStrategy on logical CPUs train as one device does."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from kfac.python.ops import replica_cost
from kfac.tests import shared_runs
from kfac.tests.ops.distributed_program import LAYERS

ADAPTIVE = {
    "adapt_damping": True,
    "momentum_type": "qmodel",
    "learning_rate": None,
    "momentum": None,
    "damping": 1.0,
    "damping_adaptation_interval": 3,
}
SHARED = {"placement_strategy": "replica_round_robin"}
FOUR = {"replicas": 4, "collective": True}
JOBS = {
    "fixed, none": {"replicas": 0},
    "fixed, 1": {"replicas": 1},
    "fixed, 2": {"replicas": 2},
    "fixed, 4 sharing": {**FOUR, **SHARED},
    "fixed, 2 sharing inversions": {
        "replicas": 2,
        "distribute_transformations": False,
        **SHARED,
    },
    "fixed, 4 uneven and one empty": {**FOUR, "static": False, "sizes": [6, 6, 4, 0]},
    "adaptive, none": {"replicas": 0, **ADAPTIVE},
    "adaptive, 4 sharing": {**FOUR, **SHARED, **ADAPTIVE},
    "adaptive, 2 uneven": {
        "replicas": 2,
        "static": False,
        "sizes": [10, 6],
        **ADAPTIVE,
    },
}
NET = [
    replica_cost.Layer(rows + 1, columns)
    for rows, columns in zip(LAYERS, LAYERS[1:], strict=False)
]
# The program's periods, and float64.
PERIODS = {"cov_update_every": 2, "invert_every": 3, "number_bytes": 8}


def run():
    finished = subprocess.run(
        [
            *[sys.executable, "-m", "kfac.tests.ops.distributed_program"],
            *["4", json.dumps(JOBS)],
        ],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=pathlib.Path(__file__).parents[3],
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.split("FOUND")[1])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return shared_runs.computed_once(tmp_path_factory, "core_replicas", run)


@pytest.mark.parametrize("name", [name for name in JOBS if "none" not in name])
def test_replicas_have_the_parameters_of_one_device_after_fifty_steps(found, name):
    alone = found[name.split(",")[0] + ", none"]
    # Float64, so only the order of sums differs.
    np.testing.assert_allclose(
        found[name]["parameters"], alone["parameters"], rtol=0, atol=1e-10
    )
    assert found[name]["damping"][:12] == alone["damping"][:12]


@pytest.mark.parametrize("name", list(JOBS))
def test_all_copies_of_all_state_are_equal_to_the_bit(found, name):
    assert found[name]["replicas_agree"]


def test_training_moved_the_parameters_and_adapted_the_damping(found):
    fixed, adaptive = (found[f"{kind}, none"] for kind in ("fixed", "adaptive"))
    change = np.subtract(fixed["parameters"], adaptive["parameters"])
    assert np.abs(change).max() > 0.1
    assert float(adaptive["damping"].strip("[]")) < 0.5


@pytest.mark.parametrize("name", list(JOBS))
def test_one_function_is_traced_however_many_steps_are_taken(found, name):
    # Two traces: TensorFlow traces a function that made variables once more.
    assert found[name]["traces"] == 2


def steps_with(every):
    """How many of fifty steps, counted from 0, are multiples of `every`."""
    return -(-50 // every)


ADAPTATION = {"adaptation_every": 3, "quadratic_model": True}


@pytest.mark.parametrize(
    "name, options",
    [
        ("fixed, 2", {"share_inversions": False}),
        ("fixed, 4 sharing", {}),
        ("fixed, 2 sharing inversions", {"share_products": False}),
        ("fixed, 4 uneven and one empty", {"share_inversions": False, "uneven": True}),
        ("adaptive, 4 sharing", ADAPTATION),
    ],
)
def test_executed_collectives_are_the_predicted_ones(found, name, options):
    expected = {}
    for exchange in replica_cost.exchanges(NET, **PERIODS, **options):
        times, _ = expected.get(exchange.purpose, (0, 0))
        # The damping is adapted at the end of its period, the rest starts one.
        last = exchange.purpose == "loss"
        times += 50 // exchange.every if last else steps_with(exchange.every)
        expected[exchange.purpose] = [times, exchange.num_bytes]
    assert found[name]["collectives"] == expected


@pytest.mark.parametrize("name", ("fixed, none", "fixed, 1"))
def test_one_device_executes_no_collectives(found, name):
    assert found[name]["collectives"] == {}


@pytest.mark.parametrize(
    "name, replicas",
    [
        ("fixed, 4 sharing", 4),
        ("fixed, 2 sharing inversions", 2),
        ("adaptive, 4 sharing", 4),
    ],
)
def test_each_replica_executes_its_share_of_the_factorisations(found, name, replicas):
    rounds = steps_with(PERIODS["invert_every"])
    cubes = found[name]["cubes"]
    predicted = replica_cost.inversion_flops(NET, replicas)
    # A factorisation, a solve and a product take 10/3 n^3.
    np.testing.assert_allclose(cubes, np.multiply(predicted, rounds * 3 / 10))
    assert sum(cubes) == sum(found["fixed, none"]["cubes"])
    largest = rounds * max(max(layer.rows, layer.columns) for layer in NET) ** 3
    # Graham's bound on what dealing out largest first can cost.
    assert max(cubes) <= max(largest, sum(cubes) / replicas) * 4 / 3


def test_without_sharing_every_replica_factorises_everything(found):
    (alone,) = found["fixed, none"]["cubes"]
    assert found["fixed, 2"]["cubes"] == [alone] * 2
