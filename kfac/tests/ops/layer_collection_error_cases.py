"""Calls that a collection must refuse, and what it must say."""

import numpy as np
import tensorflow as tf

from kfac.tests.ops.layer_collection_cases import (
    BATCH,
    CASES,
    EMBEDDING,
    data,
    register,
    variable,
)

tf1 = tf.compat.v1


def _call(method, **overrides):
    """A call of a method with some arguments made anew."""

    def call(collection):
        made = {name: make() for name, make in overrides.items()}
        register(collection, method, CASES[method].arguments(), **made)

    return call


def _value(value):
    return lambda: value


def _ids(**overrides):
    def call(collection):
        made = {name: make() for name, make in overrides.items()}
        arguments = {**EMBEDDING.arguments(), **made}
        register(collection, DENSE, arguments)

    return call


class Wrapper:
    """Looks like a Keras variable."""

    shape = tf.TensorShape([3, 2])
    dtype = "float32"

    def __init__(self):
        self.value = variable([3, 2], "wrapped")


def _two_of_the_same(*rest):
    w = variable([3, 2], "w")
    return (w, w, *rest)


def _weights():
    return variable([3, 2], "w")


DENSE, MULTI = "register_fully_connected", "register_fully_connected_multi"
CONV, CONV_MULTI = "register_conv2d", "register_conv2d_multi"
SCALE = "register_scale_and_shift"

