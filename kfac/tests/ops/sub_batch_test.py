"""Statistics and losses on the first cases of the batch."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import layer_collection, loss_functions, sub_batch
from kfac.python.ops.curvature_matrix_vector_products import (
    CurvatureMatrixVectorProductComputer,
)
from kfac.tests import estimator_cases as cases
from kfac.tests import graph_kinds, oracle

tf1 = tf.compat.v1


def part_of(model, fraction, batch_size=None):
    return sub_batch.SubBatch(model.collection, fraction, batch_size)


@pytest.mark.parametrize(
    "fraction, batch, expected",
    [(1.0, 7, 7), (0.5, 7, 4), (0.1, 30, 3), (1 / 3, 30, 10), (0.01, 5, 1)],
)
def test_the_count_is_the_fraction_rounded_up(fraction, batch, expected):
    with tf.Graph().as_default(), tf1.Session() as session:
        model = cases.build(cases.DENSE_SOFTMAX, dynamic=True)
        part = part_of(model, fraction)
        assert part.count(batch) == expected
        assert session.run(part.count(tf.constant(batch))) == expected


@pytest.mark.parametrize("fraction", [0, -0.5, 1.01, None, "1/2"])
def test_fractions_out_of_range_are_refused(fraction):
    with tf.Graph().as_default(), pytest.raises(ValueError, match="fraction"):
        part_of(cases.build(cases.DENSE_SOFTMAX), fraction)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_statistics_are_those_of_the_first_cases(kind, dynamic):
    case = cases.CONV_SIGMOID

    def build():
        model = cases.build(case, dynamic=dynamic)
        made = model.estimator(
            estimation_mode="empirical", cov_batch_fraction=0.6, batch_size=None
        )
        updates, _ = made.make_vars_and_create_op_thunks()

        def branch():
            with tf.control_dependencies([cases.update_all(updates)]):
                return tf.constant(1)

        due = tf1.placeholder_with_default(True, [])
        done = tf.cond(due, branch, lambda: tf.constant(0))
        return cases.after(done, lambda: made.factors[0].cov)

    total = case.first(2).example_gradients(square_root=True).sum(axis=0)
    expected = np.outer(total, total) / 2
    np.testing.assert_allclose(graph_kinds.Run(kind, build)(), expected, rtol=1e-9)


@pytest.mark.parametrize("mode", ["exact", "curvature_prop", "gradients"])
def test_every_mode_takes_the_part(mode):
    # One case of four, so that the exact mode gives its Fisher matrix.
    case = cases.MEAN_VARIANCE

    def build():
        model = cases.build(case)
        made = model.estimator(estimation_mode=mode, cov_batch_fraction=0.25)
        updates, _ = made.make_vars_and_create_op_thunks()
        return cases.after(cases.update_all(updates), lambda: made.factors[0].cov)

    cov = graph_kinds.Run(graph_kinds.FUNCTION, build)()
    if mode == "exact":
        assert oracle.relative_error(cov, case.first(1).fisher()) < 1e-9
    else:
        # One source is one gradient: rank one, in the row space of the Jacobian.
        ((_, jacobian),) = oracle.jacobians(case.net, case.params, case.x[:1])[0]
        projector = np.linalg.pinv(jacobian) @ jacobian
        np.testing.assert_allclose(projector @ cov @ projector, cov, atol=1e-9)
        assert np.linalg.matrix_rank(cov) == 1


@pytest.mark.parametrize("kind", [*graph_kinds.FAST, graph_kinds.XLA])
def test_exact_mode_on_the_part_follows_custom_gradients(kind):
    # The gradient of silu is a closure over the whole batch's tensors.
    base = cases.DENSE_SOFTMAX
    case = dataclasses.replace(
        base,
        net=lambda p, x: [tf.matmul(tf.nn.silu(tf.matmul(x, p[0]) + p[1]), p[2])],
    )

    def build():
        model = cases.build(case)
        made = model.estimator(estimation_mode="exact", cov_batch_fraction=0.2)
        updates, _ = made.make_vars_and_create_op_thunks()
        return cases.after(cases.update_all(updates), lambda: made.factors[0].cov)

    cov = graph_kinds.Run(kind, build)()
    assert oracle.relative_error(cov, case.first(1).fisher()) < 1e-9


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_embeddings_are_counted_on_the_part(kind):
    def build():
        ids = tf1.placeholder_with_default(np.array([2, 0, 2, 1]), [4])
        table = graph_kinds.variable(np.eye(3, 2) + 1, "table")
        out = tf.gather(table, ids)
        collection = layer_collection.LayerCollection()
        collection.register_fully_connected(table, ids, out, dense_inputs=False)
        collection.register_squared_error_loss(out, targets=tf.zeros_like(out))
        model = cases.Model(cases.DENSE_SOFTMAX, collection, [table], ids, [out])
        made = model.estimator(estimation_mode="empirical", cov_batch_fraction=0.5)
        updates, _ = made.make_vars_and_create_op_thunks()
        return cases.after(cases.update_all(updates), made.get_cov_vars)

    frequencies, moment = tf.nest.flatten(graph_kinds.Run(kind, build)())
    np.testing.assert_allclose(frequencies, [0.5, 0.0, 0.5])
    rows = 2 * (np.eye(3, 2) + 1)[[2, 0]]
    np.testing.assert_allclose(moment, rows.T @ rows / 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_layer_factors_get_inputs_and_gradients_of_the_part(dynamic):
    x = np.random.RandomState(0).randn(6, 3)
    w = np.random.RandomState(1).randn(3, 4)

    def build():
        inputs = tf1.placeholder_with_default(x, [None if dynamic else 6, 3])
        weights = graph_kinds.variable(w, "w")
        out = tf.matmul(inputs, weights)
        collection = layer_collection.LayerCollection()
        collection.register_fully_connected(weights, inputs, out)
        collection.register_squared_error_loss(out, targets=np.zeros([6, 4]))
        model = cases.Model(cases.DENSE_SOFTMAX, collection, [weights], inputs, [out])
        size = tf.shape(inputs)[0] if dynamic else 6
        made = model.estimator(
            estimation_mode="empirical", cov_batch_fraction=1 / 3, batch_size=size
        )
        updates, _ = made.make_vars_and_create_op_thunks()
        assert made.factors[0].batch_size() == 2 or dynamic
        return cases.after(cases.update_all(updates), made.get_cov_vars)

    covs = tf.nest.flatten(graph_kinds.Run(graph_kinds.V1_ON, build)())
    gradients = 2 * x[:2] @ w
    for cov, rows in zip(covs, (x[:2], gradients), strict=True):
        np.testing.assert_allclose(cov, rows.T @ rows / 2, rtol=1e-10)


def test_equal_tensors_stay_identical_so_that_factors_are_shared():
    with tf.Graph().as_default():
        x = tf1.placeholder(tf.float64, [4, 3])
        ws = [
            tf1.get_variable(name, initializer=np.eye(3), use_resource=True)
            for name in "uv"
        ]
        outs = [tf.matmul(x, w) for w in ws]
        collection = layer_collection.LayerCollection()
        for w, out in zip(ws, outs, strict=True):
            collection.register_fully_connected(w, x, out)
            collection.register_squared_error_loss(out)
        model = cases.Model(cases.DENSE_SOFTMAX, collection, ws, x, outs)
        made = model.estimator(cov_batch_fraction=0.5)
        made.create_ops_and_vars_thunks()
        assert len(made.factors) == 3
        part = made._sub_batch
        assert part.deferred(x) is part.deferred(x)
        assert part.deferred(x).shape.as_list() == [2, 3]
        assert part.deferred(ws[0]) is ws[0]


def test_towers_are_cut_each():
    x = np.random.RandomState(0).randn(2, 4, 3)
    w = np.random.RandomState(1).randn(3, 2)

    def build():
        weights = graph_kinds.variable(w, "w")
        collection = layer_collection.LayerCollection()
        for tower in range(2):
            inputs = tf1.placeholder_with_default(x[tower], [4, 3])
            out = tf.matmul(inputs, weights)
            reuse = tower > 0
            collection.register_fully_connected(weights, inputs, out, reuse=reuse)
            collection.register_squared_error_loss(
                out, targets=tf.zeros_like(out), name="loss", reuse=reuse
            )
        model = cases.Model(cases.DENSE_SOFTMAX, collection, [weights], None, [])
        made = model.estimator(
            estimation_mode="empirical", cov_batch_fraction=0.5, batch_size=8
        )
        updates, _ = made.make_vars_and_create_op_thunks()
        return cases.after(cases.update_all(updates), made.get_cov_vars)

    inputs = x[:, :2].reshape(4, 3)
    covs = tf.nest.flatten(graph_kinds.Run(graph_kinds.FUNCTION, build)())
    for cov, rows in zip(covs, (inputs, 2 * inputs @ w), strict=True):
        np.testing.assert_allclose(cov, rows.T @ rows / 4, rtol=1e-10)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_losses_and_products_on_the_part_are_those_of_the_first_cases(kind):
    case = cases.TWO_LOSSES
    direction = [np.ones(p.shape) for p in case.params]

    def build():
        model = cases.build(case)
        part = part_of(model, 0.5)
        losses = part.losses()
        assert part.losses() is losses
        assert len(losses.losses) == 2 and losses.loss_coeffs[losses.losses[0]] == 2.0
        products = CurvatureMatrixVectorProductComputer(losses, model.variables)
        return losses.total_loss(), products.multiply_fisher(direction)

    total, product = graph_kinds.Run(kind, build)()
    first = case.first(2)
    expected = 2 * first.fisher() @ np.concatenate([d.ravel() for d in direction])
    actual = np.concatenate([np.ravel(p) for p in product])
    np.testing.assert_allclose(actual, expected, rtol=1e-9)

    def whole():
        return cases.build(first).collection.total_loss()

    np.testing.assert_allclose(total, graph_kinds.Run(kind, whole)(), rtol=1e-12)


def test_the_arguments_of_a_function_are_cut():
    case = cases.DENSE_SOFTMAX

    @tf.function
    @tf.autograph.experimental.do_not_convert
    def logits_of_part(x, ws):
        out = case.net(ws, x)[0]
        collection = layer_collection.LayerCollection()
        collection.register_softmax_cross_entropy_loss(out)
        return sub_batch.SubBatch(collection, 0.4).tensor(out)

    actual = logits_of_part(tf.constant(case.x), [tf.constant(p) for p in case.params])
    (expected,) = case.net(case.params, case.x[:2])
    np.testing.assert_allclose(actual, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_batch_normalisation_and_pooling_see_the_part_alone(dynamic):
    x = np.random.RandomState(0).randn(6, 4, 4, 2).astype(np.float32)
    kernel = np.random.RandomState(1).randn(3, 3, 2, 2).astype(np.float32)

    def net(inputs):
        hidden = tf.nn.conv2d(inputs, kernel, [1, 1, 1, 1], "SAME")
        hidden = tf1.nn.fused_batch_norm(
            hidden, tf.ones([2]), tf.zeros([2]), is_training=True
        )[0]
        hidden = tf.nn.max_pool2d(tf.nn.relu(hidden), 2, 2, "SAME")
        mean = tf.reduce_mean(hidden, axis=0)  # Over the cases.
        return tf.reshape(hidden - mean, [-1, 8])

    def build():
        out = net(tf1.placeholder_with_default(x, [None if dynamic else 6, 4, 4, 2]))
        part = sub_batch.SubBatch(collection_of(out), 0.5)
        assert part.batch_size == 3 or dynamic
        return (
            part.tensor(out),
            net(tf.constant(x[:3])),
            tf.constant(0) + part.batch_size,
        )

    actual, expected, size = graph_kinds.Run(graph_kinds.V1_ON, build)()
    assert size == 3
    np.testing.assert_allclose(actual, expected, atol=1e-6)  # float32


def test_a_batch_from_an_iterator_is_cut():
    with tf.Graph().as_default(), tf1.Session() as session:
        data = np.arange(12.0).reshape(6, 2)
        dataset = tf.data.Dataset.from_tensor_slices(data).batch(4, drop_remainder=True)
        x = tf1.data.make_one_shot_iterator(dataset).get_next()
        out = 2 * x
        collection = layer_collection.LayerCollection()
        collection.register_squared_error_loss(out)
        part = sub_batch.SubBatch(collection, 0.5).tensor(out)
        whole, half = session.run([out, part])
        assert half.shape == (2, 2)
        np.testing.assert_array_equal(half, whole[:2])


def collection_of(out):
    collection = layer_collection.LayerCollection()
    collection.register_squared_error_loss(out)
    return collection


def test_a_model_without_a_visible_batch_is_refused():
    with tf.Graph().as_default():
        out = 2 * tf.cast(tf.constant(np.ones([4, 2], np.int32)), tf.float64)
        with pytest.raises(ValueError, match="placeholder_with_default"):
            sub_batch.SubBatch(collection_of(out), 0.5)
        other = 2 * tf1.placeholder(tf.float64, [5, 2])
        with pytest.raises(ValueError, match="batch size \\(4\\)"):
            sub_batch.SubBatch(collection_of(other), 0.5, batch_size=4)


@pytest.mark.parametrize(
    "model",
    [
        lambda x: tf.reshape(tf.transpose(x), [4, 3]),
        lambda x: tf.reshape(tf.reshape(x, [12]), [4, 3]),
        lambda x: tf.reshape(x, [tf.shape(x)[0] // 2, 6]),
        lambda x: tf.reshape(x, [2, 2, 3])[0],
        # This constant has the size of the batch for another reason.
        lambda x: tf.matmul(tf.constant(np.arange(16.0).reshape(4, 4)), x),
    ],
)
def test_a_model_that_mixes_cases_is_refused(model):
    with tf.Graph().as_default():
        x = tf1.placeholder(tf.float64, [4, 3], name="x")
        out = tf.identity(model(x), name="out")
        with pytest.raises(ValueError, match="out|batch"):
            part = sub_batch.SubBatch(collection_of(out), 0.5, batch_size=4)
            assert part.static_shape(out).as_list()[0] == 2


def recurrent(x, weights):
    """Two steps of a cell that starts from a state of the static batch's size."""
    state = tf.zeros([4, 3], tf.float64)
    for _ in range(2):
        state = tf.tanh(tf.matmul(tf.concat([x, state], 1), weights))
    return state


