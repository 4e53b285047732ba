"""Targets, constructor arguments and their errors."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import errors, loss_functions
from kfac.tests import graph_kinds
from kfac.tests.ops.loss_cases import BY_NAME, CASES, IDS, in_function

Normal = loss_functions.NormalMeanNegativeLogProbLoss
MeanVariance = loss_functions.NormalMeanVarianceNegativeLogProbLoss
Categorical = loss_functions.CategoricalLogitsNegativeLogProbLoss
Onehot = loss_functions.OnehotCategoricalLogitsNegativeLogProbLoss
Bernoulli = loss_functions.MultiBernoulliNegativeLogProbLoss


def _value(build):
    return in_function(lambda: build().evaluate())


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_missing_targets_are_an_error_that_says_so(case):
    loss = case.loss()
    assert loss.targets is None
    with pytest.raises(errors.MissingTargetsError, match="unspecified targets"):
        loss.evaluate()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_nothing_flows_into_the_targets(case):
    if case.kind == "class":
        pytest.skip("class indices are integers")

    def build():
        source = tf.constant(case.some_targets().astype(np.float64))
        loss = case.loss(targets=1.0 * source)
        assert tf.gradients(loss.evaluate(), source) == [None]
        return source

    in_function(build)


def test_squared_error_includes_the_normalising_constant():
    mean, targets = np.array([[1.0, 2.0]]), np.array([[0.0, 4.0]])
    value = _value(lambda: Normal(tf.constant(mean), targets=targets))
    np.testing.assert_allclose(value, 1 + 4 + 2 * 0.5 * np.log(np.pi))


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8, list])
def test_targets_of_another_dtype_are_cast(dtype):
    binary = np.array([[0, 1], [1, 1]])
    given = binary.tolist() if dtype is list else binary.astype(dtype)
    for cls in (Normal, Onehot, Bernoulli):
        logits = tf.constant([[0.3, -0.2], [0.1, 0.7]])
        expected = _value(lambda: cls(logits, targets=binary.astype("f4")))
        actual = _value(lambda: cls(logits, targets=given))
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual, expected)


def test_lists_of_floats_keep_the_precision_of_a_float64_model():
    mean = tf.zeros([1, 1], tf.float64)
    value = _value(lambda: Normal(mean, targets=[[0.1]]))
    np.testing.assert_allclose(value, 0.1**2 + 0.5 * np.log(np.pi), rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64, list])
def test_class_indices_may_be_integers_or_floats_that_hold_integers(dtype):
    logits = np.random.default_rng(0).normal(size=[3, 4])
    classes = np.array([3, 0, 1])
    given = classes.tolist() if dtype is list else classes.astype(dtype)
    expected = np.log(np.exp(logits).sum(1)) - logits[range(3), classes]
    value = _value(lambda: Categorical(tf.constant(logits), targets=given))
    np.testing.assert_allclose(value, expected.sum())


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, bool])
def test_class_indices_of_a_small_type_are_refused(dtype):
    loss = Categorical(tf.zeros([2, 3]), targets=np.array([0, 1], dtype))
    with pytest.raises(TypeError, match="int32"):
        _value(lambda: loss)


def test_class_index_out_of_range_fails_at_run_time():
    with pytest.raises(tf.errors.InvalidArgumentError):
        _value(lambda: Categorical(tf.zeros([2, 3]), targets=np.array([0, 3])))


def test_soft_targets_give_soft_label_cross_entropy():
    """And the right gradient, also of rows that do not sum to one."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=[2, 3]), rng.uniform(size=[2, 3])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    sigmoid = 1 / (1 + np.exp(-logits))

    def build():
        z = tf.constant(logits)
        values = [cls(z, targets=targets).evaluate() for cls in (Onehot, Bernoulli)]
        return values, [tf.gradients(v, z)[0] for v in values]

    values, gradients = in_function(build)
    np.testing.assert_allclose(values[0], -(targets * np.log(p)).sum())
    binary = targets * np.log(sigmoid) + (1 - targets) * np.log(1 - sigmoid)
    np.testing.assert_allclose(values[1], -binary.sum())
    expected = targets.sum(1, keepdims=True) * p - targets
    np.testing.assert_allclose(gradients[0], expected)
    np.testing.assert_allclose(gradients[1], sigmoid - targets)


