"""Exact products of a mini-batch's Fisher, Gauss-Newton and Hessian matrices.

For losses l with inputs z_l, coefficients c_l and parameters θ, let J_l = ∂z_l/∂θ and
let B_l be the loss's factor of its own curvature, B_l B_lᵀ = F_l.  Then

    Fisher product            Σ_l c_l J_lᵀ F_l J_l v
    factor-transpose product  √c_l B_lᵀ J_l v, one for each loss
    factor product            Σ_l J_lᵀ √c_l B_l u_l

(Schraudolph 2002; Martens 2014, section 8.)  Losses are summed over the batch; nothing
is averaged or damped.  J_l v is two reverse passes, of which only the second executes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import utils
from kfac.python.ops.rules import scalars


class CurvatureMatrixVectorProductComputer:
    """Multiplies vectors over parameters by curvature matrices of the current batch.

    Vectors `vecs` are lists like `wrt_tensors`: tensors or arrays of the same shapes
    and dtypes, None for zero.  Results over parameters are lists like `wrt_tensors`.
    In Fisher and Gauss-Newton results an entry is None if no loss input depends on
    that tensor, and `tf.IndexedSlices` for a variable that is only gathered from.

    Works in any graph (v1, `tf.function`, a branch of a conditional), with XLA too.
    Several calls in one graph cost no more when run than one call with several
    vectors would (stacked passes were measured to be no faster).

    Args:
      layer_collection: has `losses`, `loss_coeffs`, `loss_colocation_ops` and, for
        Hessian products, `total_loss()`. Read at each call.
      wrt_tensors: the parameters θ: list or tuple of variables and tensors, or one of
        them. Derivatives of loss inputs are partial: each is held independent of the
        others.
      colocate_gradients_with_ops: whether gradient ops share their op's device.
    """

    def __init__(
        self,
        layer_collection: Any,
        wrt_tensors: Any,
        colocate_gradients_with_ops: bool = True,
    ):
        self._layer_collection = layer_collection
        self._wrt_tensors = list(utils.ensure_sequence(wrt_tensors))
        self._colocate_gradients_with_ops = colocate_gradients_with_ops

    def multiply_fisher(self, vecs: Sequence[Any]) -> list[Any]:
        """Fisher matrix times a vector over parameters.

        Raises:
          ValueError: `vecs` has another length or shapes than the parameters.
          TypeError: an entry has another dtype.
          RuntimeError: called eagerly.
        """
        images = self._multiply_jacobian(vecs)
        return self._multiply_jacobian_transpose(
            self._multiply_losses("multiply_fisher", images)
        )

    def multiply_fisher_factor_transpose(
        self, vecs: Sequence[Any]
    ) -> tuple[tf.Tensor, ...]:
        """Transposed factor of the Fisher matrix times a vector over parameters.

        Squared norms of the results sum to `vᵀ F v`.

        Returns:
          For each loss a tensor of its `fisher_factor_inner_shape`.

        Raises:
          As `multiply_fisher`.
        """
        images = self._multiply_jacobian(vecs)
        return self._multiply_losses(
            "multiply_fisher_factor_transpose", images, root=True
        )

    def multiply_fisher_factor(self, loss_inner_vecs: Sequence[Any]) -> list[Any]:
        """Factor of the Fisher matrix times inner vectors.

        Args:
          loss_inner_vecs: for each loss a tensor of its `fisher_factor_inner_shape`,
            None for zero.

        Raises:
          ValueError: wrong length or shapes.
          RuntimeError: called eagerly.
        """
        vectors = self._inner_vectors(
            loss_inner_vecs,
            self.fisher_factor_inner_shapes,
            self.fisher_factor_inner_static_shapes,
        )
        return self._multiply_jacobian_transpose(
            self._multiply_losses("multiply_fisher_factor", vectors, root=True)
        )

    def multiply_ggn(self, vecs: Sequence[Any]) -> list[Any]:
        """Gauss-Newton matrix times a vector; see `multiply_fisher`.

        Raises:
          NotImplementedError: a loss has no Gauss-Newton matrix.
        """
        images = self._multiply_jacobian(vecs)
        return self._multiply_jacobian_transpose(
            self._multiply_losses("multiply_ggn", images)
        )

    def multiply_ggn_factor_transpose(
        self, vecs: Sequence[Any]
    ) -> tuple[tf.Tensor, ...]:
        """Gauss-Newton version of `multiply_fisher_factor_transpose`."""
        images = self._multiply_jacobian(vecs)
        return self._multiply_losses("multiply_ggn_factor_transpose", images, root=True)

    def multiply_ggn_factor(self, loss_inner_vecs: Sequence[Any]) -> list[Any]:
        """Gauss-Newton version of `multiply_fisher_factor`."""
        vectors = self._inner_vectors(
            loss_inner_vecs,
            self.ggn_factor_inner_shapes,
            self.ggn_factor_inner_static_shapes,
        )
        return self._multiply_jacobian_transpose(
            self._multiply_losses("multiply_ggn_factor", vectors, root=True)
        )

    def multiply_hessian(self, vecs: Sequence[Any]) -> list[Any]:
        """Hessian of `layer_collection.total_loss()` times a vector over parameters.

        Uses the actual targets and total derivatives (a parameter that depends on
        another one is not held independent of it).

        Returns:
          Dense tensors, zero where the gradient does not depend on the parameter;
          a list of None for a collection without losses.

        Raises:
          MissingTargetsError: a loss has no targets.
          ValueError, TypeError, RuntimeError: as `multiply_fisher`.
        """
        _check_in_a_graph()
        vectors = self._parameter_vectors(vecs)
        if not self._losses:
            return [None] * len(self._wrt_tensors)
        # Dense, because TensorFlow cannot differentiate a sparse gradient again.
        weighted = [
            (tf.convert_to_tensor(gradient), vector)
            for gradient, vector in zip(
                self._gradients([self._total_loss]), vectors, strict=True
            )
            if gradient is not None and vector is not None
        ]
        products = [None] * len(self._wrt_tensors)
        if weighted:
            products = self._gradients(*zip(*weighted, strict=True))
        return [
            tf.zeros_like(wrt) if product is None else tf.convert_to_tensor(product)
            for product, wrt in zip(products, self._wrt_tensors, strict=True)
        ]

    @property
    def fisher_factor_inner_shapes(self) -> tuple[tf.Tensor, ...]:
        """For each loss the runtime shape of its inner vectors, batch first."""
        return tuple(loss.fisher_factor_inner_shape for loss in self._losses)

    @property
    def fisher_factor_inner_static_shapes(self) -> tuple[tf.TensorShape, ...]:
        """For each loss the static shape of its inner vectors."""
        return tuple(loss.fisher_factor_inner_static_shape for loss in self._losses)

    @property
    def ggn_factor_inner_shapes(self) -> tuple[tf.Tensor, ...]:
        """Gauss-Newton version of `fisher_factor_inner_shapes`."""
        return tuple(loss.ggn_factor_inner_shape for loss in self._losses)

    @property
    def ggn_factor_inner_static_shapes(self) -> tuple[tf.TensorShape, ...]:
        """Gauss-Newton version of `fisher_factor_inner_static_shapes`."""
        return tuple(loss.ggn_factor_inner_static_shape for loss in self._losses)

    @property
    def _losses(self) -> Sequence[Any]:
        return self._layer_collection.losses

    @property
    def _inputs_to_losses(self) -> list[Any]:
        return [
            tf.nest.map_structure(tf.convert_to_tensor, loss.inputs)
            for loss in self._losses
        ]

    @property
    def _inputs_to_losses_flat(self) -> list[tf.Tensor]:
        return tf.nest.flatten(self._inputs_to_losses)

    @property
    def _total_loss(self) -> tf.Tensor:
        return self._layer_collection.total_loss()

    def _multiply_jacobian(self, vecs: Sequence[Any]) -> list[Any]:
        """`J_l v`, for each loss in the structure of its inputs."""
        _check_in_a_graph()
        connected = [
            (wrt, vector)
            for wrt, vector in zip(
                self._wrt_tensors, self._parameter_vectors(vecs), strict=True
            )
            if vector is not None
        ]
        inputs = self._inputs_to_losses
        flat = tf.nest.flatten(inputs)
        images = [None] * len(flat)
        if flat and connected:
            wrt, vectors = zip(*connected, strict=True)
            images = utils.fwd_gradients(
                flat,
                wrt,
                grad_xs=vectors,
                stop_gradients=self._wrt_tensors,
                colocate_gradients_with_ops=self._colocate_gradients_with_ops,
            )
        images = [
            tf.zeros_like(z) if image is None else image
            for z, image in zip(flat, images, strict=True)
        ]
        return tf.nest.pack_sequence_as(inputs, images)

    def _multiply_jacobian_transpose(self, loss_vecs: Sequence[Any]) -> list[Any]:
        """`Σ_l J_lᵀ u_l` for u_l in the structure of the loss's inputs."""
        _check_in_a_graph()
        inputs = self._inputs_to_losses_flat
        if not inputs:
            return [None] * len(self._wrt_tensors)
        return self._gradients(
            inputs, tf.nest.flatten(loss_vecs), stop_gradients=self._wrt_tensors
        )

    def _gradients(self, ys, grad_ys=None, stop_gradients=None) -> list[Any]:
        return utils.gradients(
            ys,
            self._wrt_tensors,
            grad_ys,
            stop_gradients,
            colocate_gradients_with_ops=self._colocate_gradients_with_ops,
        )

    def _multiply_losses(
        self, product: str, vectors: Sequence[Any], root: bool = False
    ) -> tuple:
        """A product of every loss, times its coefficient or the root of that."""
        products = []
        for loss, vector in zip(self._losses, vectors, strict=True):
            colocation_op = self._layer_collection.loss_colocation_ops[loss]
            with tf.device(getattr(colocation_op, "device", None) or ""):
                coeff = self._layer_collection.loss_coeffs[loss]
                products.append(_scaled(getattr(loss, product)(vector), coeff, root))
        return tuple(products)

    def _parameter_vectors(self, vecs: Sequence[Any]) -> list[tf.Tensor | None]:
        vecs = utils.ensure_sequence(vecs)
        if len(vecs) != len(self._wrt_tensors):
            raise ValueError(
                f"One vector for each of the {len(self._wrt_tensors)} parameters is "
                f"expected, got {len(vecs)}."
            )
        return [
            None
            if vector is None
            else _vector_like(
                vector,
                tf.TensorShape(wrt.shape),
                tf.as_dtype(wrt.dtype).base_dtype,
                getattr(wrt, "name", wrt),
            )
            for vector, wrt in zip(vecs, self._wrt_tensors, strict=True)
        ]

    def _inner_vectors(
        self,
        loss_inner_vecs: Sequence[Any],
        shapes: Sequence[tf.Tensor],
        static_shapes: Sequence[tf.TensorShape],
    ) -> list[tf.Tensor]:
        losses = self._losses
        if len(loss_inner_vecs) != len(losses):
            raise ValueError(
                f"One inner vector for each of the {len(losses)} losses is expected, "
                f"got {len(loss_inner_vecs)}."
            )
        dtypes = [tf.as_dtype(loss.dtype).base_dtype for loss in losses]
        return [
            tf.zeros(shape, dtype)
            if vector is None
            else _vector_like(vector, static, dtype, type(loss).__name__)
            for vector, loss, shape, static, dtype in zip(
                loss_inner_vecs, losses, shapes, static_shapes, dtypes, strict=True
            )
        ]


