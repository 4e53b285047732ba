import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import utils
from kfac.tests import graph_kinds

tf1 = tf.compat.v1
RNG = np.random.RandomState(0)
W, X, V = RNG.randn(3, 2), RNG.randn(4, 3), RNG.randn(3, 2)


def _jacobian_vector_product(f, x, v, step=1e-6):
    """Central difference; its error is of the order of `step` squared."""
    return (f(x + step * v) - f(x - step * v)) / (2 * step)


def _network(w):
    return np.tanh(X @ w), np.sum(w**2)


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
def test_fwd_gradients_is_the_jacobian_times_the_vector(kind):
    def build():
        w = graph_kinds.variable(W, "w")
        ys = [tf.tanh(tf.constant(X) @ w), tf.reduce_sum(w**2)]
        return utils.fwd_gradients(ys, [w], [tf.constant(V)], stop_gradients=[w])

    products = graph_kinds.Run(kind, build)()
    for i, product in enumerate(products):
        expected = _jacobian_vector_product(lambda w, i=i: _network(w)[i], W, V)
        np.testing.assert_allclose(product, expected, atol=1e-8)


def test_fwd_gradients_sums_over_xs_and_defaults_to_vectors_of_ones():
    with tf.Graph().as_default(), tf1.Session() as session:
        a, b = tf.constant([1.0, 2.0]), tf.constant([3.0, 5.0])
        y = a * b
        explicit = utils.fwd_gradients(y, [a, b], [[1.0, 1.0], [1.0, 1.0]])
        default = utils.fwd_gradients([y], (a, b))
        partly = utils.fwd_gradients(y, [a, b], [[2.0, 0.0], None])
        results = session.run([explicit, default, partly])
    np.testing.assert_array_equal(results, [[[4, 7]], [[4, 7]], [[7, 2]]])


def test_stop_gradients_makes_the_derivatives_partial():
    with tf.Graph().as_default(), tf1.Session() as session:
        a = tf.constant(2.0)
        b = a**2
        y = a * b
        total = utils.fwd_gradients(y, [a, b])
        partial = utils.fwd_gradients(y, [a, b], stop_gradients=[a, b])
        # Total: dy/da = 3 a^2 = 12, plus dy/db = 2; partial: b + a.
        assert session.run([total, partial]) == [[14.0], [6.0]]


def test_unconnected_tensors_contribute_nothing_or_give_none():
    with tf.Graph().as_default(), tf1.Session() as session:
        a, b, c = tf.constant(2.0), tf.constant(3.0), tf.constant(4.0)
        products = utils.fwd_gradients([a**2, c**2], [a, b])
        assert products[1] is None
        assert session.run(products[0]) == 4.0
        assert utils.fwd_gradients([c**2], [a, b]) == [None]
        zero = tf.UnconnectedGradients.ZERO
        for ys in ([a**2, c**2], [c**2, c]):
            products = utils.fwd_gradients(ys, [a, b], unconnected_gradients=zero)
            assert session.run(products[1]) == 0.0


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_sparse_gradients_are_densified(kind):
    rows = np.array([2, 0, 2])

    def build():
        table = graph_kinds.variable(W, "table")
        y = tf.gather(table, rows) ** 2
        return utils.fwd_gradients(y, [table], [tf.constant(V)], stop_gradients=[table])

    (product,) = graph_kinds.Run(kind, build)()
    np.testing.assert_allclose(product, 2 * W[rows] * V[rows], rtol=1e-12)


def test_no_term_is_lost_because_the_cotangent_is_zero():
    # The second derivative of the cross entropy skips cotangents it can see are zero.
    logits, direction = RNG.randn(2, 3), RNG.randn(2, 3)
    with tf.Graph().as_default(), tf1.Session() as session:
        z = tf.constant(logits)
        labels = tf.constant([[1.0, 0, 0], [0, 0, 1.0]], tf.float64)
        loss = tf.nn.softmax_cross_entropy_with_logits(labels, z)
        gradient = tf.gradients(loss, z)[0]
        product = session.run(utils.fwd_gradients(gradient, z, [direction]))[0]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    hessian = p * direction - p * (p * direction).sum(-1, keepdims=True)
    np.testing.assert_allclose(product, hessian, rtol=1e-12)


