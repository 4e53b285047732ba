"""Registration of ordinary convolutions: 1-D, 2-D, any rank, several uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac.python.ops import errors
from kfac.python.ops.layer_collection import approximations, checks, conv_checks
from kfac.python.ops.layer_collection.parameters_dict import as_key, as_tuple
from kfac.python.ops.layer_collection.registry import LayerRegistry, Plan
from kfac.python.ops.layer_collection.reuse import VARIABLE_SCOPE


class ConvolutionLayers(LayerRegistry):
    """`register_conv1d`, `_conv2d`, `_convolution`, `_conv2d_multi`; channels last."""

    def register_conv1d(
        self,
        params: Any,
        strides: Sequence[int],
        padding: str,
        inputs: Any,
        outputs: Any,
        dilations: Sequence[int] | None = None,
        approx: str | None = None,
        reuse: Any = VARIABLE_SCOPE,
        sub_sample_inputs: bool | None = None,
        sub_sample_patches: bool | None = None,
    ) -> None:
        """Registers a convolution over sequences.

        Args:
          params: filter `[width, c_in, c_out]`, or `(filter, bias)`, bias `[c_out]`.
          strides: 3 ints, `[1, stride, 1]`.
          padding: "SAME" or "VALID".
          inputs: `[batch, length, c_in]`.
          outputs: `[batch, new_length, c_out]`, before any nonlinearity.
          dilations: 3 ints, or None for ones.
          approx: "kron", "ekfac" or "ekfac_product"; None for the linked one or the
            default.
          reuse: True adds a tower to the layer, see `reuse.is_another_tower`.
          sub_sample_inputs: statistics from a random part of the cases; None for the
            setting of `fisher_factors`.
          sub_sample_patches: statistics from a random part of the patches; likewise.

        Raises:
          ArgumentError: parameters, shapes, approximation or reuse do not fit.
        """
        key = checks.layer_parameters(params, conv_checks.MEMBERS)
        make_block, _ = self._block_type_of("conv1d", key, approx)
        conv_checks.check_padding(padding)
        strides = conv_checks.window(strides, 1, "strides", with_batch=True)
        if dilations is not None:
            dilations = conv_checks.window(dilations, 1, "dilations", with_batch=True)
        conv_checks.check_shapes(key, 3, "[width, c_in, c_out]", inputs, outputs)
        block = make_block(
            self,
            params=key,
            padding=padding,
            strides=strides,
            dilation_rate=dilations,
            data_format="NWC",
            extract_patches_fn="extract_convolution_patches",
            sub_sample_inputs=sub_sample_inputs,
            sub_sample_patches=sub_sample_patches,
        )
        self._commit(self._plan(key, block, reuse), (inputs, outputs), uses=1)

    def register_conv2d(
        self,
        params: Any,
        strides: Sequence[int],
        padding: str,
        inputs: Any,
        outputs: Any,
        data_format: str | None = None,
        dilations: Sequence[int] | None = None,
        approx: str | None = None,
        reuse: Any = VARIABLE_SCOPE,
        sub_sample_inputs: bool | None = None,
        sub_sample_patches: bool | None = None,
        patch_mask: Any = None,
    ) -> None:
        """Registers a convolution over images.

        Args:
          params: filter `[height, width, c_in, c_out]`, or `(filter, bias)`, bias
            `[c_out]`.
          strides: 4 ints, `[1, s, s, 1]`.
          padding: "SAME" or "VALID".
          inputs: `[batch, rows, columns, c_in]`, or with approximation "diagonal" the
            channels of several groups, each of which has its part of the outputs.
          outputs: `[batch, new_rows, new_columns, c_out]`, before any nonlinearity.
          data_format: None or "NHWC".
          dilations: 4 ints, or None for ones.
          approx: "kron", "kron_sua", "kron_reduce", "diagonal", "ekfac" or
            "ekfac_product"; None for the linked one or the default.
          reuse: True adds a tower to the layer, see `reuse.is_another_tower`.
          sub_sample_inputs: statistics from a random part of the cases; None for the
            setting of `fisher_factors`. "diagonal" and "kron_reduce" ignore it.
          sub_sample_patches: statistics from a random part of the patches; likewise.
          patch_mask: `[height, width, c_in]`, multiplies every patch (for filters that
            are masked by it); array or tensor.

        Raises:
          ArgumentError: parameters, shapes, approximation or reuse do not fit.
        """
        plan = self._plan_conv2d(
            params,
            strides,
            padding,
            inputs,
            outputs,
            data_format=data_format,
            dilations=dilations,
            approx=approx,
            reuse=reuse,
            sub_sample_inputs=sub_sample_inputs,
            sub_sample_patches=sub_sample_patches,
            patch_mask=patch_mask,
        )
        self._commit(plan, (inputs, outputs), uses=1)

    def _plan_conv2d(
        self,
        params: Any,
        strides: Sequence[int],
        padding: str,
        inputs: Any,
        outputs: Any,
        data_format: str | None,
        dilations: Sequence[int] | None,
        approx: str | None,
        reuse: Any,
        sub_sample_inputs: bool | None,
        sub_sample_patches: bool | None,
        patch_mask: Any,
    ) -> Plan:
        conv_checks.check_nhwc(data_format)
        key = checks.layer_parameters(params, conv_checks.MEMBERS)
        make_block, name = self._block_type_of("conv2d", key, approx)
        conv_checks.check_padding(padding)
        strides = conv_checks.window(strides, 2, "strides", with_batch=True)
        if dilations is not None:
            dilations = conv_checks.window(dilations, 2, "dilations", with_batch=True)
        layout = "[height, width, c_in, c_out]"
        # Groups of channels are independent layers only to the diagonal.
        grouped = name == approximations.APPROX_DIAGONAL_NAME and patch_mask is None
        conv_checks.check_shapes(key, 4, layout, inputs, outputs, grouped)
        options = dict(
            params=key,
            padding=padding,
            strides=strides,
            data_format=data_format,
            patch_mask=conv_checks.patch_mask_tensor(patch_mask, as_tuple(key)[0]),
        )
        if name == approximations.APPROX_DIAGONAL_NAME:
            block = make_block(self, dilations=dilations, **options)
        else:
            if name != approximations.APPROX_KRONECKER_REDUCE_NAME:
                options.update(
                    sub_sample_inputs=sub_sample_inputs,
                    sub_sample_patches=sub_sample_patches,
                )
            block = make_block(
                self,
                dilation_rate=dilations,
                extract_patches_fn="extract_image_patches",
                **options,
            )
        return self._plan(key, block, reuse)

    def register_convolution(
        self,
        params: Any,
        inputs: Any,
        outputs: Any,
        padding: str,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        approx: str | None = None,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Registers a convolution of any rank, as `tf.nn.convolution` computes it.

        Args:
          params: filter `[*spatial, c_in, c_out]`, or `(filter, bias)`, bias `[c_out]`.
          inputs: `[batch, *spatial, c_in]`.
          outputs: `[batch, *spatial, c_out]`, before any nonlinearity.
          padding: "SAME" or "VALID".
          strides: one int per spatial axis, or None for ones.
          dilation_rate: likewise.
          data_format: None, or a name that ends in "C".
          approx: "kron", "ekfac" or "ekfac_product"; None for the linked one or the
            default.
          reuse: True adds a tower to the layer, see `reuse.is_another_tower`.

        Raises:
          ArgumentError: parameters, shapes, approximation or reuse do not fit.
        """
        key = checks.layer_parameters(params, conv_checks.MEMBERS)
        make_block, _ = self._block_type_of("convolution", key, approx)
        conv_checks.check_padding(padding)
        is_text = isinstance(data_format, str)
        if data_format is not None and not (is_text and data_format.endswith("C")):
            raise errors.ArgumentError(
                f"data_format={data_format!r}: channels must be last."
            )
        sizes = conv_checks.check_shapes(
            key, None, "[*spatial, c_in, c_out]", inputs, outputs
        )
        rank = len(sizes) - 2
        either = dict(with_batch=True, without=True)
        if strides is not None:
            strides = conv_checks.window(strides, rank, "strides", **either)
        if dilation_rate is not None:
            dilation_rate = conv_checks.window(
                dilation_rate, rank, "dilation_rate", **either
            )
        block = make_block(
            self,
            params=key,
            padding=padding,
            strides=strides,
            dilation_rate=dilation_rate,
            data_format=data_format,
        )
        self._commit(self._plan(key, block, reuse), (inputs, outputs), uses=1)

    def register_conv2d_multi(
        self,
        params: Any,
        strides: Sequence[int],
        padding: str,
        inputs: Any,
        outputs: Any,
        num_uses: int | None = None,
        data_format: str | None = None,
        dilations: Sequence[int] | None = None,
        approx: str | None = None,
        reuse: Any = VARIABLE_SCOPE,
        sub_sample_inputs: bool | None = None,
        sub_sample_patches: bool | None = None,
        patch_mask: Any = None,
    ) -> None:
        """Registers a convolution over images used several times per case.

        Args:
          params: filter `[height, width, c_in, c_out]`, or `(filter, bias)`, bias
            `[c_out]`.
          strides: 4 ints, `[1, s, s, 1]`.
          padding: "SAME" or "VALID".
          inputs: a list over uses of `[batch, rows, columns, c_in]`, or one tensor
            `[uses * batch, rows, columns, c_in]`, use by use.
          outputs: likewise; a list of equal length if `inputs` is a list.
          num_uses: number of uses; needed if both `inputs` and `outputs` are tensors.
          data_format: None or "NHWC".
          dilations: 4 ints, or None for ones.
          approx: "kron_indep", "ekfac" or "ekfac_product"; None for the linked one or
            the default.
          reuse: True adds a tower to the layer, see `reuse.is_another_tower`.
          sub_sample_inputs: as in `register_conv2d`, like the following.
          sub_sample_patches: as said.
          patch_mask: as said.

        Raises:
          ArgumentError: parameters, shapes, approximation or reuse do not fit.
        """
        conv_checks.check_nhwc(data_format)
        key = checks.layer_parameters(params, conv_checks.MEMBERS)
        make_block, _ = self._block_type_of("conv2d_multi", key, approx)
        conv_checks.check_padding(padding)
        strides = conv_checks.window(strides, 2, "strides", with_batch=True)
        if dilations is not None:
            dilations = conv_checks.window(dilations, 2, "dilations", with_batch=True)
        num_uses = checks.number_of_uses(inputs, outputs, num_uses)
        layout = "[height, width, c_in, c_out]"
        if isinstance(inputs, (tuple, list)):
            for use_inputs, use_outputs in zip(inputs, outputs, strict=True):
                conv_checks.check_shapes(key, 4, layout, use_inputs, use_outputs)
        else:
            sizes = conv_checks.filter_sizes(key, 4, layout)
            conv_checks.check_channels(inputs, 4, sizes[-2], "inputs", "c_in")
            for tensor in as_tuple(outputs):
                conv_checks.check_channels(tensor, 4, sizes[-1], "outputs", "c_out")
                checks.same_dtype(inputs, tensor)
            rows = checks.folded_uses(inputs, num_uses, 4, "inputs")
            if not isinstance(outputs, (tuple, list)):
                checks.same_rows(
                    rows,
                    checks.folded_uses(outputs, num_uses, 4, "outputs"),
                    inputs,
                    outputs,
                )
        block = make_block(
            self,
            params=key,
            padding=padding,
            strides=strides,
            dilation_rate=dilations,
            data_format=data_format,
            extract_patches_fn="extract_image_patches",
            num_uses=num_uses,
            sub_sample_inputs=sub_sample_inputs,
            sub_sample_patches=sub_sample_patches,
            patch_mask=conv_checks.patch_mask_tensor(patch_mask, as_tuple(key)[0]),
        )
        uses = len(inputs) if isinstance(inputs, (tuple, list)) else 1
        plan = self._plan(key, block, reuse)
        self._commit(plan, (as_key(inputs), as_key(outputs)), uses)
