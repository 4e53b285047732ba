"""What a step costs each of N replicas: operations and bytes, before anything runs.

Pure functions of layer shapes.  `docs/distributed.md` uses them for its tables, and a
test compares them with what is executed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kfac.python.ops import placement_decision

# Factorisation n^3 / 3, solve with the identity n^3, product 2 n^3.
_CUBES_PER_INVERSE = 10 / 3


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight matrix with Kronecker factors of its rows and its columns.

    Attributes:
      rows: input features, plus one for a bias; patch size times channels for a
        convolution.
      columns: output features.
      uses: how often a case uses it: 1 for dense layers, the number of locations or
        positions otherwise.
    """

    rows: int
    columns: int
    uses: int = 1


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
    parameters = sum(layer.rows * layer.columns for layer in layers)
    sides = [side for layer in layers for side in (layer.rows, layer.columns)]
    triangles = sum(side * (side + 1) // 2 for side in sides)
    weight = int(uneven)
    counts = [
        ("gradients", parameters + weight, 1),
        ("statistics", triangles + weight, cov_update_every),
    ]
    if share_inversions:  # And a count of fallbacks a factor.
        counts.append(("inverses", triangles + len(sides), invert_every))
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
    sides = [side for layer in layers for side in (layer.rows, layer.columns)]
    costs = {i: _CUBES_PER_INVERSE * side**3 for i, side in enumerate(sides)}
    owner_of = placement_decision.largest_first(costs, range(replicas))
    shares = [0.0] * replicas
    for i, owner in owner_of.items():
        shares[owner] += costs[i]
    return shares


def product_flops(layers: Sequence[Layer], replicas: int) -> list[float]:
    """Operations of preconditioning on each replica, dealt out by cost."""
    costs = {
        i: 2.0 * layer.rows * layer.columns * (layer.rows + layer.columns)
        for i, layer in enumerate(layers)
    }
    owner_of = placement_decision.largest_first(costs, range(replicas))
    shares = [0.0] * replicas
    for i, owner in owner_of.items():
        shares[owner] += costs[i]
    return shares


def gradient_flops(layers: Sequence[Layer], cases: int) -> float:
    """Operations of the forward and the backward pass over a replica's cases."""
    return sum(6.0 * cases * la.uses * la.rows * la.columns for la in layers)


def statistics_flops(layers: Sequence[Layer], cases: int) -> float:
    """Operations of statistics on a replica's cases.

    A further forward and backward pass to the pre-activations, and the two second
    moments `[rows, rows]` and `[columns, columns]` of every layer.
    """
    passes = sum(4.0 * cases * la.uses * la.rows * la.columns for la in layers)
    moments = sum(2.0 * cases * la.uses * (la.rows**2 + la.columns**2) for la in layers)
    return passes + moments


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
    statistics = statistics_flops(layers, round(cases * cov_batch_fraction))
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
