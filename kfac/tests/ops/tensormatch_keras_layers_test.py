"""How Keras' layers are covered when a traced model is scanned.

Every row of the table is run in a trace, on random data, in float64: the blocks must be
the expected ones, every use of every variable must be accounted for, and each
layer-specific block must be able to rebuild the parameters' gradient from what it
captured.
"""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from kfac.tests.ops.tensormatch_keras_case import GENERIC
from kfac.tests.ops.tensormatch_keras_cases import CASES
from kfac.tests.ops.tensormatch_keras_scan import BATCH, Scan, float64

pytestmark = pytest.mark.usefixtures(float64.__name__)


def data(case):
    shape = (BATCH, *case.shape)
    rng = np.random.default_rng(0)
    if case.ids is not None:
        return [rng.integers(case.ids, size=shape).astype(np.int32)]
    return [rng.normal(size=shape) for _ in range(case.inputs)]


def scan(case):
    call = {} if case.training is None else {"training": case.training}
    return Scan(case.build(), data(case), **call)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_parameters_get_the_expected_blocks_which_rebuild_their_gradients(case):
    if case.newer and not hasattr(keras.layers, case.newer):
        pytest.skip(f"Keras {keras.__version__} has no {case.newer}")
    result = scan(case)
    found = {paths: type(block).__name__ for paths, block in result.blocks.items()}
    assert len(found) == len(case.blocks), found
    for names, block in case.blocks.items():
        patterns = [f".*{name}" for name in names.split(",")]
        matching = [
            paths
            for paths in found
            if len(paths) == len(patterns) and all(map(re.fullmatch, patterns, paths))
        ]
        assert [found[paths] for paths in matching] == [block], (names, found)
        assert (block == GENERIC) == (matching[0] not in result.gradients)
    generic = {path for (path, *_), block in found.items() if block == GENERIC}
    assert set(result.reasons) == generic
    assert not case.reason or any(case.reason in r for r in result.reasons.values())
    for paths, (rebuilt, true) in result.gradients.items():
        for one, other in zip(rebuilt, true, strict=True):
            # Sums of at most some hundred terms of order one. (Keras makes the
            # matrices of LoRA in float32, whatever the dtype policy.)
            tolerance = 1e-9 if other.dtype == tf.float64 else 1e-5
            np.testing.assert_allclose(
                one, other, rtol=tolerance, atol=tolerance, err_msg=str(paths)
            )


def test_a_gradient_in_the_table_is_not_zero():
    # Otherwise the identity above would show nothing.
    (pair,) = scan(CASES[0]).gradients.values()
    assert np.abs(pair[1][0]).max() > 0.01