CONSTANTS = {
    "rows of rows": lambda x, w: tf.matmul(
        tf.reshape(tf.reshape(x, [4, 3, 1]), [4, 3]), w
    ),
    "unknown columns": lambda x, w: tf.matmul(tf.reshape(x, [4, -1]), w),
    "added numbers": lambda x, w: tf.matmul(
        x + tf.constant(np.arange(12.0).reshape(4, 3)), w
    ),
    "initial state": lambda x, w: recurrent(x, tf.concat([w, w], 0)),
    "filled state": lambda x, w: tf.matmul(x + tf.fill([4, 3], w[0, 0]), w),
}


@pytest.mark.parametrize("kind", graph_kinds.FAST)
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_batch_size_held_as_a_constant_is_cut(kind, name):
    value = np.random.default_rng(0).normal(size=[4, 3])
    start = np.random.default_rng(1).normal(size=[3, 3])

    def build():
        x = tf1.placeholder_with_default(value, [4, 3])
        w = graph_kinds.variable(start, "w")
        out = CONSTANTS[name](x, w)
        part = sub_batch.SubBatch(collection_of(out), 0.5, batch_size=4)
        assert part.static_shape(out).as_list() == [2, 3]
        copy = part.tensor(out)
        return out, copy, tf.gradients(out[:2], w)[0], tf.gradients(copy, w)[0]

    out, copy, gradient, gradient_of_copy = graph_kinds.Run(kind, build)()
    np.testing.assert_allclose(copy, out[:2], rtol=1e-12)
    np.testing.assert_allclose(gradient_of_copy, gradient, rtol=1e-12)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_a_batch_held_as_a_constant_is_cut(kind):
    value = np.random.default_rng(0).normal(size=[4, 3])

    def build():
        out = tf.square(tf.constant(value))
        part = sub_batch.SubBatch(collection_of(out), 0.25)
        return part.tensor(out)

    np.testing.assert_allclose(graph_kinds.Run(kind, build)(), value[:1] ** 2)


