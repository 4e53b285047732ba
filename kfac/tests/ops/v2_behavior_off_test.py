"""The foundation under the real `tf.compat.v1.disable_v2_behavior()`.

It cannot be undone, so it is called in a process of its own; the other tests flip the
switches that matter one by one, see `graph_kinds`.
"""

import pathlib
import subprocess
import sys

OPS = pathlib.Path(__file__).parents[2] / "python" / "ops"

PROGRAM = """
import importlib
import sys

import numpy as np
import tensorflow as tf

tf1 = tf.compat.v1
tf1.disable_v2_behavior()

for module in sys.argv[1:]:
    importlib.import_module("kfac.python.ops." + module)

from kfac.python.ops import inverses, linear_operator, utils
from kfac.python.ops.kfac_utils import data_reader

# Everything in the default graph, as programs of that time do.
x = tf1.placeholder(tf.float32, [None, 3])
reader = data_reader.CachedDataReader([x], 4)
(batch,) = reader(2)
w = tf1.get_variable("w", [3, 2], initializer=tf1.ones_initializer())
assert utils.is_reference_variable(w)
y = tf.matmul(batch, w)
assert utils.SubGraph([y]).variable_uses(w) == 1
(product,) = utils.fwd_gradients([y], [w], stop_gradients=[w])

average = utils.MovingAverageVariable("cov", [3, 3], tf.float32)
update = average.add_to_average(tf.matmul(batch, batch, transpose_a=True), 0.9, 0.1)
inverse, fell_back = inverses.damped_inverse(average.value, 0.5)
operator = linear_operator.LinearOperatorFullMatrix(inverse)
solved = operator.matmul(tf.matmul(batch, batch, transpose_a=True))
step = tf1.get_variable("step", [], tf.int64, initializer=tf1.zeros_initializer())
scheduled = utils.batch_execute(step, [lambda: update, lambda: step.assign_add(1)], 2)

rows = np.arange(12.0).reshape(4, 3).astype(np.float32)
with tf1.Session() as session:
    session.run(tf1.global_variables_initializer())
    np.testing.assert_allclose(
        session.run(product, {x: rows}), np.tile(rows[:2].sum(1)[:, None], [1, 2])
    )
    session.run(scheduled, {x: rows})
    assert session.run(step) == 1
    cov = rows[:2].T @ rows[:2]
    expected = np.linalg.inv(cov + 0.5 * np.eye(3)) @ cov
    np.testing.assert_allclose(session.run(solved, {x: rows}), expected, atol=1e-4)
    np.testing.assert_array_equal(session.run(reader.cached_batch[0]), rows[:2])
    assert not session.run(fell_back)
print("DONE")
"""


def _modules():
    """All modules of the core, as dotted names below it."""
    return [
        ".".join(path.relative_to(OPS).with_suffix("").parts)
        for path in sorted(OPS.rglob("*.py"))
        if path.name != "__init__.py"
    ]


def test_everything_imports_and_works_with_v2_behaviour_off():
    modules = _modules()
    assert "inverses" in modules and "utils.replicas" in modules
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, *modules],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=OPS.parents[2],
    )
    assert finished.stdout.strip().endswith("DONE"), finished.stderr[-3000:]
