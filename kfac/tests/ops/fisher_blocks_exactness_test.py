"""Where theory says that a block is exact, it equals the matrix built from Jacobians.

Sources are those of the estimator's exact mode: one per output coordinate, the root of
the loss's Fisher matrix times a unit vector, for all cases at once.
"""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import deferred, layer_collection
from kfac.python.ops import fisher_blocks as fb
from kfac.tests import graph_kinds, oracle
from kfac.tests.ops import fisher_blocks_cases as cases

BATCH = 5
VARIANCE = 0.5
# Sums of a few hundred float64 products.
TOLERANCE = dict(rtol=1e-10, atol=1e-12)


def _exact_sources(predictions, structure):
    """Gradients of `structure` for unit signals at every output coordinate.

    The squared error's Fisher matrix is the identity over the variance.
    """
    flat = tf.reshape(predictions, [predictions.shape[0], -1])
    tensors = tf.nest.flatten(structure)
    sources = []
    for i in range(flat.shape[1]):
        signal = tf.reduce_sum(flat[:, i]) / VARIANCE**0.5
        grads = tf.gradients(signal, tensors)
        grads = [
            tf.zeros_like(t) if g is None else g
            for t, g in zip(tensors, grads, strict=True)
        ]
        sources.append(tf.nest.pack_sequence_as(structure, grads))
    return tuple(sources)


def _matrix(block, towers, predictions):
    """Dense block after one exact statistic."""
    for inputs, outputs in towers:
        block.register_additional_tower(inputs, outputs)
    sources = _exact_sources(predictions, block.tensors_to_compute_grads())
    done = cases.update(block, sources)
    with tf.control_dependencies([done]):
        return block.full_fisher_block()


def _true_matrix(net, params, x):
    return oracle.fisher(net, params, x, [oracle.Normal(var=VARIANCE)])


def _run(build):
    return graph_kinds.Run(graph_kinds.V1_ON, build)()


def test_one_case_makes_the_dense_kronecker_block_the_outer_product_of_its_gradient():
    rng = np.random.RandomState(0)
    x, w, b, readout = (rng.normal(size=s) for s in ((1, 3), (3, 2), (2,), (2, 4)))

    def build():
        inputs, weights, bias = (tf.constant(a) for a in (x, w, b))
        outputs = inputs @ weights + bias
        loss = tf.reduce_sum(tf.sin(tf.tanh(outputs) @ readout))
        block = fb.FullyConnectedKFACBasicFB(
            layer_collection.LayerCollection(), has_bias=True
        )
        block.register_additional_tower(inputs, outputs)
        done = cases.update(block, ((tf.gradients(loss, outputs)[0],),))
        with tf.control_dependencies([done]):
            return block.full_fisher_block(), tf.gradients(loss, [weights, bias])

    matrix, gradient = _run(build)
    gradient = cases.flat(gradient)
    np.testing.assert_allclose(matrix, np.outer(gradient, gradient), **TOLERANCE)


def test_a_deep_linear_network_with_squared_error_has_exact_kronecker_blocks():
    rng = np.random.RandomState(1)
    x = rng.normal(size=(BATCH, 3))
    first, second = rng.normal(size=(4, 2)), rng.normal(size=(3, 2))

    def net(params, x):
        (matrix,) = params
        ones = tf.ones([x.shape[0], 1], tf.float64)
        return tf.concat([x, ones], 1) @ matrix @ tf.constant(second.T)

    def build():
        inputs = tf.constant(x)
        hidden = inputs @ first[:-1] + first[-1]
        predictions = hidden @ second.T
        block = fb.FullyConnectedKFACBasicFB(
            layer_collection.LayerCollection(), has_bias=True
        )
        return _matrix(block, [(inputs, hidden)], predictions)

    np.testing.assert_allclose(_run(build), _true_matrix(net, [first], x), **TOLERANCE)


