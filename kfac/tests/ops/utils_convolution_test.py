import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import utils
from kfac.tests import graph_kinds

tf1 = tf.compat.v1
FEW = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
# num_spatial, strides, dilations: TensorFlow allows only one of the two above 1.
CASES = [
    (n, s, d)
    for n in (1, 2, 3)
    for s, d in (([1, 1, 1], [1, 1, 1]), ([2, 3, 2], [1, 1, 1]), ([1] * 3, [2, 1, 2]))
]
FILTERS, SIZES = [3, 2, 2], [6, 7, 5]


def _data(num_spatial):
    rng = np.random.RandomState(num_spatial)
    inputs = rng.randn(2, *SIZES[:num_spatial], 3)
    kernel = rng.randn(*FILTERS[:num_spatial], 3, 4)
    return inputs, kernel


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("num_spatial", "strides", "dilations"), CASES)
def test_patches_times_the_flat_kernel_is_the_convolution(
    num_spatial, strides, dilations, padding
):
    inputs, kernel = _data(num_spatial)
    strides, dilations = strides[:num_spatial], dilations[:num_spatial]
    patches = utils.extract_convolution_patches(
        inputs, kernel.shape, padding, strides, dilations
    )
    expected = tf.nn.convolution(inputs, kernel, strides, padding, dilations=dilations)
    kernel_shape = list(kernel.shape[:-1])
    assert patches.shape.as_list() == expected.shape.as_list()[:-1] + kernel_shape
    flat = tf.reshape(patches, [*expected.shape[:-1], -1])
    found = flat @ kernel.reshape(-1, 4)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("num_spatial", [1, 2, 3])
def test_all_sizes_but_the_channels_may_be_dynamic(num_spatial):
    inputs, kernel = _data(num_spatial)
    with tf.Graph().as_default(), tf1.Session() as session:
        feed = tf1.placeholder(tf.float64, [None] * (num_spatial + 1) + [3])
        patches = [
            utils.extract_convolution_patches(feed, kernel.shape, padding, [2] * 3)
            if num_spatial == 3
            else utils.extract_convolution_patches(feed, kernel.shape, padding)
            for padding in ("SAME", "VALID")
        ]
        dynamic = session.run(patches, {feed: inputs})
    strides = [2] * 3 if num_spatial == 3 else None
    for found, padding in zip(dynamic, ("SAME", "VALID"), strict=True):
        np.testing.assert_array_equal(
            found,
            utils.extract_convolution_patches(inputs, kernel.shape, padding, strides),
        )


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
def test_patches_can_be_taken_in_every_kind_of_graph(kind):
    def build():
        return [
            utils.extract_convolution_patches(
                tf.constant(_data(n)[0]), _data(n)[1].shape, "same"
            )
            for n in (1, 2)
        ]

    for n, patches in zip((1, 2), graph_kinds.Run(kind, build)(), strict=True):
        inputs, kernel = _data(n)
        np.testing.assert_allclose(
            patches.reshape(-1, kernel[..., 0].size) @ kernel.reshape(-1, 4),
            tf.reshape(tf.nn.convolution(inputs, kernel, padding="SAME"), [-1, 4]),
            atol=1e-12,
        )


def test_strides_and_dilations_may_have_full_rank():
    inputs, kernel = _data(2)
    np.testing.assert_array_equal(
        utils.extract_convolution_patches(
            inputs, kernel.shape, "SAME", [1, 2, 3, 1], [1, 1, 1, 1], data_format="NHWC"
        ),
        utils.extract_convolution_patches(inputs, kernel.shape, "SAME", [2, 3], [1, 1]),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_format": "NCHW"}, "Channels must come last"),
        ({"filter_shape": [3, 2, 5, 4]}, "3 channels.*takes 5"),
        ({"filter_shape": [3, 3, 4]}, "do not fit"),
        ({"padding": "CAUSAL"}, "padding"),
        ({"strides": [1, 1, 1]}, "2 or 4 entries"),
    ],
)
def test_convolutions_that_make_no_sense_are_refused(arguments, message):
    inputs, kernel = _data(2)
    arguments = {"filter_shape": kernel.shape, "padding": "SAME", **arguments}
    with pytest.raises(ValueError, match=message):
        utils.extract_convolution_patches(inputs, **arguments)


