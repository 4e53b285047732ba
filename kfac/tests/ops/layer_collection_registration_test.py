"""Layers: which block a registration makes, when it adds a tower, what it counts."""

import math

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import fisher_blocks as fb
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


# The table of `reuse`.


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("reuse", [False, None, tf1.AUTO_REUSE, "VARIABLE_SCOPE"])
def test_an_unknown_group_is_inserted_unless_reuse_is_true(lc, method, reuse):
    case = CASES[method]
    arguments = case.arguments()
    register(lc, method, arguments, reuse=reuse)
    assert len(lc.fisher_blocks) == len(groups(arguments))
    block = lc.fisher_blocks[groups(arguments)[-1]]
    assert type(block) is case.block
    assert block.num_registered_towers == 1
    for variable_ in tf.nest.flatten(groups(arguments)):
        assert lc._vars_to_uses[variable_] == case.uses


@pytest.mark.parametrize("method", ALL_METHODS)
def test_reuse_of_an_unknown_group_is_an_error(lc, method):
    with unchanged(lc), pytest.raises(ValueError, match="reuse is set"):
        register(lc, method, CASES[method].arguments(), reuse=True)


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("reuse", [False, None, "VARIABLE_SCOPE"])
def test_a_known_group_without_reuse_is_an_error(lc, method, reuse):
    arguments = CASES[method].arguments()
    register(lc, method, arguments)
    with unchanged(lc), pytest.raises(ValueError, match="already in LayerCollection"):
        register(lc, method, arguments, reuse=reuse)


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("reuse", [True, tf1.AUTO_REUSE])
def test_a_known_group_with_reuse_gets_another_tower(lc, method, reuse):
    case = CASES[method]
    arguments = case.arguments()
    register(lc, method, arguments)
    blocks = lc.get_blocks()
    register(lc, method, arguments, reuse=reuse)
    assert all(a is b for a, b in zip(lc.get_blocks(), blocks, strict=True))
    assert {block.num_registered_towers for block in blocks} == {2}
    for variable_ in tf.nest.flatten(groups(arguments)):
        assert lc._vars_to_uses[variable_] == 2 * case.uses


@pytest.mark.parametrize("method", [m for m in ALL_METHODS if CASES[m].another_approx])
@pytest.mark.parametrize("reuse", [True, tf1.AUTO_REUSE])
def test_another_class_of_block_cannot_be_a_tower(lc, method, reuse):
    arguments = CASES[method].arguments()
    if method == "register_generic":
        arguments["params"] = variable([2], "q")
    register(lc, method, arguments)
    with unchanged(lc), pytest.raises(ValueError, match="another tower"):
        approx = CASES[method].another_approx
        register(lc, method, arguments, approx=approx, reuse=reuse)


@pytest.mark.parametrize("method", [m for m in ALL_METHODS if CASES[m].another_option])
def test_another_configuration_cannot_be_a_tower(lc, method):
    case = CASES[method]
    arguments = case.arguments()
    register(lc, method, arguments)
    with unchanged(lc), pytest.raises(ValueError, match="another tower"):
        register(lc, method, arguments, reuse=True, **case.another_option())


def test_spellings_of_the_same_configuration_are_the_same(lc):
    arguments = CASES["register_conv2d"].arguments()
    mask = np.ones([3, 3, 2])
    register(lc, "register_conv2d", arguments, patch_mask=mask)
    same = dict(padding="same", dilations=[1, 1, 1, 1], strides=(1, 1, 1, 1))
    register(
        lc, "register_conv2d", arguments, reuse=True, patch_mask=mask.copy(), **same
    )
    with unchanged(lc), pytest.raises(ValueError, match="patch_mask"):
        register(lc, "register_conv2d", arguments, reuse=True, patch_mask=0 * mask)
    with unchanged(lc), pytest.raises(ValueError, match="patch_mask"):
        register(lc, "register_conv2d", arguments, reuse=True)


def test_towers_must_agree_on_integer_ids(lc):
    arguments = EMBEDDING.arguments()
    register(lc, "register_fully_connected", arguments)
    with unchanged(lc), pytest.raises(ValueError, match="dense_inputs"):
        lc.register_fully_connected(
            arguments["params"], data(7), data(2), approx="kron_in_diag", reuse=True
        )


@pytest.mark.parametrize("scope_reuse", [False, tf1.AUTO_REUSE, True])
def test_by_default_the_ambient_variable_scope_decides(lc, scope_reuse):
    arguments = CASES["register_fully_connected"].arguments()
    with tf1.variable_scope("outer", reuse=scope_reuse):
        if scope_reuse is True:
            with pytest.raises(ValueError, match="reuse is set"):
                register(lc, "register_fully_connected", arguments)
        else:
            register(lc, "register_fully_connected", arguments)
            assert len(lc.fisher_blocks) == 1


@pytest.mark.parametrize("reuse", ["maybe", 1, "variable_scope"])
def test_any_other_value_of_reuse_is_refused(lc, reuse):
    arguments = CASES["register_fully_connected"].arguments()
    with unchanged(lc), pytest.raises(ValueError, match="duplicate"):
        register(lc, "register_fully_connected", arguments, reuse=reuse)