def _check_in_a_graph() -> None:
    if tf.executing_eagerly():
        raise RuntimeError(
            "Curvature products differentiate graphs, and there is none eagerly. Call "
            "them inside a tf.function, together with the model."
        )


def _vector_like(
    vector: Any, shape: tf.TensorShape, dtype: tf.DType, name: str
) -> tf.Tensor:
    """A dense tensor; arrays and tensors must have the dtype, lists take it."""
    if hasattr(vector, "dtype") and tf.as_dtype(vector.dtype).base_dtype != dtype:
        raise TypeError(
            f"The vector for {name!r} must have dtype {dtype.name}, got "
            f"{tf.as_dtype(vector.dtype).name}."
        )
    tensor = tf.convert_to_tensor(vector, dtype)
    if not tensor.shape.is_compatible_with(shape):
        raise ValueError(
            f"The vector for {name!r} must have shape {shape}, got {tensor.shape}."
        )
    return tensor


def _scaled(structure: Any, coeff: Any, root: bool) -> Any:
    """Every tensor of a structure times `coeff`, or its root, in the tensor's dtype."""

    def scale(tensor: tf.Tensor) -> tf.Tensor:
        factor = scalars.cast(coeff, tensor.dtype)
        return (_checked_sqrt(factor) if root else factor) * tensor

    return tf.nest.map_structure(scale, structure)


def _checked_sqrt(coeff: tf.Tensor) -> tf.Tensor:
    message = "A loss coefficient must not be negative to have a factor"
    value = tf.get_static_value(coeff)
    if value is not None:
        if value < 0:
            raise ValueError(f"{message}, got {value}.")
        return tf.sqrt(coeff)
    not_negative = tf.debugging.assert_non_negative(coeff, message=message)
    with tf.control_dependencies([not_negative]):
        return tf.sqrt(coeff)
