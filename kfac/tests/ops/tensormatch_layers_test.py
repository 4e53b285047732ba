"""Layers beyond the basic patterns in plain TensorFlow, and look-alikes of layers."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops.tensormatch import graph_search as gs
from kfac.python.ops.tensormatch.layers import einsum, parameters
from kfac.tests.ops import tensormatch_cases as cases
from kfac.tests.ops.tensormatch_cases import (
    BATCH,
    GENERIC,
    assert_generic,
    blocks,
    collection_of,
    data,
    ids,
    reason,
    scan,
    variable,
)

tf1 = tf.compat.v1
DENSE, SHARED = "FullyConnectedKFACBasicFB", "FullyConnectedMultiIndepFB"
CONV = "ConvKFCBasicFB"


@pytest.fixture(autouse=True)
def graph_fixture():
    with tf.Graph().as_default():
        yield


class TestParameters:
    def test_a_variable_is_seen_through_casts_and_reshapes(self):
        v = variable("v", 2, 3)
        value = tf.reshape(tf.cast(tf.identity(v), tf.float64), [3, 2])
        view = parameters.trace(value)
        assert view.root is v.handle and view.op_types == ("Reshape", "Cast")
        assert not view.is_plain and not view.is_transposed
        assert view.sizes(v) == [3, 2]

    def test_the_variable_itself_is_plain(self):
        v = variable("v", 2, 3)
        view = parameters.trace(v.handle)
        assert view.is_plain and view.sizes(v) == [2, 3]

    def test_transposes_are_noted(self):
        assert parameters.trace(tf.transpose(variable("v", 2, 3))).is_transposed

    def test_computed_values_are_no_parameters(self):
        v = variable("v", 2, 3)
        for value in (tf.sin(v), v + 1.0, data(2, 3), tf.constant(1.0)):
            assert parameters.trace(value) is None
            assert parameters.is_no_parameter(value)

    def test_made_of_parameters(self):
        v, w = variable("v", 2, 3), variable("w", 2, 3)
        known = {v.handle: v}
        for value in (v.handle, tf.sin(2.0 * v), tf.reshape(v, [6]) + 1.0):
            assert parameters.is_made_of_parameters(value, known)
        x = tf.constant(np.ones((2, 3), np.float32))
        for value in (x, x * v, data(2, 3), w.handle, tf.tile(v, [2, 1])):
            assert not parameters.is_made_of_parameters(value, known)


class TestDense:
    @pytest.mark.parametrize("cast_bias", [False, True])
    def test_cast_parameters(self, cast_bias):
        x, w, b = (
            tf.cast(data(None, 3), tf.float16),
            variable("w", 3, 4),
            variable("b", 4),
        )
        y = tf.matmul(x, tf.cast(w, tf.float16))
        y = tf.nn.bias_add(y, tf.cast(b, tf.float16)) if cast_bias else y
        variables = [w, b] if cast_bias else [w]
        collection = scan(tf.cast(y, tf.float32), variables)
        assert blocks(collection) == {"w,b" if cast_bias else "w": DENSE}
        assert collection.get_blocks()[0]._outputs[0] is y
        cases.check_uses(collection, variables)

    @pytest.mark.parametrize("order", [1, -1])
    def test_a_bias_after_a_reshape(self, order):
        x, w, b = data(None, 6, 3), variable("w", 3, 4), variable("b", 4)
        product = tf.matmul(tf.reshape(x, [-1, 3]), w)
        terms = [tf.reshape(product, [-1, 6, 4]), b][::order]
        collection = scan(tf.add(*terms), [w, b])
        (block,) = collection.get_blocks()
        assert blocks(collection) == {"w,b": SHARED} and block._num_uses == 6
        assert block._outputs[0] is product
        cases.check_uses(collection, [w, b])

    @pytest.mark.parametrize("with_bias", [False, True])
    def test_inputs_of_rank_4(self, with_bias):
        x, w, b = data(None, 6, 2, 3), variable("w", 3, 4), variable("b", 4)
        y = tf.matmul(x, w) + b if with_bias else tf.matmul(x, w)
        collection = scan(y, [w, b] if with_bias else [w])
        (block,) = collection.get_blocks()
        assert block._num_uses == 12 and block._inputs[0] is x
        assert blocks(collection) == {"w,b" if with_bias else "w": SHARED}

    def test_inputs_of_rank_4_without_known_batch_are_generic(self):
        x, w = data(7, 6, 2, 3), variable("w", 3, 4)
        assert_generic(tf.matmul(x, w), [w], "first axis")

    def test_a_bias_that_something_else_bypasses_is_no_part_of_the_layer(self):
        x, w, b = data(None, 6, 3), variable("w", 3, 4), variable("b", 4)
        product = tf.matmul(tf.reshape(x, [-1, 3]), w)
        folded = tf.reshape(product, [-1, 6, 4])
        collection = scan(folded + b + tf.sin(folded), [w, b], BATCH)
        assert blocks(collection) == {"w": SHARED, "b": GENERIC}

    @pytest.mark.parametrize("order", [1, -1])
    def test_a_bias_of_a_sum_goes_with_the_first_product(self, order):
        x, h = data(None, 3), data(None, 2, seed=1)
        w, u, b = variable("w", 3, 4), variable("u", 2, 4), variable("b", 4)
        terms = [tf.matmul(x, w) + tf.matmul(h, u), b][::order]
        collection = scan(tf.add(*terms), [w, u, b])
        assert blocks(collection) == {"w,b": DENSE, "u": DENSE}

    def test_a_second_bias_is_not_taken_for_the_bias(self):
        x, w = data(None, 3), variable("w", 3, 4)
        b, c = variable("b", 4), variable("c", 4)
        collection = scan(tf.matmul(x, w) + b + c, [w, b, c], BATCH)
        assert blocks(collection) == {"w,b": DENSE, "c": GENERIC}

    def test_a_layer_on_several_sequences(self):
        w, b = variable("w", 3, 4), variable("b", 4)
        outputs = []
        for seed in range(2):
            rows = tf.reshape(data(None, 6, 3, seed=seed), [-1, 3])
            outputs.append(tf.reshape(tf.matmul(rows, w), [-1, 6, 4]) + b)
        collection = scan(tf.concat(outputs, 1), [w, b])
        (block,) = collection.get_blocks()
        assert blocks(collection) == {"w,b": SHARED} and block._num_uses == 12
        cases.check_uses(collection, [w, b])

    def test_sequences_of_different_lengths_are_generic(self):
        w = variable("w", 3, 4)
        outputs = [
            tf.reshape(tf.matmul(tf.reshape(data(None, t, 3), [-1, 3]), w), [-1, t, 4])
            for t in (5, 6)
        ]
        assert_generic(tf.concat(outputs, 1), [w], "different lengths")

    @pytest.mark.parametrize("flag", [False, True])
    def test_transposed_weights_are_refused_by_name(self, flag):
        x, w = data(None, 4), variable("w", 3, 4)
        y = tf.matmul(x, w if flag else tf.transpose(w), transpose_b=flag)
        assert_generic(y, [w], "transpose")

    def test_a_tied_decoder_makes_the_table_generic(self):
        w = variable("w", 7, 3)
        hidden = tf.nn.embedding_lookup(w, ids(None))
        logits = tf.matmul(tf.tanh(hidden), w, transpose_b=True)
        assert_generic(logits, [w], "transpose")

    def test_a_transposed_use_is_no_obstacle_if_the_user_registered_it(self):
        x, w, v = data(None, 4), variable("w", 3, 4), variable("v", 3, 2)
        collection = collection_of(tf.matmul(tf.matmul(x, w, transpose_b=True), v))
        collection.register_generic(w, BATCH)
        gs.register_layers(collection, [w, v])
        assert blocks(collection) == {"w": GENERIC, "v": DENSE}

    def test_a_bias_of_frozen_weights_is_generic(self):
        x, w, b = data(None, 3), variable("w", 3, 4), variable("b", 4)
        assert_generic(tf.matmul(x, w) + b, [b], "bias of")

    def test_one_matrix_per_entry_is_no_dense_layer(self):
        x, w = data(2, None, 3), variable("w", 2, 3, 4)
        y = tf.reshape(tf.transpose(tf.matmul(x, w), [1, 0, 2]), [-1, 8])
        assert_generic(y, [w], "one matrix for each entry")

    def test_products_of_parameters_are_no_layers(self):
        x, a, b = data(None, 3), variable("a", 3, 2), variable("b", 2, 4)
        y = tf.matmul(x, tf.sin(tf.matmul(a, b)))
        assert_generic(y, [a, b], "combined with other parameters")

    def test_uses_that_are_not_recognised_make_the_layer_generic(self):
        x, w = data(None, 3), variable("w", 3, 3)
        y = tf.matmul(x, w) + tf.matmul(x, tf.sin(w))
        collection = scan(y, [w], BATCH)
        assert blocks(collection) == {"w": GENERIC}
        assert "1 of its 2 uses" in reason(collection, w)
        assert "Sin" in reason(collection, w)


class TestLowRankUpdates:
    @pytest.mark.parametrize("train_base", [False, True])
    def test_the_second_matrix_is_a_layer_of_its_own(self, train_base):
        x, w, bias = data(None, 3), variable("w", 3, 4), variable("bias", 4)
        a, b = variable("a", 3, 2), variable("b", 2, 4)
        y = tf.matmul(x, w + 0.5 * tf.matmul(a, b)) + bias
        variables = [a, b, bias, *([w] if train_base else [])]
        others = {"w,bias": DENSE, "b": DENSE} if train_base else {"b,bias": DENSE}
        assert_generic(y, variables, "low-rank update", others)

    def test_its_inputs_are_those_of_the_update(self):
        x, w = data(None, 3), variable("w", 3, 4)
        a, b = variable("a", 3, 2), variable("b", 2, 4)
        collection = scan(tf.matmul(x, w + 0.5 * tf.matmul(a, b)), [b])
        (block,) = collection.get_blocks()
        with tf1.Session() as session:
            session.run(tf1.global_variables_initializer())
            made, expected = session.run([block._inputs[0], 0.5 * tf.matmul(x, a)])
        np.testing.assert_allclose(made, expected, rtol=1e-6)


class TestEinsum:
    @pytest.mark.parametrize(
        ("equation", "weights_first", "expected"),
        [
            ("ab,bc->ac", False, ("ab", "a", "b", "c")),
            ("abc,cde->abde", False, ("abc", "ab", "c", "de")),
            ("abcd,cde->abe", False, ("abcd", "ab", "cd", "e")),
            ("abdc,cde->abe", False, ("abdc", "ab", "cd", "e")),
            ("bc,ab->ac", True, ("ab", "a", "b", "c")),
            ("abc,bcd->abd", False, None),  # Weights for each b.
            ("ab,cb->ac", False, None),  # Transposed weights.
            ("ab,bc->ca", False, None),  # Outputs in another order.
            ("abc,cd->ad", False, None),  # Summed over uses.
            ("ab,b->a", False, None),  # A vector.
            ("...b,bc->...c", False, None),
        ],
    )
    def test_roles_of_labels(self, equation, weights_first, expected):
        found = einsum.parse(equation, weights_first)
        assert found == (expected and einsum.Equation(*expected))

    def test_rows_have_the_contracted_axes_last(self):
        x = data(BATCH, 2, 3, 4)
        equation = einsum.parse("abdc,cde->abe")
        rows = einsum.as_rows(equation, x)
        assert rows.shape.as_list() == [BATCH, 2, 12]
        with tf1.Session() as session:
            made, value = session.run([rows, x])
        expected = value.transpose(0, 1, 3, 2).reshape(BATCH, 2, 12)
        np.testing.assert_array_equal(made, expected)

    @pytest.mark.parametrize("weights_first", [False, True])
    def test_einsum_is_a_dense_layer(self, weights_first):
        x, w, b = data(None, 3), variable("w", 3, 4), variable("b", 4)
        if weights_first:
            y = tf.raw_ops.Einsum(inputs=[w, x], equation="bc,ab->ac") + b
        else:
            y = tf.raw_ops.Einsum(inputs=[x, w], equation="ab,bc->ac") + b
        collection = scan(y, [w, b])
        assert blocks(collection) == {"w,b": DENSE}
        cases.check_uses(collection, [w, b])

    def test_heads(self):
        x, w, b = data(None, 6, 4), variable("w", 4, 2, 3), variable("b", 2, 3)
        y = tf.raw_ops.Einsum(inputs=[x, w], equation="abc,cde->abde") + b
        collection = scan(y, [w, b])
        assert blocks(collection) == {"w,b": SHARED}
        assert collection.get_blocks()[0]._num_uses == 6


class TestConvolutions:
    def test_1d(self):
        x, w, b = data(None, 8, 2), variable("w", 3, 2, 4), variable("b", 4)
        y = tf.nn.conv1d(x, w, 2, "SAME") + b
        collection = scan(y, [w, b])
        (block,) = collection.get_blocks()
        assert blocks(collection) == {"w,b": CONV}
        assert block._inputs[0] is x and block._outputs[0] is y

    def test_dilation_by_moving_space_to_batch(self):
        x, w = data(None, 8, 8, 2), variable("w", 3, 3, 2, 4)
        y = tf.nn.convolution(x, w, dilations=[2, 2], padding="SAME")
        assert y.op.type == "BatchToSpaceND", "otherwise this shows nothing"
        collection = scan(y, [w])
        (block,) = collection.get_blocks()
        assert block._inputs[0] is x and block._outputs[0] is y
        assert block._padding == "SAME" and block._dilation_rate == (1, 2, 2, 1)

    def test_dilation_of_unknown_padding_is_refused(self):
        x, w = data(None, None, 8, 2), variable("w", 3, 3, 2, 4)
        y = tf.nn.convolution(x, w, dilations=[2, 2], padding="SAME")
        y = tf.reduce_sum(y, axis=[1, 2])
        assert_generic(y, [w], "not known statically")

    @pytest.mark.parametrize("bias", [False, True])
    def test_grouped(self, bias):
        x, w, b = data(None, 8, 8, 4), variable("w", 3, 3, 2, 6), variable("b", 6)
        y = tf.nn.conv2d(x, w, [1, 2, 2, 1], "VALID")
        variables = [w, b] if bias else [w]
        collection = scan(tf.nn.bias_add(y, b) if bias else y, variables)
        assert blocks(collection) == {"w,b" if bias else "w": "ConvDiagonalFB"}
        cases.check_uses(collection, variables)

    def test_grouped_and_used_twice_is_generic(self):
        w = variable("w", 3, 3, 2, 6)
        outputs = [
            tf.nn.conv2d(data(None, 8, 8, 4, seed=i), w, 1, "SAME") for i in range(2)
        ]
        assert_generic(tf.concat(outputs, 1), [w], "without groups")

    def test_grouped_in_1d_is_generic(self):
        x, w = data(None, 8, 4), variable("w", 3, 2, 6)
        assert_generic(tf.nn.conv1d(x, w, 1, "SAME"), [w], "grouped")

    def test_channels_first(self):
        x, w = data(None, 2, 8, 8), variable("w", 3, 3, 2, 4)
        y = tf.nn.conv2d(x, w, 1, "SAME", data_format="NCHW")
        assert_generic(y, [w], "channels first")

    def test_explicit_padding(self):
        x, w = data(None, 8, 8, 2), variable("w", 3, 3, 2, 4)
        y = tf.nn.conv2d(x, w, 1, [[0, 0], [1, 0], [1, 0], [0, 0]])
        assert_generic(y, [w], "EXPLICIT")

    def test_transposed(self):
        x, w = data(BATCH, 4, 4, 2), variable("w", 3, 3, 4, 2)
        y = tf.nn.conv2d_transpose(x, w, [BATCH, 8, 8, 4], 2)
        assert_generic(y, [w], "transposed convolution")

    def test_a_layer_on_several_images(self):
        w = variable("w", 3, 3, 2, 4)
        outputs = [
            tf.nn.conv2d(data(None, 6, 6, 2, seed=i), w, 1, "VALID") for i in range(2)
        ]
        collection = scan(tf.concat(outputs, 1), [w])
        assert blocks(collection) == {"w": "ConvKFCBasicMultiIndepFB"}
        cases.check_uses(collection, [w])

    def test_a_1d_layer_used_twice_is_generic(self):
        w = variable("w", 3, 2, 4)
        outputs = [
            tf.nn.conv1d(data(None, 8, 2, seed=i), w, 1, "SAME") for i in range(2)
        ]
        assert_generic(tf.concat(outputs, 1), [w], "2 times")


class TestLookups:
    @pytest.mark.parametrize("cast", [False, True])
    def test_sequences(self, cast):
        w = variable("w", 7, 3)
        y = tf.gather(tf.cast(w, tf.float64) if cast else w, ids(None, 4))
        collection = scan(tf.cast(y, tf.float32), [w])
        (block,) = collection.get_blocks()
        assert blocks(collection) == {"w": SHARED} and block._num_uses == 4
        assert block._diagonal_approx_for_input

    def test_positions_are_not_cases(self):
        w, v = variable("w", 7, 3), variable("v", 4, 3)
        rows = tf.nn.embedding_lookup(w, ids(None, 4))
        y = rows + tf.nn.embedding_lookup(v, tf.range(4))
        assert_generic(y, [w, v], "all cases share", {"w": SHARED})

    def test_distinct_ids_are_not_cases(self):
        w = variable("w", 7, 3)
        unique, index = tf.unique(ids(None))
        y = tf.gather(tf.nn.embedding_lookup(w, unique), index)
        assert_generic(y, [w], "distinct id")

    def test_columns_are_no_rows(self):
        w, x = variable("w", 3, 7), data(None, 3)
        y = tf.matmul(x, tf.sin(tf.gather(w, ids(BATCH), axis=1)))
        assert_generic(y, [w], "does not look up rows")

    def test_a_vector_is_no_table(self):
        w = variable("w", 7)
        y = data(None, 2) * tf.gather(w, ids(None))[:, None]
        assert_generic(y, [w], "rows and columns")


class TestElementwise:
    def test_parameters_through_reshapes(self):
        x, s, t = data(None, 4, 3), variable("s", 3), variable("t", 3)
        y = x * tf.reshape(s, [1, 1, 3]) + tf.reshape(t, [1, 1, 3])
        collection = scan(y, [s, t])
        assert blocks(collection) == {"s,t": "ScaleAndShiftFullFB"}
        cases.check_uses(collection, [s, t])

    def test_a_scale_of_another_axis_is_generic(self):
        x, s = data(None, 4, 3), variable("s", 4)
        assert_generic(x * tf.reshape(s, [1, 4, 1]), [s], "no layer pattern")

    def test_masked_weights_are_no_scales(self):
        x, w = data(None, 3), variable("w", 3, 4)
        mask = tf.constant(np.eye(3, 4, dtype=np.float32))
        assert_generic(tf.matmul(x, w * mask), [w], "no batch axis")

    def test_a_scale_that_widens_its_input_is_no_scale(self):
        x, s = data(None, 1), variable("s", 4)
        assert_generic(x * s, [s], "broadcast")

    def test_a_scale_used_twice_is_generic(self):
        x, s = data(None, 3), variable("s", 3)
        assert_generic(tf.tanh(x * s) * s, [s], "2 tensors")

    def test_a_shift_without_scale_is_generic(self):
        x, t = data(None, 3), variable("t", 3)
        assert_generic(x + t, [t], "not to the output of a recognised layer")
