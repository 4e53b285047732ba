"""Registration of generic parameters and of elementwise scales and shifts."""

from __future__ import annotations

import math
from typing import Any

from kfac.python.ops import errors
from kfac.python.ops.layer_collection import approximations, checks
from kfac.python.ops.layer_collection.parameters_dict import as_key, as_tuple
from kfac.python.ops.layer_collection.registry import LayerRegistry
from kfac.python.ops.layer_collection.reuse import VARIABLE_SCOPE


class ElementwiseLayers(LayerRegistry):
    """`register_generic` and `register_scale_and_shift`."""

    def register_generic(
        self,
        params: Any,
        batch_size: Any,
        approx: str | None = None,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Registers parameters of any kind, without saying how they are used.

        The statistics come from the gradient of the summed loss and have a high
        variance: prefer a layer's own method where there is one. The number of uses
        of these parameters is not checked.

        Args:
          params: a variable, or a tuple or list of them.
          batch_size: number of cases of this tower's mini-batch; int or scalar tensor.
          approx: "diagonal" (one variable only) or "full"; None for the linked one or
            the default.
          reuse: True adds a tower to the group, see `reuse.is_another_tower`.

        Raises:
          ArgumentError: parameters, batch size, approximation or reuse do not fit.
        """
        key = as_key(params)
        checks.distinct_parameters(as_tuple(key))
        make_block, name = self._block_type_of("generic", key, approx)
        if name == approximations.APPROX_DIAGONAL_NAME and isinstance(key, tuple):
            raise errors.ArgumentError(
                f"The diagonal approximation takes one variable, got the group "
                f"{checks.parameter_name(key)}. Register its members one by one, or "
                "give approx='full'."
            )
        checks.batch_size(batch_size)
        plan = self._plan(key, make_block(self, key), reuse)
        self._commit(plan, (batch_size,), uses=math.inf)

    def register_scale_and_shift(
        self,
        params: Any,
        inputs: Any,
        outputs: Any,
        approx: str | None = None,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Registers a layer `outputs = scale * inputs + shift` with broadcasting.

        Args:
          params: scale, or `(scale, shift)`, broadcast against the data from the last
            axis backwards; over the batch they must be broadcast.
          inputs: `[batch, ...]`.
          outputs: `[batch, ...]`, same shape.
          approx: "full" or "diagonal"; None for the linked one or the default.
          reuse: True adds a tower to the layer, see `reuse.is_another_tower`.

        Raises:
          ArgumentError: parameters, shapes, approximation or reuse do not fit.
        """
        key = checks.layer_parameters(params, "the scale, or (scale, shift)")
        scale, *shift = as_tuple(key)
        checks.single_tensor(inputs, "inputs", "register_generic")
        checks.single_tensor(outputs, "outputs", "register_generic")
        shift_axes = _broadcast_axes(outputs, shift[0], "shift") if shift else None
        scale_axes = _broadcast_axes(inputs, scale, "scale")
        ranks = len(checks.static_sizes(inputs)), checks.static_sizes(outputs)
        if ranks[1] is not None and ranks[0] != len(ranks[1]):
            raise errors.ArgumentError(
                f"inputs of shape {inputs.shape} and outputs of shape {outputs.shape} "
                "have different ranks."
            )
        checks.same_batch(inputs, outputs)
        checks.same_dtype(inputs, outputs)
        if not inputs.shape.is_compatible_with(outputs.shape):
            raise errors.ArgumentError(
                f"inputs of shape {inputs.shape} and outputs of shape {outputs.shape} "
                "must have one shape; broadcast the inputs before, or use "
                "register_generic."
            )
        make_block, _ = self._block_type_of("scale_and_shift", key, approx)
        block = make_block(
            self,
            broadcast_dims_scale=scale_axes,
            broadcast_dims_shift=shift_axes,
            has_shift=bool(shift),
        )
        self._commit(self._plan(key, block, reuse), (inputs, outputs), uses=1)


def _broadcast_axes(data: Any, parameter: Any, what: str) -> tuple[int, ...]:
    """Axes of `data`, but the batch's, along which the parameter is broadcast.

    Raises:
      ArgumentError: the shapes do not broadcast so that every case sees the same
        parameter.
    """
    data_sizes, sizes = checks.static_sizes(data), checks.static_sizes(parameter)
    name = checks.parameter_name(parameter)
    if data_sizes is None or sizes is None:
        raise errors.ArgumentError(
            f"The rank of the {what} {name!r} or of the data is not known statically; "
            "set the shape with tf.ensure_shape."
        )
    absent = len(data_sizes) - len(sizes)
    if absent < 0:
        raise errors.ArgumentError(
            f"The rank of the {what} {name!r} of shape {sizes} exceeds that of the "
            f"data of shape {data_sizes}."
        )
    if absent == 0 and sizes and sizes[0] != 1:
        raise errors.ArgumentError(
            f"The batch dimension of the {what} {name!r} of shape {sizes} must be 1, "
            f"for data of shape {data_sizes}: all cases share the parameter."
        )
    axes = list(range(1, absent))
    for axis in range(max(absent, 1), len(data_sizes)):
        size, data_size = sizes[axis - absent], data_sizes[axis]
        if size == data_size:
            continue
        if size == 1:
            axes.append(axis)
        elif None not in (size, data_size):
            raise errors.ArgumentError(
                f"Incompatible shapes: the {what} {name!r} of shape {sizes} and data "
                f"of shape {data_sizes} differ in axis {axis} of the data. The "
                "parameter must have the data's size or 1 there."
            )
    return tuple(axes)
