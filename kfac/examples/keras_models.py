"""Two small Keras classifiers of images `[batch, 28, 28]`: both end in logits."""

from __future__ import annotations

import keras

IMAGE = (28, 28)
CLASSES = 10


def convnet() -> keras.Model:
    """Two convolutions and two dense layers, 56,714 parameters."""
    return keras.Sequential(
        [
            keras.Input(IMAGE),
            keras.layers.Reshape((*IMAGE, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(CLASSES),
        ],
        name="convnet",
    )


class AddPositions(keras.layers.Layer):
    """Adds a learned vector for each of the rows `[batch, rows, width]`."""

    def build(self, shape: tuple) -> None:
        self.positions = self.add_weight(shape=shape[1:], initializer="uniform")

    def call(self, x):
        return x + self.positions


def transformer(width: int = 32, blocks: int = 2, heads: int = 4) -> keras.Model:
    """Self-attention over the image's rows, normalisation before every part."""
    images = keras.Input(IMAGE)
    x = keras.layers.Dense(width, name="embed")(images)
    x = AddPositions(name="positions")(x)
    for i in range(blocks):
        normal = keras.layers.LayerNormalization(name=f"norm_{i}a")(x)
        attention = keras.layers.MultiHeadAttention(
            heads, width // heads, name=f"attention_{i}"
        )
        x = x + attention(normal, normal)
        normal = keras.layers.LayerNormalization(name=f"norm_{i}b")(x)
        hidden = keras.layers.Dense(2 * width, "gelu", name=f"expand_{i}")(normal)
        x = x + keras.layers.Dense(width, name=f"contract_{i}")(hidden)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(images, keras.layers.Dense(CLASSES)(x), name="transformer")


MODELS = {"convnet": convnet, "transformer": transformer}
