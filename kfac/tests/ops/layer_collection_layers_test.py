"""What a registration hands to its block, and what it counts."""

import math

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import fisher_factors
from kfac.python.ops import layer_collection as lc_lib
from kfac.tests.ops.layer_collection_cases import (
    BATCH,
    CASES,
    EMBEDDING,
    data,
    groups,
    register,
    unchanged,
    variable,
)

tf1 = tf.compat.v1
ALL_METHODS = sorted(CASES)


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as g:
        yield g


@pytest.fixture
def lc(graph):
    return lc_lib.LayerCollection()


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_layer_without_bias_is_registered_by_its_weights(lc, method):
    arguments = CASES[method].arguments()
    for name in ("params", "pointwise_params"):
        if isinstance(arguments.get(name), tuple):
            arguments[name] = arguments[name][0]
    register(lc, method, arguments)
    key = groups(arguments)[-1]
    block = lc.fisher_blocks[key]
    assert not getattr(block, "_has_bias", False)
    assert not getattr(block, "_has_shift", False)
    assert lc.registered_variables == tuple(groups(arguments))


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_bias_makes_a_tuple_key_also_from_a_list(lc, method):
    arguments = CASES[method].arguments()
    key = groups(arguments)[-1]
    if not isinstance(key, tuple):
        pytest.skip("takes one variable")
    name = "pointwise_params" if "pointwise_params" in arguments else "params"
    register(lc, method, arguments, **{name: list(key)})
    block = lc.fisher_blocks[list(key)]
    assert getattr(block, "_has_bias", getattr(block, "_has_shift", None))
    assert list(lc.fisher_blocks)[-1] == key
    assert lc.registered_variables[-2:] == key


def test_a_sequence_of_one_parameter_is_that_parameter(lc):
    w = variable([3, 2], "w")
    lc.register_fully_connected([w], data(3), data(2))
    assert lc.fisher_blocks[w]._has_bias is False


def test_options_reach_the_blocks(lc):
    register(
        lc,
        "register_conv2d",
        CASES["register_conv2d"].arguments(),
        dilations=[1, 2, 2, 1],
        sub_sample_inputs=True,
        sub_sample_patches=False,
        patch_mask=np.ones([3, 3, 2]),
        approx="kron",
    )
    block = lc.get_blocks()[0]
    assert tuple(block._strides) == (1, 1, 1, 1)
    assert tuple(block._dilation_rate) == (1, 2, 2, 1)
    assert block._padding == "SAME"
    assert block._sub_sample_inputs is True
    assert block._sub_sample_patches is False
    assert block._patch_mask.shape == [3, 3, 2]
    assert block._extract_patches_fn == "extract_image_patches"

    register(lc, "register_conv1d", CASES["register_conv1d"].arguments())
    assert lc.get_blocks()[1]._data_format == "NWC"
    assert lc.get_blocks()[1]._extract_patches_fn == "extract_convolution_patches"

    arguments = CASES["register_conv2d"].arguments()
    register(lc, "register_conv2d", arguments, strides=[1, 2, 2, 1], approx="kron_sua")
    assert tuple(lc.get_blocks()[2]._strides) == (1, 2, 2, 1)

    arguments = CASES["register_conv2d_multi"].arguments()
    register(lc, "register_conv2d_multi", arguments, sub_sample_inputs=False)
    assert lc.get_blocks()[3]._num_uses == 3
    assert lc.get_blocks()[3]._sub_sample_inputs is False


@pytest.mark.parametrize("option", [1, 2])
def test_series_options_reach_the_block(lc, option):
    arguments = CASES["register_fully_connected_multi"].arguments()
    approx = f"kron_series_{option}"
    register(lc, "register_fully_connected_multi", arguments, approx=approx)
    assert lc.get_blocks()[0]._option == option


@pytest.mark.parametrize(
    ("approx", "flags"),
    [
        ("kron", (False, False)),
        ("kron_in_diag", (True, False)),
        ("kron_out_diag", (False, True)),
        ("kron_both_diag", (True, True)),
    ],
)
@pytest.mark.parametrize("multi", [False, True])
def test_diagonal_flags_follow_the_name(lc, approx, flags, multi):
    method = "register_fully_connected" + ("_multi" if multi else "")
    approx = approx.replace("kron", "kron_indep") if multi else approx
    register(lc, method, CASES[method].arguments(), approx=approx)
    block = lc.get_blocks()[0]
    assert block._diagonal_approx_for_input is flags[0]
    assert block._diagonal_approx_for_output is flags[1]


def test_the_separable_method_registers_both_layers(lc):
    arguments = CASES["register_separable_conv2d"].arguments()
    register(lc, "register_separable_conv2d", arguments, strides=[1, 2, 2, 1])
    depthwise, pointwise = lc.get_blocks()
    assert tuple(depthwise._strides) == (1, 2, 2, 1)
    assert tuple(pointwise._strides) == (1, 1, 1, 1)
    assert pointwise._padding == "VALID"
    assert pointwise._inputs[0] is arguments["depthwise_outputs"]
    assert pointwise._outputs[0] is arguments["pointwise_outputs"]
    assert depthwise._inputs[0] is arguments["inputs"]


