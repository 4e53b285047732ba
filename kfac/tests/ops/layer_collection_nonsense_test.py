"""Whatever one argument is, a registration is accepted or refused with a reason."""

import inspect

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import errors
from kfac.python.ops import layer_collection as lc_lib
from kfac.tests.ops.layer_collection_cases import (
    BATCH,
    CASES,
    EMBEDDING,
    data,
    register,
    snapshot,
    variable,
)

tf1 = tf.compat.v1

PARAMS = ("params", "depthwise_params", "pointwise_params")
DATA = ("inputs", "outputs", "depthwise_outputs", "pointwise_outputs")
METHODS = {**{name: (name, case) for name, case in CASES.items()}}
METHODS["embedding"] = "register_fully_connected", EMBEDDING

# What no parameter can be.
NO_PARAMETER = {
    "nothing": lambda: None,
    "text": lambda: "w",
    "number": lambda: 3.5,
    "empty": list,
    "array": lambda: np.ones([3, 2], np.float32),
    "dictionary": lambda: {"w": variable([2])},
    "op": tf.no_op,
    "nested": lambda: ((variable([3, 2]),), variable([2])),
    "too many": lambda: (variable([3]), variable([2]), variable([4])),
    "twice": lambda: (variable([3]),) * 2,
}
NO_TENSOR = {
    "nothing": lambda: None,
    "text": lambda: "x",
    "number": lambda: 3,
    "array": lambda: np.ones([BATCH, 3], np.float32),
    "nothings": lambda: [None],
    "empty": list,
    "another type": lambda: data(3, dtype=tf.bool),
}
# Per option, what is refused wherever there is such an option.
OPTIONS = {
    "strides": [1, [1], "ab", [1.5] * 4, ["a"] * 4, [1, 0, 0, 1], [1, -1, -1, 1]]
    + [[2, 1, 1, 1], [1, 1, 1, 2], [None] * 4],
    "dilations": [1, [1], "a", [1, 0, 0, 1], [1, -1, 1, 1], [2, 1, 1, 1]],
    "dilation_rate": [1, [1], "a", [0, 0], [-1, 1]],
    "rate": [1, [1], "ab", [0, 0], [1, 1, 1, 1]],
    "padding": [None, 3, "FULL", "CAUSAL", b"SAME", [[0, 0], [1, 1], [1, 1], [0, 0]]],
    "data_format": [3, "NCHW", "channels_first"],
    "approx": [3, "", "KRON", ["kron"], {}, "kron_of_all"],
    "reuse": ["x", 1.0, []],
    "num_uses": [-1, 0, 7, 1.5, "2"],
    "batch_size": [None, 0, -1, 1.5, "6", float("nan"), [6], np.array([6])],
    "patch_mask": ["x", 3, np.ones([3, 3]), object()],
}


def replacements(method, case):
    """`(argument, what it is replaced by, maker)` of one method."""
    parameters = inspect.signature(getattr(lc_lib.LayerCollection, method)).parameters
    for argument in list(parameters)[1:]:
        if argument in PARAMS:
            for name, make in NO_PARAMETER.items():
                # Generic parameters may be any number of any shape.
                if method != "register_generic" or name != "too many":
                    yield argument, name, make
        elif argument in DATA:
            for name, make in NO_TENSOR.items():
                # Ids say nothing of the outputs' type, nor do outputs of theirs.
                if case is not EMBEDDING or name != "another type":
                    yield argument, name, make
        else:
            for value in OPTIONS.get(argument, ()):
                yield argument, repr(value), lambda value=value: value


@pytest.mark.parametrize("name", METHODS)
def test_nonsense_is_refused_with_a_reason_and_changes_nothing(name):
    method, case = METHODS[name]
    for argument, what, make in replacements(method, case):
        with tf.Graph().as_default():
            collection = lc_lib.LayerCollection()
            collection.register_generic(variable([2], "known"), BATCH)
            arguments, value = case.arguments(), make()
            before = snapshot(collection)
            try:
                register(collection, method, arguments, **{argument: value})
            except (errors.ArgumentError, NotImplementedError) as error:
                assert len(str(error)) > 30, (argument, what, error)
            else:
                pytest.fail(f"{method} accepts {argument}={what}")
            assert snapshot(collection) == before, (argument, what)
            register(collection, method, arguments)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("register_generic",)]
)
@pytest.mark.parametrize("rank", [0, 1, 3, 4, 5])
def test_weights_of_every_other_rank_are_refused(name, rank):
    method, case = METHODS[name]
    for role in PARAMS:
        with tf.Graph().as_default():
            arguments = case.arguments()
            if role not in arguments:
                continue
            given = arguments[role]
            first, *rest = given if isinstance(given, tuple) else (given,)
            dense = name in (
                "register_fully_connected",
                "register_fully_connected_multi",
            )
            if len(first.shape) == rank or (dense and rank != 1):
                continue  # A scalar stands for anything; sides may have several axes.
            if name == "register_scale_and_shift" and rank == 0:
                continue  # Broadcast.
            weights = variable([3] * rank, "other")
            collection = lc_lib.LayerCollection()
            params = (weights, *rest) if rest else weights
            with pytest.raises(errors.ArgumentError, match=r"\(3|\[3|\[\]"):
                register(collection, method, arguments, **{role: params})
            register(collection, method, arguments)


