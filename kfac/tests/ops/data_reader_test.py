import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops.kfac_utils import data_reader, data_reader_alt
from kfac.tests import graph_kinds

tf1 = tf.compat.v1
ROWS = 6
FEATURES = np.arange(2.0 * ROWS).reshape(ROWS, 2)
LABELS = np.arange(ROWS, dtype=np.int32)  # Row i of FEATURES is [2 i, 2 i + 1].
MODULES = [data_reader, data_reader_alt]
both = pytest.mark.parametrize("module", MODULES, ids=["stream", "in memory"])


def _dataset(module):
    """Both components; the stream shuffles them itself at each step."""
    if module is data_reader_alt:
        return [tf.constant(FEATURES), tf.constant(LABELS)]
    order = tf.random.shuffle(tf.range(ROWS))
    return [tf.gather(FEATURES, order), tf.gather(LABELS, order)]


def _assert_aligned(batch, size):
    features, labels = batch
    assert features.shape == (size, 2) and labels.shape == (size,)
    np.testing.assert_array_equal(features, FEATURES[labels])
    assert len(set(labels)) == size  # No row twice.


@both
@pytest.mark.parametrize("reader_name", ["VariableBatchReader", "CachedDataReader"])
def test_a_batch_has_the_size_asked_for_and_aligned_rows(module, reader_name):
    with tf.Graph().as_default(), tf1.Session() as session:
        tf1.set_random_seed(0)
        reader = getattr(module, reader_name)(_dataset(module), ROWS)
        size = tf1.placeholder(tf.int32, [])
        dynamic, static = reader(size), reader(4)
        assert isinstance(dynamic, list)
        session.run(tf1.global_variables_initializer())
        seen = set()
        for count in (0, 1, 5, 6, 3, 3, 3, 3):
            batch = session.run(dynamic, {size: count})
            _assert_aligned(batch, count)
            seen.add(tuple(batch[1]))
        _assert_aligned(session.run(static), 4)
    # Draws are random: four batches of 3 of 6 rows are equal once in 120^3.
    assert len(seen) > 5


@both
@pytest.mark.parametrize("reader_name", ["VariableBatchReader", "CachedDataReader"])
def test_too_large_a_batch_is_refused(module, reader_name):
    with tf.Graph().as_default(), tf1.Session() as session:
        reader = getattr(module, reader_name)(_dataset(module), 5)
        with pytest.raises(tf.errors.InvalidArgumentError, match="larger than allowed"):
            reader(6)
        size = tf1.placeholder(tf.int32, [])
        batch = reader(size)
        session.run(tf1.global_variables_initializer())
        with pytest.raises(tf.errors.InvalidArgumentError, match="larger than allowed"):
            session.run(batch, {size: 6})


@both
@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_the_cache_holds_the_batch_drawn_last_before_this_step(module, kind):
    period = 3

    def build():
        step = graph_kinds.variable(0, "step", np.int32, trainable=False)
        reader = module.CachedDataReader(_dataset(module), ROWS)
        now = tf.identity(step)
        size = 2 + now // period
        cached = reader.cached_batch
        # The draw is inside a branch, the cached batch is read outside of it.
        drawn = tf.cond(
            tf.equal(now % period, 0),
            lambda: reader(size),
            lambda: [tensor[:0] for tensor in _dataset(module)],
        )
        with tf.control_dependencies([*drawn, *cached]):
            advance = step.assign_add(1)
        with tf.control_dependencies([advance]):
            return [tf.identity(t) for t in cached], [tf.identity(t) for t in drawn]

    run = graph_kinds.Run(kind, build)
    last = [FEATURES[:0], LABELS[:0]]
    for step in range(3 * period):
        cached, drawn = run()
        for found, expected in zip(cached, last, strict=True):
            np.testing.assert_array_equal(found, expected)
        if step % period == 0:
            _assert_aligned(drawn, 2 + step // period)
            last = drawn


@both
def test_repeated_reads_of_the_cache_do_not_change_it(module):
    with tf.Graph().as_default(), tf1.Session() as session:
        reader = module.CachedDataReader(_dataset(module), ROWS)
        batch = reader(4)
        session.run(tf1.global_variables_initializer())
        assert [len(part) for part in session.run(reader.cached_batch)] == [0, 0]
        drawn = session.run(batch)
        for _ in range(3):
            for found, expected in zip(
                session.run(reader.cached_batch), drawn, strict=True
            ):
                np.testing.assert_array_equal(found, expected)


@both
def test_the_data_are_available_only_once_they_are_stored(module):
    with tf.Graph().as_default(), tf1.Session() as session:
        reader = module.CachedDataReader(_dataset(module), ROWS)
        (features, labels) = reader(3)
        session.run(tf1.global_variables_initializer())
        session.run(features)  # One component alone stores the whole batch.
        size = session.run(reader._batch_size)
        _assert_aligned(session.run(reader.cached_batch), size)
        assert size == 3


def test_state_has_stable_names_shapes_and_dtypes():
    def found(module):
        with tf.Graph().as_default():
            module.CachedDataReader(_dataset(module), 4)
            return {
                v.op.name: (v.shape.as_list(), v.dtype) for v in tf1.global_variables()
            }

    scope = "cached_data_reader/cached_batch_"
    assert found(data_reader) == {
        scope + "storage_0": ([4, 2], tf.float64),
        scope + "storage_1": ([4], tf.int32),
        scope + "size": ([], tf.int32),
    }
    assert found(data_reader_alt) == {
        scope + "indices": ([4], tf.int32),
        scope + "size": ([], tf.int32),
    }


@both
@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_two_readers_keep_different_batches(module, kind):
    def build():
        readers = [module.CachedDataReader(_dataset(module), ROWS) for _ in range(2)]
        before = [tensor for reader in readers for tensor in reader.cached_batch]
        drawn = [
            tensor
            for size, reader in zip((2, 3), readers, strict=True)
            for tensor in reader(size)
        ]
        with tf.control_dependencies([tf.identity(t) for t in before]):
            return before, [tf.identity(tensor) for tensor in drawn]

    run = graph_kinds.Run(kind, build)
    _, drawn = run()
    cached, _ = run()
    for found, expected in zip(cached, drawn, strict=True):
        np.testing.assert_array_equal(found, expected)