@pytest.mark.parametrize("other", ["subset", "superset", "overlap", "permuted"])
def test_a_variable_is_in_one_group_only(lc, other):
    w, b, c = variable([2, 2], "w"), variable([2], "b"), variable([2], "c")
    first = w if other == "superset" else (w, b)
    second = {"subset": b, "superset": (w, b), "overlap": (b, c), "permuted": (b, w)}
    lc.register_generic(first, BATCH, approx="full")
    for reuse in (False, tf1.AUTO_REUSE):
        with unchanged(lc), pytest.raises(ValueError, match="was already registered"):
            lc.register_generic(second[other], BATCH, approx="full", reuse=reuse)


def test_register_block_works_on_a_plain_dict_of_anything(lc):
    x, y = variable([1], "x"), variable([1], "y")
    lc.fisher_blocks = {x: "one", (y,): "two"}
    assert lc._register_block(x, "other", reuse=True) == "one"
    with pytest.raises(ValueError, match="already in LayerCollection"):
        lc._register_block(x, "other", reuse=False)
    with pytest.raises(ValueError, match="was already registered"):
        lc._register_block([x, y], "other", reuse=False)
    with pytest.raises(ValueError, match="another tower"):
        lc._register_block(x, 3, reuse=True)
    z = variable([1], "z")
    assert lc._register_block(z, "three") == "three"
    assert lc.registered_variables[-1] is z
    assert lc.get_blocks() == ("one", "two", "three")


# Approximations.

APPROXIMATIONS = {
    ("register_generic", "full"): fb.NaiveFullFB,
    ("register_generic", "diagonal"): fb.NaiveDiagonalFB,
    ("register_fully_connected", "kron"): fb.FullyConnectedKFACBasicFB,
    ("register_fully_connected", "kron_in_diag"): fb.FullyConnectedKFACBasicFB,
    ("register_fully_connected", "kron_out_diag"): fb.FullyConnectedKFACBasicFB,
    ("register_fully_connected", "kron_both_diag"): fb.FullyConnectedKFACBasicFB,
    ("register_fully_connected", "diagonal"): fb.FullyConnectedDiagonalFB,
    ("register_conv1d", "kron"): fb.ConvKFCBasicFB,
    ("register_convolution", "kron"): fb.ConvKFCBasicFB,
    ("register_conv2d", "kron"): fb.ConvKFCBasicFB,
    ("register_conv2d", "kron_sua"): fb.ConvKFCBasicFB,
    ("register_conv2d", "kron_reduce"): fb.ConvKFCReduceFB,
    ("register_conv2d", "diagonal"): fb.ConvDiagonalFB,
    ("register_depthwise_conv2d", "diagonal"): fb.DepthwiseConvDiagonalFB,
    ("register_depthwise_conv2d", "kron_depthwise"): fb.DepthwiseConvKFCBasicFB,
    ("register_separable_conv2d", "kron_sua"): fb.ConvKFCBasicFB,
    ("register_fully_connected_multi", "kron_indep"): fb.FullyConnectedMultiIndepFB,
    (
        "register_fully_connected_multi",
        "kron_indep_in_diag",
    ): fb.FullyConnectedMultiIndepFB,
    (
        "register_fully_connected_multi",
        "kron_indep_out_diag",
    ): fb.FullyConnectedMultiIndepFB,
    (
        "register_fully_connected_multi",
        "kron_indep_both_diag",
    ): fb.FullyConnectedMultiIndepFB,
    ("register_fully_connected_multi", "kron_series_1"): fb.FullyConnectedSeriesFB,
    ("register_fully_connected_multi", "kron_series_2"): fb.FullyConnectedSeriesFB,
    ("register_fully_connected_multi", "kron_reduce"): fb.FullyConnectedReduceFB,
    ("register_conv2d_multi", "kron_indep"): fb.ConvKFCBasicMultiIndepFB,
    ("register_scale_and_shift", "full"): fb.ScaleAndShiftFullFB,
    ("register_scale_and_shift", "diagonal"): fb.ScaleAndShiftDiagonalFB,
}


@pytest.mark.parametrize(("method", "approx"), sorted(APPROXIMATIONS))
def test_every_legal_approximation_makes_its_block(lc, method, approx):
    arguments = CASES[method].arguments()
    register(lc, method, arguments, approx=approx)
    block = lc.get_blocks()[-1]
    assert type(block) is APPROXIMATIONS[method, approx]
    assert block.description().approximation == approx


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("approx", ["nonsense", "kron_series_3", 7])
def test_an_approximation_outside_the_table_is_refused(lc, method, approx):
    arguments = CASES[method].arguments()
    with unchanged(lc), pytest.raises(ValueError, match="Bad value") as error:
        register(lc, method, arguments, approx=approx)
    assert isinstance(error.value, AssertionError)