# Name -> (call, fragment of the message).  All are ValueErrors.
ERRORS = {
    # Parameters.
    "no parameters": (_call(DENSE, params=tuple), "0 parameters"),
    "three parameters": (
        _call(DENSE, params=lambda: (_weights(), variable([2]), variable([2]))),
        "3 parameters",
    ),
    "one parameter twice": (_call(DENSE, params=_two_of_the_same), "twice"),
    "not a variable": (_call(DENSE, params=_value("w")), "must be variables"),
    "none": (_call(DENSE, params=_value(None)), "must be variables"),
    "wrapped variable": (_call(DENSE, params=Wrapper), "wraps a tf.Variable"),
    "generic wrapped": (
        _call("register_generic", params=Wrapper),
        "wraps a tf.Variable",
    ),
    "generic empty": (
        _call("register_generic", params=list, approx=_value("full")),
        "empty sequence",
    ),
    "weights of rank 1": (
        _call(DENSE, params=lambda: variable([3])),
        "expected \\[d_in, d_out\\]",
    ),
    "bias before weights": (
        _call(DENSE, params=lambda: (variable([2]), _weights())),
        "expected \\[d_in, d_out\\]",
    ),
    "bias of another size": (
        _call(DENSE, params=lambda: (_weights(), variable([3]))),
        "need 2 entries",
    ),
    "filter of rank 2": (_call(CONV, params=_weights), "height, width, c_in, c_out"),
    "conv1d filter of rank 4": (
        _call("register_conv1d", params=lambda: variable([1, 3, 2, 4])),
        "width, c_in, c_out",
    ),
    "convolution filter of rank 2": (
        _call("register_convolution", params=_weights),
        "spatial, c_in, c_out",
    ),
    "depthwise filter of rank 3": (
        _call("register_depthwise_conv2d", params=lambda: variable([3, 3, 2])),
        "shape",
    ),
    # Inputs and outputs.
    "dense inputs of another width": (
        _call(DENSE, inputs=lambda: data(4)),
        "last axis of size 3",
    ),
    "dense outputs of another width": (
        _call(DENSE, outputs=lambda: data(4)),
        "last axis of size 2",
    ),
    "dense inputs of rank 3": (_call(DENSE, inputs=lambda: data(1, 3)), "batch, d_in"),
    "dense inputs are ids": (_call(DENSE, inputs=lambda: data()), "dense_inputs=False"),
    "another batch size": (
        _call(DENSE, outputs=lambda: tf.zeros([BATCH + 1, 2])),
        "different numbers of cases",
    ),
    "list of inputs": (
        _call(DENSE, inputs=lambda: [data(3), data(3)]),
        "register_fully_connected_multi",
    ),
    "inputs are no tensor": (_call(DENSE, inputs=_value("x")), "must be a tensor"),
    "conv inputs of another depth": (
        _call(CONV, inputs=lambda: data(5, 5, 3)),
        "last axis of size 2",
    ),
    "conv outputs of another depth": (
        _call(CONV, outputs=lambda: data(5, 5, 3)),
        "last axis of size 4",
    ),
    "conv inputs of another rank": (
        _call(CONV, inputs=lambda: data(5, 2)),
        "2 spatial axes",
    ),
    "conv1d inputs of another rank": (
        _call("register_conv1d", inputs=lambda: data(5, 5, 2)),
        "1 spatial axes",
    ),
    "depthwise outputs of another depth": (
        _call("register_depthwise_conv2d", outputs=lambda: data(5, 5, 2)),
        "last axis of size 4",
    ),
    "separable: second layer does not fit": (
        _call("register_separable_conv2d", pointwise_outputs=lambda: data(5, 5, 9)),
        "last axis of size 3",
    ),
    "separable: second layer's approximation": (
        _call("register_separable_conv2d", approx=_value("kron_indep")),
        "Bad value",
    ),
    "separable: first layer does not fit": (
        _call("register_separable_conv2d", inputs=lambda: data(5, 5, 9)),
        "last axis of size 2",
    ),
    # Several uses.
    "unequal lists": (
        _call(MULTI, outputs=lambda: [data(2)]),
        "one of each per use",
    ),
    "list and tensor": (_call(MULTI, outputs=lambda: data(2)), "list of outputs"),
    "empty list": (_call(MULTI, inputs=list, outputs=list), "empty list"),
    "member is no tensor": (_call(MULTI, inputs=_value([1, 2])), "must be a tensor"),
    "num_uses against lists": (_call(MULTI, num_uses=_value(3)), "2 members"),
    "one use of another width": (
        _call(MULTI, inputs=lambda: [data(3), data(4)]),
        "last axis of size 3",
    ),
    "one use of another batch": (
        _call(MULTI, outputs=lambda: [data(2), tf.zeros([1, 2])]),
        "different numbers of cases",
    ),
    "folded uses do not divide": (
        _call(
            MULTI,
            inputs=lambda: tf.zeros([7, 3]),
            outputs=lambda: tf.zeros([7, 2]),
            num_uses=_value(2),
        ),
        "cannot hold num_uses=2",
    ),
    "unfolded uses differ": (
        _call(
            MULTI,
            inputs=lambda: tf.zeros([3, 6, 3]),
            outputs=lambda: tf.zeros([12, 2]),
            num_uses=_value(2),
        ),
        "cannot hold num_uses=2",
    ),
    "folded sides differ": (
        _call(
            MULTI,
            inputs=lambda: tf.zeros([2, 6, 3]),
            outputs=lambda: tf.zeros([14, 2]),
            num_uses=_value(2),
        ),
        "different numbers of cases",
    ),
    "conv: unequal lists": (
        _call(CONV_MULTI, outputs=lambda: [data(5, 5, 4)]),
        "one of each per use",
    ),
    "conv: one use of another depth": (
        _call(
            CONV_MULTI,
            inputs=lambda: [data(5, 5, 3)],
            outputs=lambda: [data(5, 5, 4)],
        ),
        "last axis of size 2",
    ),
    "conv: folded uses do not divide": (
        _call(
            CONV_MULTI,
            inputs=lambda: tf.zeros([7, 5, 5, 2]),
            outputs=lambda: tf.zeros([7, 5, 5, 4]),
            num_uses=_value(3),
        ),
        "cannot hold num_uses=3",
    ),
    # Integer ids.
    "ids with a bias": (
        _ids(params=lambda: (variable([7, 2]), variable([2]))),
        "with a bias",
    ),
    "ids with a dense input factor": (_ids(approx=_value("kron")), "diagonal input"),
    "ids with the diagonal block": (_ids(approx=_value("diagonal")), "diagonal input"),
    "ids in floating point": (_ids(inputs=lambda: data()), "integer ids"),
    "ids of rank 2": (_ids(inputs=lambda: data(1, dtype=tf.int32)), "ids \\[batch\\]"),
    # Options of convolutions.
    "channels first": (_call(CONV, data_format=_value("NCHW")), "channels last"),
    "channels first, multi": (
        _call(CONV_MULTI, data_format=_value("NCHW")),
        "channels last",
    ),
    "channels first, depthwise": (
        _call("register_depthwise_conv2d", data_format=_value("NCHW")),
        "channels last",
    ),
    "channels first, any rank": (
        _call("register_convolution", data_format=_value("NCHW")),
        "channels must be last",
    ),
    "two strides": (_call(CONV, strides=_value([1, 1])), "4 integers"),
    "one number as strides": (_call(CONV, strides=_value(1)), "4 integers"),
    "two dilations": (_call(CONV, dilations=_value([1, 1])), "4 integers"),
    "four strides in conv1d": (
        _call("register_conv1d", strides=_value([1, 1, 1, 1])),
        "3 integers",
    ),
    "three strides in convolution": (
        _call("register_convolution", strides=_value([1, 1, 1])),
        "2 or 4 integers",
    ),
    "three dilations in convolution": (
        _call("register_convolution", dilation_rate=_value([1, 1, 1])),
        "2 or 4 integers",
    ),
    "depthwise: two strides": (
        _call("register_depthwise_conv2d", strides=_value([1, 1])),
        "strides",
    ),
    "depthwise: four rates": (
        _call("register_depthwise_conv2d", rate=_value([1, 1, 1, 1])),
        "rate",
    ),
    "diagonal with a stride over channels": (
        _call(CONV, strides=_value([1, 1, 1, 2]), approx=_value("diagonal")),
        "1 for the batch and the channels",
    ),
    "mask of another shape": (
        _call(CONV, patch_mask=_value(np.ones([3, 3]))),
        "patch_mask has shape",
    ),
    "mask with sua": (
        _call(CONV, patch_mask=_value(np.ones([3, 3, 2])), approx=_value("kron_sua")),
        "patch_mask",
    ),
    # Generic parameters.
    "diagonal of a group": (
        _call("register_generic", params=lambda: (variable([2]), variable([3]))),
        "takes one variable",
    ),
    "batch size is a vector": (
        _call("register_generic", batch_size=lambda: tf.constant([3])),
        "scalar",
    ),
    "batch size is missing": (
        _call("register_generic", batch_size=_value(None)),
        "positive number",
    ),
    "batch size is zero": (
        _call("register_generic", batch_size=_value(0)),
        "must be positive",
    ),
    # Scale and shift.
    "scale of a higher rank": (
        _call(SCALE, params=lambda: variable([1, 1, 1, 3])),
        "exceeds",
    ),
    "scale with a batch": (
        _call(SCALE, params=lambda: variable([BATCH, 5, 3])),
        "batch dimension",
    ),
    "scale too small": (_call(SCALE, params=lambda: variable([2])), "Incompatible"),
    "scale too large": (_call(SCALE, params=lambda: variable([4])), "Incompatible"),
    "shift too large": (
        _call(SCALE, params=lambda: (variable([3]), variable([4]))),
        "Incompatible shapes: the shift",
    ),
    "both wrong": (
        _call(SCALE, params=lambda: (variable([4]), variable([4]))),
        "the shift",
    ),
    "data of unknown rank": (
        _call(SCALE, inputs=lambda: tf1.placeholder(tf.float32)),
        "not known statically",
    ),
    "data of different ranks": (
        _call(SCALE, params=lambda: variable([3]), outputs=lambda: data(3)),
        "different ranks",
    ),
    # Losses.
    "loss coefficient is a string": (
        lambda lc: lc.register_squared_error_loss(data(2), coeff="1"),
        "expected a number",
    ),
    "loss coefficient is a vector": (
        lambda lc: lc.register_squared_error_loss(data(2), coeff=tf.ones([2])),
        "expected a number",
    ),
    "loss variance": (
        lambda lc: lc.register_normal_predictive_distribution(data(2), var="1"),
        "var",
    ),
    "loss of another coefficient": (
        lambda lc: lc.register_squared_error_loss(
            data(2), name="loss", reuse=True, coeff=1.0
        ),
        "has the coefficient 0.5",
    ),
    "loss of another class": (
        lambda lc: lc.register_sigmoid_cross_entropy_loss(
            data(2), name="loss", reuse=True, coeff=0.5
        ),
        "cannot be a MultiBernoulli",
    ),
    "loss of another variance": (
        lambda lc: lc.register_normal_predictive_distribution(
            data(2), 1.0, name="loss", reuse=True, coeff=0.5
        ),
        "has variance 0.5",
    ),
    "loss name is taken": (
        lambda lc: lc.register_squared_error_loss(data(2), name="loss"),
        "exists already",
    ),
    "no such loss": (
        lambda lc: lc.register_squared_error_loss(data(2), name="los", reuse=True),
        "there is no loss 'los'",
    ),
    "nameless tower": (
        lambda lc: lc.register_squared_error_loss(data(2), reuse=True),
        "without a name",
    ),
    "loss reuse": (
        lambda lc: lc.register_squared_error_loss(data(2), reuse="sometimes"),
        "duplicate",
    ),
    # Linked parameters and defaults.
    "linked twice": (
        lambda lc: lc.define_linked_parameters(tuple(next(iter(lc.linked_parameters)))),
        "already linked",
    ),
    "linked as nonsense": (
        lambda lc: lc.define_linked_parameters(_weights(), "nonsense"),
        "Bad value",
    ),
    "unknown default": (
        lambda lc: lc.set_default_conv2d_approximation("kron_indep"),
        "Bad value",
    ),
    # Evaluation, finalisation.
    "target mode": (lambda lc: lc.eval_losses(target_mode="dta"), "target_mode"),
    "coefficient mode": (lambda lc: lc.eval_losses(coeff_mode="x"), "coeff_mode"),
    "missing targets": (lambda lc: lc.total_loss(), "unspecified targets"),
    "check before finalize": (lambda lc: lc.check_registration([]), "finalize"),
}
