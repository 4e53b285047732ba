"""The curvature of a trained Keras model as an operator, against dense matrices."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kfac.python.keras.fishleg import FishLeg
from kfac.python.ops import curvature_operator, laplace
from kfac.tests.keras import keras_cases as cases

PRIOR = 2.0


def network():
    """Attention, a norm and a convolution, small enough for dense matrices."""
    inputs = keras.Input((4, 3))
    hidden = layers.MultiHeadAttention(2, 2, name="attention")(inputs, inputs)
    hidden = layers.LayerNormalization()(hidden)
    hidden = layers.Conv1D(2, 2, activation="tanh", name="conv")(hidden)
    return keras.Model(inputs, layers.Dense(cases.CLASSES)(layers.Flatten()(hidden)))


@pytest.fixture(scope="module", params=[None, "ekfac"])
def trained(request):
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    with cases.dtype_policy("float64"):
        model = network()
        optimizer = cases.make(model, fisher_approx=request.param)
        x, y = rng.normal(size=(12, 4, 3)), np.arange(12) % cases.CLASSES
        model.fit(x, y, epochs=4, batch_size=12, verbose=0)
    return model, optimizer


def test_the_operator_is_the_dense_matrix_whichever_way_it_is_got(trained):
    model, optimizer = trained
    operator = curvature_operator.curvature_operator(optimizer)
    matrix = operator.to_dense().numpy()
    assert len(matrix) == model.count_params()
    for other in (optimizer.layers, optimizer.optimizer):
        other = curvature_operator.curvature_operator(other)
        np.testing.assert_array_equal(other.to_dense(), matrix)
    vector = np.random.default_rng(1).normal(size=len(matrix))
    # The damping, 0.1, bounds the condition number: 1e-9 is far above rounding.
    tolerance = dict(rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(operator.matvec(vector), matrix @ vector, **tolerance)
    solution = np.linalg.solve(matrix, vector)
    np.testing.assert_allclose(operator.solvevec(vector), solution, **tolerance)
    np.testing.assert_allclose(operator.trace(), np.trace(matrix), **tolerance)
    determinant = np.linalg.slogdet(matrix)[1]
    np.testing.assert_allclose(operator.log_abs_determinant(), determinant, **tolerance)


def test_products_are_those_of_the_optimizer(trained):
    _, optimizer = trained
    operator = curvature_operator.curvature_operator(optimizer)
    variables = curvature_operator.parameters(optimizer)
    rng = np.random.default_rng(2)
    pairs = [(tf.constant(rng.normal(size=v.shape)), v) for v in variables]
    vector = curvature_operator.flatten(optimizer, pairs[::-1])
    products = [block.multiply for block in optimizer.layers.get_blocks()]
    by_block = []
    for params, multiply in zip(optimizer.layers.fisher_blocks, products, strict=True):
        group = params if isinstance(params, tuple) else (params,)
        own = tuple(next(t for t, v in pairs if v is w) for w in group)
        image = multiply(own if isinstance(params, tuple) else own[0])
        by_block += tf.nest.flatten(image)
    expected = np.concatenate([np.ravel(part) for part in by_block])
    np.testing.assert_allclose(operator.matvec(vector), expected, rtol=1e-9, atol=1e-12)


def test_posterior_and_evidence_are_those_of_dense_matrices(trained):
    _, optimizer = trained
    bare = curvature_operator.curvature_operator(optimizer, damped=False)
    posterior = laplace.LaplacePosterior(optimizer, 12, PRIOR)
    size = len(posterior.mean)
    precision = 12 * bare.to_dense().numpy() + PRIOR * np.eye(size)
    dense = posterior.precision.to_dense()
    np.testing.assert_allclose(dense, precision, rtol=1e-8, atol=1e-8)
    mean = posterior.mean.numpy()
    expected = (
        -3.0
        - PRIOR / 2 * mean @ mean
        + size / 2 * np.log(PRIOR)
        - np.linalg.slogdet(precision)[1] / 2
    )
    np.testing.assert_allclose(posterior.log_evidence(-3.0), expected, rtol=1e-9)
    samples = posterior.sample(4, seed=1)
    for draws, variable in samples:
        assert draws.shape == (4, *variable.shape)


@pytest.mark.parametrize("wrong", [keras.Sequential, dict, object])
def test_what_has_no_curvature_is_refused(wrong):
    with pytest.raises(TypeError, match=wrong.__name__):
        curvature_operator.curvature_operator(wrong())


def test_before_training_and_without_factors_it_says_what_is_missing():
    model = cases.sequential()
    with pytest.raises(ValueError, match="fit"):
        curvature_operator.curvature_operator(cases.make(model))
    optimizer = FishLeg(learning_rate=0.1, damping=0.1, model=model, warmup_steps=1)
    model.compile(optimizer=optimizer, loss=cases.sparse_logits())
    model.train_on_batch(*cases.data())
    with pytest.raises(ValueError, match="FishLeg"):
        curvature_operator.curvature_operator(optimizer)
