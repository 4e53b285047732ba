"""Trainings end where the TF1 package `kfac` 0.2.4 ended, case by case."""

import json
import pathlib

import numpy as np
import pytest

import kfac
from kfac.tests import graph_kinds
from kfac.tests.conformance import reference_cases

RECORDED = json.loads(
    (pathlib.Path(__file__).parent / "conformance" / "reference_steps.json").read_text()
)


@pytest.mark.parametrize("name", reference_cases.CASES)
def test_training_ends_where_the_tf1_package_ended(name):
    with graph_kinds.v2_behavior_off():
        actual = reference_cases.run(kfac, name)
    assert actual.keys() == RECORDED[name].keys()
    for key, expected in RECORDED[name].items():
        # float32 on both sides, six steps through inverses: about 1e-6 was seen.
        np.testing.assert_allclose(
            actual[key], expected, rtol=1e-4, atol=1e-5, err_msg=key
        )


def test_the_recorded_trainings_really_moved():
    for name in reference_cases.CASES:
        assert np.abs(RECORDED[name].get("b1:0", [1.0])).max() > 1e-3
    moved = {json.dumps(RECORDED[name]) for name in reference_cases.CASES}
    # Scanning must end where registering by hand does; all else differs.
    assert len(moved) == len(reference_cases.CASES) - 2
