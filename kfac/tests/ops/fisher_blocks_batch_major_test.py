"""Sequence data with the cases first give what the same data with uses first give."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import layer_collection as lc
from kfac.python.ops import linear_operator
from kfac.python.ops.fisher_blocks import batch_major
from kfac.tests import graph_kinds
from kfac.tests.ops import tensormatch_cases as cases

B, T, D_IN, D_OUT = 4, 3, 2, 5


def arrays():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, T, D_IN)), rng.normal(size=(B, T, D_OUT))


def evaluate(build):
    return graph_kinds.Run(graph_kinds.FUNCTION, build)()


@pytest.mark.parametrize("shape", [(B, T, D_IN), (B * T, D_IN)])
def test_rows_keep_the_order_and_use_major_data_change_it(shape):
    value, _ = arrays()

    def build():
        data = tf.constant(value.reshape(shape))
        rows, moved = batch_major.rows(data, T), batch_major.use_major(data, T)
        assert rows.shape == [B * T, D_IN] and moved.shape == [T, B, D_IN]
        return tf.convert_to_tensor(rows), tf.convert_to_tensor(moved)

    rows, moved = evaluate(build)
    np.testing.assert_array_equal(rows, value.reshape(B * T, D_IN))
    np.testing.assert_array_equal(moved, value.transpose(1, 0, 2))


def test_several_sequences_follow_each_other():
    first, _ = arrays()

    def build():
        pair = (tf.constant(first), tf.constant(-first))
        return [
            tf.convert_to_tensor(arrange(pair, 2 * T))
            for arrange in (batch_major.rows, batch_major.use_major)
        ]

    rows, moved = evaluate(build)
    flat, swapped = first.reshape(-1, D_IN), first.transpose(1, 0, 2)
    np.testing.assert_array_equal(rows, np.concatenate([flat, -flat]))
    np.testing.assert_array_equal(moved, np.concatenate([swapped, -swapped]))


def test_features_may_have_several_axes():
    value = np.arange(B * T * 6.0).reshape(B, T, 2, 3)

    def build():
        return tf.convert_to_tensor(batch_major.use_major(tf.constant(value), T, 6))

    expected = value.reshape(B, T, 6).transpose(1, 0, 2)
    np.testing.assert_array_equal(evaluate(build), expected)


def test_the_same_data_give_the_same_object():
    def build():
        data, other = tf.zeros([B, T, D_IN]), tf.zeros([B, T, D_IN])
        first = batch_major.rows(data, T)
        assert batch_major.rows(data, T) is first
        assert batch_major.rows(other, T) is not first
        assert batch_major.use_major(data, T) is not first
        return first.resolve()

    evaluate(build)


def test_the_batch_may_be_unknown():
    data = tf.TensorSpec([None, T, D_IN])

    @tf.function(autograph=False)
    def traced(x):
        assert batch_major.rows(x, T).shape.as_list() == [None, D_IN]
        assert batch_major.use_major(x, T).shape.as_list() == [T, None, D_IN]
        return x

    traced.get_concrete_function(data)


@pytest.mark.parametrize(
    "approx", ["kron_indep", "kron_indep_both_diag", "kron_reduce", "kron_series_2"]
)
def test_factors_and_gradients_equal_those_of_use_major_data(approx):
    inputs, grads = arrays()

    def statistics(batch_major):
        collection = lc.LayerCollection()
        weights = cases.variable(f"w{batch_major}", D_IN, D_OUT)
        x, g = tf.constant(inputs), tf.constant(grads)
        if not batch_major:
            x, g = tf.transpose(x, [1, 0, 2]), tf.transpose(g, [1, 0, 2])
        options = {"batch_major": True} if batch_major else {}
        collection.register_fully_connected_multi(
            weights, x, g, num_uses=T, approx=approx, **options
        )
        (block,) = collection.get_blocks()
        block.instantiate_factors(((g,),), 0.1)
        factors = (block.input_factor, block.output_factor)
        covs = [tf.convert_to_tensor(f._compute_new_cov(0, 0)) for f in factors]
        sizes = [tf.convert_to_tensor(f.batch_size()) for f in factors]
        return covs, sizes, block.rebuild_gradient((g,))

    plain, sizes, gradient = evaluate(lambda: statistics(False))
    other, other_sizes, other_gradient = evaluate(lambda: statistics(True))
    for one, another in zip(plain, other, strict=True):
        np.testing.assert_allclose(one, another, rtol=1e-12)
    assert sizes == other_sizes
    np.testing.assert_allclose(gradient, other_gradient, rtol=1e-12)


@pytest.mark.parametrize(
    "approx", ["kron_indep", "kron_reduce", "kron_series_1", "kron_series_2", "ekfac"]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_weights_of_attention_heads_are_those_of_the_matrix_reshaped(approx, has_bias):
    inputs, grads = arrays()
    heads = (3, 2)
    grads = np.concatenate([grads, grads[..., :1] ** 2], axis=-1)

    def product(*features):
        name = f"{approx}{len(features)}{has_bias}"
        weights = cases.variable(f"w{name}", D_IN, *features)
        bias = cases.variable(f"b{name}", *features)
        params = (weights, bias) if has_bias else weights
        x, g = tf.constant(inputs), tf.constant(grads.reshape(B, T, *features))
        collection = lc.LayerCollection()
        collection.register_fully_connected_multi(
            params, x, g, num_uses=T, approx=approx, batch_major=True
        )
        (block,) = collection.get_blocks()
        block.instantiate_factors(((g,),), 0.1)
        block.register_matpower(-1)
        factors = block._factors()
        for factor in factors:
            factor.instantiate_cov_variables()
        updates = [f.make_covariance_update_op(0.0, 1.0) for f in factors]
        for factor in factors:
            factor.instantiate_inv_variables()
        with tf.control_dependencies(updates):
            updates = [f.make_inverse_update_ops() for f in factors]
        with tf.control_dependencies(tf.nest.flatten(updates)):
            size = D_IN * 6
            vector = [tf.reshape(tf.cos(tf.range(size, dtype=x.dtype)), weights.shape)]
            vector += [tf.reshape(tf.range(6, dtype=x.dtype), features)] * has_bias
            result = block.multiply_inverse(tuple(vector) if has_bias else vector[0])
        for part, variable in zip(
            tf.nest.flatten(result), tf.nest.flatten(params), strict=True
        ):
            assert part.shape == variable.shape
        return [tf.reshape(part, [-1]) for part in tf.nest.flatten(result)]

    plain, with_heads = evaluate(lambda: (product(6), product(*heads)))
    for one, another in zip(plain, with_heads, strict=True):
        assert np.abs(one).max() > 0.1
        np.testing.assert_allclose(one, another, rtol=1e-9)


class TestRegistration:
    @pytest.fixture(autouse=True)
    def graph_fixture(self):
        with tf.Graph().as_default():
            yield

    def register(self, weights, inputs, outputs, **options):
        collection = lc.LayerCollection()
        collection.register_fully_connected_multi(
            weights, inputs, outputs, batch_major=True, **options
        )
        (block,) = collection.get_blocks()
        return block

    @pytest.mark.parametrize(
        ("inputs", "outputs", "num_uses"),
        [
            ([(B, T, 2)], [(B, T, 5)], None),
            ([(B, T, 2)] * 2, [(B, T, 5)], 2 * T),
            ([(B, T, 2)] * 2, [(B, T, 5)] * 2, 2 * T + 1),
            ([(B, T, 3)], [(B, T, 5)], T),
            ([(B, T, 2)], [(B, T, 4)], T),
        ],
    )
    def test_what_does_not_fit_is_refused(self, inputs, outputs, num_uses):
        weights = cases.variable("w", 2, 5)
        sides = [[cases.data(*s) for s in side] for side in (inputs, outputs)]
        inputs, outputs = (side if len(side) > 1 else side[0] for side in sides)
        with pytest.raises(ValueError):
            self.register(weights, inputs, outputs, num_uses=num_uses)

    def test_weights_may_have_several_axes_on_both_sides(self):
        weights, bias = cases.variable("w", 4, 2, 3), cases.variable("b", 2, 3)
        inputs, outputs = cases.data(B, T, 4), cases.data(B, T, 6)
        block = self.register((weights, bias), inputs, outputs, num_uses=T)
        block.instantiate_factors(((outputs,),), 0.1)
        assert block.input_factor._cov_shape == [5, 5]
        assert block.output_factor._cov_shape == [6, 6]

    def test_products_are_those_of_the_matrix_with_all_output_axes(self):
        value = np.arange(24.0, dtype=np.float32).reshape(4, 2, 3)
        left, right = np.diag([1.0, 2, 3, 4]), np.diag(np.arange(1.0, 7))
        weights = cases.variable("w", 4, 2, 3)
        block = self.register(
            weights, cases.data(B, T, 4), cases.data(B, T, 6), num_uses=T
        )
        operators = [
            linear_operator.LinearOperatorFullMatrix(tf.constant(m, tf.float32))
            for m in (left, right)
        ]
        product = block._multiply_factored_matrix(*operators, tf.constant(value))
        with tf.compat.v1.Session() as session:
            result = session.run(product)
        expected = left @ value.reshape(4, 6) @ right
        np.testing.assert_allclose(result, expected.reshape(4, 2, 3), rtol=1e-6)
