"""Convolution factors against loops over every pixel."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config
from kfac.python.ops import fisher_factors as ff
from kfac.python.ops.fisher_factors import statistics
from kfac.tests.ops import fisher_factor_cases as cases

tf1 = tf.compat.v1

TIGHT = dict(rtol=1e-11, atol=1e-12)


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as new_graph:
        yield new_graph


def randn(*shape, seed=0):
    return np.random.RandomState(seed).randn(*shape)


def new_cov(factor, feed=None):
    """The statistic that an update would average, of any factor."""
    factor.instantiate_cov_variables()
    factor.make_covariance_update_op(1.0, 1.0)
    with tf1.Session() as session:
        return session.run(factor._cov_tensor, feed)


GEOMETRIES = [
    # kernel, strides, dilations, padding
    ((1, 1), (1, 1), (1, 1), "SAME"),
    ((3, 2), (1, 1), (1, 1), "SAME"),
    ((3, 2), (2, 1), (1, 1), "VALID"),
    ((2, 3), (2, 2), (1, 1), "SAME"),
    ((2, 2), (1, 1), (2, 1), "SAME"),
    ((2, 2), (1, 1), (1, 3), "VALID"),
]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kernel, strides, dilations, padding", GEOMETRIES)
def test_input_factor_is_the_mean_outer_product_of_patches(
    kernel, strides, dilations, padding, mask
):
    filter_shape = (*kernel, 2, 3)
    x = randn(2, 5, 6, 2)
    mask = randn(*filter_shape[:-1], seed=2) if mask else None
    patches = cases.slow_patches(x, filter_shape, padding, strides, dilations)
    if mask is not None:
        patches = patches * mask.ravel()
    rows = cases.with_ones(patches.reshape(-1, patches.shape[-1]))
    options = dict(
        has_bias=True, patch_mask=None if mask is None else tf.constant(mask)
    )
    by_default = ff.ConvInputKroneckerFactor(
        (tf.constant(x),), filter_shape, padding, strides, dilations, **options
    )
    by_image = ff.ConvInputKroneckerFactor(
        (tf.constant(x),),
        filter_shape,
        padding,
        strides=(1, *strides, 1),
        dilation_rate=(1, *dilations, 1),
        extract_patches_fn="extract_image_patches",
        **options,
    )
    for factor in (by_default, by_image):
        np.testing.assert_allclose(new_cov(factor), cases.mean_outer(rows), **TIGHT)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kernel, strides, dilations, padding", GEOMETRIES)
def test_diagonal_factor_is_the_mean_square_of_each_cases_gradient(
    kernel, strides, dilations, padding, mask
):
    filter_shape = (*kernel, 2, 3)
    x = randn(2, 5, 6, 2)
    mask = randn(*filter_shape[:-1], seed=2) if mask else None
    output = tf.nn.conv2d(
        x, np.zeros(filter_shape), strides, padding, dilations=dilations
    )
    grads = randn(*output.shape.as_list(), seed=1)
    factor = ff.ConvDiagonalFactor(
        (tf.constant(x),),
        ((tf.constant(grads),),),
        filter_shape,
        (1, *strides, 1),
        padding,
        dilations=(1, *dilations, 1),
        has_bias=True,
        patch_mask=None if mask is None else tf.constant(mask),
    )
    patches = cases.slow_patches(x, filter_shape, padding, strides, dilations)
    if mask is not None:
        patches = patches * mask.ravel()
    expected = cases.mean_square(
        cases.example_gradients(cases.with_ones(patches), cases.located(grads))
    )
    np.testing.assert_allclose(new_cov(factor), expected, **TIGHT)


@pytest.mark.parametrize("kernel, strides, dilations, padding", GEOMETRIES[1:4])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_factor_is_the_mean_square_of_tensorflows_own_gradients(
    kernel, strides, dilations, padding, multiplier
):
    if strides[0] != strides[1]:
        strides = (2, 2)  # All that TensorFlow's depthwise convolution can do.
    filter_shape = (*kernel, 3, multiplier)
    x = randn(3, 5, 6, 3)
    filters = tf.constant(randn(*filter_shape, seed=2))
    bias = tf.zeros([3 * multiplier], tf.float64)
    squares, grads = 0.0, []
    for case in range(3):
        out = tf.nn.depthwise_conv2d(
            x[case : case + 1], filters, (1, *strides, 1), padding, dilations=dilations
        )
        out_grad = randn(*out.shape.as_list(), seed=case)
        grads.append(out_grad)
        gradient = tf.gradients(out + bias, [filters, bias], out_grad)
        squares += np.concatenate(
            [g.ravel() ** 2 / 3 for g in tf1.Session().run(gradient)]
        )
    factor = ff.DepthwiseConvDiagonalFactor(
        (tf.constant(x),),
        ((tf.constant(np.concatenate(grads)),),),
        filter_shape,
        (1, *strides, 1),
        padding,
        has_bias=True,
    )
    np.testing.assert_allclose(new_cov(factor).ravel(), squares, **TIGHT)


def test_grouped_factor_keeps_each_groups_own_gradients():
    x, grads = randn(3, 4, 4, 4), randn(3, 4, 4, 6, seed=1)
    filter_shape = (2, 2, 2, 6)
    factor = ff.GroupedConvDiagonalFactor(
        (tf.constant(x),),
        ((tf.constant(grads),),),
        filter_shape,
        2,
        (1, 1, 1, 1),
        "SAME",
        has_bias=True,
    )
    columns = []
    for group in range(2):
        patches = cases.slow_patches(
            x[..., 2 * group : 2 * group + 2], (2, 2, 2, 3), "SAME"
        )
        group_grads = cases.located(grads[..., 3 * group : 3 * group + 3])
        columns.append(
            cases.mean_square(
                cases.example_gradients(cases.with_ones(patches), group_grads)
            )
        )
    expected = np.concatenate(columns, axis=1)
    np.testing.assert_allclose(new_cov(factor), expected, **TIGHT)


@pytest.mark.parametrize("has_bias", [False, True])
def test_diagonal_factor_extracts_patches_in_chunks_when_they_are_large(
    monkeypatch, has_bias
):
    case = cases.BY_NAME["ConvDiagonal"]
    data = case.data(0)
    inputs, grads = case.tensors(data)
    args = (inputs, grads, cases.FILTER, (1, 1, 1, 1), "SAME", None, None, has_bias)
    factor = ff.ConvDiagonalFactor(*args)
    whole = new_cov(factor)
    assert all(patches is not None for patches in factor._patches)
    # 192 patch entries per case: two cases at a time, of three.
    monkeypatch.setattr(statistics, "MAX_CHUNK_ELEMENTS", 400)
    with tf1.variable_scope("chunked"):
        factor = ff.ConvDiagonalFactor(*args)
        chunked = new_cov(factor)
    assert factor._patches == [None, None]
    np.testing.assert_allclose(chunked, whole, **TIGHT)


def test_diagonal_statistics_need_the_update_to_prepare_the_data():
    x, g = tf.zeros([2, 3, 3, 1]), tf.zeros([2, 3, 3, 1])
    conv = ff.ConvDiagonalFactor((x,), ((g,),), (2, 2, 1, 1), (1, 1, 1, 1), "SAME")
    dense = ff.FullyConnectedDiagonalFactor((x[:, 0, 0],), ((g[:, 0, 0],),))
    for factor in (conv, dense):
        with pytest.raises(TypeError):
            factor._compute_new_cov(0, 0)


@pytest.mark.parametrize("num_spatial", [1, 3])
def test_input_and_output_factors_take_any_number_of_spatial_axes(num_spatial):
    filter_shape = (2,) * num_spatial + (2, 3)
    x = randn(2, *(3, 4, 3)[:num_spatial], 2)
    patches = cases.slow_patches(x, filter_shape, "SAME")
    factor = ff.ConvInputKroneckerFactor((tf.constant(x),), filter_shape, "SAME")
    rows = patches.reshape(-1, patches.shape[-1])
    np.testing.assert_allclose(new_cov(factor), cases.mean_outer(rows), **TIGHT)
    factor = ff.ConvOutputKroneckerFactor(((tf.constant(x),),))
    np.testing.assert_allclose(
        new_cov(factor), cases.mean_outer(x.reshape(-1, 2)), **TIGHT
    )


@pytest.mark.parametrize(
    "case", [c for c in cases.CASES if c.name.startswith("Conv")], ids=lambda c: c.name
)
def test_batch_and_image_size_may_be_dynamic(case):
    data = case.data(0)
    tensors = cases.map_data(
        lambda array: tf1.placeholder(
            tf.float64, [None] * (array.ndim - 1) + [array.shape[-1]]
        ),
        data,
    )
    factor = case.build(*tensors)
    factor.instantiate_cov_variables()
    update = factor.make_covariance_update_op(1.0, 1.0)
    cov, size = factor.cov, factor.batch_size()
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        feed = case.feed(tensors, data)
        assert session.run(size, feed) == case.batch * case.towers
        session.run(update, feed)
        value = session.run(cov)
    np.testing.assert_allclose(value, case.expected_total(data), **TIGHT)


def test_pointwise_patches_are_the_pixels():
    x = randn(2, 3, 3, 2)
    factor = ff.ConvInputKroneckerFactor(
        (tf.constant(x),),
        (1, 1, 2, 3),
        "SAME",
        extract_patches_fn="extract_pointwise_conv2d_patches",
    )
    expected = cases.mean_outer(x.reshape(-1, 2))
    np.testing.assert_allclose(new_cov(factor), expected, **TIGHT)


def test_subsampled_inputs_normalise_by_the_rows_that_are_used():
    # Images of one value each: the statistic tells which of them were kept.
    values = np.arange(1.0, 8.0)
    x = np.tile(values[:, None, None, None], (1, 3, 3, 1))
    with config.override(inputs_to_extract_patches_factor=0.25):  # ceil(7 / 4) = 2
        factor = ff.ConvInputKroneckerFactor(
            (tf.constant(x),), (1, 1, 1, 1), "SAME", sub_sample_inputs=True
        )
        cov = new_cov(factor)
    pairs = itertools.combinations(values, 2)
    assert any(abs(cov[0, 0] - (a * a + b * b) / 2) < 1e-12 for a, b in pairs)


def test_subsampled_patches_normalise_by_the_rows_that_are_used():
    x = randn(1, 2, 2, 1)
    with config.override(max_num_patches=1, sub_sample_patches=True):
        factor = ff.ConvInputKroneckerFactor(
            (tf.constant(x),), (1, 1, 1, 1), "SAME", has_bias=True
        )
        cov = new_cov(factor)
    # One pixel and its homogeneous coordinate.
    pixel = cov[0, 1]
    assert any(abs(pixel - value) < 1e-12 for value in x.ravel())
    np.testing.assert_allclose(cov, [[pixel**2, pixel], [pixel, 1]])


def test_subsampling_defaults_are_captured_on_construction():
    x = tf.zeros([10, 4, 4, 1])
    with config.override(sub_sample_inputs=True, sub_sample_patches=True):
        factor = ff.ConvInputKroneckerFactor((x,), (2, 2, 1, 1), "SAME")
    assert factor._sub_sample_inputs and factor._sub_sample_patches
    explicit = ff.ConvInputMultiKF((x,), (2, 2, 1, 1), "SAME", 2)
    assert not explicit._sub_sample_inputs and not explicit._sub_sample_patches


def conv_diagonal(**changes):
    arguments = dict(
        inputs=(tf.zeros([2, 4, 4, 2]),),
        outputs_grads=((tf.zeros([2, 4, 4, 3]),),),
        filter_shape=(2, 2, 2, 3),
        strides=(1, 1, 1, 1),
        padding="SAME",
    )
    return ff.ConvDiagonalFactor(**(arguments | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data_format="NCHW"), "channel axis must be last"),
        (dict(inputs=(tf.TensorSpec([2, 4, 2]),)), r"inputs\[0\] must have rank 4"),
        (dict(inputs=(tf.TensorSpec([2, 4, 4, 5]),)), "must have 2 channels"),
        (dict(outputs_grads=((tf.TensorSpec([2, 3]),),)), "source 0 must have rank 4"),
        (
            dict(
                outputs_grads=(
                    (tf.TensorSpec([2, 4, 4, 3]),),
                    (tf.TensorSpec([2, 4, 4, 4]),),
                )
            ),
            "source 1 must have 3 channels",
        ),
        (dict(strides=(1, 1)), "strides must have length 4"),
        (dict(dilations=(1, 1)), "dilations must have length 4"),
    ],
)
def test_diagonal_factor_refuses_shapes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        conv_diagonal(**changes)


def conv_input(**changes):
    arguments = dict(
        inputs=(tf.zeros([2, 4, 4, 2]),), filter_shape=(2, 2, 2, 3), padding="SAME"
    )
    factor = ff.ConvInputKroneckerFactor(**(arguments | changes))
    factor.instantiate_cov_variables()
    factor.make_covariance_update_op(1.0, 1.0)


IMAGE = dict(extract_patches_fn="extract_image_patches")
POINTWISE = dict(extract_patches_fn="extract_pointwise_conv2d_patches")


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(data_format="NCHW"), ValueError, "channel axis must be last"),
        (dict(filter_shape=(2, 2, 3, 3)), ValueError, "must have 3 channels"),
        (dict(patch_mask=np.zeros((2, 2))), AssertionError, "patch_mask must have"),
        (dict(extract_patches_fn="magic"), NotImplementedError, "magic"),
        (IMAGE, TypeError, "needs strides"),
        (IMAGE | dict(strides=(1, 1)), AssertionError, "strides of length 4"),
        (
            IMAGE | dict(strides=(1, 1, 1, 1), dilation_rate=(2, 1, 1, 1)),
            AssertionError,
            r"\[1, height, width, 1\]",
        ),
        (
            POINTWISE | dict(filter_shape=(1, 1, 2, 3), strides=(1, 2)),
            AssertionError,
            "stride 1",
        ),
        (POINTWISE, ValueError, r"\[1, 1, in, out\]"),
    ],
)
def test_input_factor_refuses_arguments_that_do_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        conv_input(**changes)


def test_the_missing_fused_kernel_is_refused():
    with config.override(use_patches_second_moment_op=True):
        with pytest.raises(NotImplementedError, match="fused"):
            conv_input()


def test_output_factor_refuses_channels_first():
    with pytest.raises(ValueError, match="channel axis must be last"):
        ff.ConvOutputKroneckerFactor(((tf.zeros([2, 3, 4, 4]),),), "NCHW")


def test_inputs_have_one_source_only():
    x = tf.zeros([2, 4, 4, 2])
    for factor in (
        ff.ConvInputKroneckerFactor((x,), (2, 2, 2, 3), "SAME"),
        ff.ConvInputSUAKroneckerFactor((x,), (2, 2, 2, 3)),
    ):
        with pytest.raises(AssertionError, match="one source"):
            factor._partial_batch_size(source=1)


def test_groups_must_divide_the_output_channels():
    with pytest.raises(ValueError, match="do not divide into 2"):
        ff.GroupedConvDiagonalFactor(
            (tf.zeros([2, 4, 4, 4]),),
            ((tf.zeros([2, 4, 4, 3]),),),
            (1, 1, 2, 3),
            2,
            (1, 1, 1, 1),
            "SAME",
        )