def test_an_embedding_is_the_dense_layer_of_its_one_hot_rows():
    rng = np.random.RandomState(2)
    ids, depth = np.array([0, 3, 3, 1]), 4
    grads = rng.normal(size=(4, 2))

    def build():
        tensor = tf.constant(ids)
        captured = deferred.DeferredTensor(
            lambda: tensor, tensor.shape, tensor.dtype, tensor.name, one_hot_depth=depth
        )
        matrices = []
        for inputs, diagonal in ((captured, True), (tf.one_hot(ids, depth), False)):
            if not diagonal:
                inputs = tf.cast(inputs, tf.float64)
            block = fb.FullyConnectedKFACBasicFB(
                layer_collection.LayerCollection(), False, diagonal
            )
            outputs = tf.constant(grads)
            block.register_additional_tower(inputs, outputs)
            done = cases.update(block, ((outputs,),))
            with tf.control_dependencies([done]):
                matrices.append(block.full_fisher_block())
        return matrices

    sparse, dense = _run(build)
    np.testing.assert_allclose(sparse, dense, **TOLERANCE)


def _per_case_gradients(loss_of_case, params):
    """`[batch, parameters]`, by one differentiation a case."""
    rows = []
    for case in range(BATCH):
        grads = tf.gradients(loss_of_case[case], params)
        rows.append(cases.flat_tensor(grads))
    return tf.stack(rows)


def _second_moment_blocks():
    """Layer name -> function that makes (block, inputs, outputs, params)."""
    rng = np.random.RandomState(3)
    collection = layer_collection.LayerCollection

    def normal(*shape):
        return tf.constant(rng.normal(size=shape))

    def dense():
        w, b, x = normal(3, 2), normal(2), normal(BATCH, 3)
        block = fb.FullyConnectedDiagonalFB(collection(), has_bias=True)
        return block, x, x @ w + b, [w, b]

    def convolution():
        w, b, x = normal(2, 2, 2, 3), normal(3), normal(BATCH, 4, 5, 2)
        block = fb.ConvDiagonalFB(
            collection(), (w, b), [1, 1, 1, 1], "VALID", dilations=[1, 2, 1, 1]
        )
        y = tf.nn.convolution(x, w, padding="VALID", dilations=[2, 1]) + b
        return block, x, y, [w, b]

    def depthwise():
        w, x = normal(2, 2, 3, 2), normal(BATCH, 4, 4, 3)
        strides = [1, 2, 2, 1]
        block = fb.DepthwiseConvDiagonalFB(collection(), w, strides, "SAME")
        return block, x, tf.nn.depthwise_conv2d(x, w, strides, "SAME"), [w]

    def scale_and_shift(cls):
        w, b, x = normal(3, 2), normal(2), normal(BATCH, 4, 3, 2)
        return cls(collection(), (1,), (1, 2)), x, x * w + b, [w, b]

    return {
        "dense": dense,
        "convolution": convolution,
        "depthwise": depthwise,
        "scale and shift, full": lambda: scale_and_shift(fb.ScaleAndShiftFullFB),
        "scale and shift": lambda: scale_and_shift(fb.ScaleAndShiftDiagonalFB),
    }


@pytest.mark.parametrize("name", _second_moment_blocks())
def test_full_and_diagonal_blocks_are_the_second_moment_of_case_gradients(name):
    def build():
        block, inputs, outputs, params = _second_moment_blocks()[name]()
        losses = tf.reduce_sum(
            tf.reshape(tf.sin(outputs) + outputs**2, [BATCH, -1]), axis=1
        )
        block.register_additional_tower(inputs, outputs)
        done = cases.update(block, ((tf.gradients(losses, outputs)[0],),))
        with tf.control_dependencies([done]):
            return block.full_fisher_block(), _per_case_gradients(
                tf.unstack(losses), params
            )

    matrix, gradients = _run(build)
    expected = gradients.T @ gradients / BATCH
    if "full" not in name:
        expected = np.diag(np.diag(expected))
    np.testing.assert_allclose(matrix, expected, **TOLERANCE)


USES = 3


def _shared_layer(cls, readout, average):
    """A linear layer used on every row of `[batch, uses, 3]`, then a linear readout.

    Returns the block's matrix and the true one, for an average over uses before the
    loss ("reduce" setting) or a loss at every use ("expand" setting).
    """
    rng = np.random.RandomState(4)
    x = rng.normal(size=(BATCH, USES, 3)) + 0.5
    w = rng.normal(size=(3, 2))

    def head(hidden):
        hidden = tf.reduce_mean(hidden, axis=1) if average else hidden
        return hidden @ tf.constant(readout)

    def build():
        inputs = tuple(tf.constant(x[:, t]) for t in range(USES))
        hidden = tuple(use @ w for use in inputs)
        block = cls(layer_collection.LayerCollection())
        return _matrix(block, [(inputs, hidden)], head(tf.stack(hidden, axis=1)))

    return _run(build), _true_matrix(lambda params, x: head(x @ params[0]), [w], x)


