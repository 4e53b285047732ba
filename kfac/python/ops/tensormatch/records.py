"""What a pattern match says about a layer: one record per use of its parameters."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from kfac.python.ops import utils

ensure_sequence = utils.ensure_sequence

DENSE_TYPES = ("MatMul", "BatchMatMulV2", "BatchMatMulV3")
GATHER_TYPES = ("Gather", "GatherV2", "ResourceGather")

# Ranks of the inputs of a layer with one axis of uses.
MAX_DENSE_RANK = 3
MAX_ID_RANK = 2


class RecordType(enum.Enum):
    """Kind of layer, which decides how it is registered."""

    fully_connected = 1
    conv2d = 2
    scale_and_shift = 3
    batch_norm = 4
    depthwise_conv2d = 5
    conv1d = 6
    convolution = 7
    # Recognised, but no block can represent it; data["reason"] says why.
    unsupported = 8


class AmbiguousRegistrationError(Exception):
    """It takes the user's decision to register a variable."""


class UnsupportedLayerError(ValueError):
    """A layer that was recognised, but that no Fisher block can represent.

    Attributes:
      params: the parameter concerned, or a tuple of them.
    """

    def __init__(self, params: Any, reason: str):
        super().__init__(reason)
        self.params = params


class MatchRecord:
    """One use of a group of parameters by a layer.

    Attributes:
      record_type: a `RecordType`.
      params: one variable, or a tuple of variables, the weights first.
      tensor_set: everything that the match consumed.
      data: what registration needs to know (inputs, outputs, strides, ...). The inputs
        may be a function that makes them, if the graph does not hold them.
    """

    def __init__(
        self,
        record_type: RecordType,
        params: Any,
        tensor_set: Any,
        data: dict[str, Any] | None = None,
    ):
        self.record_type = record_type
        self.params = params
        self.tensor_set = tensor_set
        self.data = {} if data is None else data

    @property
    def inputs(self) -> Any:
        """The layer's input tensor."""
        if callable(self.data["inputs"]):
            self.data["inputs"] = self.data["inputs"]()
        return self.data["inputs"]

    @property
    def outputs(self) -> Any:
        """The layer's output tensor, on which the losses depend."""
        return self.data["outputs"]

    def __repr__(self) -> str:
        names = [parameter_name(param) for param in ensure_sequence(self.params)]
        return f"MatchRecord({self.record_type.name}, {', '.join(names)})"


def parameter_name(param: Any) -> str:
    """Name of a variable for messages and for ordering, with its `:0`."""
    return str(getattr(param, "name", param))


def parameter_names(params: Any) -> str:
    """Name of a variable, or names of a group in parentheses."""
    if isinstance(params, (list, tuple)):
        return f"({', '.join(parameter_name(param) for param in params)})"
    return parameter_name(params)


def attribute(op: tf.Operation, name: str, default: Any = None) -> Any:
    """An operation's attribute, bytes decoded; `default` if there is none."""
    try:
        value = op.get_attr(name)
    except ValueError:
        return default
    return value.decode() if isinstance(value, bytes) else value


def is_transposed(op: tf.Operation) -> bool:
    """Whether a matrix product transposes (or takes the adjoint of) an operand."""
    flags = ("transpose_a", "transpose_b", "adj_x", "adj_y")
    return any(attribute(op, flag, False) for flag in flags)


def record_affine_from_bindings(
    bindings: Mapping[str, Any],
    consumed_tensors: Any,
    tensors_to_variables: Mapping[Any, Any],
) -> MatchRecord | None:
    """Record of a match of `Affine` or `Embed`.

    Args:
      bindings: of the match.
      consumed_tensors: what the match consumed.
      tensors_to_variables: handle, capture of a handle or reference tensor ->
        variable, for the variables of interest.

    Returns:
      The record; None if none of the parameters is of interest.

    Raises:
      ValueError: the layer cannot be registered. The weights are not of interest,
        although the bias is; the rank of the inputs is too high; the product is
        transposed; the operation is unknown.
    """
    weights = tensors_to_variables.get(bindings["weights"])
    biases = None
    if bindings.get("biases") is not None:
        biases = tensors_to_variables.get(bindings["biases"])
    if weights is None and biases is None:
        return None
    op = bindings["linear_op"]
    if weights is None:
        raise frozen_weights_error(biases, op)
    inputs, outputs = bindings["in"], bindings["pre_activations"]
    params = weights
    if biases is not None and bias_fits(biases, weights):
        params = (weights, biases)
    if op.type == "Conv2D":
        return MatchRecord(
            RecordType.conv2d,
            params,
            consumed_tensors,
            {"inputs": inputs, "outputs": outputs, **convolution_data(op)},
        )
    if op.type not in DENSE_TYPES + GATHER_TYPES:
        raise UnsupportedLayerError(
            weights, f"{op.name!r} is a {op.type}, which no layer is made of"
        )
    dense_inputs = op.type in DENSE_TYPES
    _check_rank(weights, op, inputs, dense_inputs)
    if dense_inputs and is_transposed(op):
        raise transposed_error(weights, op)
    return MatchRecord(
        RecordType.fully_connected,
        params,
        consumed_tensors,
        {"inputs": inputs, "outputs": outputs, "dense_inputs": dense_inputs},
    )


