"""Which block an approximation means, and which one applies."""

import pytest
import tensorflow as tf

from kfac.python.ops import fisher_blocks as fb
from kfac.python.ops import layer_collection as lc_lib
from kfac.tests.ops.layer_collection_cases import (
    BATCH,
    CASES,
    register,
    unchanged,
    variable,
)

ALL_METHODS = sorted(CASES)


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as g:
        yield g


@pytest.fixture
def lc(graph):
    return lc_lib.LayerCollection()


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


@pytest.mark.parametrize("sides", ["", "_in_diag", "_out_diag", "_both_diag"])
def test_a_linked_kronecker_product_is_meant_for_any_number_of_uses(lc, sides):
    method = "register_fully_connected_multi"
    arguments = CASES[method].arguments()
    lc.define_linked_parameters(arguments["params"], "kron" + sides)
    register(lc, method, arguments)
    (block,) = lc.get_blocks()
    assert block.description().approximation == "kron_indep" + sides


def test_an_explicit_approximation_is_not_renamed(lc):
    method = "register_fully_connected_multi"
    with unchanged(lc), pytest.raises(ValueError, match="Bad value 'kron'"):
        register(lc, method, CASES[method].arguments(), approx="kron")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ekfac", {"conv1d": "ekfac", "conv2d_multi": "ekfac", "generic": "diagonal"}),
        ("diagonal", {"conv2d": "diagonal", "fully_connected_multi": "kron_indep"}),
        ("kron", {"fully_connected_multi": "kron_indep", "scale_and_shift": "full"}),
        ("kron_out_diag", {"fully_connected_multi": "kron_indep_out_diag"}),
        ("kron_depthwise", {"depthwise_conv2d": "kron_depthwise", "conv2d": "kron"}),
    ],
)
def test_a_default_for_all_layers_is_that_of_the_families_that_have_it(
    lc, name, expected
):
    lc.set_default_approximation(name)
    for family, approximation in expected.items():
        method = f"register_{family}"
        arguments = CASES[method].arguments()
        register(lc, method, arguments)
        block = lc.get_blocks()[-1]
        assert block.description().approximation == approximation


@pytest.mark.parametrize("name", ["nonsense", None, "default"])
def test_a_default_for_all_layers_that_none_has_is_refused(lc, name):
    with unchanged(lc), pytest.raises(ValueError, match="Bad value"):
        lc.set_default_approximation(name)


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
    with unchanged(lc), pytest.raises(ValueError, match="Bad value"):
        lc.define_linked_parameters(x, "kronecker")
    lc.define_linked_parameters(x, "kron_series_1")


# Preferences.


def test_a_preference_is_for_those_groups_that_can_have_it(lc):
    dense = CASES["register_fully_connected"].arguments()
    norm = CASES["register_scale_and_shift"].arguments()
    lc.prefer_approximation([*dense["params"], *norm["params"]], "ekfac")
    register(lc, "register_fully_connected", dense)
    register(lc, "register_scale_and_shift", norm)
    blocks = [type(block) for block in lc.get_blocks()]
    assert blocks == [fb.FullyConnectedEKFACFB, fb.ScaleAndShiftFullFB]
    lc.check_preferences()


def test_arguments_and_links_count_more_than_preferences_and_late_ones_than_early(lc):
    cases = [CASES["register_fully_connected"].arguments() for _ in range(3)]
    lc.define_linked_parameters(cases[1]["params"], "kron_in_diag")
    for name in ("ekfac", "kron_both_diag"):
        lc.prefer_approximation([v for c in cases for v in c["params"]], name)
    for arguments, explicit in zip(cases, ("diagonal", None, None), strict=True):
        register(lc, "register_fully_connected", arguments, approx=explicit)
    found = [block.description().approximation for block in lc.get_blocks()]
    assert found == ["diagonal", "kron_in_diag", "kron_both_diag"]


def test_a_preference_that_no_group_could_have_is_an_error_once_asked_for(lc):
    norm = CASES["register_scale_and_shift"].arguments()
    lc.prefer_approximation(norm["params"], "ekfac")
    lc.check_preferences()  # Nothing is registered.
    register(lc, "register_scale_and_shift", norm)
    with pytest.raises(ValueError, match=r"Bad value.*\['diagonal', 'full'\]") as error:
        lc.check_preferences()
    assert isinstance(error.value, AssertionError)


def test_preferring_an_unknown_approximation_is_an_error(lc):
    with unchanged(lc), pytest.raises(ValueError, match="Bad value"):
        lc.prefer_approximation([variable([1], "x")], "nonsense")
