"""Gradients of single examples with respect to a layer's parameters.

The gradient of example b is the matrix `Σ_u a[b, u] g[b, u]ᵀ` over the uses u of the
parameters: one use in a dense layer, the output locations of a convolution, the steps
of a shared layer.  Examples lead here, `[batch, uses, features]`, so that it is one
matrix product per example.

`Examples` and its subclass bring a layer's data to that layout; the functions sum the
squares of such gradients in the coordinates of a Kronecker basis.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import utils
from kfac.python.ops.fisher_factors import conv_patches, naming, statistics


class Examples:
    """Inputs and output gradients of a dense layer, by towers.

    Args:
      inputs: indexed by tower: `[batch, d_in]`, or of several uses
        `[uses * batch, d_in]` (use-major) or `[uses, batch, d_in]`.
      outputs_grads: indexed by source, then by tower; the same with `d_out`.
      has_bias: append the constant 1 of a bias to the inputs.
      num_uses: number of uses per example.
    """

    def __init__(
        self,
        inputs: Any,
        outputs_grads: Any,
        has_bias: bool = False,
        num_uses: int = 1,
    ):
        self._inputs = inputs
        self._outputs_grads = outputs_grads
        self._has_bias = has_bias
        self._num_uses = int(num_uses)

    @property
    def scope(self) -> str:
        """A name made of the tensors' names."""
        return naming.scope_string_from_params(
            [*self._inputs, *tf.nest.flatten(self._outputs_grads), self._has_bias]
        )

    @property
    def identity(self) -> Hashable:
        """What tells these examples from others of the same `scope`."""
        return naming.fingerprint((self._inputs, self._outputs_grads, self._num_uses))

    @property
    def num_sources(self) -> int:
        return len(self._outputs_grads)

    @property
    def num_towers(self) -> int:
        return len(self._inputs)

    @property
    def uses(self) -> int:
        """How often an example uses the parameters."""
        return self._num_uses

    @property
    def d_in(self) -> int:
        """Number of rows of the parameters' matrix, that of a bias included."""
        return self._num_features + int(self._has_bias)

    @property
    def d_out(self) -> int:
        return int(tf.compat.dimension_value(self._outputs_grads[0][0].shape[-1]))

    @property
    def dtype(self) -> tf.DType:
        return self._outputs_grads[0][0].dtype

    @property
    def _num_features(self) -> int:
        return int(tf.compat.dimension_value(self._inputs[0].shape[-1]))

    def device(self, tower: int) -> str | None:
        return self._inputs[tower].device

    def batch_size(self, source: int, tower: int) -> int | tf.Tensor:
        """Number of examples of one shard: an int if static, else a tensor."""
        return statistics.num_cases(self._outputs_grads[source][tower], self._num_uses)

    def inputs(self, tower: int) -> tf.Tensor:
        """What `rows` takes, examples first."""
        data = statistics.to_canonical(
            tf.convert_to_tensor(self._inputs[tower]), self._num_uses
        )
        return _examples_first(data)

    def grads(self, source: int, tower: int) -> tf.Tensor:
        """Output gradients `[batch, uses, d_out]`."""
        data = statistics.to_canonical(
            tf.convert_to_tensor(self._outputs_grads[source][tower]), self._num_uses
        )
        return _examples_first(data)

    def rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """`[batch, uses, d_in]` from some of the examples of `inputs(tower)`."""
        return statistics.append_homog(inputs) if self._has_bias else inputs


