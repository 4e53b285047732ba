"""Does a collection see what the model does? Gradients rebuilt from captured tensors.

A layer's weight gradient is a sum over cases and uses of captured input times captured
output gradient.  Where that sum equals the gradient that differentiation gives for the
same scalar, the registration has the right tensors, all uses, the right sharing, scale
and masking.  Where it does not, the layer is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from kfac.python.ops import errors, state, utils

# Sums over many cases and locations in float32 agree to about 1e-5 of their norm; a
# wrong registration is off by a multiple of the whole gradient.
DEFAULT_TOLERANCE = 1e-3


class Agreement(NamedTuple):
    """How a rebuilt gradient `r` compares with the true gradient `t` of a layer.

    Scalar tensors, or numbers once they have been evaluated.

    Attributes:
      relative_error: `|r - t| / max(|r|, |t|)`, 0 if both are zero.
      scale: `<r, t> / <t, t>`, 0 if `t` is zero.
      cosine: of the angle between them, 0 if one of them is zero.
    """

    relative_error: Any
    scale: Any
    cosine: Any


class LayerVerificationError(ValueError):
    """The captured tensors of some layers do not explain their gradients.

    Attributes:
      layers: name of the layer's parameters -> its `Agreement`.
    """

    def __init__(self, message: str, layers: Mapping[str, Agreement]):
        super().__init__(message)
        self.layers = dict(layers)


def compare(
    collection: Any, output_gradients: Sequence[Any], true_gradients: Sequence[Any]
) -> dict[str, Agreement]:
    """Compares rebuilt with true gradients, layer by layer.

    Args:
      collection: the `LayerCollection`.
      output_gradients: for every block, in the order of `get_blocks()`, the gradients
        of some scalar with respect to `block.tensors_to_compute_grads()`, in the same
        structure.
      true_gradients: for every block the gradients of the same scalar with respect to
        its parameters, structured like the block's key.

    Returns:
      Parameters' name -> agreement. Blocks that capture nothing to rebuild from
      (generic ones) are not in it.

    Raises:
      ArgumentError: the sequences are not as long as there are blocks.
    """
    blocks = collection.get_blocks()
    if not len(blocks) == len(output_gradients) == len(true_gradients):
        raise errors.ArgumentError(
            f"There are {len(blocks)} blocks, but {len(output_gradients)} output "
            f"gradients and {len(true_gradients)} true gradients were given."
        )
    result = {}
    for name, block, outputs, true in zip(
        _names(collection), blocks, output_gradients, true_gradients, strict=True
    ):
        rebuilt = block.rebuild_gradient(outputs)
        if rebuilt is not None:
            result[name] = _agreement(rebuilt, true)
    return result


def compare_gradients_of(collection: Any, scalar: tf.Tensor) -> dict[str, Agreement]:
    """`compare` for the gradients of `scalar`, which are taken here.

    Args:
      collection: the `LayerCollection`.
      scalar: any scalar of the losses' graph that depends on the parameters through
        the registered layers only: a loss without penalties on weights.
    """
    outputs = [block.tensors_to_compute_grads() for block in collection.get_blocks()]
    params = [utils.ensure_sequence(key) for key in collection.fisher_blocks]
    tensors = [tf.nest.flatten(outputs), [v for group in params for v in group]]
    gradients = [
        tf.gradients(scalar, of, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        for of in tensors
    ]
    remaining = iter(gradients[1])
    return compare(
        collection,
        tf.nest.pack_sequence_as(outputs, gradients[0]),
        [tuple(next(remaining) for _ in group) for group in params],
    )


def _names(collection: Any) -> list[str]:
    """A different name for every parameter group, in registration order."""
    names: list[str] = []
    for params in collection.fisher_blocks:
        group = utils.ensure_sequence(params)
        name = ", ".join(state.parameter_path(v) for v in group)
        # Variables made in functions often have one and the same name.
        repeated = sum(other.split(" #")[0] == name for other in names)
        names.append(f"{name} #{repeated + 1}" if repeated else name)
    return names


def check(
    agreements: Mapping[str, Agreement], tolerance: float = DEFAULT_TOLERANCE
) -> None:
    """Refuses layers whose rebuilt gradient is not the true one.

    Args:
      agreements: evaluated results of `compare`.
      tolerance: largest relative error that is no disagreement.

    Raises:
      LayerVerificationError: names the layers, with the likely causes.
    """
    wrong = {
        name: agreement
        for name, agreement in agreements.items()
        if not float(agreement.relative_error) <= tolerance  # Also for NaN.
    }
    if not wrong:
        return
    lines = [
        f"  {name}: relative error {float(agreement.relative_error):.2g}. "
        f"{_likely_cause(agreement, tolerance)}"
        for name, agreement in wrong.items()
    ]
    raise LayerVerificationError(
        f"The gradients of {len(wrong)} layer(s) cannot be rebuilt from the registered "
        "inputs and outputs:\n" + "\n".join(lines),
        wrong,
    )


def _likely_cause(agreement: Agreement, tolerance: float) -> str:
    error, scale, cosine = (float(value) for value in agreement)
    if error != error:
        return "There are NaNs in the tensors of this layer."
    if scale == 0.0 and cosine == 0.0:
        return (
            "One of the two gradients is zero: the loss does not depend on the "
            "registered outputs (a stop_gradient, or tensors of another branch), or it "
            "depends on them but not on the parameters."
        )
    if cosine > 1.0 - tolerance:
        return (
            f"The rebuilt gradient is {scale:.4g} times the true one: a constant "
            "factor between the layer and the registered outputs, or a tower or "
            "use that is missing or registered twice."
        )
    return (
        "Likely a use of the parameters that is not registered (sharing, a penalty on "
        "the weights), a mask on weights, inputs or outputs that the registration does "
        "not tell, or outputs taken after a nonlinearity."
    )


def _agreement(rebuilt: Any, true: Any) -> Agreement:
    rebuilt, true = _column(rebuilt), _column(true)
    true = tf.cast(true, rebuilt.dtype)
    rebuilt_norm, true_norm = tf.norm(rebuilt), tf.norm(true)
    product = tf.reduce_sum(rebuilt * true)
    return Agreement(
        relative_error=tf.math.divide_no_nan(
            tf.norm(rebuilt - true), tf.maximum(rebuilt_norm, true_norm)
        ),
        scale=tf.math.divide_no_nan(product, true_norm**2),
        cosine=tf.math.divide_no_nan(product, rebuilt_norm * true_norm),
    )


def _column(structure: Any) -> tf.Tensor:
    return utils.tensors_to_column(
        [tf.convert_to_tensor(part) for part in utils.ensure_sequence(structure)]
    )