def test_constants_are_left_alone_where_the_batch_can_be_cut_without():
    with tf.Graph().as_default(), tf1.Session() as session:
        value = np.random.default_rng(0).normal(size=[4, 4])
        x = tf1.placeholder_with_default(np.ones([4, 4]), [4, 4])
        out = tf.matmul(x, tf.constant(value))
        part = sub_batch.SubBatch(collection_of(out), 0.5)
        copy = session.run(part.tensor(out))
        np.testing.assert_allclose(copy, np.ones([2, 4]) @ value)


def test_unknown_ranks_are_refused():
    with tf.Graph().as_default():
        out = tf.reshape(2 * tf1.placeholder(tf.float64), [-1, 3])
        with pytest.raises(ValueError, match="rank"):
            sub_batch.SubBatch(collection_of(out), 0.5)


def test_a_loss_class_of_ones_own_says_how_it_is_rebuilt():
    class Odd(loss_functions.NormalMeanNegativeLogProbLoss):
        def __init__(self, pair):
            super().__init__(pair[0], targets=pair[1])

    class Helpful(Odd):
        def with_tensors(self, replace, replace_targets):
            return Helpful((replace(self.params), replace_targets(self.targets)))

    with tf.Graph().as_default():
        x = tf1.placeholder(tf.float64, [4, 3])
        for cls, works in ((Odd, False), (Helpful, True)):
            collection = layer_collection.LayerCollection()
            collection._register_loss_function(cls((2 * x, x)), x, "odd")
            if works:
                (loss,) = sub_batch.SubBatch(collection, 0.5).losses().losses
                assert loss.params.shape.as_list() == [2, 3]
                assert loss.targets.shape.as_list() == [2, 3]
            else:
                with pytest.raises(ValueError, match="with_tensors"):
                    sub_batch.SubBatch(collection, 0.5)