@pytest.mark.parametrize(
    ("cls", "shape", "targets"),
    [
        (Normal, [3, 1], [3]),
        (Normal, [3, 2], [1, 2]),
        (Categorical, [3, 2], [3, 1]),
        (Categorical, [3, 2], [2]),
        (Onehot, [3, 2], [3]),
        (Bernoulli, [3, 1], [3]),
    ],
)
def test_targets_of_another_shape_are_refused_not_broadcast(cls, shape, targets):
    loss = cls(tf.zeros(shape), targets=np.zeros(targets, np.int32))
    with pytest.raises(ValueError, match="not broadcast"):
        _value(lambda: loss)


def test_mean_variance_targets_of_another_shape_are_refused():
    loss = MeanVariance(tf.zeros([2, 1]), tf.ones([2, 1]), targets=np.zeros([2]))
    with pytest.raises(ValueError, match="not broadcast"):
        _value(lambda: loss)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_targets_of_another_runtime_shape_are_refused(kind):
    def build():
        logits = tf.compat.v1.placeholder_with_default(np.zeros([3, 2]), [None, 2])
        targets = tf.compat.v1.placeholder_with_default(np.zeros([1, 2]), [None, 2])
        return Bernoulli(logits, targets=targets).evaluate()

    with pytest.raises(tf.errors.InvalidArgumentError, match="not broadcast"):
        graph_kinds.Run(kind, build)()


def test_single_case_logits_are_a_vector():
    logits, vector = np.array([0.1, 0.5, -0.3]), np.array([1.0, 2.0, 3.0])
    p = np.exp(logits) / np.exp(logits).sum()
    fisher = np.diag(p) - np.outer(p, p)

    def build():
        loss = Categorical(tf.constant(logits), targets=1)
        vectors = [vector, vector[None], np.stack([vector, 2 * vector])]
        return (
            loss.evaluate(),
            loss.evaluate_on_sample(seed=1),
            [loss.multiply_fisher(v) for v in vectors],
            loss.multiply_fisher_factor_replicated_one_hot((2,)),
        )

    value, sampled, products, column = in_function(build)
    np.testing.assert_allclose(value, -np.log(p[1]))
    assert np.isclose(-np.log(p), sampled).any()
    np.testing.assert_allclose(products[0], fisher @ vector)
    np.testing.assert_allclose(products[1], [fisher @ vector])
    np.testing.assert_allclose(products[2], [fisher @ vector, 2 * fisher @ vector])
    np.testing.assert_allclose(column, np.sqrt(p[2]) * (np.eye(3)[2] - p))


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_value_of_a_single_case_is_not_negated_by_graph_optimisers(kind):
    """Sums of one element are removed from graphs, and then signs must survive."""

    def build():
        one = tf.constant([0.5])
        return [
            Categorical(tf.constant([0.1, 0.5]), targets=1).evaluate(),
            Onehot(one, targets=[2.0]).evaluate(),
            Bernoulli(one, targets=[1.0]).evaluate(),
            Normal(one, targets=[1.0]).evaluate(),
        ]

    expected = [
        np.log(1 + np.exp(-0.4)),
        0.0,
        np.log(1 + np.exp(-0.5)),
        0.25 + 0.5 * np.log(np.pi),
    ]
    np.testing.assert_allclose(graph_kinds.Run(kind, build)(), expected, rtol=1e-6)


@pytest.mark.parametrize("var", [2, np.float32(2), np.float64(2), np.array(2.0)])
def test_variance_may_be_any_number(var):
    vector = np.ones([1, 2])
    product = in_function(lambda: Normal(np.zeros([1, 2]), var).multiply_fisher(vector))
    np.testing.assert_array_equal(product, vector / 2)


