"""Scale and shift, weight sharing, embeddings, generic parameters, towers."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import fisher_factors as ff
from kfac.python.ops import utils
from kfac.tests.ops import fisher_factor_cases as cases

tf1 = tf.compat.v1

TIGHT = dict(rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as new_graph:
        yield new_graph


def randn(*shape, seed=0):
    return np.random.RandomState(seed).randn(*shape)


def new_cov(factor, feed=None):
    factor.instantiate_cov_variables()
    factor.make_covariance_update_op(1.0, 1.0)
    with tf1.Session() as session:
        return session.run(factor._cov_tensor, feed)


# --- scale and shift ------------------------------------------------------------------


@pytest.mark.parametrize("has_shift", [False, True])
@pytest.mark.parametrize(
    "in_shape, out_shape, dims_scale, dims_shift",
    [
        ((4, 3), (4, 3), (), ()),  # one parameter per feature
        ((4, 2, 3, 5), (4, 2, 3, 5), (1, 2), (1, 2)),  # batch normalisation
        ((4, 2, 3), (4, 2, 3), (1,), ()),  # differently broadcast
        ((4, 2, 3), (4, 2, 3), (2, 1), (2,)),  # a single scale
        ((4, 1, 3), (4, 2, 3), (1,), ()),  # the input is broadcast too
    ],
)
def test_scale_and_shift_statistics_are_those_of_tensorflows_gradients(
    in_shape, out_shape, dims_scale, dims_shift, has_shift
):
    x, g = randn(*in_shape), randn(*out_shape, seed=1)

    def kept(shape, dims):
        return [1 if d in dims else n for d, n in enumerate(shape)][1:]

    scale = tf.ones(kept(in_shape, dims_scale), tf.float64)
    shift = tf.zeros(kept(out_shape, dims_shift), tf.float64)
    params = [scale, shift] if has_shift else [scale]
    rows = []
    with tf1.Session() as session:
        for case in range(4):
            out = scale * x[case] + shift
            gradients = session.run(tf.gradients(out, params, g[case]))
            rows.append(np.concatenate([gradient.ravel() for gradient in gradients]))
    expected = cases.mean_outer(rows)
    args = (
        (tf.constant(x),),
        ((tf.constant(g),),),
        dims_scale,
        dims_shift if has_shift else None,
        has_shift,
    )
    full = ff.ScaleAndShiftFullFactor(*args)
    diagonal = ff.ScaleAndShiftDiagonalFactor(*args)
    np.testing.assert_allclose(new_cov(full), expected, **TIGHT)
    np.testing.assert_allclose(new_cov(diagonal), np.diag(expected), **TIGHT)


@pytest.mark.parametrize(
    "in_shape, out_shape, dims_scale, dims_shift, message",
    [
        ((4, 3), (4, 3), (), None, "needs broadcast_dims_shift"),
        ((4, 3), (4, 2, 3), (1,), (1,), "ranks differ"),
        ((4, 3), (4, 1), (), (), "neither equal nor 1"),
        ((4, 1), (4, 3), (), (), "broadcast along axis 1, but the scale is not"),
        ((4, 3), (4, 3), (0,), (), "never the batch"),
    ],
)
def test_scale_and_shift_refuses_what_does_not_fit_on_construction(
    in_shape, out_shape, dims_scale, dims_shift, message
):
    inputs, grads = (tf.zeros(in_shape),), ((tf.zeros(out_shape),),)
    for cls in (ff.ScaleAndShiftFullFactor, ff.ScaleAndShiftDiagonalFactor):
        with pytest.raises(AssertionError, match=message) as error:
            cls(inputs, grads, dims_scale, dims_shift)
        assert isinstance(error.value, ValueError)


def test_another_approximation_of_scale_and_shift_is_refused():
    class Custom(ff.ScaleAndShiftFullFactor):
        def __init__(self, *args):
            ff.ScaleAndShiftFactor.__init__(self, *args, approx="banded")

    with pytest.raises(AssertionError, match="banded"):
        Custom((tf.zeros([2, 3]),), ((tf.zeros([2, 3]),),), (), ())


# --- weight sharing, "reduce" ---------------------------------------------------------


def test_reduced_factors_are_exact_for_a_linear_layer_that_is_averaged_over_uses():
    # arXiv 2311.00636, section 3.3: for out = mean_u(W x_u) the gradient of one case is
    # mean_u(x_u) (x) g, where each use receives g / U; so is A (x) G for one case.
    x, g = randn(3, 1, 2), randn(1, 4, seed=1)
    shared = np.tile(g / 3, (3, 1, 1))
    inputs = ff.FullyConnectedReduceKroneckerFactor(
        ((tf.constant(x),),), 3, "mean", has_bias=True
    )
    outputs = ff.FullyConnectedReduceKroneckerFactor(
        ((tf.constant(shared),),), 3, "sum"
    )
    a, b = new_cov(inputs), new_cov(outputs)
    gradient = np.outer(np.append(x.mean(0)[0], 1.0), g[0]).ravel()
    np.testing.assert_allclose(np.kron(a, b), np.outer(gradient, gradient), **TIGHT)


def test_convolution_reduced_over_locations_is_exact_for_a_pooled_convolution():
    x, g = randn(1, 3, 3, 2), randn(4, seed=1)
    filter_shape = (2, 2, 2, 4)
    per_location = np.tile(g / 9, (1, 3, 3, 1))
    a = new_cov(
        ff.ConvInputReduceKroneckerFactor((tf.constant(x),), filter_shape, "SAME")
    )
    b = new_cov(ff.ConvOutputReduceKroneckerFactor(((tf.constant(per_location),),)))
    filters = tf.zeros(filter_shape, tf.float64)
    pooled = tf.reduce_mean(tf.nn.conv2d(x, filters, 1, "SAME"), axis=[1, 2])
    with tf1.Session() as session:
        gradient = session.run(tf.gradients(pooled, filters, g[None])[0]).ravel()
    np.testing.assert_allclose(np.kron(a, b), np.outer(gradient, gradient), **TIGHT)


def test_reduced_and_ordinary_convolution_factors_have_different_names():
    x = tf.zeros([2, 3, 3, 2])
    pairs = [
        (
            ff.ConvInputKroneckerFactor((x,), (2, 2, 2, 4), "SAME"),
            ff.ConvInputReduceKroneckerFactor((x,), (2, 2, 2, 4), "SAME"),
        ),
        (
            ff.ConvOutputKroneckerFactor(((x,),)),
            ff.ConvOutputReduceKroneckerFactor(((x,),)),
        ),
    ]
    for ordinary, reduced in pairs:
        assert ordinary.name != reduced.name


def test_unknown_reductions_and_a_summed_bias_are_refused():
    tensors = ((tf.zeros([3, 2, 2]),),)
    with pytest.raises(ValueError, match='"mean" or "sum"'):
        ff.FullyConnectedReduceKroneckerFactor(tensors, 3, "max")
    with pytest.raises(ValueError, match="belongs to the inputs"):
        ff.FullyConnectedReduceKroneckerFactor(tensors, 3, "sum", has_bias=True)


# --- embeddings -----------------------------------------------------------------------


def ids_tensor(values, depth):
    ids = tf.constant(values)
    ids.one_hot_depth = depth
    return ids


def test_statistics_of_ids_take_the_given_dtype_and_float32_otherwise():
    tensors = ((ids_tensor([0, 1, 1, 7], 3),),)
    default = ff.DiagonalKroneckerFactor(tensors, True)
    double = ff.DiagonalKroneckerFactor(tensors, True, tf.float64)
    assert (default._dtype, double._dtype) == (tf.float32, tf.float64)
    for factor in (default, double):
        factor.set_name(factor._dtype.name)
        cov = new_cov(factor)
        assert cov.dtype == factor._dtype.as_numpy_dtype
        # The foreign id 7 counts in the batch only; the last entry is the bias.
        np.testing.assert_array_equal(cov, [0.25, 0.5, 0, 1])


def test_the_dtype_argument_is_ignored_for_dense_data():
    factor = ff.DiagonalKroneckerFactor(((tf.zeros([2, 3]),),), False, tf.float64)
    assert factor._dtype == tf.float32


def test_ids_of_several_uses_may_be_a_partitioned_tensor():
    parts = utils.PartitionedTensor((ids_tensor([0, 1], 3), ids_tensor([1, 1], 3)))
    factor = ff.DiagonalMultiKF(((parts,),), 2)
    assert factor.batch_size() == 2
    np.testing.assert_array_equal(new_cov(factor), [0.25, 0.75, 0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: ff.DiagonalKroneckerFactor(((tf.zeros([2, 3, 4]),),)),
        lambda: ff.DiagonalKroneckerFactor(((ids_tensor([[0, 1]], 3),),)),
        lambda: ff.DiagonalMultiKF(((tf.zeros([2, 3, 4, 5]),),), 2),
        lambda: ff.DiagonalMultiKF(((ids_tensor([[[0, 1]]], 3),),), 2),
    ],
)
def test_data_of_another_rank_are_refused(make):
    with pytest.raises(ValueError, match="must have rank"):
        make()


# --- generic parameters ---------------------------------------------------------------


def test_naive_factors_take_the_square_of_the_summed_gradient():
    weights, bias = randn(2, 3), randn(3, seed=1)
    batch_size = tf1.placeholder_with_default(4, ())
    groups = ((tf.constant(weights), tf.constant(bias)),) * 2
    full = ff.NaiveFullFactor(groups, batch_size)
    assert full._cov_shape == [9, 9]
    column = np.concatenate([weights.ravel(), bias])
    np.testing.assert_allclose(new_cov(full), 2 * np.outer(column, column) / 4, **TIGHT)
    diagonal = ff.NaiveDiagonalFactor((groups[0][0], groups[1][0]), batch_size)
    np.testing.assert_allclose(new_cov(diagonal), 2 * weights**2 / 4, **TIGHT)


def test_naive_factors_have_one_batch_size_and_nothing_to_compare():
    grads = (tf.zeros([2, 3]), tf.zeros([2, 3]))
    for factor in (ff.NaiveFullFactor(grads, 5), ff.NaiveDiagonalFactor(grads, 5)):
        assert factor.batch_size() == 5
        factor.check_partial_batch_sizes()
        with pytest.raises(AssertionError, match="one batch size"):
            factor._partial_batch_size(source=1)


def test_the_naive_diagonal_factor_refuses_groups_of_parameters():
    group = (tf.zeros([2, 3]), tf.zeros([3]))
    with pytest.raises(AttributeError, match="one tensor per source"):
        ff.NaiveDiagonalFactor((group,), 5)


# --- towers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    # Not where uses come first: there, towers do not concatenate.
    [c for c in cases.CASES if c.towers == 2 and c.batch == 3],
    ids=lambda c: c.name,
)
def test_equal_towers_kept_apart_or_concatenated_give_the_same(case):
    data = case.data(0)
    inputs, grads = case.tensors(data)
    if inputs is not None:
        inputs = (utils.PartitionedTensor(inputs),)
    if grads is not None:
        grads = tuple((utils.PartitionedTensor(towers),) for towers in grads)
    factor = case.build(inputs, grads)
    assert factor._num_towers == 1
    assert factor.batch_size() == case.batch * 2
    assert "__" in factor.name  # Named by the members of the partitioned tensors.
    np.testing.assert_allclose(new_cov(factor), case.expected_total(data), **TIGHT)
