"""Operations and memory that the curvature of one layer takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from kfac.python.ops import replica_cost, report


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Cost of one parameter group's Fisher block.

    Operations are those of one update or one product; memory is in bytes.

    Attributes:
      row: what covers the group, see `kfac.python.ops.report.Row`.
      statistics_flops: second moments of one batch, without the backward pass.
      inverse_flops: all inverses.
      preconditioning_flops: the product of the inverse block with a gradient.
      factor_bytes: moving averages of the second moments.
      inverse_bytes: inverses.
      statistics_bytes: the patches that a convolution's second moment is taken of;
        needed only meanwhile.
      on_replicas: the layer as `replica_cost` knows it.
      first_user: position of the first layer that uses this layer's input factor.
    """

    row: report.Row
    statistics_flops: float
    inverse_flops: float
    preconditioning_flops: float
    factor_bytes: int
    inverse_bytes: int
    statistics_bytes: int
    on_replicas: replica_cost.Layer
    first_user: int

    @property
    def name(self) -> str:
        """The group's parameters."""
        return report.names_of(self.row)

    @property
    def matrix_sides(self) -> dict[str, int]:
        """Sides of the factors that are full matrices: "in", "out" or "both"."""
        return _matrix_sides(self.row)


def layer_costs(
    rows: Sequence[report.Row],
    factors: Sequence[Sequence[Any]],
    cases: int,
    element_bytes: int,
) -> tuple[LayerCost, ...]:
    """The cost of every row of the report.

    Args:
      rows: of blocks whose factors exist.
      factors: each block's factors. What layers share, such as the input of attention's
        projections, is counted in the first of them, but each has its inverse (of its
        own damping).
      cases: number of cases that statistics are taken from.
      element_bytes: size of one number.
    """
    first_users: dict[int, int] = {}
    found = []
    for i, (row, of_row) in enumerate(zip(rows, factors, strict=True)):
        is_new = [first_users.setdefault(id(factor), i) == i for factor in of_row]
        found.append(
            _layer_cost(
                row,
                is_new,
                cases,
                element_bytes,
                on_replicas=_on_replicas(row, of_row[0], is_new[0]),
                first_user=first_users[id(of_row[0])],
            )
        )
    return tuple(found)


def _on_replicas(
    row: report.Row, input_factor: Any, is_new: bool
) -> replica_cost.Layer:
    sides, uses = _matrix_sides(row), row.uses or 1
    if not _is_kronecker(row):
        count = sum(math.prod(shape) for shape in row.shapes)
        factor = "full" if sides else "diagonal"
        return replica_cost.Layer(count, 1, uses, factor, "none")
    if "in" in sides:
        row_factor = "full" if is_new else "shared"
    else:
        looks_up = getattr(input_factor, "is_sparse", False)
        row_factor = "one_hot" if looks_up else "diagonal"
    return replica_cost.Layer(
        row.factor_sides[0][0],
        row.factor_sides[1][0],
        uses,
        row_factor,
        "full" if "out" in sides else "diagonal",
    )


def _layer_cost(
    row: report.Row,
    is_new: Sequence[bool],
    cases: int,
    element_bytes: int,
    **others: Any,
) -> LayerCost:
    parameters = sum(math.prod(shape) for shape in row.shapes)
    averaged = row.approximation == "kron_reduce"
    rows = cases * (1 if averaged or row.uses is None else row.uses)
    sides = _matrix_sides(row)
    new_roles = dict(zip(_roles(row), is_new, strict=False))
    new_sides = [side for role, side in sides.items() if new_roles[role]]
    patches = 0
    if _is_kronecker(row):
        statistics = sum(2 * rows * side**2 for side in new_sides)
        applied = sum(2 * parameters * side for side in sides.values())
        if len(row.shapes[0]) > 2 and new_roles["in"]:
            patches = rows * row.factor_sides[0][0]
    elif sides:
        statistics = 2 * cases * parameters**2
        applied = 2 * parameters**2
    else:
        statistics = 2 * rows * parameters  # Gradients of single cases, squared.
        applied = parameters
    in_eigenbasis = len(row.factor_sides) > 2  # The third factor holds its moments.
    if in_eigenbasis:
        # Cases are rotated into the basis; gradients into it and back.
        rotations = sum(2 * rows * side**2 for side in sides.values())
        statistics += rotations + 2 * rows * parameters
        applied *= 2
    # As `DenseSquareMatrixFactor.inverse_flops`, which needs variables: factorisation,
    # solve and product, or an eigendecomposition.
    cubes = 9 if in_eigenbasis else 10 / 3
    return LayerCost(
        row=row,
        statistics_flops=statistics,
        inverse_flops=sum(cubes * side**3 for side in sides.values()),
        preconditioning_flops=applied,
        factor_bytes=element_bytes
        * sum(
            math.prod(shape)
            for shape, new in zip(row.factor_sides, is_new, strict=True)
            if new
        ),
        inverse_bytes=element_bytes * sum(side**2 for side in sides.values()),
        statistics_bytes=element_bytes * patches,
        **others,
    )


def _matrix_sides(row: report.Row) -> dict[str, int]:
    if not _is_kronecker(row):
        (side,) = row.factor_sides
        return {"both": side[0]} if row.approximation == "full" else {}
    sides = zip(_roles(row), row.factor_sides[:2], strict=True)
    return {role: side[0] for role, side in sides if len(side) == 2}


def _is_kronecker(row: report.Row) -> bool:
    return len(row.factor_sides) > 1


def _roles(row: report.Row) -> tuple[str, ...]:
    return ("in", "out") if _is_kronecker(row) else ("both",)
