"""The programs for `tf.distribute`, in a process of their own.

Their flags have the names of the other programs' flags, and devices are configured
before TensorFlow starts.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from kfac.tests import shared_runs
from kfac.tests.examples import example_runs

ROOT = pathlib.Path(__file__).parents[3]

PROGRAM = """
import json, sys
from absl.testing import flagsaver
from kfac.examples import autoencoder_mnist_tpu_strategy as autoencoder
from kfac.examples import classifier_mnist_tpu_strategy as classifier
from kfac.examples import strategy_training

data, checkpoints = sys.argv[1:]
strategy_training.FLAGS(["program", "--data_dir=" + data, "--batch_size=100"])
scalars = []
run = strategy_training.run
strategy_training.run = lambda task: scalars.append(run(task))


def program(title, module, **flags):
    print("PROGRAM", title, flush=True)
    with flagsaver.flagsaver(**flags):
        module.main([])


small = {"hidden_widths": ["8"], "checkpoint_every": 2, "eval_every": 3}
program(
    "two", classifier, strategy="mirrored", num_replicas=2, train_steps=4,
    checkpoint_dir=checkpoints, **small,
)
small["strategy"] = "none"
program("on", classifier, train_steps=9, checkpoint_dir=checkpoints, **small)
program("done", classifier, train_steps=9, checkpoint_dir=checkpoints, **small)
small["hidden_widths"] = ["6", "3", "6"]
program("autoencoder", autoencoder, train_steps=3, **small)

batches = strategy_training.shuffled_batches([list(range(10))], 4, seed=1)
drawn = {
    first: [b[0].numpy().tolist() for b in batches(first).take(8 - first)]
    for first in (0, 3)
}
print("FOUND" + json.dumps({"scalars": scalars, "drawn": drawn}))
"""


def run(factory):
    folder = factory.mktemp("images")
    data = example_runs.write_few_images(folder)
    checkpoints = folder / "checkpoints"
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, data, str(checkpoints)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    output, found = finished.stdout.split("FOUND")
    printed = {}
    for part in output.split("PROGRAM ")[1:]:
        title, _, text = part.partition("\n")
        printed[title] = text
    kept = sorted(path.stem for path in checkpoints.glob("*.index"))
    return {"printed": printed, "kept": kept, **json.loads(found)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return shared_runs.computed_once(
        tmp_path_factory, "strategy_programs", lambda: run(tmp_path_factory)
    )


def test_a_program_says_who_does_what_and_where_checkpoints_are(found):
    text = found["printed"]["two"]
    assert "2 replica(s) share the 100 cases of a step" in text
    assert "checkpoints, every 2 steps" in text
    assert "step    3" in text and "test_accuracy" in text
    assert "To go on, run this again with --train_steps above 4." in text
    assert "No checkpoints: give --checkpoint_dir" in found["printed"]["autoencoder"]


def test_training_on_two_replicas_goes_on_on_one_device(found):
    text = found["printed"]["on"]
    assert "Going on from step 4" in text
    assert "step    3" not in text and "step    6" in text
    assert found["kept"] == ["ckpt-6", "ckpt-8", "ckpt-9"]
    first, second = (run["test_entropy"] for run in found["scalars"][:2])
    assert second < first < np.log(10)


def test_a_program_that_has_nothing_left_to_do_says_so_and_evaluates(found):
    assert "9 steps were taken before: give more by" in found["printed"]["done"]
    scores = {k: v for k, v in found["scalars"][1].items() if k.startswith("test")}
    assert found["scalars"][2] == pytest.approx(scores)


def test_the_autoencoder_learns(found):
    assert 0 < found["scalars"][3]["test_entropy"] < 784 * np.log(2)


def test_batches_depend_on_their_place_alone_and_epochs_hold_every_case(found):
    drawn = found["drawn"]
    assert drawn["0"][3:] == drawn["3"]
    rows = np.ravel(drawn["0"])
    epochs = rows[:30].reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
