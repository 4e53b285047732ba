"""One trace of a model that finds out what its training will compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kfac.python.keras.models import PureModel, tf_variable
from kfac.python.keras.planning import graph_cost
from kfac.python.keras.planning.layer_cost import layer_costs
from kfac.python.keras.registration import Registrar, approximations
from kfac.python.ops import curvature_matrix_vector_products as products
from kfac.python.ops import estimator, report, state
from kfac.python.ops.layer_collection import LayerCollection


def input_specs(model: PureModel, batch_size: int, x: Any = None) -> Any:
    """Structure of `tf.TensorSpec`s of static shapes.

    Args:
      model: the model.
      batch_size: the first size of every input.
      x: inputs or their specs, where the model does not know them.

    Raises:
      ValueError: the model knows none, or a size is unknown.
    """
    given = model.input_specs() if x is None else x
    if given is None:
        raise ValueError(
            f"{type(model.model).__name__} does not say what its inputs are; pass x=, "
            "one batch of inputs or tf.TensorSpecs."
        )

    def spec(leaf):
        shape = [batch_size, *leaf.shape[1:]]
        if None in shape:
            raise ValueError(
                f"An input has the shape {tuple(leaf.shape)}; pass x= with every size "
                "but the first."
            )
        return tf.TensorSpec(shape, leaf.dtype)

    return tf.nest.map_structure(spec, given)


class CostTrace:
    """Operations and memory of a model, and of the curvature of its layers.

    Args:
      model: the model as a pure function, with any loss.
      specs: structure of `tf.TensorSpec`s of static shapes, see `input_specs`.
      cov_batch_fraction: part of the batch that statistics are taken from.
      fisher_approx: see `Kfac`.

    Attributes:
      forward: operations of the forward pass.
      gradient: of forward pass and gradient.
      signals: of the backward pass to the layers' outputs.
      model_products: of two products for the quadratic model.
      parameter_bytes: memory of the parameters.
      activation_bytes: what the forward pass keeps for the backward pass.
      layers: costs of the curvature.
      loops: names of loops, which are not counted.
    """

    def __init__(
        self,
        model: PureModel,
        specs: Any,
        cov_batch_fraction: float = 1.0,
        fisher_approx: Any = None,
    ):
        self._model = model
        self._cov_batch_fraction = cov_batch_fraction
        self._fisher_approx = fisher_approx
        tf.function(self._build, autograph=False).get_concrete_function(specs)

    def _build(self, x: Any) -> tf.Tensor:
        variables = [tf_variable(v) for v in self._model.model.trainable_variables]
        with state.parameter_names(self._model.state_names()):
            outputs = [
                tensor
                for tensor in tf.nest.flatten(self._model(x))
                if tensor.dtype.is_floating
            ]
            self._count_gradient(outputs, variables)
            # Which loss it is changes neither layers nor shapes.
            collection = LayerCollection()
            for output in outputs:
                collection.register_squared_error_loss(output)
            batch_size = int(tf.nest.flatten(x)[0].shape[0])
            chosen = approximations(self._model.model, self._fisher_approx)
            registrar = Registrar(self._model, chosen)
            left = registrar.left_to_fallback()
            variables = [v for v in variables if v.ref() not in left]
            registrar.register_layers(collection, variables, batch_size)
            self._count_products(collection, variables)
            self._count_layers(collection, variables, outputs, batch_size)
        return tf.constant(0)

    def _count_gradient(self, outputs: Sequence, variables: Sequence) -> None:
        self._forward_ops = graph_cost.behind(outputs)
        gradients = tf.gradients(outputs, variables)
        backward = graph_cost.behind(map(_values, gradients), self._forward_ops)
        self.forward = graph_cost.flops(self._forward_ops)
        self.gradient = self.forward + graph_cost.flops(backward)
        self.activation_bytes = graph_cost.bytes_between(self._forward_ops, backward)
        self.parameter_bytes = sum(
            v.shape.num_elements() * v.dtype.size for v in variables
        )
        self.loops = graph_cost.loops(self._forward_ops)

    def _count_products(self, collection: LayerCollection, variables: Sequence) -> None:
        computer = products.CurvatureMatrixVectorProductComputer(collection, variables)
        vectors = [tf.ones_like(v) for v in variables]
        images = computer.multiply_fisher_factor_transpose(vectors)
        ops = graph_cost.behind(images, self._forward_ops)
        self.model_products = 2 * graph_cost.flops(ops)

    def _count_layers(self, collection, variables, outputs, batch_size) -> None:
        curvature = estimator.make_fisher_estimator(
            variables=variables,
            cov_ema_decay=0.95,
            damping=1.0,
            layer_collection=collection,
            exps=(-1,),
        )
        curvature.create_ops_and_vars_thunks()  # Makes the factors, no variables.
        captured = [block.tensors_to_compute_grads() for block in curvature.blocks]
        signals = tf.gradients(outputs, tf.nest.flatten(captured))
        backward = graph_cost.behind(map(_values, signals), self._forward_ops)
        self.signals = graph_cost.flops(backward)
        cases = math.ceil(self._cov_batch_fraction * batch_size)
        self.layers = layer_costs(
            report.explain(collection),
            [block._factors() for block in curvature.blocks],
            cases,
            variables[0].dtype.size,
        )


def _values(gradient: Any) -> Any:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
