"""How whole Keras models are covered when they are scanned."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kfac.python.ops import layer_collection as lc
from kfac.python.ops.tensormatch import graph_search
from kfac.tests.ops.tensormatch_keras_case import CONV, DENSE, GENERIC, SCALE, SHARED
from kfac.tests.ops.tensormatch_keras_scan import BATCH, Scan, float64, members

pytestmark = pytest.mark.usefixtures(float64.__name__)


def total(blocks):
    return sorted(type(block).__name__ for block in blocks.values())


class TestModels:
    def scan(self, model, *shape, **kwargs):
        x = np.random.default_rng(0).normal(size=(BATCH, *shape))
        result = Scan(model, [x], **kwargs)
        for rebuilt, true in result.gradients.values():
            for one, other in zip(rebuilt, true, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
        return result

    def test_nested_models(self):
        inner = keras.Sequential([layers.Dense(4, "tanh"), layers.LayerNormalization()])
        inputs = keras.Input((3,))
        outputs = layers.Dense(2)(inner(layers.Dense(3, "relu")(inputs)))
        result = self.scan(keras.Model(inputs, outputs), 3)
        assert total(result.blocks) == [DENSE] * 3 + [SCALE]

    def test_a_shared_layer(self):
        shared = layers.Dense(3, "tanh")
        model = keras.Sequential([shared, shared, layers.Dense(2)])
        result = self.scan(model, 3)
        assert total(result.blocks) == [DENSE, SHARED]
        assert [b._num_uses for b in result.blocks.values() if hasattr(b, "_num_uses")]

    def test_a_layer_shared_by_sequences(self):
        shared = layers.Dense(4, "tanh")
        inputs = keras.Input((5, 4))
        model = keras.Model(inputs, layers.Add()([shared(shared(inputs)), inputs]))
        (block,) = self.scan(model, 5, 4).blocks.values()
        assert type(block).__name__ == SHARED and block._num_uses == 10

    def test_a_shared_normalisation_is_generic(self):
        shared = layers.LayerNormalization()
        model = keras.Sequential([shared, layers.Dense(4), shared])
        result = self.scan(model, 4)
        assert total(result.blocks) == [DENSE, GENERIC, GENERIC]
        assert any("2 tensors" in reason for reason in result.reasons.values())

    def test_a_transformer_block(self):
        inputs = keras.Input((5, 4))
        attended = layers.MultiHeadAttention(2, 3)(inputs, inputs)
        normalized = layers.LayerNormalization()(inputs + attended)
        hidden = layers.Dense(6, "gelu")(normalized)
        outputs = layers.LayerNormalization()(normalized + layers.Dense(4)(hidden))
        result = self.scan(keras.Model(inputs, outputs), 5, 4)
        assert total(result.blocks) == [SHARED] * 6 + [SCALE] * 2

    def test_a_convolutional_net_with_batch_norm(self):
        model = keras.Sequential(
            [
                layers.Conv2D(3, 3, use_bias=False),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.MaxPooling2D(),
                layers.Flatten(),
                layers.Dense(2),
            ]
        )
        result = self.scan(model, 6, 6, 2, training=True)
        assert total(result.blocks) == [CONV, DENSE, SCALE]

    def test_dropout_and_activations_do_not_matter(self):
        activations = ["relu", "gelu", "silu", "softplus", "elu", "leaky_relu", "mish"]
        stack = [layers.Dense(3, activation) for activation in activations]
        model = keras.Sequential([*stack, layers.Dropout(0.5), layers.Dense(1)])
        result = self.scan(model, 3, training=True)
        assert total(result.blocks) == [DENSE] * (len(activations) + 1)

    def test_known_batch_sizes(self):
        model = keras.Sequential([layers.Dense(4, "tanh"), layers.Dense(2)])
        result = self.scan(model, 5, 3, unknown_batch=False)
        assert total(result.blocks) == [SHARED] * 2

    def test_an_unknown_length_is_an_error_that_names_the_layers(self):
        model = keras.Sequential([layers.Dense(4, name="first")])
        with pytest.raises(ValueError, match="kernel.*static length"):
            self.scan(NoLength(model), 5, 3)


class NoLength(keras.layers.Layer):
    """Hides the length of sequences from the static shape."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, inputs):
        hidden = tf.compat.v1.placeholder_with_default(inputs, [None, None, 3])
        return self.model(hidden)


def test_a_tied_decoder_makes_the_embedding_generic():
    class Tied(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.embed = layers.Embedding(10, 4)
            self.norm = layers.LayerNormalization()

        def call(self, ids):
            hidden = self.norm(self.embed(ids))
            return hidden @ tf.transpose(self.embed.embeddings)

    ids = np.arange(BATCH * 5, dtype=np.int32).reshape(BATCH, 5) % 10
    result = Scan(Tied(), [ids])
    assert total(result.blocks) == [GENERIC, SCALE]
    assert any("transpose" in reason for reason in result.reasons.values())


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_changes_nothing(policy):
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((6, 6, 2))
    hidden = layers.Conv2D(4, 3)(inputs)
    hidden = layers.LayerNormalization()(layers.LayerNormalization()(hidden))
    hidden = layers.BatchNormalization(axis=1)(hidden)
    hidden = layers.Dense(3)(layers.Reshape((16, 4))(hidden))
    hidden = layers.EinsumDense("abc,cde->abde", (16, 2, 2), bias_axes="de")(hidden)
    outputs = layers.Dense(2, dtype="float32")(layers.Flatten()(hidden))
    model = keras.Model(inputs, outputs)
    variables = [v.value for v in model.trainable_variables]
    found = {}

    @tf.function(autograph=False)
    def traced(x):
        collection = lc.LayerCollection()
        collection.register_squared_error_loss(model(x))
        graph_search.register_layers(collection, variables, batch_size=BATCH)
        collection.finalize()
        collection.check_registration(variables)
        found.update({names_of(p): b for p, b in collection.fisher_blocks.items()})

    traced.get_concrete_function(tf.TensorSpec([None, 6, 6, 2]))
    assert total(found) == sorted(
        [CONV, SCALE, SCALE, GENERIC, GENERIC, SHARED, SHARED, DENSE]
    )


def names_of(params):
    return tuple(v.name for v in members(params))
