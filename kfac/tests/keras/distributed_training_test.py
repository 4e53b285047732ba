"""Keras training on replicas and in several processes is training on one device.

Also when a worker is killed, or hangs, and all start again.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from kfac.python.ops import replica_cost
from kfac.tests import shared_runs

ROOT = pathlib.Path(__file__).parents[3]
PROGRAM = [sys.executable, "-m", "kfac.tests.keras.distributed_program"]
SHARED = {"placement_strategy": "replica_round_robin"}
# Three ways to train, all for 51 steps on the same batches, every third of them short.
JOBS = {
    "fit, none": {"do": "fit", "replicas": 0},
    "fit, 2": {"do": "fit", "replicas": 2},
    "loop, 4": {"do": "loop", "replicas": 4, **SHARED},
    "own loop, 2": {"do": "own loop", "replicas": 2},
    "own loop, divided loss, 2": {"do": "own loop", "replicas": 2, "own_loss": True},
    "adaptive loop, none": {"do": "loop", "replicas": 0, "adaptive": True},
    "adaptive fit, 2": {"do": "fit", "replicas": 2, "adaptive": True, **SHARED},
    "count, convnet": {
        **{"do": "count", "replicas": 4, "model": "convnet"},
        **SHARED,
    },
    "count, language model": {
        **{"do": "count", "replicas": 2, "model": "language_model"},
        **{"fisher_approx": {"vocabulary": "kron_indep_out_diag"}, **SHARED},
        "distribute_transformations": False,
    },
    "adaptive loop, 1 then 4 then 1": {
        "do": "resumed",
        "strategies_and_steps": [[0, 10], [4, 20], [0, 51]],
        "adaptive": True,
    },
}
COUNTED = [name for name in JOBS if "count" in name]
ON_REPLICAS = [n for n in JOBS if "none" not in n and n not in COUNTED]


def run_replicas(directory):
    jobs = json.loads(json.dumps(JOBS))
    jobs["adaptive loop, 1 then 4 then 1"]["directory"] = str(directory)
    finished = subprocess.run(
        [*PROGRAM, "mirrored", json.dumps(jobs)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.split("FOUND")[1])


def run_workers(directory, grief, timeout, max_restarts=0, also_fit=False):
    """The launcher's output, what each worker found, and the files that are left."""
    job = {
        "directory": str(directory),
        "timeout": timeout,
        "grief": grief,
        "also_fit": also_fit,
    }
    finished = subprocess.run(
        [
            *[sys.executable, "-m", "kfac.examples.launch_local", "--num_workers=2"],
            *[f"--max_restarts={max_restarts}", "--timeout=400", "--"],
            *[*PROGRAM, "worker", json.dumps(job)],
        ],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
    )
    lines = finished.stdout.splitlines()
    found = [
        json.loads(line.split("FOUND")[1])
        for index in range(2)
        for line in lines
        if line.startswith(f"[worker {index}] FOUND")
    ]
    assert finished.returncode == 0 and len(found) == 2, finished.stdout[-4000:]
    files = sorted(path.name for path in directory.iterdir())
    return {"lines": lines, "workers": found, "files": files}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    return shared_runs.computed_once(
        tmp_path_factory,
        "keras_replicas",
        lambda: run_replicas(tmp_path_factory.mktemp("checkpoints")),
    )


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory):
    return shared_runs.computed_once(
        tmp_path_factory,
        "keras_workers",
        lambda: run_workers(tmp_path_factory.mktemp("c"), {}, 100, also_fit=True),
    )


@pytest.fixture(scope="module")
def stormy(tmp_path_factory):
    grief = {12: "kill", 17: "hang"}
    return shared_runs.computed_once(
        tmp_path_factory,
        "keras_grief",
        lambda: run_workers(tmp_path_factory.mktemp("c"), grief, 8, max_restarts=2),
    )


def assert_trained_alike(found, alone):
    # Float64, so only the order of sums differs.
    np.testing.assert_allclose(
        found["parameters"], alone["parameters"], rtol=0, atol=1e-10
    )
    np.testing.assert_allclose(found["damping"], alone["damping"], rtol=1e-6)