def test_lists_over_uses_are_stored_as_tuples_of_the_same_tensors(lc):
    arguments = CASES["register_fully_connected_multi"].arguments()
    register(lc, "register_fully_connected_multi", arguments)
    block = lc.get_blocks()[0]
    for stored, given in (
        (block._inputs[0], arguments["inputs"]),
        (block._outputs[0], arguments["outputs"]),
    ):
        assert isinstance(stored, tuple)
        assert all(a is b for a, b in zip(stored, given, strict=True))


@pytest.mark.parametrize(
    ("inputs", "outputs", "num_uses"),
    [((12, 3), (12, 2), 2), ((2, 6, 3), (2, 6, 2), 2), ((2, 6, 3), (12, 2), None)],
)
def test_folded_uses_count_as_one(lc, inputs, outputs, num_uses):
    w = variable([3, 2], "w")
    lc.register_fully_connected_multi(
        w, tf.zeros(inputs), tf.zeros(outputs), num_uses=num_uses
    )
    assert lc._vars_to_uses[w] == 1
    assert lc.fisher_blocks[w]._num_uses == num_uses


def test_folded_inputs_may_go_with_a_list_of_outputs(lc):
    w = variable([3, 2], "w")
    lc.register_fully_connected_multi(w, tf.zeros([12, 3]), [data(2), data(2)])
    assert lc._vars_to_uses[w] == 1
    assert lc.fisher_blocks[w]._num_uses == 2


# Integer ids.


@pytest.mark.parametrize(
    ("default", "picked"),
    [
        ("kron", "kron_in_diag"),
        ("kron_in_diag", "kron_in_diag"),
        ("kron_out_diag", "kron_both_diag"),
        ("kron_both_diag", "kron_both_diag"),
        ("diagonal", "kron_both_diag"),
    ],
)
def test_ids_pick_the_variant_with_a_diagonal_input(lc, default, picked):
    lc.set_default_fully_connected_approximation(default)
    register(lc, "register_fully_connected", EMBEDDING.arguments())
    assert lc.get_blocks()[0].description().approximation == picked
    assert lc.default_fully_connected_approximation == default


@pytest.mark.parametrize(
    ("default", "picked"),
    [
        ("kron_indep", "kron_indep_in_diag"),
        ("kron_indep_out_diag", "kron_indep_both_diag"),
        ("kron_series_2", "kron_indep_in_diag"),
        ("kron_reduce", "kron_indep_in_diag"),
    ],
)
def test_ids_of_several_uses_do_too(lc, default, picked):
    lc.set_default_fully_connected_multi_approximation(default)
    table = variable([7, 2], "table")
    ids = [data(dtype=tf.int32), data(dtype=tf.int32)]
    outputs = [data(2), data(2)]
    lc.register_fully_connected_multi(table, ids, outputs, dense_inputs=False)
    block = lc.get_blocks()[0]
    assert block.description().approximation == picked
    assert [use.one_hot_depth for use in block._inputs[0]] == [7, 7]
    assert lc._vars_to_uses[table] == 2


@pytest.mark.parametrize("shape", [(2, 6), (12,)])
def test_folded_ids_are_accepted(lc, shape):
    table = variable([7, 2], "table")
    lc.register_fully_connected_multi(
        table,
        tf.zeros(shape, tf.int64),
        tf.zeros([12, 2]),
        num_uses=2,
        dense_inputs=False,
    )
    assert lc.get_blocks()[0]._inputs[0].one_hot_depth == 7


def test_the_number_of_classes_does_not_leak_onto_the_ids(lc):
    ids = data(dtype=tf.int32)
    first, second = variable([7, 2], "first"), variable([9, 2], "second")
    third = variable([7, 4], "third")
    lc.register_fully_connected(first, ids, data(2), dense_inputs=False)
    lc.register_fully_connected(second, ids, data(2), dense_inputs=False)
    lc.register_fully_connected(third, ids, data(4), dense_inputs=False)
    stored = [block._inputs[0] for block in lc.get_blocks()]
    assert [tensor.one_hot_depth for tensor in stored] == [7, 9, 7]
    assert stored[0] is stored[2]  # So that their input factor can be shared.
    assert not hasattr(ids, "one_hot_depth")
    assert stored[0].dtype == tf.int32
    with tf1.Session() as session:
        value = session.run(tf.convert_to_tensor(stored[0]))
    np.testing.assert_array_equal(value, np.zeros(BATCH))


def test_ids_that_know_their_number_of_classes_are_stored_as_they_are(lc):
    first, second = variable([7, 2], "first"), variable([7, 2], "second")
    ids = data(dtype=tf.int32)
    lc.register_fully_connected(first, ids, data(2), dense_inputs=False)
    wrapped = lc.get_blocks()[0]._inputs[0]
    lc.register_fully_connected(second, wrapped, data(2), dense_inputs=False)
    assert lc.get_blocks()[1]._inputs[0] is wrapped


