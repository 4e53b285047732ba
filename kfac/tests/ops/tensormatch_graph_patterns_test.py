"""The library of patterns: what they match and what they bind."""

import pytest
import tensorflow as tf

from kfac.python.ops.tensormatch import graph_matcher as gm
from kfac.python.ops.tensormatch import graph_patterns as gp

tf1 = tf.compat.v1


@pytest.fixture(autouse=True)
def graph_fixture():
    with tf.Graph().as_default():
        yield


def placeholder(shape=(2, 3), dtype=tf.float32):
    return tf1.placeholder(dtype, shape)


def variable(name, shape):
    return tf1.get_variable(name, shape, use_resource=True)


def bindings_of(pattern, node):
    return gm.matcher(pattern)(node)


class TestFactories:
    def test_every_raw_operation_has_a_factory_of_its_name(self):
        names = ["MatMul", "BatchMatMulV2", "ResourceGather", "FusedBatchNormV3", "Sub"]
        for name in names:
            assert getattr(gp, name).__name__ == name
            assert name in dir(gp)

    def test_an_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="NoSuchOperation"):
            _ = gp.NoSuchOperation

    def test_resolving_names_does_not_fill_the_module(self):
        _ = gp.Softplus
        assert "Softplus" not in vars(gp)

    def test_node_kinds_are_not_overridden_by_raw_operations(self):
        constant, x, v = tf.constant(1.0), placeholder(), variable("v", [2])
        assert bindings_of(gp.Const("c"), constant)["c"] is constant
        assert bindings_of(gp.Placeholder("p"), x)["p"] is x
        assert bindings_of(gp.Variable("v"), v)["v"] is v
        assert bindings_of(gp.Tensor("t"), x)["t"] is x
        assert bindings_of(gp.Op("o"), x.op)["o"] is x.op
        assert not bindings_of(gp.Placeholder, constant)

    def test_factories_restrict_the_type_and_take_a_name(self):
        y = tf.tanh(placeholder())
        assert bindings_of(gp.Tanh("t"), y.op)["t"] is y.op
        assert bindings_of(gp.Tanh, y.op) is True
        assert not bindings_of(gp.Relu, y.op)

    def test_unstack_matches_what_tf_unstack_makes(self):
        parts = tf.unstack(placeholder(), num=2)
        assert bindings_of(gp.Unstack, parts[0].op) is True

    def test_nonlinearity_is_relu_or_tanh(self):
        x = placeholder()
        assert bindings_of(gp.Nonlinearity, tf.nn.relu(x).op) is True
        assert bindings_of(gp.Nonlinearity, tf.tanh(x).op) is True
        assert not bindings_of(gp.Nonlinearity, tf.sigmoid(x).op)


def linear_layers():
    def matmul():
        x, w = placeholder(), variable("w", [3, 4])
        return x, w, tf.matmul(x, w)

    def batch_matmul():
        x, w = placeholder([5, 2, 3]), variable("w", [5, 3, 4])
        return x, w, tf.matmul(x, w)

    def conv():
        x, w = placeholder([2, 5, 5, 3]), variable("w", [2, 2, 3, 4])
        return x, w, tf.nn.conv2d(x, w, 1, "SAME")

    return [matmul, batch_matmul, conv]


@pytest.mark.parametrize("layer", linear_layers())
class TestAffine:
    def test_without_bias(self, layer):
        x, w, y = layer()
        bindings = bindings_of(gp.Affine, y)
        assert bindings["in"] is x and bindings["weights"] is w.handle
        assert bindings["linear_op"] is y.op and bindings["pre_activations"] is y
        assert "biases" not in bindings

    @pytest.mark.parametrize(
        "add",
        [
            lambda y, b: y + b,
            lambda y, b: b + y,
            lambda y, b: tf.raw_ops.Add(x=y, y=b),
            lambda y, b: tf.raw_ops.Add(x=b, y=y),
            tf.nn.bias_add,
        ],
        ids=["AddV2", "AddV2 swapped", "Add", "Add swapped", "BiasAdd"],
    )
    def test_with_bias(self, layer, add):
        x, w, y = layer()
        b = variable("b", [4])
        z = add(y, b)
        bindings = bindings_of(gp.Affine, z)
        assert bindings["biases"] is b.handle and bindings["weights"] is w.handle
        assert bindings["pre_activations"] is z and bindings["linear_op"] is y.op

    def test_names_can_be_chosen(self, layer):
        x, w, y = layer()
        pattern = gp.Affine(gp.Placeholder("x"), "l", "w", "b", "y")
        assert set(bindings_of(pattern, y)) == {"x", "l", "w", "y"}


class TestAffineRefuses:
    def test_a_product_without_variable(self):
        assert not bindings_of(gp.Affine, tf.matmul(placeholder(), placeholder([3, 4])))

    def test_an_added_tensor_that_is_no_variable(self):
        y = tf.matmul(placeholder(), variable("w", [3, 4]))
        assert not bindings_of(gp.Affine, y + placeholder([2, 4]))

    def test_the_operation_itself(self):
        y = tf.matmul(placeholder(), variable("w", [3, 4]))
        assert not bindings_of(gp.Affine, y.op)


