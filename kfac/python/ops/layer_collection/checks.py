"""Checks of registrations, as far as static shapes tell.

Every check raises `errors.ArgumentError` and changes nothing.  What is not known
statically passes.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import errors, state
from kfac.python.ops.layer_collection import parameters_dict
from kfac.python.ops.rules import scalars

# Sizes of the axes of a tensor, None where unknown.
Sizes = list[int | None]


def parameter_name(parameter: Any) -> str:
    """Name of a parameter, or of every member of a group, for messages."""
    if isinstance(parameter, (tuple, list)):
        return "(" + ", ".join(parameter_name(p) for p in parameter) + ")"
    return (
        state.parameter_path(parameter) if tensor_name(parameter) else repr(parameter)
    )


def static_sizes(tensor: Any) -> Sizes | None:
    """Static sizes of a tensor-like object; None for an unknown rank."""
    shape = tf.TensorShape(tensor.shape)
    return None if shape.rank is None else shape.as_list()


def layer_parameters(params: Any, members: str) -> Any:
    """The canonical key of a layer: the weights, or the tuple `(weights, bias)`.

    A sequence of one parameter is that parameter: such a layer has no bias.

    Args:
      params: a parameter, or a tuple or list of one or two of them.
      members: what the two are, for messages.

    Raises:
      ArgumentError: another number of parameters, one parameter twice, or something
        that is not a variable or tensor.
    """
    group = parameters_dict.as_tuple(params)
    if len(group) not in (1, 2):
        raise errors.ArgumentError(
            f"params holds {len(group)} parameters: {params!r}. Give {members}."
        )
    distinct_parameters(group)
    return group if len(group) == 2 else group[0]


def distinct_parameters(group: Sequence[Any]) -> None:
    """Checks that a group has members, all of them different variables or tensors."""
    if not group:
        raise errors.ArgumentError("params is an empty sequence; give variables.")
    for parameter in group:
        if isinstance(getattr(parameter, "value", None), tf.Variable):
            raise errors.ArgumentError(
                f"{parameter!r} wraps a tf.Variable; register that variable, its "
                "`.value`."
            )
        is_array = isinstance(parameter, (np.ndarray, np.generic))
        has_type = hasattr(parameter, "shape") and hasattr(parameter, "dtype")
        if is_array or not has_type:
            raise errors.ArgumentError(
                f"params must be variables (or tensors); got {parameter!r}."
            )
    if len({parameters_dict.identity(p) for p in group}) < len(group):
        raise errors.ArgumentError(f"{parameter_name(group)} holds a parameter twice.")


def single_tensor(tensor: Any, what: str, alternative: str) -> None:
    """Refuses a list of tensors where one is expected."""
    if isinstance(tensor, (tuple, list)):
        raise errors.ArgumentError(
            f"{what} is a sequence of {len(tensor)} tensors, one tensor was expected. "
            f"For a layer used several times call {alternative}."
        )
    if isinstance(tensor, np.ndarray):
        raise errors.ArgumentError(
            f"{what} is a NumPy array of shape {tensor.shape}; give the tensor that "
            "the layer takes or makes in the graph of the losses."
        )
    if not hasattr(tensor, "shape"):
        raise errors.ArgumentError(
            f"{what} must be a tensor of the losses' graph; got {tensor!r}."
        )


def network_output(tensor: Any, what: str) -> None:
    """Refuses what cannot parameterise a predictive distribution."""
    if not hasattr(tensor, "shape") or not hasattr(tensor, "dtype"):
        raise errors.ArgumentError(
            f"{what} must be a tensor, an output of the network, in the graph of the "
            f"layers that are registered; got {tensor!r}."
        )


def number_of_uses(inputs: Any, outputs: Any, num_uses: int | None) -> int | None:
    """Checks how the data of several uses are given, and counts the uses.

    Returns:
      The number of uses, as given or as long as the lists are; None if unknown.

    Raises:
      ArgumentError: a list of inputs without a list of outputs of the same length, an
        empty list, or another `num_uses` than the length of the list(s).
    """
    for tensors, what in ((inputs, "inputs"), (outputs, "outputs")):
        if not isinstance(tensors, (tuple, list)):
            single_tensor(tensors, what, "")
            continue
        if not tensors:
            raise errors.ArgumentError(
                f"{what} is an empty list; give one tensor a use."
            )
        for tensor in tensors:
            single_tensor(tensor, f"a member of {what}", "")
        if num_uses is not None and num_uses != len(tensors):
            raise errors.ArgumentError(
                f"num_uses={num_uses}, but {what} has {len(tensors)} members."
            )
    if isinstance(inputs, (tuple, list)):
        if not isinstance(outputs, (tuple, list)):
            raise errors.ArgumentError(
                f"inputs is a list of {len(inputs)} tensors, one a use, outputs is one "
                "tensor; give a list of outputs of the same length."
            )
        if len(inputs) != len(outputs):
            raise errors.ArgumentError(
                f"inputs has {len(inputs)} members and outputs has {len(outputs)}; "
                "give one of each per use."
            )
    if num_uses is None and isinstance(outputs, (tuple, list)):
        return len(outputs)
    return num_uses


def weights_and_bias(
    key: Any,
    is_legal_rank: Callable[[int], bool],
    layout: str,
    output_axes: int = 1,
) -> Sizes | None:
    """Checks the weights' rank and the bias's size.

    Args:
      key: weights, or `(weights, bias)`.
      is_legal_rank: whether weights may have a rank.
      layout: the expected layout of the weights, for messages.
      output_axes: number of last axes of the weights that belong to the outputs.

    Returns:
      The weights' static sizes, None if there is nothing to compare with (unknown
      rank, or a scalar weight where that is legal, which fits everything).
    """
    group = parameters_dict.as_tuple(key)
    sizes = static_sizes(group[0])
    if sizes is None:
        return None
    if not is_legal_rank(len(sizes)):
        raise errors.ArgumentError(
            f"The weights {parameter_name(group[0])!r} have shape {sizes}; expected "
            f"{layout}."
        )
    if not sizes:
        return None
    if len(group) == 2:
        bias, last = static_sizes(group[1]), sizes[-output_axes:]
        if bias is not None and None not in bias and None not in last:
            if math.prod(bias) != math.prod(last):
                raise errors.ArgumentError(
                    f"The bias {parameter_name(group[1])!r} has shape {bias}; the "
                    f"weights {parameter_name(group[0])!r} of shape {sizes} need "
                    f"{math.prod(last)} entries. params is (weights, bias), in this "
                    "order."
                )
    return sizes


def known_sizes(parameter: Any, sizes: Sizes | None, layout: str) -> Sizes:
    """The sizes of weights, all of which must be known statically."""
    if sizes is None or None in sizes:
        raise errors.ArgumentError(
            f"The weights {parameter_name(parameter)!r} have the static shape "
            f"{parameter.shape}; expected {layout}, all sizes known. Register the "
            "variable itself."
        )
    return sizes


def rank_and_last_axis(
    tensor: Any, ranks: Sequence[int], last: int | None, what: str, layout: str
) -> None:
    """Checks a tensor's rank and the size of its last axis.

    Args:
      tensor: the tensor.
      ranks: legal ranks.
      last: legal size of the last axis, None for any.
      what: what the tensor is, for messages.
      layout: the expected layout, for messages.
    """
    sizes = static_sizes(tensor)
    if sizes is None:
        return
    if len(sizes) not in ranks or (
        last is not None and sizes[-1] is not None and sizes[-1] != last
    ):
        raise errors.ArgumentError(
            f"The layer's {what} {tensor_name(tensor)!r} has shape {sizes}; expected "
            + layout
            + (f", the last axis of size {last}." if last is not None else ".")
        )


def same_dtype(inputs: Any, outputs: Any) -> None:
    """Checks that the data of a layer have one dtype."""
    first, second = (tf.as_dtype(t.dtype).base_dtype for t in (inputs, outputs))
    if first != second:
        raise errors.ArgumentError(
            f"inputs {tensor_name(inputs)!r} and outputs {tensor_name(outputs)!r} have "
            f"different dtypes, {first.name} and {second.name}."
        )


def same_batch(inputs: Any, outputs: Any) -> None:
    """Checks that the first axes have the same size."""
    first, second = static_sizes(inputs), static_sizes(outputs)
    if first and second:
        same_rows(first[0], second[0], inputs, outputs)


def same_rows(first: int | None, second: int | None, inputs: Any, outputs: Any) -> None:
    """Checks that inputs of `first` cases go with outputs of `second` cases."""
    if None not in (first, second) and first != second:
        raise errors.ArgumentError(
            f"inputs {tensor_name(inputs)!r} of shape {inputs.shape} and outputs "
            f"{tensor_name(outputs)!r} of shape {outputs.shape} hold different numbers "
            f"of cases, {first} and {second}."
        )


def folded_uses(
    tensor: Any, num_uses: int | None, folded_rank: int, what: str
) -> int | None:
    """Checks the leading axis or axes of all uses in one tensor.

    Args:
      tensor: `[uses * batch, ...]` of rank `folded_rank`, or `[uses, batch, ...]`.
      num_uses: number of uses, if known.
      folded_rank: as said.
      what: what the tensor is, for messages.

    Returns:
      The number of rows `uses * batch`, if known.
    """
    sizes = static_sizes(tensor)
    if sizes is None:
        return None
    if len(sizes) > folded_rank:
        wrong = num_uses is not None and sizes[0] not in (None, num_uses)
        rows = None if None in sizes[:2] else sizes[0] * sizes[1]
    else:
        rows = sizes[0]
        wrong = None not in (num_uses, rows) and rows % num_uses != 0
    if wrong:
        raise errors.ArgumentError(
            f"The layer's {what} {tensor_name(tensor)!r} of shape {sizes} cannot hold "
            f"num_uses={num_uses}; expected [num_uses * batch, ...], use by use"
            + (", or [num_uses, batch, ...]." if len(sizes) > folded_rank else ".")
        )
    return rows


def batch_size(size: Any) -> None:
    """Checks a tower's batch size: a positive number or a scalar tensor."""
    shape = tf.TensorShape(getattr(size, "shape", []))
    number = isinstance(size, numbers.Real) and not isinstance(size, bool)
    if not (number or hasattr(size, "shape")) or shape.rank not in (0, None):
        raise errors.ArgumentError(
            f"batch_size={size!r}; expected a positive number or a scalar tensor, the "
            "size of this tower's mini-batch."
        )
    if number and not (isinstance(scalars.whole(size), int) and size > 0):
        raise errors.ArgumentError(
            f"batch_size={size!r} must be positive, a whole number of cases."
        )


def tensor_name(tensor: Any) -> str:
    """Name of a tensor, empty if it has none."""
    try:
        return getattr(tensor, "name", None) or ""
    except (AttributeError, ValueError):  # Eager tensors have no name.
        return ""
