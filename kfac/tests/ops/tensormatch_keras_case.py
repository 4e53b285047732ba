"""A row of the table of Keras' layers, and the blocks that parameters may get."""

import dataclasses
from collections.abc import Callable, Mapping

import keras

DENSE = "FullyConnectedKFACBasicFB"
SHARED = "FullyConnectedMultiIndepFB"
CONV = "ConvKFCBasicFB"
SHARED_CONV = "ConvKFCBasicMultiIndepFB"
DEPTHWISE = "DepthwiseConvDiagonalFB"
SCALE = "ScaleAndShiftFullFB"
GENERIC = "NaiveDiagonalFB"


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
      name: what the layer is.
      build: makes the layer.
      shape: of its input, without the batch.
      blocks: parameters (ends of their paths, comma separated) -> block class.
      reason: part of the reason given for generic parameters.
      ids: number of different ids if the input holds ids.
      inputs: number of inputs, all alike.
      training: argument of the call; not passed if None.
      newer: Keras' name of the layer, if the oldest Keras supported lacks it.
    """

    name: str
    build: Callable[[], keras.layers.Layer]
    shape: tuple[int | None, ...]
    blocks: Mapping[str, str]
    reason: str = ""
    ids: int | None = None
    inputs: int = 1
    training: bool | None = None
    newer: str | None = None

    def __repr__(self):
        return self.name