@pytest.mark.parametrize("name", ON_REPLICAS)
def test_parameters_and_damping_are_those_of_one_device(replicas, name):
    adaptive = name.startswith("adaptive")
    alone = replicas["adaptive loop, none" if adaptive else "fit, none"]
    assert_trained_alike(replicas[name], alone)


def test_the_adaptive_runs_did_adapt_the_damping(replicas):
    assert replicas["adaptive loop, none"]["damping"] < 0.1
    np.testing.assert_allclose(replicas["fit, none"]["damping"], 0.3, rtol=1e-6)


def test_training_goes_on_where_a_checkpoint_was_made(replicas):
    assert replicas["adaptive loop, 1 then 4 then 1"]["started"] == 20


def test_the_loss_of_a_step_is_the_mean_over_all_cases(replicas):
    # Of the last step, which is on a short batch.
    on_four = replicas["loop, 4"]["loss"]
    assert on_four == pytest.approx(replicas["fit, none"]["last_loss"], rel=1e-6)


def test_evaluation_averages_over_cases_not_over_batches_or_replicas(replicas):
    for name in ("loop, 4", "adaptive loop, none"):
        found = replicas[name]
        assert found["evaluated"] == pytest.approx(found["mean_loss"], rel=1e-6)


@pytest.mark.parametrize("name", COUNTED)
def test_a_planned_models_collectives_and_factorisations_are_executed(replicas, name):
    found = replicas[name]
    layers = [replica_cost.Layer(**layer) for layer in found["layers"]]
    exchanges = replica_cost.exchanges(
        layers,
        share_products=JOBS[name].get("distribute_transformations", True),
        uneven=True,
        number_bytes=8,
    )
    # Of four steps; inverses are due in the first three, see `schedule`.
    expected = {e.purpose: [4 if e.every == 1 else 3, e.num_bytes] for e in exchanges}
    # What the loop shows: a float32 loss, and the number of its cases.
    assert found["collectives"] == {**expected, "progress": [4, 8]}
    flops = replica_cost.inversion_flops(layers, JOBS[name]["replicas"])
    # A factorisation, a solve and a product take 10/3 n^3.
    np.testing.assert_allclose(found["cubes"], np.multiply(flops, 3 * 3 / 10))
    memory = replica_cost.memory_bytes(layers, number_bytes=8)
    # The store holds no parameters and nothing temporary.
    kept = sum(memory[name] for name in ("momentum", "statistics", "inverses"))
    assert found["kept_bytes"] == kept


def test_two_processes_have_the_parameters_of_one(peaceful, replicas):
    for worker in peaceful["workers"]:
        assert_trained_alike(worker["fit"], replicas["fit, none"])
        assert_trained_alike(worker["loop"], replicas["adaptive loop, none"])


def test_all_workers_hold_the_same_state_to_the_bit(peaceful):
    assert peaceful["workers"][0] == peaceful["workers"][1]


def test_training_ends_to_the_bit_as_if_nobody_had_been_killed_or_hung(
    stormy, peaceful
):
    undisturbed = peaceful["workers"][0]["loop"]
    for worker in stormy["workers"]:
        assert worker["loop"]["parameters"] == undisturbed["parameters"]
        assert worker["loop"]["state"] == undisturbed["state"]
        assert worker["loop"]["started"] == 15


def test_a_hung_peer_ends_in_an_error_with_the_reason(stormy):
    # (Of the killed one worker 0 may not hear before the launcher stops it.)
    told = [line for line in stormy["lines"] if "PeerLostError: worker 0" in line]
    (hung,) = [line for line in told if "after step 17" in line]
    assert "ckpt-15" in hung and "timed out" in hung
    failures = [line for line in stormy["lines"] if "[launcher] worker" in line]
    assert len(failures) == 2 and "worker 0 exited 1" in failures[1]


def test_only_the_chief_leaves_checkpoints(stormy):
    names = {name.split(".")[0] for name in stormy["files"]}
    kept = {"ckpt-45", "ckpt-50", "ckpt-51"}
    assert names == {"checkpoint", "grief_12", "grief_17"} | kept