@pytest.mark.parametrize("shape", [None, [None] * 4, [3, 3, None, 4]])
def test_filters_of_unknown_sizes_are_refused(shape):
    with tf.Graph().as_default():
        collection = lc_lib.LayerCollection()
        for method in ("register_conv2d", "register_conv2d_multi"):
            filter_ = tf1.placeholder(tf.float32, shape)
            with pytest.raises(errors.ArgumentError, match="all sizes known"):
                register(collection, method, CASES[method].arguments(), params=filter_)
        assert not collection.fisher_blocks


@pytest.mark.parametrize(
    "method", [name for name in CASES if "conv" in name and "multi" not in name]
)
def test_convolutions_need_data_of_known_rank(method):
    with tf.Graph().as_default():
        collection = lc_lib.LayerCollection()
        arguments = CASES[method].arguments()
        for role in DATA:
            if role in arguments:
                unknown = tf1.placeholder(tf.float32)
                with pytest.raises(errors.ArgumentError, match="tf.ensure_shape"):
                    register(collection, method, arguments, **{role: unknown})
        register(collection, method, arguments)


def test_unknown_numbers_of_features_are_reported_when_variables_are_made():
    with tf.Graph().as_default():
        collection = lc_lib.LayerCollection()
        some = tf1.placeholder(tf.float32, [BATCH, None], "some")
        collection.register_fully_connected(variable([3, 2], "w"), some, data(2))
        (block,) = collection.get_blocks()
        block.instantiate_factors(((data(2),),), 0.1)
        with pytest.raises(ValueError, match=r"'some:0'.*tf.ensure_shape"):
            collection.get_factors()[0].instantiate_cov_variables()


@pytest.mark.parametrize(
    "changes",
    [
        {"strides": [1, 2, 2, 1]},
        {"padding": "VALID"},
        {"rate": [2, 2], "padding": "VALID"},
    ],
)
def test_a_depthwise_layer_that_is_computed_otherwise_is_reported(changes):
    with tf.Graph().as_default():
        collection = lc_lib.LayerCollection()
        case = CASES["register_depthwise_conv2d"]
        register(collection, "register_depthwise_conv2d", case.arguments(), **changes)
        (block,) = collection.get_blocks()
        block.instantiate_factors(((data(5, 5, 4),),), 0.1)
        (factor,) = collection.get_factors()
        factor.instantiate_cov_variables()
        with pytest.raises(ValueError, match="Register the layer as it is computed"):
            factor.make_covariance_update_op(0.9, 1.0)


LOSSES = {
    "categorical_predictive_distribution": ("logits",),
    "softmax_cross_entropy_loss": ("logits",),
    "onehot_categorical_predictive_distribution": ("logits",),
    "normal_predictive_distribution": ("mean",),
    "squared_error_loss": ("prediction",),
    "normal_mean_variance_predictive_distribution": ("mean", "variance"),
    "multi_bernoulli_predictive_distribution": ("logits",),
    "sigmoid_cross_entropy_loss": ("logits",),
}
NO_OUTPUT = {name: NO_TENSOR[name] for name in ("nothing", "text", "number", "empty")}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_distribution_without_tensors_is_refused(kind):
    with tf.Graph().as_default():
        collection = lc_lib.LayerCollection()
        register_loss = getattr(collection, f"register_{kind}")
        arguments = {name: data(3) for name in LOSSES[kind]}
        for name in LOSSES[kind]:
            for make in NO_OUTPUT.values():
                with pytest.raises(errors.ArgumentError, match=f"{name} must be a te"):
                    register_loss(**{**arguments, name: make()})
        for option, value in [("name", ["a"]), ("coeff", "1"), ("coeff", tf.ones([2]))]:
            with pytest.raises(errors.ArgumentError, match=option):
                register_loss(**arguments, **{option: value})
        assert not collection.losses and not collection.loss_coeffs
        register_loss(**arguments)


def test_a_loss_of_numbers_cannot_be_finalised():
    with tf.Graph().as_default():
        collection = lc_lib.LayerCollection()
        collection.register_squared_error_loss(np.ones([BATCH, 2]))
        with pytest.raises(errors.ArgumentError, match="computed by no graph"):
            collection.finalize()
        assert collection.subgraph is None and not collection._finalized
