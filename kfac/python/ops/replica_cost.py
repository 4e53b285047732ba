"""What a step costs each of N replicas: operations, bytes, memory, before it runs.

Pure functions of layer shapes.  `docs/distributed.md` uses them for its tables, and
tests compare them with what is executed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from kfac.python.ops import placement_decision

# Factorisation n^3 / 3, solve with the identity n^3, product 2 n^3.
_CUBES_PER_INVERSE = 10 / 3

_ROW_FACTORS = ("full", "diagonal", "one_hot", "shared")
_COLUMN_FACTORS = ("full", "diagonal", "none")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight matrix with Kronecker factors of its rows and its columns.

    Attributes:
      rows: input features, plus one for a bias; patch size times channels for a
        convolution; the vocabulary for an embedding.
      columns: output features.
      uses: how often a case uses it: 1 for dense layers, the number of locations or
        positions otherwise.
      row_factor: "full"; "diagonal"; "one_hot" for an embedding, whose factor is
        diagonal and whose products are look-ups; "shared" if the factor is that of the
        layer before, as those of attention's query, key and value are.
      column_factor: "full", "diagonal", or "none" for what has one factor only: all
        its parameters are rows, of one column.

    Raises:
      ValueError: unknown factors.
    """

    rows: int
    columns: int
    uses: int = 1
    row_factor: str = "full"
    column_factor: str = "full"

    def __post_init__(self):
        for name, known in (
            ("row_factor", _ROW_FACTORS),
            ("column_factor", _COLUMN_FACTORS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}; expected one of {known}."
                )

    @property
    def parameters(self) -> int:
        """Entries of the matrix."""
        return self.rows * self.columns

    @property
    def matrix_sides(self) -> list[int]:
        """Sides by which a gradient is multiplied with a full matrix."""
        sides = [self.rows] if self.row_factor in ("full", "shared") else []
        return sides + ([self.columns] if self.column_factor == "full" else [])


@dataclasses.dataclass
class _Factor:
    """A second moment.

    Attributes:
      side: number of features.
      inverses: how many are kept: one for each layer that uses it, of its own damping;
        none of a diagonal.
    """

    side: int
    inverses: int

    @property
    def is_matrix(self) -> bool:
        return self.inverses > 0

    @property
    def triangle(self) -> int:
        """Entries that travel."""
        return self.side * (self.side + 1) // 2 if self.is_matrix else self.side

    @property
    def kept(self) -> int:
        """Entries that are stored."""
        return self.side**2 if self.is_matrix else self.side

    @property
    def inversion_flops(self) -> float:
        return _CUBES_PER_INVERSE * self.inverses * self.side**3


def _factors(layers: Sequence[Layer]) -> list[_Factor]:
    """All factors, in the order of the layers."""
    found: list[_Factor] = []
    rows = None
    for layer in layers:
        if layer.row_factor != "shared":
            rows = _Factor(layer.rows, int(layer.row_factor == "full"))
            found.append(rows)
        elif rows is None or not rows.is_matrix or rows.side != layer.rows:
            raise ValueError(f"{layer} shares a factor, but no such one is before it.")
        else:
            rows.inverses += 1
        if layer.column_factor != "none":
            found.append(_Factor(layer.columns, int(layer.column_factor == "full")))
    return found


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One collective.

    Attributes:
      purpose: what travels.
      num_bytes: per replica, one way.
      every: steps from one to the next.
    """

    purpose: str
    num_bytes: int
    every: int


def exchanges(
    layers: Sequence[Layer],
    cov_update_every: int = 1,
    invert_every: int = 10,
    share_inversions: bool = True,
    share_products: bool = True,
    adaptation_every: int | None = None,
    quadratic_model: bool = False,
    uneven: bool = False,
    number_bytes: int = 4,
) -> list[Exchange]:
    """The collectives of training, in the order of a step.

    Args:
      layers: all layers.
      cov_update_every: steps between statistics.
      invert_every: steps between inversions.
      share_inversions: `placement_strategy="replica_round_robin"`.
      share_products: its `distribute_transformations`.
      adaptation_every: steps between damping adaptations; None for fixed damping.
      quadratic_model: whether the step size comes from the quadratic model.
      uneven: whether batch sizes may differ, so that each travels with its means.
      number_bytes: size of a number.
    """
    parameters = sum(layer.parameters for layer in layers)
    factors = _factors(layers)
    statistics = sum(factor.triangle for factor in factors)
    # And a count of fallbacks of each factor that is inverted.
    inverses = sum(f.inverses * f.triangle + 1 for f in factors if f.is_matrix)
    weight = int(uneven)
    counts = [
        ("gradients", parameters + weight, 1),
        ("statistics", statistics + weight, cov_update_every),
    ]
    if share_inversions:
        counts.append(("inverses", inverses, invert_every))
    if adaptation_every:
        counts += [("loss", 1 + weight, adaptation_every)] * 2
    if share_inversions and share_products:
        counts.append(("preconditioned", parameters, 1))
    if quadratic_model:
        counts.append(("quadratic model", 4 + weight, 1))
    return [
        Exchange(purpose, count * number_bytes, every)
        for purpose, count, every in counts
    ]


def inversion_flops(layers: Sequence[Layer], replicas: int) -> list[float]:
    """Operations of one round of inversions on each replica, dealt out by cost."""
    costs = [f.inversion_flops for f in _factors(layers) if f.is_matrix]
    return _dealt_out(costs, replicas)


def replicas_that_help(layers: Sequence[Layer]) -> int:
    """From how many replicas on sharing inversions becomes no faster.

    The replica with the costliest factor then does nothing else.
    """
    costs = [f.inversion_flops for f in _factors(layers) if f.is_matrix]
    replicas = math.ceil(sum(costs) / max(costs))
    while max(_dealt_out(costs, replicas)) > max(costs):
        replicas += 1
    return replicas


def product_flops(layers: Sequence[Layer], replicas: int) -> list[float]:
    """Operations of preconditioning on each replica, dealt out by cost."""
    costs = [2.0 * la.parameters * sum(la.matrix_sides) for la in layers]
    return _dealt_out(costs, replicas)


def _dealt_out(costs: Sequence[float], replicas: int) -> list[float]:
    """Each replica's part of the costs."""
    owner_of = placement_decision.largest_first(dict(enumerate(costs)), range(replicas))
    shares = [0.0] * replicas
    for i, owner in owner_of.items():
        shares[owner] += costs[i]
    return shares