class ConvolutionExamples(Examples):
    """Inputs and output gradients of a convolution of any rank, channels last.

    Args:
      inputs: indexed by tower: `[num_uses * batch, *spatial, channels_in]`, use-major.
      outputs_grads: indexed by source, then by tower:
        `[num_uses * batch, *spatial, channels_out]`.
      filter_shape: `[*filter_spatial, channels_in, channels_out]`.
      padding: "SAME" or "VALID".
      num_locations: number of output locations.
      strides: None, or as `extract_patches_fn` asks.
      dilation_rate: None, or as `extract_patches_fn` asks.
      data_format: None or channels last.
      extract_patches_fn: see `conv_patches.extract`.
      has_bias: append the constant 1 of a bias to each patch.
      patch_mask: `[*filter_spatial, channels_in]`, multiplies each patch.
      num_uses: number of uses of the whole filter per example.
    """

    def __init__(
        self,
        inputs: Any,
        outputs_grads: Any,
        filter_shape: Sequence[int],
        padding: str,
        num_locations: int,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        extract_patches_fn: str | None = None,
        has_bias: bool = False,
        patch_mask: Any = None,
        num_uses: int = 1,
    ):
        super().__init__(inputs, outputs_grads, has_bias, num_uses)
        self._filter_shape = tuple(int(size) for size in filter_shape)
        self._num_locations = int(num_locations)
        self._patch_options = dict(
            padding=padding,
            strides=strides,
            dilation_rate=dilation_rate,
            data_format=data_format,
            method=extract_patches_fn,
            mask=patch_mask,
        )

    @property
    def identity(self) -> Hashable:
        options = tuple(self._patch_options.values())
        return super().identity, self._filter_shape, naming.fingerprint(options)

    @property
    def uses(self) -> int:
        return self._num_uses * self._num_locations

    @property
    def _num_features(self) -> int:
        return math.prod(self._filter_shape[:-1])

    def batch_size(self, source: int, tower: int) -> int | tf.Tensor:
        rows = statistics.num_rows(self._outputs_grads[source][tower])
        return rows // self._num_uses

    def inputs(self, tower: int) -> tf.Tensor:
        """Images `[batch, uses, *spatial, channels_in]`."""
        return self._split_uses(self._inputs[tower])

    def grads(self, source: int, tower: int) -> tf.Tensor:
        data = self._split_uses(self._outputs_grads[source][tower])
        batch = utils.get_shape(data)[0]
        return tf.reshape(data, [batch, self.uses, self.d_out])

    def rows(self, inputs: tf.Tensor) -> tf.Tensor:
        batch, _, *image = utils.get_shape(inputs)
        patches = conv_patches.extract(
            tf.reshape(inputs, [-1, *image]), self._filter_shape, **self._patch_options
        )
        patches = tf.reshape(patches, [batch, self.uses, self._num_features])
        return super().rows(patches)

    def _split_uses(self, data: Any) -> tf.Tensor:
        data = tf.convert_to_tensor(data)
        rows, *image = utils.get_shape(data)
        split = [self._num_uses, rows // self._num_uses, *image]
        return _examples_first(tf.reshape(data, split))


def _examples_first(data: tf.Tensor) -> tf.Tensor:
    """`[uses, batch, ...]` as `[batch, uses, ...]`."""
    return tf.transpose(data, [1, 0, *range(2, data.shape.rank)])


def sum_of_squares(
    rows: tf.Tensor,
    grads: Sequence[tf.Tensor],
    input_basis: Any,
    output_basis: Any,
) -> tf.Tensor:
    """Sum over examples and sources of squared coordinates of example gradients.

    Args:
      rows: inputs `[batch, uses, d_in]`, `uses` static.
      grads: per source, output gradients `[batch, uses, d_out]`.
      input_basis: `[d_in, d_in]`.
      output_basis: `[d_out, d_out]`.

    Returns:
      `Σ_s Σ_b (U_Aᵀ (Σ_u rows[b, u] grads_s[b, u]ᵀ) U_G)²` `[d_in, d_out]`.
    """
    uses, d_in = rows.shape.as_list()[1:]
    d_out = grads[0].shape.as_list()[-1]
    # Rotating every row costs uses (d_in² + d_out²) operations an example, rotating
    # the gradient d_in d_out (d_in + d_out).
    if uses * (d_in**2 + d_out**2) > d_in * d_out * (d_in + d_out):
        gradients = [tf.matmul(rows, grad, transpose_a=True) for grad in grads]
        coordinates = [
            tf.matmul(tf.matmul(input_basis, gradient, transpose_a=True), output_basis)
            for gradient in gradients
        ]
        return tf.add_n([tf.reduce_sum(tf.square(c), axis=0) for c in coordinates])
    rows = tf.matmul(rows, input_basis)
    grads = [tf.matmul(grad, output_basis) for grad in grads]
    if uses == 1:
        # The square of an outer product is the outer product of the squares.
        squares = tf.add_n([tf.square(grad[:, 0]) for grad in grads])
        return tf.matmul(tf.square(rows[:, 0]), squares, transpose_a=True)
    coordinates = [tf.matmul(rows, grad, transpose_a=True) for grad in grads]
    return tf.add_n([tf.reduce_sum(tf.square(c), axis=0) for c in coordinates])


def mean_of_squares(
    examples: Examples,
    tower: int,
    sources: Sequence[int],
    input_basis: Any,
    output_basis: Any,
) -> tf.Tensor:
    """`sum_of_squares` of one tower over its batch size, in chunks that fit in memory.

    Args:
      examples: the layer's data.
      tower: which shard of the batch.
      sources: sources to sum over.
      input_basis: `[d_in, d_in]`.
      output_basis: `[d_out, d_out]`.
    """
    input_basis = tf.convert_to_tensor(input_basis)
    output_basis = tf.convert_to_tensor(output_basis)

    def chunk_sum(inputs, *grads):
        return sum_of_squares(examples.rows(inputs), grads, input_basis, output_basis)

    d_in, d_out, uses = examples.d_in, examples.d_out, examples.uses
    held = uses * d_in
    if uses > 1:
        held += len(sources) * d_in * d_out
    inputs = examples.inputs(tower)
    total = statistics.sum_over_chunks(
        chunk_sum,
        (inputs, *(examples.grads(source, tower) for source in sources)),
        held,
    )
    return total / tf.cast(statistics.num_rows(inputs), total.dtype)


def mean_square_of_features(rows: tf.Tensor, basis: Any) -> tf.Tensor:
    """Mean over examples and uses of squared coordinates of single features.

    Args:
      rows: `[batch, uses, features]`.
      basis: `[features, features]`.

    Returns:
      `[features]`: the diagonal of `Uᵀ C U`, C the second moment of the rows.
    """
    return statistics.second_moment_diagonal(
        tf.matmul(statistics.fold_uses(rows), basis)
    )
