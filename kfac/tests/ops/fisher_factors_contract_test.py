"""What every Fisher factor class promises, checked on all of them."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config, errors, utils
from kfac.python.ops import fisher_factors as ff
from kfac.tests.ops import fisher_factor_cases as cases

tf1 = tf.compat.v1

every_class = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
# Double precision, and sums of a dozen terms of order 1.
TIGHT = dict(rtol=1e-12, atol=1e-12)


def start(case, seed=0, name=None):
    """A factor with its variables, on placeholders that hold random data."""
    data = case.data(seed)
    tensors = case.tensors(data)
    factor = case.build(*tensors)
    if name is not None:
        factor.set_name(name)
    factor.instantiate_cov_variables()
    return factor, tensors, data


def session():
    running = tf1.Session()
    running.run(tf1.global_variables_initializer())
    return running


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as new_graph:
        yield new_graph


@every_class
def test_construction_creates_no_variable_and_no_op(case, graph):
    tensors = case.tensors(case.data(0))
    before = len(graph.get_operations())
    factor = case.build(*tensors)
    assert factor.name == factor._var_scope
    assert factor.batch_size() == case.batch * case.towers
    assert len(graph.get_operations()) == before
    assert not tf1.global_variables()


@every_class
def test_cov_shape_is_plain_ints_and_that_of_the_statistic(case):
    data = case.data(0)
    factor = case.build(*case.tensors(data))
    assert all(type(dim) is int for dim in factor._cov_shape)
    assert tuple(factor._cov_shape) == case.expected_total(data).shape
    assert factor._dtype == tf.float64


@every_class
def test_cov_is_refused_before_its_variables_exist(case):
    factor = case.build(*case.tensors(case.data(0)))
    with pytest.raises(AttributeError, match="instantiate_cov_variables"):
        _ = factor.cov
    with pytest.raises(AttributeError, match="instantiate_cov_variables"):
        factor.make_covariance_update_op(1.0, 1.0)


@every_class
def test_cov_variables_are_created_once_under_the_factors_name(case):
    with tf1.variable_scope("outer"):
        factor, _, _ = start(case)
    names = {variable.name for variable in tf1.global_variables()}
    prefix = f"outer/{factor.name}"
    assert {f"{prefix}/cov/var:0", f"{prefix}/cov/total_weight:0"} <= names
    assert {variable.name for variable in factor.cov_variables()} == names
    with pytest.raises(AssertionError):
        factor.instantiate_cov_variables()


@every_class
def test_average_is_the_debiased_weighted_mean_of_the_statistics(case):
    factor, tensors, first = start(case)
    second = case.data(1)
    decay, weight = tf1.placeholder(tf.float32, ()), tf1.placeholder(tf.float32, ())
    update = factor.make_covariance_update_op(decay, weight)
    cov = factor.cov
    with session() as running:
        # Nothing yet: zeros, not 0/0.
        np.testing.assert_array_equal(running.run(cov), np.zeros(factor._cov_shape))
        for data, d, w in ((first, 1.0, 1.0), (second, 0.5, 0.25)):
            feed = case.feed(tensors, data) | {decay: d, weight: w}
            running.run(update, feed)
        value = running.run(cov)
    total = 0.5 * case.expected_total(first) + 0.25 * case.expected_total(second)
    np.testing.assert_allclose(value, total / 0.75, **TIGHT)


@every_class
def test_without_debiasing_the_average_is_the_plain_weighted_sum(case):
    with config.override(zero_debias=False):
        factor, tensors, data = start(case)
    update = factor.make_covariance_update_op(0.5, 0.25)
    cov = factor.cov
    with session() as running:
        running.run(update)
        running.run(update)
        value = running.run(cov)
    expected = (0.5 + 1) * 0.25 * case.expected_total(data)
    np.testing.assert_allclose(value, expected, **TIGHT)


@every_class
def test_deferred_tensors_give_what_their_tensors_give(case, graph):
    data = case.data(0)
    tensors = case.tensors(data)
    waiting = cases.map_data(cases.deferred_of, tensors)
    before = len(graph.get_operations())
    factor = case.build(*waiting)
    factor.set_name("layer/role")
    assert factor.batch_size() == case.batch * case.towers
    assert len(graph.get_operations()) == before
    factor.instantiate_cov_variables()
    # Built where a data tensor of the branch must not leak out of it.
    update = tf1.cond(
        tf.constant(True),
        lambda: tf.group(factor.make_covariance_update_op(1.0, 1.0)),
        tf.no_op,
    )
    cov = factor.cov
    with session() as running:
        running.run(update)
        value = running.run(cov)
    np.testing.assert_allclose(value, case.expected_total(data), **TIGHT)


@every_class
def test_partial_batches_of_one_size_pass_the_check(case):
    factor = case.build(*case.tensors(case.data(0)))
    with session() as running:
        running.run(factor.check_partial_batch_sizes())


@every_class
def test_powers_and_inverse_equal_those_of_the_dense_damped_matrix(case):
    factor, _, data = start(case)
    damping = cases.damping_func(0.3)
    exponents = (-1, 1) if case.kind == "sua" else (-1, -0.5, 0.5, 1)
    for exponent in exponents:
        factor.register_matpower(exponent, damping)
    factor.instantiate_inv_variables()
    updates = factor.make_inverse_update_ops()
    cov_update = factor.make_covariance_update_op(1.0, 1.0)
    dense = {e: factor.get_matpower(e, damping).to_dense() for e in exponents}
    undamped = factor.get_cov_as_linear_operator().to_dense()
    with session() as running:
        running.run(cov_update)
        running.run(updates)
        undamped, dense = running.run([undamped, dense])
    matrix = case.expected_total(data)
    if case.kind == "diagonal":
        matrix = np.diag(matrix.ravel())
    if case.kind != "sua":  # Its operator is checked in a test of its own.
        np.testing.assert_allclose(undamped, matrix, **TIGHT)
    values, vectors = np.linalg.eigh(undamped + 0.3 * np.eye(len(undamped)))
    for exponent, result in dense.items():
        expected = (vectors * values**exponent) @ vectors.T
        np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "case", cases.DENSE + cases.DIAGONAL, ids=lambda case: case.name
)
def test_cholesky_factor_and_its_inverse_are_lower_and_reproduce_the_matrix(case):
    factor, _, _ = start(case)
    damping = cases.damping_func(0.3)
    factor.register_cholesky(damping)
    factor.register_cholesky_inverse(damping)
    factor.instantiate_inv_variables()
    cov_update = factor.make_covariance_update_op(1.0, 1.0)
    updates = factor.make_inverse_update_ops()
    fetches = [
        factor.get_cov_as_linear_operator().to_dense(),
        factor.get_cholesky(damping).to_dense(),
        factor.get_cholesky_inverse(damping).to_dense(),
    ]
    with session() as running:
        running.run(cov_update)
        running.run(updates)
        cov, lower, inverse = running.run(fetches)
    identity = np.eye(len(cov))
    np.testing.assert_allclose(lower @ lower.T, cov + 0.3 * identity, rtol=1e-10)
    np.testing.assert_allclose(inverse @ lower, identity, atol=1e-10)
    for matrix in (lower, inverse):
        np.testing.assert_array_equal(matrix, np.tril(matrix))


@every_class
def test_nothing_registered_needs_no_inverse_variable_and_no_update(case):
    factor, _, _ = start(case)
    factor.instantiate_inv_variables()
    assert factor.get_inv_vars() == []
    assert factor.inverse_variables() == []
    assert factor.fallbacks is None
    one_group = isinstance(factor, ff.FullyConnectedMultiKF)
    assert len(factor.make_inverse_update_ops()) == (1 if one_group else 0)


@every_class
def test_a_stable_name_replaces_tensor_names_everywhere(case):
    factor, _, _ = start(case, name="dense_1/kernel/input")
    damping = cases.damping_func(0.3)
    factor.register_matpower(-1, damping)
    factor.instantiate_inv_variables()
    assert factor.name == "dense_1/kernel/input"
    names = [variable.name for variable in tf1.global_variables()]
    assert all(name.startswith("dense_1/kernel/input/") for name in names)
    if case.kind != "diagonal":
        assert "dense_1/kernel/input/matpower_exp-1_damp0:0" in names
        assert "dense_1/kernel/input/fallbacks:0" in names
    with pytest.raises(errors.ArgumentError, match="has variables already"):
        factor.set_name("other")


@every_class
def test_cov_vars_are_values_and_cov_variables_are_variables(case):
    factor, _, _ = start(case)
    assert [tuple(v.shape) for v in factor.get_cov_vars()] == [tuple(factor._cov_shape)]
    assert all(isinstance(v, tf.Variable) for v in factor.cov_variables())


@pytest.mark.parametrize("case", cases.DENSE, ids=lambda case: case.name)
def test_dense_factors_serve_only_what_was_registered_in_time(case):
    factor, _, _ = start(case)
    damping, late = cases.damping_func(0.3), cases.damping_func(0.4)
    factor.register_inverse(damping)
    factor.instantiate_inv_variables()
    factor.register_inverse(late)
    factor.get_inverse(damping)
    with pytest.raises(KeyError, match="matrix power"):
        factor.get_inverse(late)
    with pytest.raises(KeyError, match="matrix power"):
        factor.get_matpower(-0.5, damping)
    with pytest.raises(KeyError, match="Cholesky factor"):
        factor.get_cholesky(damping)
    with pytest.raises(KeyError, match="inverse Cholesky factor"):
        factor.get_cholesky_inverse(damping)
    with pytest.raises(AttributeError, match="func_id"):
        factor.register_inverse(lambda: 0.3)


@pytest.mark.parametrize("case", cases.DIAGONAL, ids=lambda case: case.name)
def test_diagonal_factors_serve_any_power_unregistered_and_fresh(case):
    factor, _, data = start(case)
    update = factor.make_covariance_update_op(1.0, 1.0)
    power = factor.get_matpower(-0.25, lambda: 0.3).to_dense()
    with session() as running:
        # Before the first update: powers of the damping alone.
        first = running.run(power)
        running.run(update)
        second = running.run(power)
    np.testing.assert_allclose(first, np.eye(len(first)) * 0.3**-0.25, rtol=1e-12)
    expected = (case.expected_total(data).ravel() + 0.3) ** -0.25
    np.testing.assert_allclose(np.diag(second), expected, rtol=1e-12)


@every_class
def test_update_ops_follow_the_device_they_are_built_under(case):
    factor, _, _ = start(case)
    with tf.device("/CPU:0"):
        update = factor.make_covariance_update_op(1.0, 1.0)
    assert update.device.lower().endswith("cpu:0")


def test_tower_statistics_are_placed_with_the_data_unless_concatenated():
    for strategy, device in (("separate", "/device:CPU:3"), ("concat", "")):
        with tf.Graph().as_default(), config.override(tower_strategy=strategy):
            with tf.device("/device:CPU:3"):
                data = tf1.placeholder(tf.float32, (4, 2))
            factor = ff.FullyConnectedKroneckerFactor(((data,),))
            assert factor._compute_total_new_cov().op.inputs[0].device == device


@pytest.mark.parametrize(
    "abstract",
    [
        ff.FisherFactor,
        ff.DenseSquareMatrixFactor,
        ff.DiagonalFactor,
        ff.ScaleAndShiftFactor,
    ],
)
def test_abstract_classes_cannot_be_instantiated(abstract):
    with pytest.raises(TypeError, match="abstract"):
        abstract()


def test_shards_of_different_size_are_refused_on_the_whole_grid():
    three, four = tf.zeros([3, 2]), tf.zeros([4, 2])
    # One source, several towers; and several sources that disagree off the diagonal.
    for tensors in (((three, four),), ((three, three), (four, three))):
        factor = ff.FullyConnectedKroneckerFactor(tensors)
        with pytest.raises(ValueError, match="Inconsistent partial batch sizes"):
            factor.check_partial_batch_sizes()


def test_shards_of_dynamic_size_are_compared_when_run():
    data = tf1.placeholder(tf.float32, [None, 2])
    factor = ff.FullyConnectedKroneckerFactor(((tf.zeros([3, 2]), data),))
    check = factor.check_partial_batch_sizes()
    total = factor.batch_size()
    with session() as running:
        running.run(check, {data: np.zeros((3, 2))})
        assert running.run(total, {data: np.zeros((3, 2))}) == 6
        with pytest.raises(tf.errors.InvalidArgumentError, match="Inconsistent"):
            running.run(check, {data: np.zeros((4, 2))})


@every_class
def test_statistics_are_averaged_over_replicas(case, monkeypatch):
    # Stands in for the collective; every statistic must pass through it, once.
    passed = []

    def all_average(value):
        passed.append(value)
        return 3 * value

    monkeypatch.setattr(utils, "all_average", all_average)
    factor, _, data = start(case)
    update = factor.make_covariance_update_op(1.0, 1.0)
    cov = factor.cov
    with session() as running:
        running.run(update)
        value = running.run(cov)
    assert len(passed) == 1
    if case.kind != "sua":  # Its covariance is not linear in the moment.
        np.testing.assert_allclose(value, 3 * case.expected_total(data), **TIGHT)