def gradient_flops(layers: Sequence[Layer], cases: int) -> float:
    """Operations of the forward and the backward pass over a replica's cases.

    Those of the layers: attention's products of queries, keys and values are not
    counted, nor activations; but the first layer's input counts as if it had a
    gradient.
    """
    return 6.0 * cases * _products(layers)


def statistics_flops(layers: Sequence[Layer], cases: int) -> float:
    """Operations of statistics on a replica's cases.

    A further forward and backward pass to the pre-activations, and the two second
    moments `[rows, rows]` and `[columns, columns]` of every layer.
    """
    moments = 0.0
    for layer in layers:
        own = [layer.rows] if layer.row_factor == "full" else []
        own += [layer.columns] if layer.column_factor == "full" else []
        moments += layer.uses * sum(side**2 for side in own)
    return cases * (4.0 * _products(layers) + 2.0 * moments)


def _products(layers: Sequence[Layer]) -> int:
    """Multiplications of a forward pass of one case; look-ups multiply nothing."""
    return sum(la.uses * la.parameters for la in layers if la.row_factor != "one_hot")


def memory_bytes(
    layers: Sequence[Layer],
    share_inversions: bool = True,
    share_products: bool = True,
    number_bytes: int = 4,
) -> dict[str, int]:
    """Memory of each replica by what is in it, without activations.

    Sharing work out does not share memory: every replica keeps all factors and
    inverses.

    Args:
      layers: all layers.
      share_inversions: `placement_strategy="replica_round_robin"`.
      share_products: its `distribute_transformations`.
      number_bytes: size of a number.

    Returns:
      "parameters", "gradients", "momentum", "statistics", "inverses"; "exchange" is
      the largest vector that is packed for a collective and the sum that comes back.
    """
    parameters = sum(layer.parameters for layer in layers)
    factors = _factors(layers)
    packed = exchanges(
        layers,
        share_inversions=share_inversions,
        share_products=share_products,
        number_bytes=1,
    )
    counts = {
        "parameters": parameters,
        "gradients": parameters,
        "momentum": parameters,
        "statistics": sum(factor.kept for factor in factors),
        "inverses": sum(factor.inverses * factor.kept for factor in factors),
        "exchange": 2 * max(exchange.num_bytes for exchange in packed),
    }
    return {name: count * number_bytes for name, count in counts.items()}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of one replica and its network.

    Attributes:
      matmul: operations a second of matrix products.
      factorisation: operations a second of Cholesky factorisations and solves.
      bandwidth: bytes a second into and out of a replica.
      latency: seconds of one collective besides the bytes, per doubling of replicas.
    """

    matmul: float
    factorisation: float
    bandwidth: float
    latency: float

    def all_reduce_seconds(self, num_bytes: int, replicas: int) -> float:
        """A ring moves 2 (N - 1) / N of the bytes through every replica."""
        if replicas == 1:
            return 0.0
        doublings = (replicas - 1).bit_length()
        share = 2 * (replicas - 1) / replicas
        return self.latency * doublings + share * num_bytes / self.bandwidth

    @property
    def width_to_share_inversions(self) -> float:
        """Width of square layers from which sharing inversions saves time.

        Inverting two factors takes `20/3 n^3` operations, sending their triangles of
        four-byte numbers and their sums `8 n^2` bytes.
        """
        return 1.2 * self.factorisation / self.bandwidth

    @property
    def width_to_share_products(self) -> float:
        """Likewise for preconditioning, of `4 n^3` operations."""
        return 2.0 * self.matmul / self.bandwidth


def step_seconds(
    layers: Sequence[Layer],
    machine: Machine,
    replicas: int,
    cases: int,
    cov_update_every: int = 1,
    invert_every: int = 10,
    cov_batch_fraction: float = 1.0,
    share_inversions: bool = True,
    share_products: bool = True,
) -> dict[str, float]:
    """Seconds per step by phase, averaged over a period, on the busiest replica."""
    shared = share_inversions and replicas > 1
    products_shared = shared and share_products
    inversions = inversion_flops(layers, replicas if shared else 1)
    products = product_flops(layers, replicas if products_shared else 1)
    statistics = statistics_flops(layers, math.ceil(cases * cov_batch_fraction))
    seconds = {
        "gradient": gradient_flops(layers, cases) / machine.matmul,
        "statistics": statistics / machine.matmul / cov_update_every,
        "inversions": max(inversions) / machine.factorisation / invert_every,
        "products": max(products) / machine.matmul,
    }
    for exchange in exchanges(
        layers, cov_update_every, invert_every, shared, products_shared
    ):
        took = machine.all_reduce_seconds(exchange.num_bytes, replicas)
        seconds[f"send {exchange.purpose}"] = took / exchange.every
    return seconds
