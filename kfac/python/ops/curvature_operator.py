"""The estimated curvature as a `tf.linalg.LinearOperator` over all parameters.

A parameter vector `[P]` holds the blocks of the layer collection in the order of their
registration, each block's parameters one after the other (weights, bias), flattened
row-major; `flatten` and `unflatten` convert.  The operators are block-diagonal and
keep the structure of each block, so that nothing of size `[P, P]` is ever built, and
TensorFlow's own methods work: `matvec`, `solvevec`, `trace`, `log_abs_determinant`,
`diag_part`.

Statistics are read when an operator is made, in the current graph or eagerly; after
training in a `tf.function`, the optimizer made in its last trace will do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import errors, utils
from kfac.python.ops import fisher_blocks as fb
from kfac.python.ops.eigenbasis import LinearOperatorEigenbasis
from kfac.python.ops.layer_collection.parameters_dict import identity
from kfac.python.ops.rules import scalars

linalg = tf.linalg


def curvature_operator(
    estimator: Any, damped: bool = True
) -> tf.linalg.LinearOperatorBlockDiag:
    """The estimator's matrix: what `estimator.multiply` multiplies by.

    K-FAC blocks are `LinearOperatorKronecker`, with the damping in both factors, full
    ones `LinearOperatorFullMatrix`, diagonal ones `LinearOperatorDiag`, EKFAC ones
    `LinearOperatorEigenbasis`.

    Args:
      estimator: a `FisherEstimator`; anything else with a layer collection `layers`
        that is in use, such as `KfacOptimizer` or the Keras optimizer `Kfac`; or that
        collection. Its variables must exist.
      damped: whether every block contains its damping.

    Raises:
      ArgumentError: the estimator has no variables yet.
      TypeError: the argument is none of them.
      NotImplementedError: a block has no matrix (the series approximations).
    """
    return linalg.LinearOperatorBlockDiag(
        [block_operator(block, damped) for _, block in _blocks(estimator)],
        is_self_adjoint=True,
        is_positive_definite=True if damped else None,
    )


def shifted_operator(
    estimator: Any, scale: Any = 1.0, shift: Any = 0.0
) -> tf.linalg.LinearOperatorBlockDiag:
    """`scale F + shift I` with the undamped F, the shift being exact in every block.

    Kronecker and full blocks are decomposed for it.  All blocks of the result are
    `LinearOperatorEigenbasis`, which have any power.

    Args:
      estimator: see `curvature_operator`.
      scale: scalar, positive.
      shift: scalar, not negative; positive if the result is to be inverted.

    Raises:
      ArgumentError: see `curvature_operator`.
      NotImplementedError: see `curvature_operator`.
    """
    operators = []
    for _, block in _blocks(estimator):
        values, input_basis, output_basis = _spectrum(block)
        # Rounding makes tiny eigenvalues negative.
        values = tf.maximum(values, tf.zeros_like(values))
        scale, shift = (scalars.cast(number, values.dtype) for number in (scale, shift))
        operators.append(
            LinearOperatorEigenbasis(
                scale * values + shift,
                input_basis,
                output_basis,
                is_positive_definite=True,
            )
        )
    return linalg.LinearOperatorBlockDiag(
        operators, is_self_adjoint=True, is_positive_definite=True
    )


def square_root(
    operator: tf.linalg.LinearOperatorBlockDiag,
) -> tf.linalg.LinearOperatorBlockDiag:
    """R with `R Rᵀ` the damped or shifted operator, block by block.

    It is symmetric in `LinearOperatorEigenbasis`, lower triangular in other blocks.

    Args:
      operator: positive definite, of this module.
    """
    return linalg.LinearOperatorBlockDiag(
        [
            block.power(0.5)
            if isinstance(block, LinearOperatorEigenbasis)
            else block.cholesky()
            for block in operator.operators
        ]
    )


def sample(
    operator: tf.linalg.LinearOperatorBlockDiag,
    num_samples: int,
    inverse: bool = False,
    seed: int | None = None,
) -> tf.Tensor:
    """Normal vectors `[num_samples, P]` of mean 0 and the operator as covariance.

    Args:
      operator: positive definite, of this module.
      num_samples: how many.
      inverse: whether the covariance is the operator's inverse.
      seed: for the same numbers every time.
    """
    root = square_root(operator)
    shape = [num_samples, int(operator.domain_dimension)]
    if seed is None:
        noise = tf.random.normal(shape, dtype=operator.dtype)
    else:
        noise = tf.random.stateless_normal(shape, [seed, 0], dtype=operator.dtype)
    if inverse:
        samples = root.solve(noise, adjoint=True, adjoint_arg=True)
    else:
        samples = root.matmul(noise, adjoint_arg=True)
    return linalg.matrix_transpose(samples)


def parameters(estimator: Any) -> list[Any]:
    """The registered variables, in the order of parameter vectors."""
    return [
        variable
        for params, _ in _blocks(estimator)
        for variable in utils.ensure_sequence(params)
    ]


def flatten(estimator: Any, vecs_and_vars: Sequence[tuple[Any, Any]]) -> tf.Tensor:
    """The vector `[P]` of parameter-shaped tensors.

    Args:
      estimator: see `curvature_operator`.
      vecs_and_vars: `(tensor, variable)` pairs for all registered variables, in any
        order, as in the estimator's products. (Of a Keras variable it is `.value`.)

    Raises:
      KeyError: a variable is missing.
      ValueError: a tensor has another shape than its variable.
    """
    tensors = {identity(variable): tensor for tensor, variable in vecs_and_vars}
    parts = []
    for variable in parameters(estimator):
        if identity(variable) not in tensors:
            raise KeyError(
                f"No tensor is given for {variable.name!r}; expected pairs (tensor, "
                "variable) for all of `parameters(estimator)`, which are TensorFlow's "
                "variables (the `.value` of Keras')."
            )
        part = tf.convert_to_tensor(tensors[identity(variable)])
        if not part.shape.is_compatible_with(variable.shape):
            raise ValueError(
                f"The tensor for {variable.name!r} has shape {part.shape}; expected "
                f"that of the variable, {variable.shape}."
            )
        parts.append(tf.reshape(part, [-1]))
    return tf.concat(parts, axis=0)


def unflatten(estimator: Any, vector: Any) -> list[tuple[tf.Tensor, Any]]:
    """`(tensor, variable)` pairs of vectors.

    Args:
      estimator: see `curvature_operator`.
      vector: `[..., P]`; leading axes lead the tensors, too.

    Raises:
      ValueError: the last axis is not of size P.
    """
    vector = tf.convert_to_tensor(vector)
    variables = parameters(estimator)
    sizes = [variable.shape.num_elements() for variable in variables]
    if not vector.shape.is_compatible_with([*vector.shape[:-1], sum(sizes)]):
        raise ValueError(
            f"Vectors must be [..., {sum(sizes)}], a number for each parameter; got "
            f"shape {vector.shape}."
        )
    leading = list(utils.get_shape(vector)[:-1])
    return [
        (tf.reshape(part, [*leading, *variable.shape.as_list()]), variable)
        for part, variable in zip(
            tf.split(vector, sizes, axis=-1), variables, strict=True
        )
    ]


def _blocks(estimator: Any) -> list[tuple[Any, Any]]:
    """Parameter groups and blocks, which must have factors.

    Raises:
      TypeError: the argument has nothing to do with curvature.
      ArgumentError: its factors do not exist yet.
    """
    collection = estimator
    if not hasattr(estimator, "fisher_blocks"):
        collection = getattr(estimator, "layers", estimator)
    # (The Keras optimizer's is None before the model is known.)
    if not (collection is None or hasattr(collection, "fisher_blocks")):
        raise TypeError(
            "Expected an estimator, an optimizer or a LayerCollection, got a "
            f"{type(estimator).__name__}."
        )
    blocks = [] if collection is None else list(collection.fisher_blocks.items())
    if not blocks or not all(block._factors() for _, block in blocks):
        raise errors.ArgumentError(
            "The curvature has no variables yet: call make_vars_and_create_op_thunks() "
            "(or the optimizer's minimize, or a Keras model's fit) first. Optimizers "
            "without Kronecker factors, such as FishLeg, have no such curvature."
        )
    return blocks


# One block as an operator.


@functools.singledispatch
def block_operator(block: Any, damped: bool = True) -> tf.linalg.LinearOperator:
    """One block over its flattened parameters.

    Args:
      block: with factors that have their variables.
      damped: whether it contains its damping.

    Raises:
      NotImplementedError: it has no matrix.
    """
    raise NotImplementedError(
        f"{type(block).__name__} has no matrix to make an operator of; use another "
        "approximation for this layer."
    )


@block_operator.register(fb.DiagonalFB)
@block_operator.register(fb.FullFB)
def _(block, damped=True):
    return _factor_operator(block._factor, block._damping_func, damped)


@block_operator.register(fb.KroneckerProductFB)
def _(block, damped=True):
    left, right = _kronecker_factors(block, damped)
    left = _scaled(left, block._renorm_coeff, damped)
    return linalg.LinearOperatorKronecker(
        [left, right], is_self_adjoint=True, is_positive_definite=damped or None
    )


@block_operator.register(fb.EigenbasisProductFB)
def _(block, damped=True):
    return block.linear_operator(damped)


@block_operator.register(fb.DepthwiseConvKFCBasicFB)
def _(block, damped=True):
    # A principal submatrix of a Kronecker product, which is small.
    if not damped:
        return _matrix_operator(block.full_fisher_block(), damped)
    shape = list(block._depthwise_shape)
    size = int(block.full_fisher_block().shape[0])
    columns = tf.map_fn(
        lambda row: tf.reshape(block.multiply(tf.reshape(row, shape)), [-1]),
        tf.eye(size, dtype=block.input_factor._dtype),
    )
    return _matrix_operator(columns, damped)


@block_operator.register(fb.FullyConnectedSeriesFB)
def _(block, damped=True):
    del damped
    return block_operator.dispatch(object)(block)


def _factor_operator(factor: Any, damping_func: Any, damped: bool) -> Any:
    if damped:
        return factor.get_matpower(1, damping_func)
    return factor.get_cov_as_linear_operator()


def _kronecker_factors(block: Any, damped: bool) -> tuple[Any, Any]:
    """Both factors, in the order of the parameters' rows and columns."""
    left = block._left_operator(
        _factor_operator(block.input_factor, block._input_damping_func, damped)
    )
    if not isinstance(left, linalg.LinearOperator):
        left = _matrix_operator(left.to_dense(), damped)
    right = _factor_operator(block.output_factor, block._output_damping_func, damped)
    return left, right


