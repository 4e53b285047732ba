"""Targets drawn from the model: distribution, seeds, streams, reproducibility."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import loss_functions
from kfac.tests import graph_kinds
from kfac.tests.ops import loss_cases
from kfac.tests.ops.loss_cases import BY_NAME, CASES, IDS, in_function

every_loss = pytest.mark.parametrize("case", CASES, ids=IDS)

# With this many independent draws and five standard errors of tolerance, a correct
# sampler would fail once in about 1.7 million comparisons; seeds are fixed besides.
DRAWS = 20000
STANDARD_ERRORS = 5.0


def _many(case, seed=5):
    """Draws for each of the cases' distributions `[DRAWS, batch, ...]`."""

    def build():
        params = [
            tf.constant(np.tile(p, [DRAWS] + [1] * (p.ndim - 1))) for p in case.params
        ]
        loss = case.loss(params=params)
        return [loss.sample(seed), loss.sample(tf.constant([seed, 1]))]

    return [
        s.reshape(DRAWS, case.batch, *s.shape[1:]).astype(np.float64)
        for s in in_function(build)
    ]


def _assert_mean(samples, expected, variance):
    error = np.abs(samples.mean(0) - expected)
    assert np.all(error <= STANDARD_ERRORS * np.sqrt(variance / DRAWS) + 1e-12)


@every_loss
def test_samples_have_the_predicted_distribution(case):
    for samples in _many(case):
        if case.kind == "real":
            mean = case.params[0]
            var = case.params[1] if len(case.params) == 2 else case.kwargs["var"]
            var = np.broadcast_to(var, mean.shape)
            _assert_mean(samples, mean, var)
            # The variance of a squared normal deviation is 2 var².
            _assert_mean((samples - mean) ** 2, var, 2 * var**2)
        elif case.kind == "binary":
            p = 1 / (1 + np.exp(-case.params[0]))
            assert set(np.unique(samples)) == {0, 1}
            _assert_mean(samples, p, p * (1 - p))
        else:
            p = loss_cases.softmax(case.params[0])
            if case.kind == "class":
                samples = np.eye(p.shape[-1])[samples.astype(int)]
            np.testing.assert_array_equal(samples.sum(-1), 1)
            _assert_mean(samples, p, p * (1 - p))


def test_rare_outcomes_of_half_precision_logits_keep_their_frequency():
    """Logits of -6 have p = 0.0025; uniform bfloat16 numbers are multiples of 1/128."""

    def build():
        logits = tf.fill([DRAWS], tf.constant(-6.0, tf.bfloat16))
        return loss_functions.MultiBernoulliNegativeLogProbLoss(logits).sample(seed=2)

    p = 1 / (1 + np.exp(6.0))
    _assert_mean(in_function(build), p, p * (1 - p))


@every_loss
def test_elements_of_a_sample_are_independent(case):
    samples, _ = _many(case)
    flat = samples.reshape(DRAWS, -1)
    if case.kind == "onehot":
        flat = samples.argmax(-1).reshape(DRAWS, -1)
    correlations = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    # A correlation coefficient of independent draws has standard error 1 / √draws.
    assert np.abs(correlations).max() <= STANDARD_ERRORS / np.sqrt(DRAWS)


@every_loss
def test_sample_shape_and_dtype(case):
    static = [None, *case.params[0].shape[1:]]
    expected = static[:-1] if case.kind == "class" else static

    def build(*params):
        sample = case.loss(params=params).sample()
        assert sample.shape.as_list() == expected
        return sample

    specs = [tf.TensorSpec(static, tf.float64) for _ in case.params]
    sample = tf.function(build, autograph=False, input_signature=specs)(*case.params)
    assert sample.dtype == (tf.float64 if case.kind == "real" else tf.int32)
    assert sample.shape[0] == case.batch


def _normals(**kwargs):
    return loss_functions.NormalMeanNegativeLogProbLoss(tf.zeros([4, 3]), **kwargs)


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_equal_seeds_give_equal_first_draws_and_streams_advance(kind):
    def build():
        first, second = _normals(seed=0), _normals(seed=0)
        return {
            "first": first.evaluate_on_sample(),
            "second": second.evaluate_on_sample(),
            "again": first.evaluate_on_sample(),
            "explicit": _normals(seed=9).evaluate_on_sample(seed=0),
            "other": _normals(seed=9).evaluate_on_sample(),
        }

    run = graph_kinds.Run(kind, build)
    draws = run()
    assert draws["first"] == draws["second"] == draws["again"] == draws["explicit"]
    assert draws["other"] != draws["first"]
    later = run()
    assert later["first"] == later["second"] != draws["first"]
    assert graph_kinds.Run(kind, build)()["first"] == draws["first"]


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_without_seeds_draws_are_unrelated(kind):
    def build():
        loss = _normals()
        return [loss.evaluate_on_sample(), loss.evaluate_on_sample()]

    first, second = graph_kinds.Run(kind, build)()
    assert first != second


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
def test_tensor_seeds_make_the_draw_a_function_of_the_seed(kind):
    """Checkpoints need it: the seed can hold the step."""

    def build():
        return [
            _normals(seed=tf.constant([1, step], dtype)).evaluate_on_sample()
            for step, dtype in ((0, tf.int32), (0, tf.int64), (1, tf.int32))
        ]

    run = graph_kinds.Run(kind, build)
    same, as_int64, other = run()
    assert same == as_int64 != other
    np.testing.assert_array_equal(run(), [same, as_int64, other])


@every_loss
def test_stateless_draws_are_reproduced(case):
    def build():
        loss = case.loss(seed=tf.constant([1, 2]))
        return loss.sample((1, 2)), loss.sample(np.array([1, 2])), loss.sample((3, 4))

    first, same, other = in_function(build)
    np.testing.assert_array_equal(first, same)
    assert first.shape == other.shape


def test_seeds_of_another_shape_or_dtype_are_refused():
    def build():
        for seed in ([1, 2, 3], 1.5, np.array([0.1, 0.2])):
            with pytest.raises(ValueError, match="shape \\[2\\]"):
                _normals(seed=seed).evaluate_on_sample()
        return tf.constant(0)

    in_function(build)


@pytest.mark.parametrize("name", ["normal", "normal mean and variance"])
def test_samples_count_as_constants(name):
    """A normal sample is a function of its mean; the sampled loss must not see it."""
    case = BY_NAME[name]

    def build():
        params = [tf.constant(p) for p in case.params]
        loss = case.loss(params=params, seed=11)
        gradient = tf.gradients(loss.evaluate_on_sample(), params[0])[0]
        return gradient, loss.sample(11)

    gradient, sample = in_function(build)
    var = case.params[1] if len(case.params) == 2 else case.kwargs["var"]
    np.testing.assert_allclose(gradient, (case.params[0] - sample) / var)


def test_saturated_logits_always_draw_their_class():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], "f4")

    def build():
        tensor = tf.constant(logits)
        return (
            loss_functions.CategoricalLogitsNegativeLogProbLoss(tensor).sample(1),
            loss_functions.MultiBernoulliNegativeLogProbLoss(tensor).sample(1),
        )

    classes, binary = in_function(build)
    np.testing.assert_array_equal(classes, [0, 1])
    np.testing.assert_array_equal(binary, [[1, 0], [0, 1]])