def test_shared_linear_layers_are_exact_in_the_setting_they_are_made_for():
    """Propositions 1 and 2 of arXiv 2311.00636."""
    readout = np.random.RandomState(5).normal(size=(2, 4))
    expand, reduce = fb.FullyConnectedMultiIndepFB, fb.FullyConnectedReduceFB
    for cls, average in ((expand, False), (reduce, True)):
        matrix, true = _shared_layer(cls, readout, average)
        np.testing.assert_allclose(matrix, true, **TOLERANCE)
    for cls, average in ((expand, True), (reduce, False)):
        matrix, true = _shared_layer(cls, readout, average)
        assert oracle.relative_error(matrix, true) > 0.1


@pytest.mark.parametrize("average", (False, True), ids=("expand", "reduce"))
def test_linear_convolutions_are_exact_in_the_setting_they_are_made_for(average):
    rng = np.random.RandomState(6)
    x = rng.normal(size=(BATCH, 4, 3, 2)) + 0.5
    w, b = rng.normal(size=(2, 2, 2, 2)), rng.normal(size=2)
    readout = rng.normal(size=(2, 3))

    def head(hidden):
        hidden = tf.reduce_mean(hidden, axis=[1, 2]) if average else hidden
        return hidden @ tf.constant(readout)

    def layer(weights, bias, x):
        return tf.nn.convolution(x, weights, padding="VALID") + bias

    def build():
        inputs = tf.constant(x)
        hidden = layer(tf.constant(w), tf.constant(b), inputs)
        cls = fb.ConvKFCReduceFB if average else fb.ConvKFCBasicFB
        block = cls(layer_collection.LayerCollection(), (w, b), "VALID")
        return _matrix(block, [(inputs, hidden)], head(hidden))

    true = _true_matrix(lambda params, x: head(layer(*params, x)), [w, b], x)
    np.testing.assert_allclose(_run(build), true, **TOLERANCE)


def test_a_shared_convolution_is_exact_with_a_loss_at_every_use_and_location():
    rng = np.random.RandomState(7)
    x = rng.normal(size=(BATCH, USES, 3, 3, 2)) + 0.5
    w, readout = rng.normal(size=(2, 2, 2, 2)), rng.normal(size=(2, 3))

    def layer(weights, x):
        folded = tf.reshape(x, [-1, 3, 3, 2])
        hidden = tf.nn.convolution(folded, weights, padding="SAME")
        return tf.reshape(hidden, [-1, USES, 3, 3, 2]) @ tf.constant(readout)

    def build():
        inputs = tuple(tf.constant(x[:, t]) for t in range(USES))
        hidden = tuple(
            tf.nn.convolution(use, tf.constant(w), padding="SAME") for use in inputs
        )
        block = fb.ConvKFCBasicMultiIndepFB(
            layer_collection.LayerCollection(), w, "SAME"
        )
        predictions = tf.stack([h @ tf.constant(readout) for h in hidden], axis=1)
        return _matrix(block, [(inputs, hidden)], predictions)

    true = _true_matrix(lambda params, x: layer(params[0], x), [w], x)
    np.testing.assert_allclose(_run(build), true, **TOLERANCE)


def test_generic_blocks_square_the_summed_gradient():
    rng = np.random.RandomState(8)
    w, b = rng.normal(size=(2, 3)), rng.normal(size=3)

    def build():
        collection = layer_collection.LayerCollection()
        grads = (tf.constant(w), tf.constant(b))
        full = fb.NaiveFullFB(collection, grads)
        diagonal = fb.NaiveDiagonalFB(collection, grads[0])
        matrices = []
        for block, sources in ((full, (grads,)), (diagonal, (grads[0],))):
            for batch_size in (3, 5.0, tf.constant(2)):
                block.register_additional_tower(batch_size)
            done = cases.update(block, sources)
            with tf.control_dependencies([done]):
                matrices.append(block.full_fisher_block())
        return matrices

    full, diagonal = _run(build)
    gradient = cases.flat([w, b])
    np.testing.assert_allclose(full, np.outer(gradient, gradient) / 10, **TOLERANCE)
    np.testing.assert_allclose(diagonal, np.diag(w.reshape(-1) ** 2) / 10, **TOLERANCE)
