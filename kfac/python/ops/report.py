"""How every registered parameter is covered: rows, a text table, and a strict check.

The commonest failure of a curvature approximation is a layer that fell back on the
generic diagonal without anybody noticing.  `explain` shows it, `check_strict` refuses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kfac.python.ops import fisher_blocks, state, utils

_BY_HAND = "registered as generic by the caller"


class GenericParametersError(ValueError):
    """Parameters without a layer-specific approximation were refused.

    Attributes:
      rows: their rows of the report.
    """

    def __init__(self, message: str, rows: Sequence[Row]):
        super().__init__(message)
        self.rows = tuple(rows)


@dataclasses.dataclass(frozen=True)
class Row:
    """One registered parameter group.

    Attributes:
      variables: names of the parameters.
      shapes: their static shapes, None for an unknown size.
      block: class name of the Fisher block.
      approximation: its name, as in registrations.
      factor_sides: shape of every factor's second moment, the input's first; empty
        before the factors exist (they are made when an optimizer finalises).
      uses: how often a case uses the weights (locations, time steps), None if unknown.
      towers: number of registered towers.
      reason: why the group has no layer-specific approximation; None if it has.
      factor_bytes: memory of the second moments. A factor that several groups share
        counts in each of them.
      inverse_bytes: memory of the inverses made so far; likewise.
    """

    variables: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    block: str
    approximation: str
    factor_sides: tuple[tuple[int, ...], ...]
    uses: int | None
    towers: int
    reason: str | None
    factor_bytes: int
    inverse_bytes: int


def explain(collection: Any) -> list[Row]:
    """One row per registered parameter group, in registration order."""
    return [
        _row(utils.ensure_sequence(params), block, collection.generic_reasons)
        for params, block in collection.fisher_blocks.items()
    ]


def _row(params: Sequence[Any], block: Any, reasons: dict[Any, str]) -> Row:
    description = block.description()
    reason = None
    if isinstance(block, (fisher_blocks.NaiveDiagonalFB, fisher_blocks.NaiveFullFB)):
        given = dict.fromkeys(reasons.get(v.ref(), _BY_HAND) for v in params)
        reason = "; ".join(given)
    return Row(
        variables=tuple(state.parameter_path(v) for v in params),
        shapes=tuple(tuple(v.shape.as_list()) for v in params),
        block=description.block,
        approximation=description.approximation,
        factor_sides=description.factor_sides,
        uses=description.uses,
        towers=description.towers,
        reason=reason,
        factor_bytes=description.factor_bytes,
        inverse_bytes=description.inverse_bytes,
    )


def check_strict(collection: Any) -> None:
    """Refuses a collection with generic parameters.

    Raises:
      GenericParametersError: lists every one of them with its reason.
    """
    generic = [row for row in explain(collection) if row.reason is not None]
    if not generic:
        return
    lines = [f"  {names_of(row)} ({row.block}): {row.reason}" for row in generic]
    raise GenericParametersError(
        f"{len(generic)} parameter group(s) have no layer-specific approximation, only "
        "a generic one:\n" + "\n".join(lines) + "\nRegister their layers by hand, or "
        "do without strict.",
        generic,
    )


_HEADINGS = (
    "Parameters",
    "Shape",
    "Block",
    "Approximation",
    "Factors",
    "Uses",
    "Towers",
    "Factors' memory",
    "Inverses' memory",
)


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a table of text, reasons of generic parameters below it."""
    cells = [_cells(row) for row in rows]
    total = (
        ("Total",)
        + ("",) * 6
        + (
            format_bytes(sum(row.factor_bytes for row in rows)),
            format_bytes(sum(row.inverse_bytes for row in rows)),
        )
    )
    parts = aligned(_HEADINGS, cells, total)
    generic = [row for row in rows if row.reason is not None]
    if generic:
        parts += ["", "Generic approximation:"]
        parts += [f"  {names_of(row)}: {row.reason}" for row in generic]
    return "\n".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        names_of(row),
        ", ".join(_size(shape) for shape in row.shapes),
        row.block,
        row.approximation,
        format_sides(row),
        "-" if row.uses is None else str(row.uses),
        str(row.towers),
        format_bytes(row.factor_bytes) if row.factor_sides else "-",
        format_bytes(row.inverse_bytes) if row.factor_sides else "-",
    )


def aligned(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    total: Sequence[str] | None = None,
) -> list[str]:
    """Lines of a table of text; the total, if any, below a rule of its own."""
    cells = [headings, *rows] + ([] if total is None else [total])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    lines = [_line(row, widths) for row in cells]
    lines.insert(1, rule)
    if total is not None:
        lines.insert(len(lines) - 1, rule)
    return lines


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]
    return "  ".join(padded).rstrip()


def names_of(row: Row) -> str:
    """`dense/kernel`, or `dense/(kernel, bias)` for a group of one layer."""
    if len(row.variables) == 1:
        return row.variables[0]
    layers = {name.rpartition("/")[0] for name in row.variables}
    if len(layers) > 1 or layers == {""}:
        return "(" + ", ".join(row.variables) + ")"
    last = ", ".join(name.rpartition("/")[2] for name in row.variables)
    return f"{layers.pop()}/({last})"


def format_sides(row: Row) -> str:
    """The shapes of a row's factors, or `-` if there are none yet."""
    return ", ".join(_size(sides) for sides in row.factor_sides) or "-"


def _size(shape: Sequence[int | None]) -> str:
    """`3x5`; `?` for an unknown size, `1` for a scalar."""
    return "x".join("?" if size is None else str(size) for size in shape) or "1"


def format_bytes(count: int) -> str:
    """A number of bytes with a unit, for example `1.5 KiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