def test_one_vector_for_each_x_is_required():
    with tf.Graph().as_default():
        a = tf.constant(1.0)
        with pytest.raises(ValueError, match="got 2 for 1 xs"):
            utils.fwd_gradients(a, [a], [a, a])


def _branch_gradient(differentiate):
    """`differentiate(y, w)` in a branch, for y computed outside and inside of it."""
    w = graph_kinds.variable(W, "w")
    outside = w**2

    def branch():
        # Uses the variable outside (w^2) and inside (times w): y = w^3.
        return differentiate(outside * w, w), differentiate(outside, w)

    def other():
        return tf.constant(np.zeros_like(W)), tf.constant(np.zeros_like(W))

    return tf.cond(tf.reduce_all(outside >= 0), branch, other)


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_gradients_inside_a_branch_see_the_uses_outside(kind):
    def build():
        return _branch_gradient(lambda y, w: utils.gradients(y, w)[0])

    both, outside = graph_kinds.Run(kind, build)()
    np.testing.assert_allclose(both, 3 * W**2, rtol=1e-12)
    np.testing.assert_allclose(outside, 2 * W, rtol=1e-12)


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_forward_derivatives_inside_a_branch_see_the_uses_outside(kind):
    def build():
        return _branch_gradient(
            lambda y, w: utils.fwd_gradients(y, [w], [V], stop_gradients=[w])[0]
        )

    both, outside = graph_kinds.Run(kind, build)()
    np.testing.assert_allclose(both, 3 * W**2 * V, rtol=1e-12)
    np.testing.assert_allclose(outside, 2 * W * V, rtol=1e-12)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_gradients_are_those_of_tensorflow(kind):
    def build():
        w = graph_kinds.variable(W, "w")
        unused = graph_kinds.variable(V, "unused")
        y = tf.constant(X) @ w
        found = utils.gradients([y, 2 * y], [w, unused, y], [y, y])
        assert found[1] is None
        return [found[0], found[2], *tf.gradients([y, 2 * y], [w, y], [y, y])]

    w_grad, y_grad, tf_w_grad, tf_y_grad = graph_kinds.Run(kind, build)()
    np.testing.assert_allclose(w_grad, 3 * X.T @ X @ W, rtol=1e-12)
    np.testing.assert_allclose(w_grad, tf_w_grad, rtol=1e-14)
    np.testing.assert_allclose(y_grad, tf_y_grad, rtol=1e-14)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_random_signs_are_independent_fair_and_fresh_at_each_run(kind):
    count = 4000

    def build():
        return utils.generate_random_signs(tf.constant([2, count]), tf.float64)

    run = graph_kinds.Run(kind, build)
    first, second = run(), run()
    assert set(np.unique(first)) == {-1.0, 1.0}
    # Means of `count` fair signs have a standard deviation of 1 / sqrt(count).
    bound = 5 / np.sqrt(count)
    assert abs(first.mean()) < bound
    assert abs(np.mean(first[0] * first[1])) < bound
    assert abs(np.mean(first * second)) < bound


def test_random_signs_have_the_shape_and_dtype_asked_for():
    assert utils.generate_random_signs([2, 3]).dtype == tf.float32
    signs = utils.generate_random_signs([2, 3], dtype=tf.int64)
    assert signs.dtype == tf.int64
    assert signs.shape == [2, 3]


def test_a_seed_tensor_determines_the_signs():
    draws = [utils.generate_random_signs([64], seed=[1, s]) for s in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.any(draws[0] != draws[2])


def test_an_int_seed_makes_a_reproducible_stream():
    def two_draws():
        with tf.Graph().as_default(), tf1.Session() as session:
            signs = utils.generate_random_signs([64], seed=3)
            return session.run(signs), session.run(signs)

    (first, second), again = two_draws(), two_draws()
    np.testing.assert_array_equal((first, second), again)
    assert np.any(first != second)