# Scale and shift.


@pytest.mark.parametrize(
    ("data_shape", "shape", "axes"),
    [
        ([BATCH, 5, 5, 3], [3], (1, 2)),
        ([BATCH, 5, 5, 3], [1, 1, 5, 3], (1,)),
        ([BATCH, 4, 5, 3], [5, 1], (1, 3)),
        ([BATCH, 5, 3], [5, 3], ()),
        ([BATCH, 5, 3], [], (1, 2)),
        ([BATCH, 5, 3], [1, 1, 1], (1, 2)),
        ([BATCH, 3], [3], ()),
        ([BATCH, 1], [1], ()),
        ([BATCH], [1], ()),
    ],
)
def test_broadcast_axes(lc, data_shape, shape, axes):
    x = tf.zeros(data_shape)
    scale, shift = variable(shape, "scale"), variable(shape, "shift")
    lc.register_scale_and_shift((scale, shift), x, tf.zeros(data_shape))
    block = lc.get_blocks()[0]
    assert block._broadcast_dims_scale == axes
    assert block._broadcast_dims_shift == axes
    lone = variable(shape, "lone")
    lc.register_scale_and_shift(lone, x, tf.zeros(data_shape))
    assert lc.get_blocks()[1]._broadcast_dims_shift is None


def test_scale_and_shift_may_have_different_shapes(lc):
    params = variable([3], "scale"), variable([1, 5, 1], "shift")
    lc.register_scale_and_shift(params, data(5, 3), data(5, 3))
    block = lc.get_blocks()[0]
    assert block._broadcast_dims_scale == (1,)
    assert block._broadcast_dims_shift == (2,)


def test_unknown_sizes_count_as_equal_but_a_one_is_broadcast(lc):
    x = tf1.placeholder(tf.float32, [None, None, 3])
    equal, one = variable([4, 3], "equal"), variable([1, 3], "one")
    lc.register_scale_and_shift(equal, x, x)
    lc.register_scale_and_shift(one, x, x)
    assert [b._broadcast_dims_scale for b in lc.get_blocks()] == [(), (1,)]


# Uses.


def test_uses_accumulate_by_variable(lc):
    x, y = variable([1], "x"), variable([1], "y")
    lc._add_uses(x, 1)
    lc._add_uses([x, y], 2)
    lc._add_uses((y,), math.inf)
    assert lc._get_use_count_map() is lc._vars_to_uses
    assert lc._get_use_count_map()[x] == 3
    assert lc._vars_to_uses[y] == math.inf
    assert lc._vars_to_uses[variable([1], "z")] == 0
    assert len(lc._vars_to_uses) == 2


def test_unknown_shapes_pass(lc):
    unknown = tf1.placeholder(tf.float32)
    w = variable([3, 2], "w")
    lc.register_fully_connected(w, unknown, unknown)
    filter_ = variable([3, 3, 2, 4], "f")
    image = tf1.placeholder(tf.float32, [None, None, None, None])
    lc.register_conv2d(filter_, [1, 1, 1, 1], "SAME", image, image)
    some = tf1.placeholder(tf.float32, [None, None])
    lc.register_fully_connected(variable([5, 2], "v"), some, some)
    lc.register_fully_connected_multi(variable([5, 2], "u"), some, some, num_uses=3)
    assert len(lc.fisher_blocks) == 4


def test_groups_of_channels_have_a_diagonal(lc):
    filter_, inputs, outputs = variable([3, 3, 2, 6], "f"), data(5, 5, 4), data(5, 5, 6)
    args = filter_, [1, 1, 1, 1], "SAME"
    with unchanged(lc), pytest.raises(ValueError, match="last axis of size 2"):
        lc.register_conv2d(*args, inputs, outputs)
    with unchanged(lc), pytest.raises(ValueError, match="last axis of size 2"):
        lc.register_conv2d(*args, data(5, 5, 8), outputs, approx="diagonal")
    mask = np.ones([3, 3, 2])
    with unchanged(lc), pytest.raises(ValueError, match="last axis of size 2"):
        lc.register_conv2d(*args, inputs, outputs, approx="diagonal", patch_mask=mask)
    lc.register_conv2d(*args, inputs, outputs, approx="diagonal")
    (block,) = lc.get_blocks()
    block.instantiate_factors(((data(5, 5, 6),),), 0.1)
    (factor,) = lc.get_factors()
    assert isinstance(factor, fisher_factors.GroupedConvDiagonalFactor)


def test_all_but_the_last_axis_of_dense_weights_belong_to_the_input(lc):
    w = variable([2, 3, 4], "w")
    lc.register_fully_connected(w, data(6), data(4))
    with unchanged(lc), pytest.raises(ValueError, match="last axis of size 6"):
        lc.register_fully_connected(w, data(5), data(4), reuse=True)
