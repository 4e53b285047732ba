"""Families of layers beyond the basic patterns of `graph_patterns`, one per module."""

from kfac.python.ops.tensormatch.layers.convolution import (
    CONVOLUTION,
    DEPTHWISE,
    TRANSPOSED,
)
from kfac.python.ops.tensormatch.layers.dense import DENSE
from kfac.python.ops.tensormatch.layers.einsum import EINSUM
from kfac.python.ops.tensormatch.layers.embedding import EMBEDDING
from kfac.python.ops.tensormatch.layers.kind import LayerKind
from kfac.python.ops.tensormatch.layers.lora import LORA
from kfac.python.ops.tensormatch.layers.normalization import (
    ELEMENTWISE,
    FORMULA,
    FUSED,
)

# In the order in which they are tried; an output has the first that makes a record.
KINDS: tuple[LayerKind, ...] = (
    LORA,
    DENSE,
    EINSUM,
    CONVOLUTION,
    DEPTHWISE,
    TRANSPOSED,
    EMBEDDING,
    FORMULA,
    FUSED,
    ELEMENTWISE,
)

__all__ = ["KINDS", "LayerKind"]
