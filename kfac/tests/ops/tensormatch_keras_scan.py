"""A Keras layer or model traced, scanned and run once."""

import keras
import pytest
import tensorflow as tf

from kfac.python.ops import layer_collection as lc
from kfac.python.ops.tensormatch import graph_search

BATCH = 3


@pytest.fixture
def float64():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(1)
    yield
    keras.config.set_dtype_policy(before)


class Scan:
    """A layer traced, scanned and run once.

    Attributes:
      blocks: paths of parameters -> block.
      reasons: path -> reason of the generic parameters.
      gradients: paths -> pairs (rebuilt, true) of gradients.
    """

    def __init__(self, layer, inputs, batch_size=BATCH, unknown_batch=True, **call):
        layer(*inputs, **call)  # Builds the variables.
        variables = [v.value for v in layer.trainable_variables]
        path_of = {id(v.value): v.path for v in layer.trainable_variables}

        def paths(params):
            return tuple(path_of[id(v)] for v in members(params))

        def traced(*inputs):
            with tf.GradientTape() as tape:
                outputs = layer(*inputs, **call)
                rows = tf.reshape(outputs, [tf.shape(outputs)[0], -1])
                weights = tf.range(tf.size(rows[0]), dtype=tf.float64)
                loss = tf.reduce_sum(tf.sin(rows) * tf.cos(weights))
            gradients = tape.gradient(loss, variables)
            true = {id(v): g for v, g in zip(variables, gradients, strict=True)}
            collection = lc.LayerCollection()
            collection.register_squared_error_loss(rows)
            graph_search.register_layers(collection, variables, batch_size=batch_size)
            collection.finalize()
            collection.check_registration(variables)
            self.blocks = {paths(p): b for p, b in collection.fisher_blocks.items()}
            self.reasons = {
                path_of[id(v)]: collection.generic_reasons[v.ref()]
                for v in variables
                if v.ref() in collection.generic_reasons
            }
            self.factor_sides = {}
            pairs = {}
            for params, block in collection.fisher_blocks.items():
                pair = self._rebuild(block, loss)
                if pair is None:
                    continue
                self.factor_sides[paths(params)] = block.description().factor_sides
                expected = [tf.convert_to_tensor(true[id(v)]) for v in members(params)]
                pairs[paths(params)] = (tf.nest.flatten(pair), expected)
            return pairs

        function = tf.function(traced, autograph=False)
        if unknown_batch:
            signature = [tf.TensorSpec([None, *x.shape[1:]], x.dtype) for x in inputs]
            function = function.get_concrete_function(*signature)
        self.gradients = function(*map(tf.constant, inputs))

    def _rebuild(self, block, loss):
        outputs = block.tensors_to_compute_grads()
        if type(block).__name__.startswith("Naive"):
            return None
        flat = tf.nest.flatten(outputs)
        grads = tf.nest.pack_sequence_as(outputs, tf.gradients(loss, flat))
        block.instantiate_factors((grads,), 0.1)
        return block.rebuild_gradient(grads)


def members(params):
    return params if isinstance(params, tuple) else (params,)
