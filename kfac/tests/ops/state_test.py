import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import state
from kfac.tests import graph_kinds

tf1 = tf.compat.v1


def _counting_function(store, autograph=False):
    """Adds the sum of its argument to a state variable; counts traces."""
    traces = []

    @tf.function(autograph=autograph)
    def accumulate(x):
        traces.append(x.shape)
        with store.as_default(), tf1.variable_scope("layer"):
            total = state.get_variable("total", [], tf.float64)
        return total.assign_add(tf.reduce_sum(x))

    return accumulate, traces


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
def test_state_outlives_a_run(kind):
    def build():
        with tf1.variable_scope("scope"):
            v = state.get_variable("v", [2], tf.float64, initializer=3.0)
        assert isinstance(v, tf.Variable) and not v.trainable
        with tf.control_dependencies([v.assign_add([1.0, 2.0])]):
            return tf.identity(v)

    run = graph_kinds.Run(kind, build)
    np.testing.assert_array_equal(run(), [4, 5])
    np.testing.assert_array_equal(run(), [5, 7])
    names = run.store.named_variables()
    assert list(names) == ([] if "v1" in kind else ["scope/v"])


def test_a_second_trace_finds_the_first_ones_variables():
    accumulate, traces = _counting_function(state.VariableStore())
    assert float(accumulate(tf.ones([2], tf.float64))) == 2
    assert float(accumulate(tf.ones([3], tf.float64))) == 5
    # TensorFlow traces a function that creates variables twice for the first shape.
    assert {tuple(shape) for shape in traces} == {(2,), (3,)}


def test_two_functions_share_a_store_and_two_stores_share_nothing():
    store = state.VariableStore()
    first, _ = _counting_function(store)
    second, _ = _counting_function(store)
    other, _ = _counting_function(state.VariableStore())
    one = tf.ones([1], tf.float64)
    assert [float(f(one)) for f in (first, second, other, first)] == [1, 2, 1, 3]


def test_the_innermost_store_is_in_force():
    outer, inner = state.VariableStore(), state.VariableStore()
    assert state.current_store() is None
    with outer.as_default():
        with inner.as_default():
            assert state.current_store() is inner
        assert state.current_store() is outer
    assert state.current_store() is None


def test_a_checkpoint_holds_the_store(tmp_path):
    store = state.VariableStore()
    accumulate, _ = _counting_function(store)
    accumulate(tf.ones([2], tf.float64))
    path = tf.train.Checkpoint(state=store).save(str(tmp_path / "model"))

    restored = state.VariableStore()
    again, _ = _counting_function(restored)
    one = tf.ones([1], tf.float64)
    again(one)
    tf.train.Checkpoint(state=restored).restore(path).assert_consumed()
    assert float(again(one)) == 3


def test_a_checkpoint_can_be_restored_before_the_variables_exist(tmp_path):
    store = state.VariableStore()
    accumulate, _ = _counting_function(store)
    accumulate(tf.ones([2], tf.float64))
    path = tf.train.Checkpoint(state=store).save(str(tmp_path / "model"))

    restored = state.VariableStore()
    status = tf.train.Checkpoint(state=restored).restore(path)
    again, _ = _counting_function(restored)
    assert float(again(tf.ones([1], tf.float64))) == 3
    status.assert_existing_objects_matched()


def test_values_can_be_loaded_before_and_after_the_variables_exist():
    store = state.VariableStore()
    store.load({"layer/total": np.array(5.0)})
    assert store.not_yet_loaded() == ["layer/total"]
    accumulate, _ = _counting_function(store)
    one = tf.ones([1], tf.float64)
    assert float(accumulate(one)) == 6
    assert store.not_yet_loaded() == []
    store.load({"layer/total": np.array(1.0)})
    assert float(accumulate(one)) == 2


@pytest.mark.parametrize("kind", graph_kinds.FAST)
@pytest.mark.parametrize(
    ("initializer", "expected"),
    [
        (None, [0, 0]),
        (2, [2, 2]),
        (tf.ones_initializer, [1, 1]),
        (tf1.ones_initializer(), [1, 1]),
        (tf.constant_initializer([3, 4]), [3, 4]),
        (lambda shape, dtype: tf.fill(shape, tf.constant(5, dtype)), [5, 5]),
    ],
)
def test_initializers_may_be_classes_instances_functions_or_numbers(
    kind, initializer, expected
):
    def build():
        v = state.get_variable("v", [2], tf.float64, initializer)
        assert v.dtype == tf.float64
        return tf.identity(v)

    np.testing.assert_array_equal(graph_kinds.Run(kind, build)(), expected)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
@pytest.mark.parametrize("number", [0.1, np.float64(0.1), np.array(0.1)])
def test_numbers_do_not_lose_digits_on_their_way_to_float64(kind, number):
    def build():
        v = state.get_variable("v", [2], tf.float64, number)
        return tf.identity(v)

    np.testing.assert_array_equal(graph_kinds.Run(kind, build)(), [0.1, 0.1])


def test_names_do_not_depend_on_the_ops_around():
    with tf.Graph().as_default():
        with tf1.name_scope("step"), tf1.variable_scope("layer"):
            assert state.get_variable("v").op.name == "layer/v"
    store = state.VariableStore()

    @tf.function(autograph=False)
    def step():
        with store.as_default(), tf.name_scope("step"), tf1.variable_scope("layer"):
            return state.get_variable("v") + 0.0

    step()
    assert [v.name for v in store.named_variables().values()] == ["layer/v:0"]


def test_a_v1_name_is_taken_without_reuse():
    with tf.Graph().as_default():
        state.get_variable("v")
        with pytest.raises(ValueError, match="already exists"):
            state.get_variable("v")


def test_a_store_refuses_another_shape_or_dtype_for_a_name():
    store = state.VariableStore()

    def zeros(shape, dtype):
        return store.get("v", shape, dtype, lambda: tf.zeros(shape, dtype))

    v = zeros([2], tf.float32)
    assert zeros([2], tf.float32) is v
    for shape, dtype in (([3], tf.float32), ([2], tf.float64)):
        with pytest.raises(ValueError, match=r"'v' exists with shape \(2,\)"):
            zeros(shape, dtype)


def test_state_outside_of_graphs_and_stores_is_refused():
    with pytest.raises(RuntimeError, match="eagerly"):
        state.get_variable("v")
    with pytest.raises(RuntimeError, match="No VariableStore"):
        tf.function(lambda: state.get_variable("v") + 0.0, autograph=False)()


def test_parameter_path_is_the_name_of_the_first_parameter():
    w, b = tf.Variable(1.0, name="dense/kernel"), tf.Variable(1.0, name="dense/bias")
    assert state.parameter_path(w) == "dense/kernel"
    assert state.parameter_path((b, w)) == state.parameter_path([b]) == "dense/bias"


def test_parameters_can_be_given_other_names_while_building():
    w, b = tf.Variable(1.0, name="w"), tf.Variable(1.0, name="b")
    with state.parameter_names({w.ref(): "model/dense/kernel"}):
        with state.parameter_names({b.ref(): "model/dense/bias"}):
            assert state.parameter_path(w) == "model/dense/kernel"
            assert state.parameter_path((b, w)) == "model/dense/bias"
        assert state.parameter_path(b) == "b"
    assert state.parameter_path(w) == "w"