def record_scale_and_shift_from_bindings(
    bindings: Mapping[str, Any],
    consumed_tensors: Any,
    tensors_to_variables: Mapping[Any, Any],
) -> MatchRecord | None:
    """Record of a match of `ScaleAndShift`; see `record_affine_from_bindings`.

    Raises:
      ValueError: the shift is of interest, although the scale is not.
    """
    scale, shift = _known(bindings, ("scale", "shift"), tensors_to_variables)
    if scale is None and shift is None:
        return None
    if scale is None:
        raise UnsupportedLayerError(
            shift,
            f"{parameter_name(shift)!r} shifts what another variable scales "
            f"({bindings['out'].name!r}), and that one is not among the variables to "
            "register",
        )
    return MatchRecord(
        RecordType.scale_and_shift,
        scale if shift is None else (scale, shift),
        consumed_tensors,
        {"inputs": bindings["in"], "outputs": bindings["out"]},
    )


def record_batch_norm_from_bindings(
    bindings: Mapping[str, Any],
    consumed_tensors: Any,
    tensors_to_variables: Mapping[Any, Any],
) -> MatchRecord | None:
    """Record of a match of one of the batch normalisation patterns.

    See `record_affine_from_bindings`; scale and offset may be of interest separately.
    """
    known = [
        param
        for param in _known(bindings, ("scale", "offset"), tensors_to_variables)
        if param is not None
    ]
    if not known:
        return None
    return MatchRecord(
        RecordType.batch_norm,
        tuple(known) if len(known) > 1 else known[0],
        consumed_tensors,
        {"inputs": bindings["in"], "outputs": bindings["out"]},
    )


def convolution_data(op: tf.Operation) -> dict[str, Any]:
    """Strides, padding and layout of a convolution, and dilations if it has any."""
    data = {
        "strides": tuple(int(stride) for stride in attribute(op, "strides")),
        "padding": attribute(op, "padding"),
        "data_format": attribute(op, "data_format"),
    }
    dilations = tuple(int(rate) for rate in attribute(op, "dilations", ()))
    if any(rate != 1 for rate in dilations):
        data["dilations"] = dilations
    return data


def bias_fits(biases: Any, weights: Any) -> bool:
    """Whether there is one bias per output (per entry of the weights' last axis)."""
    size, outputs = biases.shape.num_elements(), _last_size(weights)
    return size is None or outputs is None or size == outputs


def _check_rank(
    weights: Any, op: tf.Operation, inputs: tf.Tensor, dense_inputs: bool
) -> None:
    """Refuses inputs with more axes than uses, cases and features.

    Raises:
      UnsupportedLayerError: as said.
    """
    limit = MAX_DENSE_RANK if dense_inputs else MAX_ID_RANK
    rank = inputs.shape.rank
    if rank is not None and rank > limit:
        kind = "dense layer" if dense_inputs else "lookup"
        raise UnsupportedLayerError(
            weights,
            f"the inputs of the {kind} {op.name!r} have rank {rank}, at most {limit} "
            f"can be registered; reshape {inputs.name!r}, which folds its axes",
        )


def transposed_error(weights: Any, op: tf.Operation) -> UnsupportedLayerError:
    """For weights that are used transposed."""
    return UnsupportedLayerError(
        weights,
        f"{op.name!r} multiplies by the transpose of {parameter_name(weights)!r} (or "
        "transposes its inputs); the Kronecker blocks want inputs @ weights",
    )


def frozen_weights_error(biases: Any, op: tf.Operation) -> UnsupportedLayerError:
    """For a bias of weights that are not trained here."""
    return UnsupportedLayerError(
        biases,
        f"{parameter_name(biases)!r} is the bias of {op.name!r}, whose weights are not "
        "among the variables to register",
    )


def _known(
    bindings: Mapping[str, Any],
    names: tuple[str, ...],
    tensors_to_variables: Mapping[Any, Any],
) -> list[Any]:
    return [
        None if bindings.get(name) is None else tensors_to_variables.get(bindings[name])
        for name in names
    ]


def _last_size(tensor: Any) -> int | None:
    shape = tensor.shape
    return tf.compat.dimension_value(shape[-1]) if shape.rank else None