def test_pointwise_patches_are_the_patches_of_a_1x1_filter():
    inputs, _ = _data(2)
    general = utils.extract_convolution_patches(inputs, [1, 1, 3, 4], "VALID")
    pointwise = utils.extract_pointwise_conv2d_patches(inputs, [1, 1, 3, 4])
    assert pointwise.shape == [2, 6, 7, 1, 1, 3]
    np.testing.assert_array_equal(pointwise, general)


def test_pointwise_patches_allow_unknown_sizes():
    with tf.Graph().as_default():
        feed = tf1.placeholder(tf.float32, [None, None, 7, 3])
        patches = utils.extract_pointwise_conv2d_patches(feed, [1, 1, 3, 4])
        assert patches.shape.as_list() == [None, None, 7, 1, 1, 3]


@pytest.mark.parametrize(
    ("shape", "filter_shape", "data_format"),
    [
        ([2, 6, 3], [1, 1, 3, 4], None),
        ([2, 6, 7, 3], [1, 3, 4], None),
        ([2, 6, 7, 3], [1, 2, 3, 4], None),
        ([2, 6, 7, 3], [1, 1, 3, 4], "NCHW"),
    ],
)
def test_pointwise_patches_refuse_anything_but_a_1x1_filter(
    shape, filter_shape, data_format
):
    with pytest.raises(ValueError):
        utils.extract_pointwise_conv2d_patches(
            tf.zeros(shape), filter_shape, data_format=data_format
        )


def test_data_formats_of_tensorflow_are_told_apart():
    last = [None, "NHWC", "NWC", "NDHWC"]
    first = ["NCHW", "NCW", "channels_last", "channels_first"]
    assert all(utils.is_data_format_channel_last(name) for name in last)
    assert not any(utils.is_data_format_channel_last(name) for name in first)


SMALL = st.integers(1, 3)


@FEW
@hypothesis.given(
    st.sampled_from(["VALID", "valid", "SAME", "same", None, "causal"]),
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 9), SMALL, SMALL, SMALL), min_size=1, max_size=2),
)
def test_number_of_locations_is_that_of_the_convolution(padding, with_dilation, axes):
    sizes, filters, strides, dilations = (
        list(values) for values in zip(*axes, strict=True)
    )
    if not with_dilation:
        dilations = [1] * len(axes)
    spans = [(f - 1) * d + 1 for f, d in zip(filters, dilations, strict=True)]
    valid = padding in ("VALID", "valid")
    hypothesis.assume(
        not valid or all(n >= span for n, span in zip(sizes, spans, strict=True))
    )
    count = utils.num_conv_locations(
        [None, *sizes, 3],
        [*filters, 3, 4],
        [1, *strides, 1],
        padding,
        dilations=[1, *dilations, 1] if with_dilation else None,
    )
    # An axis by itself: starts of windows that fit; all of them with padding.
    expected = np.prod(
        [
            len(range(0, n - span + 1 if valid else n, s))
            for n, span, s in zip(sizes, spans, strides, strict=True)
        ]
    )
    assert count == expected


def test_strides_of_none_are_ones():
    assert utils.num_conv_locations([8, 5, 6, 3], [3, 3, 3, 4], None, "VALID") == 12


def test_number_of_locations_of_a_dynamic_size_is_a_tensor():
    with tf.Graph().as_default(), tf1.Session() as session:
        feed = tf1.placeholder(tf.float32, [None, None, 7, 3])
        counts = [
            utils.num_conv_locations(
                utils.get_shape(feed), [3, 3, 3, 4], [1, 2, 2, 1], padding
            )
            for padding in ("SAME", "VALID")
        ]
        assert session.run(counts, {feed: np.zeros([1, 6, 7, 3])}) == [12, 6]


@pytest.mark.parametrize(
    ("input_shape", "filter_shape", "padding"),
    [
        ([8, 5, 5, 5, 3], [3, 3, 3, 3, 4], "SAME"),
        ([8, 5], [3, 4], "SAME"),
        ([8, 5, 3], [3, 3, 3, 4], "SAME"),
        ([8, None, 3], [3, 3, 4], "SAME"),
        ([8, 5, 3], [3, 3, 4], "diagonal"),
    ],
)
def test_number_of_locations_needs_shapes_that_fit(input_shape, filter_shape, padding):
    with pytest.raises(ValueError):
        utils.num_conv_locations(input_shape, filter_shape, None, padding)