class TestScaleAndShift:
    @pytest.mark.parametrize("swap_product", [False, True])
    @pytest.mark.parametrize("swap_sum", [False, True, None])
    def test_in_any_order_of_operands(self, swap_product, swap_sum):
        x, scale, shift = placeholder(), variable("s", [3]), variable("t", [3])
        y = scale * x if swap_product else x * scale
        if swap_sum is not None:
            y = shift + y if swap_sum else y + shift
        bindings = bindings_of(gp.ScaleAndShift, y)
        assert bindings["in"] is x and bindings["scale"] is scale.handle
        assert bindings["out"] is y
        assert ("shift" in bindings) == (swap_sum is not None)

    def test_bias_add_is_no_shift(self):
        y = tf.nn.bias_add(placeholder() * variable("s", [3]), variable("t", [3]))
        assert not bindings_of(gp.ScaleAndShift, y)


class TestBatchNorm:
    @pytest.mark.parametrize("with_scale", [False, True])
    @pytest.mark.parametrize("with_offset", [False, True])
    def test_the_unfused_formula(self, with_scale, with_offset):
        x, mean, variance = placeholder(), placeholder([3]), placeholder([3])
        scale = variable("scale", [3]) if with_scale else None
        offset = variable("offset", [3]) if with_offset else None
        inv = tf.math.rsqrt(variance + 1e-3)
        if with_scale:
            inv = inv * scale
        remainder = offset - mean * inv if with_offset else mean * inv
        y = tf.raw_ops.AddV2(x=x * inv, y=remainder)
        bindings = bindings_of(gp.BatchNorm, y)
        assert bindings["in"] is x and bindings["inv"] is inv and bindings["out"] is y
        assert ("scale" in bindings, "offset" in bindings) == (with_scale, with_offset)
        if with_scale:
            assert bindings["scale"] is scale.handle
        if with_offset:
            assert bindings["offset"] is offset.handle

    def test_tensorflow_s_batch_normalization_matches(self):
        x, mean, variance = placeholder(), placeholder([3]), placeholder([3])
        scale, offset = variable("scale", [3]), variable("offset", [3])
        y = tf.nn.batch_normalization(x, mean, variance, offset, scale, 1e-3)
        assert set(bindings_of(gp.BatchNorm, y)) == {
            "in",
            "inv",
            "scale",
            "offset",
            "out",
        }

    def test_the_same_inverse_is_needed_on_both_sides(self):
        x, mean, variance = placeholder(), placeholder([3]), placeholder([3])
        first, second = tf.math.rsqrt(variance), tf.math.rsqrt(variance)
        assert not bindings_of(gp.BatchNorm, x * first + mean * second)

    def test_fused(self):
        x, scale, offset = (
            placeholder([2, 4, 4, 3]),
            variable("s", [3]),
            variable("o", [3]),
        )
        y, mean, _ = tf1.nn.fused_batch_norm(x, scale, offset, is_training=True)
        bindings = bindings_of(gp.FusedBatchNormOutput, y)
        assert bindings["in"] is x and bindings["out"] is y
        assert bindings["scale"] is scale.handle and bindings["offset"] is offset.handle
        assert bindings_of(gp.FusedBatchNormOutput, mean)["out"] is mean


class TestEmbed:
    def test_gather_v2_binds_the_axis(self):
        ids, w = placeholder([5], tf.int32), variable("w", [7, 3])
        y = tf.raw_ops.GatherV2(params=w, indices=ids, axis=0)
        bindings = bindings_of(gp.Embed, y)
        assert bindings["in"] is ids and bindings["weights"] is w.handle
        assert bindings["pre_activations"] is y and bindings["linear_op"] is y.op
        assert tf.get_static_value(bindings["axis"]) == 0

    def test_resource_gather(self):
        ids, w = placeholder([5], tf.int32), variable("w", [7, 3])
        y = tf.raw_ops.ResourceGather(resource=w.handle, indices=ids, dtype=tf.float32)
        bindings = bindings_of(gp.Embed, y)
        assert bindings["weights"] is w.handle and "axis" not in bindings

    def test_old_gather(self):
        ids, w = placeholder([5], tf.int32), variable("w", [7, 3])
        y = tf.raw_ops.Gather(params=w, indices=ids)
        assert bindings_of(gp.Embed, y)["linear_op"] is y.op


class TestLayers:
    def test_layer_binds_the_activations(self):
        x, w, b = placeholder(), variable("w", [3, 4]), variable("b", [4])
        y = tf.tanh(tf.matmul(x, w) + b)
        bindings = bindings_of(gp.Layer, y)
        assert set(bindings) == {
            *("in", "weights", "biases", "linear_op", "pre_activations", "activations")
        }
        assert bindings["activations"] is y

    def test_layers_nest_and_pass_names_on(self):
        x = placeholder()
        first = tf.nn.relu(tf.matmul(x, variable("w1", [3, 4])))
        y = tf.nn.relu(tf.matmul(first, variable("w2", [4, 5])))
        inner = gp.Layer(
            gp.Tensor("x"), linear_op_name="l1", weights_name="w1", output_name="s1"
        )
        bindings = bindings_of(gp.Affine(inner), y.op.inputs[0])
        assert bindings["x"] is x and bindings["activations"] is first
        assert bindings["w1"].name.startswith("w1")

    def test_layer_with_batch_norm(self):
        x, mean, variance = placeholder(), placeholder([4]), placeholder([4])
        scale, offset = variable("scale", [4]), variable("offset", [4])
        y = tf.matmul(x, variable("w", [3, 4]))
        normalized = tf.nn.batch_normalization(y, mean, variance, offset, scale, 1e-3)
        out = tf.nn.relu(normalized)
        bindings = bindings_of(gp.LayerWithBatchNorm, out)
        assert bindings["final_activations"] is out and bindings["out"] is normalized
        assert bindings["pre_activations"] is y and bindings["in"] is x
