import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import utils
from kfac.python.ops.rules import moving_average
from kfac.tests import graph_kinds

tf1 = tf.compat.v1
SEQUENCE = np.random.RandomState(0).randn(4, 2, 3)


def _after(op, read):
    """What `read()` gives once `op` has run."""
    with tf.control_dependencies([op]):
        return tf.identity(read())


def _step_input(name="step"):
    """A value that advances along `SEQUENCE` with each run, and its op."""
    step = graph_kinds.variable(0, name, np.int32, trainable=False)
    value = tf.gather(tf.constant(SEQUENCE), step)
    with tf.control_dependencies([value]):
        advance = step.assign_add(1)
    return value, advance


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
def test_debiased_average_is_the_normalised_geometric_sum(kind):
    decay, weight = 0.9, 0.1

    def build():
        average = utils.MovingAverageVariable("average", [2, 3], tf.float64)
        value, advance = _step_input()
        update = average.add_to_average(value, decay, weight)
        with tf.control_dependencies([advance]):
            return _after(update, lambda: average.value)

    run = graph_kinds.Run(kind, build)
    for t in range(1, len(SEQUENCE) + 1):
        powers = decay ** np.arange(t - 1, -1, -1.0)
        expected = np.tensordot(powers * weight, SEQUENCE[:t], 1) / (1 - decay**t)
        # float64 all the way: decay and weight may not pass through float32.
        np.testing.assert_allclose(run(), expected, rtol=1e-13)


def _run_in_v1(build, *fetches_per_run):
    with tf.Graph().as_default(), tf1.Session() as session:
        ops = build()
        session.run(tf1.global_variables_initializer())
        return [session.run(ops[name]) for name in fetches_per_run]


def test_first_update_gives_the_observation_whatever_the_weight():
    def build():
        average = utils.MovingAverageVariable("average", [2, 3], tf.float64)
        update = average.add_to_average(tf.constant(SEQUENCE[0]), 0.5, 0.003)
        return {"update": update, "value": average.value}

    _, value = _run_in_v1(build, "update", "value")
    np.testing.assert_allclose(value, SEQUENCE[0], rtol=1e-14)


def test_decay_and_weight_of_one_give_the_plain_mean():
    def build():
        average = utils.MovingAverageVariable("average", [], tf.float32)
        return {
            "one": average.add_to_average(1.0),
            "five": average.add_to_average(5.0),
            "value": average.value,
        }

    assert _run_in_v1(build, "one", "five", "five", "five", "value")[-1] == 4.0


def test_unnormalised_average_reads_the_plain_variable():
    def build():
        average = utils.MovingAverageVariable(
            "a", [2], tf.float32, tf1.ones_initializer, normalize_value=False
        )
        update = average.add_to_average([2.0, 4.0], decay=0.5, weight=0.25)
        return {"value": average.value, "update": update}

    before, _, after = _run_in_v1(build, "value", "update", "value")
    np.testing.assert_array_equal(before, [1, 1])
    np.testing.assert_array_equal(after, [1.0, 1.5])


def test_average_of_nothing_is_zero_and_reset_forgets_everything():
    def build():
        average = utils.MovingAverageVariable("average", [2], tf.float32)
        return {
            "value": average.value,
            "update": average.add_to_average([1.0, 2.0], 0.9, 0.1),
            "reset": average.reset(),
            "weight": average._total_weight,
        }

    results = _run_in_v1(
        build, "value", "update", "value", "reset", "value", "weight", "update", "value"
    )
    np.testing.assert_array_equal(results[0], [0, 0])
    np.testing.assert_allclose(results[2], [1, 2], rtol=1e-6)
    np.testing.assert_array_equal(results[4], [0, 0])
    assert results[5] == 0
    np.testing.assert_allclose(results[7], [1, 2], rtol=1e-6)


def test_averages_of_one_scoped_name_share_their_variables():
    with tf.Graph().as_default():
        with tf1.variable_scope("layer"):
            first = utils.MovingAverageVariable("cov", [2], tf.float64)
            second = utils.MovingAverageVariable("cov", [2], tf.float64)
        other = utils.MovingAverageVariable("cov", [2], tf.float64)
        assert first._var is second._var
        assert first._total_weight is second._total_weight
        assert first._var is not other._var
        names = [v.op.name for v in (first._var, first._total_weight, other._var)]
        assert names == ["layer/cov/var", "layer/cov/total_weight", "cov/var"]
        assert first.dtype == tf.float64
        assert not tf1.trainable_variables()


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_accumulator_holds_the_plain_mean_until_it_is_reset(kind):
    def build():
        accumulator = utils.AccumulatorVariable("acc", [2, 3], tf.float64)
        value, advance = _step_input()
        empty = tf.identity(accumulator.value)
        with tf.control_dependencies([empty, advance]):
            first = accumulator.accumulate(value)
        with tf.control_dependencies([first]):
            second = accumulator.accumulate(3 * value)
        mean = _after(second, lambda: accumulator.value)
        with tf.control_dependencies([mean]):
            read = accumulator.read_value_and_reset()
        after = _after(read, lambda: accumulator.value)
        return empty, mean, read, after

    run = graph_kinds.Run(kind, build)
    for observed in SEQUENCE[:2]:
        empty, mean, read, after = run()
        np.testing.assert_array_equal(empty, np.zeros((2, 3)))
        np.testing.assert_allclose(mean, 2 * observed, rtol=1e-14)
        np.testing.assert_array_equal(read, mean)
        np.testing.assert_array_equal(after, np.zeros((2, 3)))


def test_accumulator_state_has_the_documented_names():
    with tf.Graph().as_default():
        utils.AccumulatorVariable("acc", [3], tf.float64)
        found = {v.op.name: v.dtype for v in tf1.global_variables()}
    assert found == {"acc/acc_var": tf.float64, "acc/counter": tf.int64}


def test_accumulator_reset_zeroes_it():
    def build():
        accumulator = utils.AccumulatorVariable("acc", [], tf.float32)
        return {
            "add": accumulator.accumulate(2.0),
            "reset": accumulator.reset(),
            "value": accumulator.value,
        }

    results = _run_in_v1(build, "add", "value", "reset", "value", "add", "value")
    assert results[1::2] == [2.0, 0.0, 2.0]


def test_rules_compute_in_the_dtype_of_the_average():
    total = moving_average.decayed(np.float64(2.0), np.float32(1.0), 0.1, 0.3)
    assert total.dtype == tf.float64
    np.testing.assert_allclose(total, 0.5, rtol=1e-15)
    np.testing.assert_array_equal(moving_average.debiased([4.0, 0.0], 0.0), [0, 0])
    np.testing.assert_array_equal(moving_average.debiased([4.0, 1.0], 0.5), [8, 2])
