"""Registration of depthwise and separable convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac.python.ops import errors
from kfac.python.ops.layer_collection import approximations, checks, conv_checks
from kfac.python.ops.layer_collection.convolution import ConvolutionLayers
from kfac.python.ops.layer_collection.parameters_dict import as_key, as_tuple, identity
from kfac.python.ops.layer_collection.registry import Plan
from kfac.python.ops.layer_collection.reuse import VARIABLE_SCOPE


class DepthwiseLayers(ConvolutionLayers):
    """`register_depthwise_conv2d` and `register_separable_conv2d`; channels last."""

    def register_depthwise_conv2d(
        self,
        params: Any,
        inputs: Any,
        outputs: Any,
        strides: Sequence[int],
        padding: str,
        rate: Sequence[int] | None = None,
        data_format: str | None = None,
        approx: str | None = None,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Registers a depthwise convolution over images.

        Args:
          params: filter `[height, width, c_in, multiplier]`; there is no bias.
          inputs: `[batch, rows, columns, c_in]`.
          outputs: `[batch, new_rows, new_columns, c_in * multiplier]`.
          strides: 4 ints, `[1, s, s, 1]`.
          padding: "SAME" or "VALID".
          rate: 2 ints, the dilation, or None for ones.
          data_format: None or "NHWC".
          approx: "diagonal" (also if None) or "kron_depthwise", which treats the layer
            as an ordinary convolution with a block-diagonal filter.
          reuse: True adds a tower to the layer, see `reuse.is_another_tower`.

        Raises:
          ArgumentError: shapes, approximation, strides or reuse do not fit.
          NotImplementedError: `params` has a bias.
        """
        plan = self._plan_depthwise_conv2d(
            params, inputs, outputs, strides, padding, rate, data_format, approx, reuse
        )
        self._commit(plan, (inputs, outputs), uses=1)

    def _plan_depthwise_conv2d(
        self,
        params: Any,
        inputs: Any,
        outputs: Any,
        strides: Sequence[int],
        padding: str,
        rate: Sequence[int] | None,
        data_format: str | None,
        approx: str | None,
        reuse: Any,
    ) -> Plan:
        conv_checks.check_nhwc(data_format)
        key = as_key(params)
        checks.distinct_parameters(as_tuple(key))
        make_block, _ = self._block_type_of("depthwise_conv2d", key, approx)
        conv_checks.check_padding(padding)
        strides = conv_checks.window(strides, 2, "strides", with_batch=True)
        if rate is not None:
            rate = conv_checks.window(rate, 2, "rate", with_batch=False, without=True)
        layout = "[height, width, c_in, multiplier]"
        if not isinstance(key, tuple):  # Which the block refuses.
            sizes = conv_checks.filter_sizes(key, 4, layout)
        block = make_block(
            self,
            params=key,
            strides=strides,
            padding=padding,
            rate=rate,
            data_format=data_format,
        )
        checks.single_tensor(inputs, "inputs", "register_generic")
        checks.single_tensor(outputs, "outputs", "register_generic")
        conv_checks.check_channels(inputs, 4, sizes[2], "inputs", "c_in")
        width = sizes[2] * sizes[3]
        conv_checks.check_channels(outputs, 4, width, "outputs", "c_in * multiplier")
        checks.same_batch(inputs, outputs)
        checks.same_dtype(inputs, outputs)
        return self._plan(key, block, reuse)

    def register_separable_conv2d(
        self,
        depthwise_params: Any,
        pointwise_params: Any,
        inputs: Any,
        depthwise_outputs: Any,
        pointwise_outputs: Any,
        strides: Sequence[int],
        padding: str,
        rate: Sequence[int] | None = None,
        data_format: str | None = None,
        approx: str | None = None,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Registers a depthwise convolution and the 1x1 convolution that follows it.

        Args:
          depthwise_params: filter `[height, width, c_in, multiplier]`.
          pointwise_params: filter `[1, 1, c_in * multiplier, c_out]`, or
            `(filter, bias)`, bias `[c_out]`.
          inputs: `[batch, rows, columns, c_in]`.
          depthwise_outputs: `[batch, new_rows, new_columns, c_in * multiplier]`.
          pointwise_outputs: `[batch, new_rows, new_columns, c_out]`, before any
            nonlinearity.
          strides: 4 ints, of the depthwise part.
          padding: "SAME" or "VALID", of the depthwise part.
          rate: 2 ints, dilation of the depthwise part, or None for ones.
          data_format: None or "NHWC".
          approx: of the pointwise part, as in `register_conv2d`; the depthwise part is
            always diagonal.
          reuse: True adds a tower to both, see `reuse.is_another_tower`.

        Raises:
          ArgumentError, NotImplementedError: as the two registrations do; then neither
            has happened.
        """
        depthwise = self._plan_depthwise_conv2d(
            depthwise_params,
            inputs,
            depthwise_outputs,
            strides,
            padding,
            rate,
            data_format,
            approximations.APPROX_DIAGONAL_NAME,
            reuse,
        )
        pointwise = self._plan_conv2d(
            pointwise_params,
            [1, 1, 1, 1],
            "VALID",
            depthwise_outputs,
            pointwise_outputs,
            data_format=data_format,
            dilations=None,
            approx=approx,
            reuse=reuse,
            sub_sample_inputs=None,
            sub_sample_patches=None,
            patch_mask=None,
        )
        if identity(depthwise.key) in {identity(v) for v in as_tuple(pointwise.key)}:
            raise errors.ArgumentError(
                f"{checks.parameter_name(depthwise.key)!r} is given as the depthwise "
                "and as a pointwise parameter."
            )
        pointwise.block.validate_tower(depthwise_outputs, pointwise_outputs)
        self._commit(depthwise, (inputs, depthwise_outputs), uses=1)
        self._commit(pointwise, (depthwise_outputs, pointwise_outputs), uses=1)
