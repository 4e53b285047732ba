"""Registration of dense and embedding layers."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import tensorflow as tf

from kfac.python.ops import deferred, errors
from kfac.python.ops.layer_collection import approximations, checks
from kfac.python.ops.layer_collection.parameters_dict import as_key, as_tuple, identity
from kfac.python.ops.layer_collection.registry import LayerRegistry
from kfac.python.ops.layer_collection.reuse import VARIABLE_SCOPE

_MEMBERS = "the weights, or (weights, bias)"


class DenseLayers(LayerRegistry):
    """`register_fully_connected` and its variant for several uses."""

    def __init__(self):
        super().__init__()
        self._wrapped_ids: dict[Hashable, deferred.DeferredTensor] = {}

    def register_fully_connected(
        self,
        params: Any,
        inputs: Any,
        outputs: Any,
        approx: str | None = None,
        dense_inputs: bool = True,
        reuse: Any = VARIABLE_SCOPE,
    ) -> None:
        """Registers a dense layer, or an embedding, used once per case.

        Args:
          params: weights `[d_in, d_out]`, or `(weights, bias)` with a bias `[d_out]`.
            Either side may have several axes, as in attention layers.
          inputs: `[batch, d_in]`; integer ids `[batch]` if not `dense_inputs`.
          outputs: `[batch, d_out]`, before any nonlinearity.
          approx: "kron", "kron_in_diag", "kron_out_diag", "kron_both_diag",
            "diagonal", "ekfac" or "ekfac_product"; None for the linked one, or the
            family's default (for ids the variant of it with a diagonal input factor,
            which is exact for them).
          dense_inputs: False if `inputs` holds ids, the rows of the weights looked up.
          reuse: True adds a tower to the layer, see `reuse.is_another_tower`.

        Raises:
          ArgumentError: parameters, shapes, approximation or reuse do not fit.
        """
        key = checks.layer_parameters(params, _MEMBERS)
        make_block = self._dense_block_type(
            "fully_connected", key, approx, dense_inputs
        )
        checks.single_tensor(inputs, "inputs", "register_fully_connected_multi")
        checks.single_tensor(outputs, "outputs", "register_fully_connected_multi")
        sizes = _matrix_sizes(key, inputs, outputs, dense_inputs)
        if sizes is not None:
            _check_input(inputs, sizes[0], dense_inputs, multi=False)
            checks.rank_and_last_axis(
                outputs, [2], sizes[1], "outputs", "[batch, d_out]"
            )
            checks.same_batch(inputs, outputs)
            if dense_inputs:
                checks.same_dtype(inputs, outputs)
        block = make_block(self, has_bias=isinstance(key, tuple))
        plan = self._plan(key, block, reuse)
        self._check_same_kind_of_inputs(plan, dense_inputs)
        if not dense_inputs:
            inputs = self._ids(inputs, key)
        self._commit(plan, (inputs, outputs), uses=1)

    def register_fully_connected_multi(
        self,
        params: Any,
        inputs: Any,
        outputs: Any,
        num_uses: int | None = None,
        approx: str | None = None,
        dense_inputs: bool = True,
        reuse: Any = VARIABLE_SCOPE,
        batch_major: bool = False,
    ) -> None:
        """Registers a dense layer, or an embedding, used several times per case.

        Args:
          params: weights `[d_in, d_out]`, or `(weights, bias)` with a bias `[d_out]`.
          inputs: a list over uses of `[batch, d_in]`, or one tensor
            `[uses * batch, d_in]` (use by use) or `[uses, batch, d_in]`. Ids have the
            same shapes without the last axis.
          outputs: likewise with `d_out`; a list of equal length if `inputs` is a list.
          num_uses: number of uses; needed if both `inputs` and `outputs` are tensors.
          approx: "kron_indep", "kron_indep_in_diag", "kron_indep_out_diag",
            "kron_indep_both_diag", "kron_series_1", "kron_series_2", "kron_reduce",
            "ekfac" or "ekfac_product"; None as in `register_fully_connected`.
          dense_inputs: False if `inputs` holds ids.
          reuse: True adds a tower to the layer, see `reuse.is_another_tower`.
          batch_major: the cases come first: `[batch, <uses>, d_in]`, with any number
            of axes of uses, or those axes folded, case by case; the outputs' features
            may have several axes. A list of such tensors is several applications of
            the layer to sequences; `num_uses`, which is needed, counts the uses of all
            of them.

        Raises:
          ArgumentError: parameters, shapes, approximation or reuse do not fit.
        """
        key = checks.layer_parameters(params, _MEMBERS)
        make_block = self._dense_block_type(
            "fully_connected_multi", key, approx, dense_inputs
        )
        counted = checks.number_of_uses(
            inputs, outputs, None if batch_major else num_uses
        )
        sizes = _matrix_sizes(
            key, as_tuple(inputs)[0], as_tuple(outputs)[0], dense_inputs
        )
        if batch_major:
            _check_batch_major(inputs, outputs, num_uses, sizes, dense_inputs)
        else:
            num_uses = counted
            if sizes is not None:
                _check_uses(inputs, outputs, num_uses, sizes, dense_inputs)
        block = make_block(self, has_bias=isinstance(key, tuple), num_uses=num_uses)
        if batch_major:
            block.use_batch_major_data(output_features=sizes and sizes[1])
        plan = self._plan(key, block, reuse)
        self._check_same_kind_of_inputs(plan, dense_inputs)
        inputs, outputs = as_key(inputs), as_key(outputs)
        if not dense_inputs:
            inputs = (
                tuple(self._ids(ids, key) for ids in inputs)
                if isinstance(inputs, tuple)
                else self._ids(inputs, key)
            )
        uses = len(inputs) if isinstance(inputs, tuple) else 1
        self._commit(plan, (inputs, outputs), uses)

    def _dense_block_type(
        self, family: str, key: Any, approx: str | None, dense_inputs: bool
    ) -> approximations.BlockFactory:
        """What makes the block, with the restrictions of integer ids."""
        if dense_inputs:
            return self._block_type_of(family, key, approx)[0]
        if isinstance(key, tuple):
            raise errors.ArgumentError(
                f"Integer ids (dense_inputs=False) with a bias, in "
                f"{checks.parameter_name(key)}, are not supported; register the "
                "embedding's weights alone."
            )
        default = approximations.default_for_ids(
            family, self._default_approximations[family]
        )
        make_block, name = self._get_block_type(
            key, approx, default, self._approximation_table(family)
        )
        if name not in approximations.WITH_DIAGONAL_INPUT_FACTOR:
            legal = sorted(
                approximations.WITH_DIAGONAL_INPUT_FACTOR
                & set(self._approximation_table(family))
            )
            raise errors.ArgumentError(
                f"Integer ids (dense_inputs=False) need a diagonal input factor, which "
                f"is exact for them; {name!r} for {checks.parameter_name(key)} has "
                f"none. Give approx=None or one of {legal}."
            )
        return make_block

    def _check_same_kind_of_inputs(self, plan: Any, dense_inputs: bool) -> None:
        """Refuses ids in one tower and dense inputs in another."""
        if plan.is_new:
            return
        first = plan.block._inputs[0]
        first = first[0] if isinstance(first, tuple) else first
        if (getattr(first, "one_hot_depth", None) is None) != dense_inputs:
            raise errors.ArgumentError(
                f"{checks.parameter_name(plan.key)} has integer ids as inputs in one "
                "tower and dense inputs in another; give all towers the same "
                "dense_inputs."
            )

    def _ids(self, ids: Any, weights: Any) -> deferred.DeferredTensor:
        """The ids with the number of classes, as data beside the user's tensor.

        The same ids give the same object, so that layers can share a factor.
        """
        depth = int(tf.compat.dimension_value(weights.shape[0]))
        if getattr(ids, "one_hot_depth", None) == depth:
            return ids
        key = (identity(ids), depth)
        if key not in self._wrapped_ids:
            self._wrapped_ids[key] = deferred.DeferredTensor(
                lambda: ids,
                ids.shape,
                ids.dtype,
                checks.tensor_name(ids) or "ids",
                getattr(ids, "device", None) or "",
                one_hot_depth=depth,
            )
        return self._wrapped_ids[key]


def _matrix_sizes(
    key: Any, inputs: Any, outputs: Any, dense: bool
) -> checks.Sizes | None:
    """`[d_in, d_out]`: the last axis of the weights belongs to the output.

    So do further ones, if the leading ones make up the last axis of the inputs.
    """
    shape = checks.static_sizes(as_tuple(key)[0])
    data = checks.static_sizes(inputs) if dense else None
    axes = 1
    if shape and data and None not in shape:
        splits = range(1, len(shape))
        axes = next((n for n in splits if math.prod(shape[:-n]) == data[-1]), 1)
    if dense:
        sizes = checks.weights_and_bias(
            key, lambda rank: rank != 1, "[d_in, d_out]", output_axes=axes
        )
    else:
        layout = "[number of ids, d_out]"
        sizes = checks.weights_and_bias(key, lambda rank: rank == 2, layout)
        checks.known_sizes(as_tuple(key)[0], sizes, layout)
    if sizes is None:
        return None
    sides = sizes[:-axes], sizes[-axes:]
    return [None if None in side else math.prod(side) for side in sides]


def _check_batch_major(
    inputs: Any,
    outputs: Any,
    num_uses: int | None,
    sizes: checks.Sizes | None,
    dense: bool,
) -> None:
    """Checks data of sequences, cases first."""
    inputs, outputs = as_tuple(inputs), as_tuple(outputs)
    if num_uses is None or len(inputs) != len(outputs) or num_uses % len(inputs):
        raise errors.ArgumentError(
            f"With batch_major=True inputs and outputs are tensors, or lists of equal "
            f"length that num_uses divides into; got {len(inputs)} inputs, "
            f"{len(outputs)} outputs and num_uses={num_uses}."
        )
    for tensor in inputs:
        checks.single_tensor(tensor, "a member of inputs", "")
        if dense and sizes is not None:
            layout = "[batch, <uses>, d_in] or [batch * uses, d_in]"
            legal = range(2, 2 + len(tensor.shape))
            checks.rank_and_last_axis(tensor, legal, sizes[0], "inputs", layout)
    for tensor in outputs:
        checks.single_tensor(tensor, "a member of outputs", "")
        shape = checks.static_sizes(tensor)
        if shape is None or sizes is None or None in (*shape[1:], sizes[1]):
            continue
        features = [math.prod(shape[-n:]) for n in range(1, len(shape))]
        if sizes[1] not in features:
            raise errors.ArgumentError(
                f"The layer's outputs {checks.tensor_name(tensor)!r} have shape "
                f"{shape}; expected [batch, <uses>, d_out] or [batch * uses, d_out] "
                f"with d_out = {sizes[1]} in one axis or several."
            )


def _check_input(inputs: Any, d_in: int | None, dense: bool, multi: bool) -> None:
    """Checks rank, width and dtype of the inputs (of one use)."""
    if dense:
        checks.rank_and_last_axis(
            inputs,
            [2, 3] if multi else [2],
            d_in,
            "inputs",
            "[batch, d_in] (or integer ids, with dense_inputs=False)"
            + (", [uses * batch, d_in] or [uses, batch, d_in]" if multi else ""),
        )
        return
    checks.rank_and_last_axis(
        inputs,
        [1, 2] if multi else [1],
        None,
        "inputs",
        "ids [batch]" + (", [uses * batch] or [uses, batch]" if multi else ""),
    )
    if not tf.as_dtype(inputs.dtype).is_integer:
        raise errors.ArgumentError(
            f"With dense_inputs=False the inputs are integer ids; got dtype "
            f"{tf.as_dtype(inputs.dtype).name}."
        )


def _check_uses(
    inputs: Any,
    outputs: Any,
    num_uses: int | None,
    sizes: checks.Sizes,
    dense: bool,
) -> None:
    """Checks the data of all uses against the weights and each other."""
    folded_inputs = not isinstance(inputs, (tuple, list))
    folded_outputs = not isinstance(outputs, (tuple, list))
    for tensor in as_tuple(inputs):
        _check_input(tensor, sizes[0], dense, multi=folded_inputs)
    for tensor in as_tuple(outputs):
        checks.rank_and_last_axis(
            tensor,
            [2, 3] if folded_outputs else [2],
            sizes[1],
            "outputs",
            "[batch, d_out]"
            + (
                ", [uses * batch, d_out] or [uses, batch, d_out]"
                if folded_outputs
                else ""
            ),
        )
    if dense:
        for tensor in as_tuple(outputs):
            checks.same_dtype(as_tuple(inputs)[0], tensor)
    if not folded_inputs:
        for use_inputs, use_outputs in zip(inputs, outputs, strict=True):
            checks.same_batch(use_inputs, use_outputs)
        return
    rows = checks.folded_uses(inputs, num_uses, 2 if dense else 1, "inputs")
    if folded_outputs:
        checks.same_rows(
            rows, checks.folded_uses(outputs, num_uses, 2, "outputs"), inputs, outputs
        )
