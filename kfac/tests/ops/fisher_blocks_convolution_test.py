"""Convolutions: counts of locations, what is refused, SUA order, depthwise filters."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import errors, fisher_factors, layer_collection
from kfac.python.ops import fisher_blocks as fb
from kfac.python.ops.fisher_blocks import conv_geometry
from kfac.tests import graph_kinds, oracle
from kfac.tests.ops import fisher_blocks_cases as cases

tf1 = tf.compat.v1


class Shaped:
    """A stand-in tensor: a shape."""

    def __init__(self, *shape):
        self.shape = tf.TensorShape(shape)


@pytest.mark.parametrize(
    ("rank", "padding"), itertools.product((1, 2, 3), ("SAME", "valid", None))
)
def test_locations_are_as_many_as_the_convolution_has(rank, padding):
    """With spatial and full-rank strides and dilations, against TensorFlow."""
    sizes, kernel = [9, 8, 10][:rank], [3, 2, 4][:rank]
    for stride, dilation in ((1, 1), (2, 1), (3, 1), (1, 2)):
        x = tf.zeros([1, *sizes, 2])
        strides, dilations = [stride] * rank, [dilation] * rank
        outputs = tf.nn.convolution(
            x,
            tf.zeros([*kernel, 2, 3]),
            strides=strides,
            padding=(padding or "same").upper(),
            dilations=dilations,
        )
        expected = np.prod(outputs.shape[1:-1].as_list())
        for s, d in (
            (strides, dilations),
            ([1, *strides, 1], tuple([1, *dilations, 1])),
        ):
            count = conv_geometry.num_locations(
                x, Shaped(None, *[None] * rank, 3), (*kernel, 2, 3), padding, s, d
            )
            assert isinstance(count, int)
            assert count == expected


def test_locations_come_from_the_output_where_the_input_does_not_tell():
    filter_shape = (3, 3, 2, 4)
    dynamic = Shaped(None, None, None, 2)
    outputs = Shaped(None, 5, 7, 4)
    for inputs, padding in ((dynamic, "SAME"), (Shaped(1, 9, 9, 2), "EXPLICIT")):
        count = conv_geometry.num_locations(inputs, outputs, filter_shape, padding)
        assert count == 35


def test_dynamic_sizes_are_refused_because_damping_depends_on_them():
    dynamic = Shaped(None, None, 7, 2)
    with pytest.raises(ValueError, match="static spatial shape"):
        conv_geometry.num_locations(dynamic, dynamic, (3, 3, 2, 2), "SAME")


def test_mismatched_ranks_and_strides_are_refused():
    images, sequences = Shaped(1, 5, 5, 2), Shaped(1, 5, 2)
    with pytest.raises(ValueError, match="same rank"):
        conv_geometry.num_locations(sequences, sequences, (3, 3, 2, 2), "SAME")
    with pytest.raises(ValueError, match="2 .spatial. or 4 entries"):
        conv_geometry.num_locations(images, images, (3, 3, 2, 2), "SAME", [1, 2, 1])


FILTER = (3, 3, 2, 4)


def _filter(shape=FILTER):
    return tf.zeros(shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(strides=[1, 1]), "strides must have 4"),
        (dict(dilations=[1, 1]), "dilations must have 4"),
        (dict(data_format="NCHW"), "channels-last"),
        (dict(params=(3, 2, 4)), "filter's shape must have 4"),
    ],
)
def test_diagonal_blocks_check_their_arguments(options, message):
    with tf.Graph().as_default(), pytest.raises(ValueError, match=message):
        arguments = dict(strides=[1, 1, 1, 1], padding="SAME") | options
        params = _filter(arguments.pop("params", FILTER))
        fb.ConvDiagonalFB(None, params, **arguments)


@pytest.mark.parametrize(
    "cls", (fb.DepthwiseConvDiagonalFB, fb.DepthwiseConvKFCBasicFB)
)
def test_depthwise_blocks_check_their_arguments(cls):
    good = dict(strides=[1, 1, 1, 1], padding="SAME")
    with tf.Graph().as_default():
        with pytest.raises(NotImplementedError, match="bias"):
            cls(None, (_filter(), tf.zeros([8])), **good)
        for params, options, message in (
            (_filter((3, 2, 4)), {}, "filter's shape"),
            (_filter(), dict(strides=[1, 1]), "strides"),
            (_filter(), dict(rate=[1, 1, 1, 1]), "rate must have 2"),
            (_filter(), dict(data_format="NCHW"), "channels-last"),
        ):
            with pytest.raises(ValueError, match=message):
                cls(None, params, **(good | options))
        block = cls(None, _filter(), rate=(2, 3), **good)
        assert block._filter_shape == (3, 3, 2, 8)
        assert tuple(block._dilations) == (1, 2, 3, 1)


@pytest.mark.parametrize(
    "cls", (fb.ConvKFCBasicFB, fb.ConvKFCReduceFB, fb.ConvKFCBasicMultiIndepFB)
)
def test_kronecker_blocks_refuse_what_they_cannot_represent(cls):
    with tf.Graph().as_default():
        with pytest.raises(ValueError, match="channels-last"):
            cls(None, _filter(), "SAME", data_format="NCHW")
        with pytest.raises(ValueError, match="sequence of 3"):
            cls(None, (_filter(), _filter(), _filter()), "SAME")
        block = cls(None, _filter(), "SAME")
        with pytest.raises(ValueError, match="Grouped convolution.*2 groups"):
            block.register_additional_tower(
                tf.zeros([1, 5, 5, 4]), tf.zeros([1, 5, 5, 4])
            )
        assert block.num_registered_towers == 0  # A refusal leaves nothing behind.


def test_sua_refuses_masks_cholesky_factors_and_other_powers():
    with tf.Graph().as_default():
        with pytest.raises(ValueError, match="patch_mask"):
            fb.ConvKFCBasicFB(
                None,
                _filter(),
                "SAME",
                use_sua_approx_for_input_factor=True,
                patch_mask=np.ones(FILTER[:3]),
            )
        block, grads = cases.register(
            cases.case("conv kron, SUA"), layer_collection.LayerCollection()
        )
        block.instantiate_factors(grads, 0.1)
        for method in (block.register_cholesky, block.register_cholesky_inverse):
            with pytest.raises(NotImplementedError, match="SUA"):
                method()
        with pytest.raises(ValueError, match="powers 1 and -1"):
            block.register_matpower(-0.5)


def test_sua_equals_the_ordinary_block_where_its_assumption_holds():
    """A 1 x 1 kernel: one offset, nothing to be uncorrelated."""
    rng = np.random.RandomState(0)
    x, g = rng.normal(size=(4, 3, 3, 2)) + 1, rng.normal(size=(4, 3, 3, 3))

    def build():
        matrices = []
        for sua in (False, True):
            params = (tf.zeros([1, 1, 2, 3]), tf.zeros([3]))
            block = fb.ConvKFCBasicFB(
                layer_collection.LayerCollection(),
                params,
                "SAME",
                use_sua_approx_for_input_factor=sua,
            )
            grads = tf.constant(g)
            block.register_additional_tower(tf.constant(x), grads)
            done = cases.update(block, ((grads,),))
            with tf.control_dependencies([done]):
                matrices.append(block.full_fisher_block())
        return matrices

    ordinary, sua = graph_kinds.Run(graph_kinds.V1_ON, build)()
    np.testing.assert_allclose(sua, ordinary, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("has_bias", (False, True))
def test_the_sua_matrix_is_in_the_order_of_the_filter(has_bias):
    """`c (blockdiag(I (x) Sigma, 0) + u u^T) (x) G`, `u` the tiled means and a 1."""
    rng = np.random.RandomState(0)
    x, g = rng.normal(size=(4, 3, 3, 2)) + 1, rng.normal(size=(4, 3, 3, 3))

    def build():
        weights = tf.zeros([2, 3, 2, 3])
        block = fb.ConvKFCBasicFB(
            layer_collection.LayerCollection(),
            (weights, tf.zeros([3])) if has_bias else weights,
            "SAME",
            use_sua_approx_for_input_factor=True,
        )
        grads = tf.constant(g)
        block.register_additional_tower(tf.constant(x), grads)
        done = cases.update(block, ((grads,),))
        with tf.control_dependencies([done]):
            return block.full_fisher_block()

    pixels = x.reshape(-1, 2)
    mean = pixels.mean(axis=0)
    sigma = pixels.T @ pixels / len(pixels) - np.outer(mean, mean)
    offsets = 2 * 3
    left = np.kron(np.eye(offsets), sigma)
    u = np.tile(mean, offsets)
    if has_bias:
        left = np.pad(left, [[0, 1], [0, 1]])
        u = np.append(u, 1.0)
    rows = g.reshape(-1, 3)
    right = rows.T @ rows / len(rows)
    expected = 9 * np.kron(left + np.outer(u, u), right)
    np.testing.assert_allclose(
        graph_kinds.Run(graph_kinds.V1_ON, build)(), expected, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize(
    "dtype", (tf.float64, tf.float32, tf.bfloat16, tf.int32), ids=lambda t: t.name
)
def test_depthwise_filters_become_ordinary_ones_and_back(dtype):
    rng = np.random.RandomState(0)
    filter = rng.randint(-9, 9, size=(2, 3, 3, 2))
    full = fb.depthwise_conv2d_filter_to_conv2d_filter(tf.cast(filter, dtype))
    assert full.dtype == dtype and full.shape == [2, 3, 3, 6]
    expected = np.zeros((2, 3, 3, 6))
    for i, j, q in itertools.product(range(3), range(3), range(2)):
        if i == j:
            expected[:, :, i, j * 2 + q] = filter[:, :, i, q]
    np.testing.assert_array_equal(tf.cast(full, tf.float64), expected)
    back = fb.conv2d_filter_to_depthwise_conv2d_filter(full)
    np.testing.assert_array_equal(tf.cast(back, tf.int32), filter)


def test_an_infinite_entry_does_not_spread_between_channels():
    filter = tf.fill([1, 1, 2, 1], np.inf)
    full = fb.depthwise_conv2d_filter_to_conv2d_filter(filter)
    np.testing.assert_array_equal(full[0, 0], [[np.inf, 0], [0, np.inf]])


def test_entries_between_channels_are_discarded_on_the_way_back():
    full = tf.reshape(tf.range(2 * 2 * 2 * 6), [2, 2, 2, 6])
    back = fb.conv2d_filter_to_depthwise_conv2d_filter(full)
    for i, q in itertools.product(range(2), range(3)):
        np.testing.assert_array_equal(back[:, :, i, q], full[:, :, i, i * 3 + q])


def test_a_filter_without_equal_groups_has_no_depthwise_form():
    with pytest.raises(ValueError, match="multiple"):
        fb.conv2d_filter_to_depthwise_conv2d_filter(tf.zeros([1, 1, 2, 3]))


def test_depthwise_statistics_do_not_grow_with_the_square_of_the_channels():
    with tf.Graph().as_default():
        block, grads = cases.register(
            cases.case("depthwise diagonal"), layer_collection.LayerCollection()
        )
        block.instantiate_factors(grads, 0.1)
        assert np.prod(block._factor._cov_shape) == 2 * 2 * 3 * 2


def test_several_uses_do_not_sub_sample_unless_asked_to():
    """`num_uses` once landed in the place of `sub_sample_inputs`."""
    with tf.Graph().as_default():
        block, grads = cases.register(
            cases.case("conv, independent uses"), layer_collection.LayerCollection()
        )
        block.instantiate_factors(grads, 0.1)
        factor = block.input_factor
        assert not factor._sub_sample_inputs and not factor._sub_sample_patches
        block = fb.ConvKFCBasicMultiIndepFB(
            layer_collection.LayerCollection(),
            _filter(),
            "SAME",
            num_uses=2,
            sub_sample_inputs=True,
            sub_sample_patches=True,
        )
        outputs = tf.zeros([4, 5, 5, 4])
        block.register_additional_tower(tf.zeros([4, 5, 5, 2]), outputs)
        block.instantiate_factors(((outputs,),), 0.1)
        factor = block.input_factor
        assert factor._sub_sample_inputs and factor._sub_sample_patches


@pytest.mark.parametrize("name", ("kron", "diagonal"))
def test_a_patch_mask_gives_the_statistics_of_the_masked_patches(name):
    rng = np.random.RandomState(0)
    mask = rng.randint(0, 2, size=(2, 2, 2)).astype(float)
    x, g = rng.normal(size=(4, 3, 3, 2)), rng.normal(size=(4, 3, 3, 3))

    def build():
        weights = tf.zeros([2, 2, 2, 3])
        collection = layer_collection.LayerCollection()
        masks = tf.constant(mask)
        matrices = []
        for patch_mask in (masks, None):
            with tf1.variable_scope("masked" if patch_mask is not None else "plain"):
                if name == "kron":
                    block = fb.ConvKFCBasicFB(
                        collection, weights, "SAME", patch_mask=patch_mask
                    )
                else:
                    block = fb.ConvDiagonalFB(
                        collection,
                        weights,
                        [1, 1, 1, 1],
                        "SAME",
                        patch_mask=patch_mask,
                    )
                grads = tf.constant(g)
                block.register_additional_tower(tf.constant(x), grads)
                done = cases.update(block, ((grads,),))
                with tf.control_dependencies([done]):
                    matrices.append(block.full_fisher_block())
        return matrices

    masked, plain = graph_kinds.Run(graph_kinds.V1_ON, build)()
    scale = np.repeat(mask.reshape(-1), 3)
    assert oracle.relative_error(plain, masked) > 0.1
    np.testing.assert_allclose(
        masked, plain * np.outer(scale, scale), rtol=1e-10, atol=1e-12
    )


def test_options_are_kept_under_their_documented_names():
    with tf.Graph().as_default():
        params = (_filter(), tf.zeros([4]))
        block = fb.ConvKFCBasicFB(None, params, "SAME", strides=[1, 2, 2, 1])
        assert block._filter_shape == FILTER
        assert block._has_bias and block._padding == "SAME"
        assert block._strides == (1, 2, 2, 1)
        diagonal = fb.ConvDiagonalFB(None, params, [1, 1, 1, 1], "VALID")
        assert diagonal._strides == (1, 1, 1, 1)
        assert diagonal._dilations == (1, 1, 1, 1)
        assert diagonal._factor_implementation is fisher_factors.ConvDiagonalFactor
        assert not fb.ConvKFCBasicFB(None, (_filter(),), "SAME")._has_bias


def test_a_mask_of_the_wrong_shape_is_refused():
    with tf.Graph().as_default():
        block = fb.ConvKFCBasicFB(
            layer_collection.LayerCollection(),
            _filter(),
            "SAME",
            patch_mask=tf.ones([2, 2, 2]),
        )
        outputs = tf.zeros([1, 5, 5, 4])
        block.register_additional_tower(tf.zeros([1, 5, 5, 2]), outputs)
        with pytest.raises(errors.ArgumentError, match="mask"):
            block.instantiate_factors(((outputs,),), 0.1)
