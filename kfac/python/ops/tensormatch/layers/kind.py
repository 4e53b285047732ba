"""What a family of layers tells the scanner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from kfac.python.ops.tensormatch.records import MatchRecord

RecordFunction = Callable[
    [Mapping[str, Any], Any, Mapping[Any, Any]], MatchRecord | list[MatchRecord] | None
]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerKind:
    """A pattern and what a match of it means.

    Attributes:
      pattern: of the layer's output tensor.
      root_types: types of the operations that the output can come from.
      record: called with bindings, consumed set and tensors_to_variables; returns a
        record (or several), or None if no variable of interest is concerned; raises
        `UnsupportedLayerError` for layers that no block can represent.
    """

    pattern: Any
    root_types: frozenset[str]
    record: RecordFunction
