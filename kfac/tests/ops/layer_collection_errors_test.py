"""Every error of a registration leaves the collection exactly as it was."""

import pytest
import tensorflow as tf

from kfac.python.ops import layer_collection as lc_lib
from kfac.tests.ops.layer_collection_cases import (
    BATCH,
    CASES,
    EMBEDDING,
    data,
    register,
    unchanged,
    variable,
)
from kfac.tests.ops.layer_collection_error_cases import ERRORS

DENSE, MULTI = "register_fully_connected", "register_fully_connected_multi"


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as g:
        yield g


@pytest.fixture
def lc(graph):
    """A collection with a layer, a generic parameter, an embedding and a loss."""
    collection = lc_lib.LayerCollection()
    register(collection, DENSE, EMBEDDING.arguments())
    register(collection, DENSE, CASES[DENSE].arguments())
    collection.register_generic(variable([2], "known"), BATCH)
    collection.register_squared_error_loss(data(2), name="loss", coeff=0.5)
    collection.define_linked_parameters(variable([2], "linked"), "full")
    return collection


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_a_refused_call_changes_nothing_and_says_why(lc, name):
    call, fragment = ERRORS[name]
    with unchanged(lc), pytest.raises(ValueError, match=fragment) as error:
        call(lc)
    assert len(str(error.value)) > 20


def test_a_refused_call_can_be_repeated_correctly(lc):
    arguments = CASES[MULTI].arguments()
    with pytest.raises(ValueError, match="one of each per use"):
        register(lc, MULTI, arguments, outputs=[data(2)])
    register(lc, MULTI, arguments)
    assert lc.get_blocks()[-1].num_registered_towers == 1
    assert lc._vars_to_uses[arguments["params"][0]] == 2


@pytest.mark.parametrize("sequence", [tuple, list])
def test_depthwise_layers_take_no_bias(lc, sequence):
    arguments = CASES["register_depthwise_conv2d"].arguments()
    params = sequence([arguments["params"], variable([4], "bias")])
    with unchanged(lc), pytest.raises(NotImplementedError):
        register(lc, "register_depthwise_conv2d", arguments, params=params)


def test_separable_layers_are_registered_both_or_not_at_all(lc):
    arguments = CASES["register_separable_conv2d"].arguments()
    lc.register_generic(arguments["pointwise_params"][1], BATCH)
    with unchanged(lc), pytest.raises(ValueError, match="was already registered"):
        register(lc, "register_separable_conv2d", arguments)
    both = variable([1, 1, 4, 1], "both")
    with unchanged(lc), pytest.raises(ValueError, match="both"):
        lc.register_separable_conv2d(
            both, both, data(5, 5, 4), data(5, 5, 4), data(5, 5, 1), [1] * 4, "SAME"
        )


@pytest.mark.parametrize(
    "name",
    [
        "unequal lists",
        "channels first",
        "channels first, multi",
        "diagonal with a stride over channels",
        "loss variance",
    ],
)
def test_documented_assertions_are_assertion_errors_too(lc, name):
    with pytest.raises(AssertionError):
        ERRORS[name][0](lc)


@pytest.mark.parametrize("name", ["loss name is taken", "no such loss"])
def test_loss_names_raise_key_errors_too(lc, name):
    with pytest.raises(KeyError) as error:
        ERRORS[name][0](lc)
    assert str(error.value).startswith(("The loss", "reuse is set"))  # Not quoted.


@pytest.mark.parametrize("method", sorted(CASES))
def test_nothing_can_be_registered_after_finalisation(lc, method):
    lc.finalize()
    with unchanged(lc), pytest.raises(ValueError, match="after finalisation"):
        register(lc, method, CASES[method].arguments())
    with unchanged(lc), pytest.raises(ValueError, match="after finalisation"):
        lc.register_squared_error_loss(data(2))
    with unchanged(lc), pytest.raises(ValueError, match="after finalisation"):
        lc._register_block(variable([1], "late"), "block")


def test_a_block_that_refuses_its_tower_is_not_stored(lc):
    class Refusing:
        def register_additional_tower(self, batch_size):
            raise RuntimeError(f"no {batch_size}")

    table = lc._generic_approx_to_block_types
    table["refusing"] = lambda collection, params: Refusing()
    with unchanged(lc), pytest.raises(RuntimeError, match="no 6"):
        lc.register_generic(variable([2], "p"), BATCH, approx="refusing")