def test_variance_must_be_a_positive_number():
    mean = tf.zeros([1, 2])
    for var in (0.0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            Normal(mean, var)
    for var in ("0.5", None, np.ones([2]), tf.ones([1, 2]), True):
        with pytest.raises(AssertionError, match="number"):
            Normal(mean, var)


def test_variance_as_a_scalar_tensor_must_be_known_while_building():
    def build():
        mean = tf.zeros([1, 2])
        assert isinstance(Normal(mean, tf.constant(0.5)), Normal)
        with pytest.raises(AssertionError, match="number"):
            Normal(mean, tf.random.uniform([]))
        return mean

    in_function(build)


def test_mean_and_variance_must_be_matrices_of_one_shape():
    matrix, vector = tf.ones([2, 3]), tf.ones([3])
    with pytest.raises(AssertionError, match="Expect 2D mean tensor."):
        MeanVariance(vector, matrix)
    with pytest.raises(AssertionError, match="Expect 2D variance tensor."):
        MeanVariance(matrix, vector)
    with pytest.raises(ValueError, match="same shape"):
        MeanVariance(matrix, matrix[:1])

    def unknown_rank(x):
        with pytest.raises(ValueError, match="2D"):
            MeanVariance(x, matrix)
        return x

    spec = [tf.TensorSpec(None, tf.float32)]
    tf.function(unknown_rank, input_signature=spec, autograph=False)(matrix)


def test_classes_with_members_left_abstract_cannot_be_instantiated():
    for cls in (
        loss_functions.LossFunction,
        loss_functions.NegativeLogProbLoss,
        loss_functions.NaturalParamsNegativeLogProbLoss,
        loss_functions.DistributionNegativeLogProbLoss,
    ):
        with pytest.raises(TypeError, match="abstract"):
            cls()


def test_a_subclass_that_supplies_a_distribution_evaluates_and_samples_by_it():
    class Uncovered:
        def log_prob(self, targets):
            return -tf.constant(targets)

        def sample(self, seed):
            return tf.constant([float(seed)])

    class Custom(Bernoulli):
        dist = property(lambda self: Uncovered())
        sample = loss_functions.DistributionNegativeLogProbLoss.sample
        _evaluate = loss_functions.DistributionNegativeLogProbLoss._evaluate

    def build():
        loss = Custom(tf.zeros([2]), targets=[1.0, 2.0], seed=7)
        return loss.evaluate(), loss.sample(3)

    value, sample = in_function(build)
    assert value == 3.0
    assert sample == [3.0]


@pytest.mark.parametrize("dim", [1, -2])
def test_insert_slice_in_zeros_places_the_slice(dim):
    for values in (np.ones([2, 1, 3]), np.ones([2, 1, 3], np.int32)):
        expected = np.zeros([2, 4, 3], values.dtype)
        expected[:, 2:3] = values
        result = in_function(
            lambda: loss_functions.insert_slice_in_zeros(values, dim, 4, 2)
        )
        assert result.dtype == values.dtype
        np.testing.assert_array_equal(result, expected)


def test_insert_slice_in_zeros_refuses_what_it_cannot_place():
    insert = loss_functions.insert_slice_in_zeros
    for wrong_size, found in ((0, 2), (2, 3)):
        with pytest.raises(ValueError, match=rf"{wrong_size}.*found {found}"):
            insert(np.ones([2, 1, 3]), wrong_size, 4, 2)
    for position in (-1, 4):
        with pytest.raises(ValueError, match="outside"):
            insert(np.ones([2, 1]), 1, 4, position)
    with pytest.raises(ValueError, match="does not exist"):
        insert(np.ones([2, 1]), 2, 4, 0)

    def unknown(size, rank):
        with pytest.raises(ValueError, match="found None"):
            insert(size, 1, 4, 0)
        with pytest.raises(ValueError, match="rank"):
            insert(rank, 1, 4, 0)
        return size

    signature = [tf.TensorSpec([2, None]), tf.TensorSpec(None)]
    arguments = tf.ones([2, 1]), tf.ones([2, 1])
    tf.function(unknown, input_signature=signature, autograph=False)(*arguments)


def test_one_hot_of_unknown_rank_is_refused():
    def build(logits):
        with pytest.raises(ValueError, match="rank"):
            Bernoulli(logits).multiply_fisher_factor_replicated_one_hot((0,))
        return logits

    spec = [tf.TensorSpec(None, tf.float32)]
    tf.function(build, input_signature=spec, autograph=False)(tf.zeros([2, 2]))


def test_probabilities_are_computed_once_per_graph():
    def build():
        loss = BY_NAME["categorical"].loss()
        for _ in range(3):
            loss.multiply_fisher(np.ones([2, 3]))
            loss.multiply_fisher_factor_replicated_one_hot((1,))
        operations = tf.compat.v1.get_default_graph().get_operations()
        assert [op.type for op in operations].count("LogSoftmax") == 1
        return tf.constant(0)

    in_function(build)
