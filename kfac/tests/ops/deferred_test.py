import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import deferred
from kfac.tests import graph_kinds

tf1 = tf.compat.v1


def _deferred(resolve, shape=(2,), dtype=tf.float64, **kwargs):
    return deferred.DeferredTensor(resolve, shape, dtype, "it", **kwargs)


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
def test_it_is_the_tensor_wherever_one_is_expected(kind):
    value = np.array([1.0, 2.0])

    def build():
        it = _deferred(lambda: tf.constant(value))
        return tf.convert_to_tensor(it), tf.reduce_sum(it), 2 * tf.convert_to_tensor(it)

    plain, total, twice = graph_kinds.Run(kind, build)()
    np.testing.assert_array_equal(plain, value)
    np.testing.assert_array_equal(twice, 2 * value)
    assert total == 3


def test_its_facts_are_known_without_computing_it():
    def fail():
        raise AssertionError("computed")

    it = _deferred(fail, [None, 3], tf.float32, device="/cpu:0", one_hot_depth=7)
    assert it.shape.as_list() == it.get_shape().as_list() == [None, 3]
    assert (it.dtype, it.name, it.device) == (tf.float32, "it", "/cpu:0")
    assert it.one_hot_depth == 7
    assert "it" in repr(it) and "float32" in repr(it)
    assert _deferred(fail).one_hot_depth is None


def test_it_is_equal_to_itself_alone():
    first, second = (_deferred(lambda: tf.zeros([2])) for _ in range(2))
    assert first == first
    assert first != second
    assert len({first, second, first}) == 2


def test_the_static_shape_is_passed_on_to_the_tensor():
    with tf.Graph().as_default():
        it = _deferred(lambda: tf1.placeholder(tf.float64, [None, None]), [None, 3])
        assert tf.convert_to_tensor(it).shape.as_list() == [None, 3]
        wrong = _deferred(lambda: tf.zeros([2, 4], tf.float64), [None, 3])
        with pytest.raises(ValueError):
            tf.convert_to_tensor(wrong)


def test_sparse_values_become_dense():
    with tf.Graph().as_default(), tf1.Session() as session:
        it = _deferred(
            lambda: tf.IndexedSlices(
                tf.constant([[1.0], [2.0]]), tf.constant([2, 2]), tf.constant([3, 1])
            ),
            [3, 1],
            tf.float32,
        )
        result = session.run(tf.convert_to_tensor(it))
    np.testing.assert_array_equal(result, [[0], [0], [3]])


def test_a_conversion_to_another_dtype_is_refused():
    with tf.Graph().as_default():
        it = _deferred(lambda: tf.zeros([2], tf.float64))
        assert tf.convert_to_tensor(it, tf.float64, name="named").name == "named:0"
        with pytest.raises(ValueError, match="float32"):
            tf.convert_to_tensor(it, tf.float32)


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_each_branch_computes_its_own_value_once(kind):
    computed = []

    def build():
        x = tf.identity(tf.constant(3.0))

        def compute():
            computed.append(tf1.get_default_graph())
            return 2.0 * x

        cache = deferred.PerContextCache(compute)

        def branch():
            first = cache.get()
            assert cache.get() is first
            return first

        outside = cache.get()
        assert cache.get() is outside
        chosen = [tf.cond(x > limit, branch, branch) for limit in (2.0, 4.0)]
        assert cache.get() is outside
        del computed[:-5]  # Those of an earlier trace of the same function.
        return [outside, *chosen]

    run = graph_kinds.Run(kind, build)
    assert run() == [6.0] * 3
    # Outside once, and once in each of the two branches of each conditional.
    assert len(computed) == 5


def test_each_graph_computes_its_own_value():
    cache = deferred.PerContextCache(lambda: tf.constant(1.0))
    values = []
    for _ in range(2):
        with tf.Graph().as_default() as graph:
            values.append(cache.get())
            assert values[-1].graph is graph
            assert cache.get() is values[-1]
    assert values[0] is not values[1]


def test_nothing_is_cached_eagerly():
    v = tf.Variable(1.0)
    cache = deferred.PerContextCache(v.read_value)
    before = cache.get()
    v.assign(2.0)
    assert (float(before), float(cache.get())) == (1.0, 2.0)
