"""Two small Keras classifiers of images `[batch, 28, 28]`: both end in logits."""

from __future__ import annotations

import keras
import numpy as np

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


def row_numbers(images: keras.KerasTensor) -> keras.KerasTensor:
    """`[batch, rows]` for images `[batch, rows, columns]`: 0, 1, 2, ... in each case.

    Made of the images for the sake of the batch axis: an embedding of one vector for
    all cases has no gradient of each, which K-FAC's statistics are taken from.
    """
    zeros = keras.ops.zeros_like(images[..., 0], dtype="int32")
    return zeros + np.arange(images.shape[1], dtype="int32")


def transformer(width: int = 32, blocks: int = 2, heads: int = 4) -> keras.Model:
    """Self-attention over the image's rows, normalisation before every part."""
    images = keras.Input(IMAGE)
    x = keras.layers.Dense(width, name="embed")(images)
    positions = keras.layers.Embedding(IMAGE[0], width, name="positions")
    x = x + positions(row_numbers(images))
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