@pytest.mark.parametrize(
    ("method", "approx"),
    [
        ("register_conv1d", "diagonal"),
        ("register_convolution", "kron_indep"),
        ("register_depthwise_conv2d", "kron"),
    ],
)
def test_fixed_types_take_only_their_own_name(lc, method, approx):
    with unchanged(lc), pytest.raises(AssertionError):
        register(lc, method, CASES[method].arguments(), approx=approx)


DEFAULTS = {
    "generic": ("diagonal", "full", "register_generic"),
    "fully_connected": ("kron", "diagonal", "register_fully_connected"),
    "conv2d": ("kron", "diagonal", "register_conv2d"),
    "fully_connected_multi": (
        "kron_indep",
        "kron_series_2",
        "register_fully_connected_multi",
    ),
    "conv2d_multi": ("kron_indep", "kron_indep", "register_conv2d_multi"),
    "scale_and_shift": ("full", "diagonal", "register_scale_and_shift"),
}


@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_defaults_hold_until_set_and_refuse_other_names(lc, family):
    initial, other, method = DEFAULTS[family]
    attribute = f"default_{family}_approximation"
    assert getattr(lc, attribute) == initial
    set_default = getattr(lc, f"set_{attribute}")
    assert set_default(other) is None
    assert getattr(lc, attribute) == other
    register(lc, method, CASES[method].arguments())
    assert type(lc.get_blocks()[0]) is APPROXIMATIONS[method, other]
    with unchanged(lc), pytest.raises(ValueError, match="Bad value"):
        set_default("nonsense")
    with pytest.raises(AttributeError):
        setattr(lc, attribute, initial)
    table = getattr(lc, f"_{family}_approx_to_block_types")
    assert {initial, other} <= set(table)


def test_explicit_beats_linked_beats_default(lc):
    arguments = CASES["register_fully_connected"].arguments()
    w, b = arguments["params"]
    lc.define_linked_parameters([b, w], "kron_out_diag")
    factory, name = lc._get_block_type(
        (w, b), None, "kron", lc._fully_connected_approx_to_block_types
    )
    assert name == "kron_out_diag"
    assert factory(lc, has_bias=True)._diagonal_approx_for_output
    register(lc, "register_fully_connected", arguments)
    assert lc.get_blocks()[0]._diagonal_approx_for_output

    more = CASES["register_fully_connected"].arguments()
    lc.define_linked_parameters(more["params"], "kron_out_diag")
    register(lc, "register_fully_connected", more, approx="diagonal")
    assert type(lc.get_blocks()[1]) is fb.FullyConnectedDiagonalFB


@pytest.mark.parametrize(
    "method",
    ["register_conv1d", "register_convolution", "register_depthwise_conv2d"],
)
def test_fixed_types_do_not_ignore_a_linked_approximation(lc, method):
    arguments = CASES[method].arguments()
    lc.define_linked_parameters(arguments["params"], "kron_indep")
    with unchanged(lc), pytest.raises(ValueError, match="Bad value"):
        register(lc, method, arguments)


# Linked parameters.


def test_linked_parameters_are_found_in_any_order(lc):
    x, y, z = variable([1], "x"), variable([1], "y"), variable([1], "z")
    lc.define_linked_parameters((x, y))
    lc.define_linked_parameters(z, "full")
    assert lc.linked_parameters == {frozenset((x, y)): None, frozenset((z,)): "full"}
    assert lc._get_linked_approx([y, x]) is None
    assert lc._get_linked_approx(z) == "full"
    assert lc._get_linked_approx((z,)) == "full"
    assert lc._get_linked_approx((y, z)) is None
    assert lc._linked_parameters is not None


def test_linking_again_or_across_registered_groups_is_an_error(lc):
    w, b = variable([2, 2], "w"), variable([2], "b")
    lc.register_generic((w, b), BATCH, approx="full")
    for group in (w, (b,), (w, variable([1], "c"))):
        with unchanged(lc), pytest.raises(ValueError, match="already registered"):
            lc.define_linked_parameters(group)
    lc.define_linked_parameters((b, w))  # Equal to a registered group.
    for group in ((w, b), w, [b, variable([1], "d")]):
        with unchanged(lc), pytest.raises(ValueError, match="already"):
            lc.define_linked_parameters(group)
    x = variable([1], "x")
    lc.define_linked_parameters(x)
    with unchanged(lc), pytest.raises(ValueError, match="already linked"):
        lc.define_linked_parameters((x, variable([1], "y")))


def test_linking_to_an_unknown_approximation_is_an_error(lc):
    x = variable([1], "x")
    with unchanged(lc), pytest.raises(ValueError, match="Unknown approximation"):
        lc.define_linked_parameters(x, "kronecker")
    lc.define_linked_parameters(x, "kron_series_1")


# What blocks are given.


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


def test_all_but_the_last_axis_of_dense_weights_belong_to_the_input(lc):
    w = variable([2, 3, 4], "w")
    lc.register_fully_connected(w, data(6), data(4))
    with unchanged(lc), pytest.raises(ValueError, match="last axis of size 6"):
        lc.register_fully_connected(w, data(5), data(4), reuse=True)