def _scaled(operator: Any, scale: float, damped: bool) -> tf.linalg.LinearOperator:
    if scale == 1:
        return operator
    if isinstance(operator, linalg.LinearOperatorDiag):
        return linalg.LinearOperatorDiag(
            scale * tf.convert_to_tensor(operator.diag),
            is_self_adjoint=True,
            is_positive_definite=damped or None,
        )
    return _matrix_operator(scale * operator.to_dense(), damped)


def _matrix_operator(matrix: Any, damped: bool) -> tf.linalg.LinearOperator:
    return linalg.LinearOperatorFullMatrix(
        matrix, is_self_adjoint=True, is_positive_definite=damped or None
    )


# One block's undamped spectrum.


@functools.singledispatch
def _spectrum(block: Any) -> tuple[tf.Tensor, Any, Any]:
    """Eigenvalues `[d_in, d_out]` and the bases of `LinearOperatorEigenbasis`."""
    # A dense matrix, or no matrix at all: then this raises.
    return _column_spectrum(block_operator(block, damped=False))


@_spectrum.register(fb.KroneckerProductFB)
def _(block):
    (left, input_basis), (right, output_basis) = (
        _decomposed(factor) for factor in _kronecker_factors(block, damped=False)
    )
    values = tf.tensordot(left, right, axes=0)
    return block._renorm_coeff * values, input_basis, output_basis


@_spectrum.register(fb.DepthwiseConvKFCBasicFB)
@_spectrum.register(fb.FullyConnectedSeriesFB)
def _(block):
    return _column_spectrum(block_operator(block, damped=False))


@_spectrum.register(fb.EigenbasisProductFB)
def _(block):
    operator = block.linear_operator(damped=False)
    return operator.eigenvalues, operator.input_basis, operator.output_basis


def _column_spectrum(operator: Any) -> tuple[tf.Tensor, Any, None]:
    values, basis = _decomposed(operator)
    return values[:, tf.newaxis], basis, None


def _decomposed(operator: Any) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Eigenvalues `[n]`, and eigenvectors unless the operator is diagonal."""
    if isinstance(operator, linalg.LinearOperatorDiag):
        return tf.convert_to_tensor(operator.diag), None
    return linalg.eigh(operator.to_dense())
