"""What replicas execute and send, predicted and counted; all tables of the docs.

    python -m benchmarks.replica_costs            # counts on logical CPUs, minutes
    python -m benchmarks.replica_costs --stored   # tables from the stored counts

A test looks for the tables in `docs/distributed.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from benchmarks import measuring
from kfac.python.ops import replica_cost
from kfac.python.ops.replica_cost import Layer

STORED = measuring.RESULTS / "replica_costs.json"

# Assumed, not measured.  Published peaks of an NVIDIA A100: 156e12 operations a second
# in TF32 and 19.5e12 in float32; a network port of 200 Gbit/s.  A quarter of the peak
# for products, a tenth for factorisations, the whole port, 20 microseconds for each
# doubling of replicas.
MACHINE = replica_cost.Machine(
    matmul=4e13, factorisation=2e12, bandwidth=2.5e10, latency=2e-5
)
REPLICAS = (1, 8, 64, 256, 1000)

# What is counted: float64, periods that divide 50 steps, everything adaptive.
STEPS, WIDTH, DEPTH = 50, 32, 4
PERIODS = {"cov_update_every": 5, "invert_every": 10}
ADAPTIVE = {
    "adapt_damping": True,
    "damping_adaptation_interval": 5,
    "momentum_type": "qmodel",
    "learning_rate": None,
    "momentum": None,
    "damping": 1.0,
}
SHARED = {"placement_strategy": "replica_round_robin"}
GROWTH = ((16, 4), (32, 4), (16, 8))
ROUNDS = 2  # Of inversions, in the runs that show growth.


def perceptron(width: int, depth: int) -> list[Layer]:
    return [Layer(width + 1, width)] * depth


def resnet50() -> list[Layer]:
    """Convolutions without biases on images of 224 by 224; 25.5 million weights."""
    layers = [Layer(7 * 7 * 3, 64, 112**2)]
    channels = 64
    for blocks, width, side in (
        *((3, 64, 56), (4, 128, 28)),
        *((6, 256, 14), (3, 512, 7)),
    ):
        for block in range(blocks):
            layers += [
                Layer(channels, width, side**2),
                Layer(9 * width, width, side**2),
                Layer(width, 4 * width, side**2),
            ]
            if block == 0:
                layers.append(Layer(channels, 4 * width, side**2))
            channels = 4 * width
    return [*layers, Layer(channels + 1, 1000)]


def transformer(
    width: int = 1024, depth: int = 24, positions: int = 512, words: int = 32_000
) -> list[Layer]:
    """Embedding, blocks of attention and two dense layers, logits of all words."""
    layers = [Layer(words, width, positions, "one_hot")]
    for _ in range(depth):
        layers += [
            Layer(width + 1, width, positions),
            *[Layer(width + 1, width, positions, "shared")] * 2,
            Layer(width + 1, width, positions),
            Layer(width + 1, 4 * width, positions),
            Layer(4 * width + 1, width, positions),
        ]
    return [*layers, Layer(width + 1, words, positions, "full", "diagonal")]


# Name, layers, cases of a replica.
JOBS = (
    ("ResNet-50, 64 images", resnet50(), 64),
    ("transformer, 8 texts of 512 words", transformer(), 8),
)


# ---------------------------------------------------------------- counting


def count() -> dict[str, dict]:
    """Runs small networks on 1, 2 and 4 logical CPUs; job -> what was executed."""
    jobs = {
        f"adaptive, {replicas}": {
            "widths": [WIDTH] * (DEPTH + 1),
            "steps": STEPS,
            **_replicas(replicas),
            **PERIODS,
            **ADAPTIVE,
        }
        for replicas in (2, 4)
    }
    for width, depth in GROWTH:
        for replicas in (1, 2, 4):
            jobs[f"{width}, {depth}, {replicas}"] = {
                "widths": [width] * (depth + 1),
                "steps": ROUNDS,
                "cov_update_every": 1,
                "invert_every": 1,
                **_replicas(replicas),
            }
    finished = subprocess.run(
        [
            *[sys.executable, "-m", "kfac.tests.ops.distributed_program"],
            *["4", json.dumps(jobs)],
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parents[1],
    )
    found = json.loads(finished.stdout.split("FOUND")[1])
    kept = ("collectives", "cubes")
    return {name: {key: of[key] for key in kept} for name, of in found.items()}


def _replicas(number: int) -> dict:
    if number == 1:
        return {"replicas": 0}
    return {"replicas": number, "collective": number == 4, **SHARED}


# ---------------------------------------------------------------- tables


def table(headings: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Markdown; numbers with separators of thousands."""
    cells = [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows]
    lines = [list(headings), ["---", *["---:"] * (len(headings) - 1)], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def collectives_table(counted: Mapping) -> str:
    """Number and bytes of every collective of 50 adaptive steps."""
    predicted: dict[str, list[int]] = {}
    for exchange in replica_cost.exchanges(
        perceptron(WIDTH, DEPTH),
        adaptation_every=ADAPTIVE["damping_adaptation_interval"],
        quadratic_model=True,
        number_bytes=8,
        **PERIODS,
    ):
        number, _ = predicted.get(exchange.purpose, (0, 0))
        number += STEPS // exchange.every
        predicted[exchange.purpose] = [number, exchange.num_bytes]
    executed = [counted[f"adaptive, {n}"]["collectives"] for n in (2, 4)]
    times = lambda found: f"{found[0]} of {found[1]:,}"
    return table(
        ["collective", "predicted", "executed, 2 replicas", "4 replicas"],
        [
            [purpose, times(found), *(times(of[purpose]) for of in executed)]
            for purpose, found in predicted.items()
        ],
    )


def growth_table(counted: Mapping) -> str:
    """Cubes of factorised sides on the busiest replica, and bytes of statistics."""
    rows = []
    for width, depth in GROWTH:
        layers = perceptron(width, depth)
        sent = {
            e.purpose: e.num_bytes
            for e in replica_cost.exchanges(layers, number_bytes=8)
        }
        for replicas in (1, 2, 4):
            found = counted[f"{width}, {depth}, {replicas}"]
            flops = max(replica_cost.inversion_flops(layers, replicas))
            executed = max(found["cubes"]) // ROUNDS
            _, received = found["collectives"].get("statistics", (0, 0))
            rows.append(
                [
                    f"{width} wide, {depth} layers",
                    replicas,
                    round(flops * 3 / 10),  # An inverse takes 10/3 n³.
                    executed,
                    f"1/{sum(found['cubes']) / max(found['cubes']):.3g}",
                    sent["statistics"] if replicas > 1 else 0,
                    received,
                ]
            )
    return table(
        [
            *["network", "replicas", "n³, predicted", "executed", "of all"],
            *["bytes of statistics, predicted", "executed"],
        ],
        rows,
    )


def models_table() -> str:
    rows = []
    for name, layers, _ in JOBS:
        memory = replica_cost.memory_bytes(layers)
        curvature = memory["statistics"] + memory["inverses"]
        costs = replica_cost.inversion_flops(layers, 10**4)
        rows.append(
            [
                name.partition(",")[0],
                f"{memory['parameters'] / 4e6:,.1f} million",
                sum(cost > 0 for cost in costs),
                max(side for layer in layers for side in layer.matrix_sides),
                replica_cost.replicas_that_help(layers),
                f"{curvature / 1e9:.1f} GB",
                f"{curvature / memory['parameters']:.1f}",
            ]
        )
    return table(
        [
            *["model", "parameters", "factors inverted", "largest side"],
            *["replicas that help", "curvature kept"],
            "in parameters",
        ],
        rows,
    )


def traffic_table() -> str:
    """Bytes of an average step by settings, in units of the gradients'."""
    settings = (
        ("`cov_update_every=1, invert_every=10`", (1, 10, True)),
        ("`cov_update_every=10, invert_every=100`", (10, 100, True)),
        ("the same, `distribute_transformations=False`", (10, 100, False)),
    )
    rows = []
    for name, (cov_update_every, invert_every, share_products) in settings:
        for model, layers, _ in JOBS:
            sent = {
                e.purpose: e.num_bytes / e.every
                for e in replica_cost.exchanges(
                    layers, cov_update_every, invert_every, True, share_products
                )
            }
            units = {k: v / sent["gradients"] for k, v in sent.items()}
            rows.append(
                [
                    f"{name}, {model.partition(',')[0]}",
                    *(
                        f"{units.get(purpose, 0):.2f}"
                        for purpose in ("statistics", "inverses", "preconditioned")
                    ),
                    f"{sum(units.values()):.2f}",
                ]
            )
    return table(
        ["settings", "statistics", "inverses", "preconditioned", "all, with gradients"],
        rows,
    )


def replicas_table(layers: Sequence[Layer], cases: int) -> str:
    """Milliseconds of a step by phase, for growing numbers of replicas."""
    rows = []
    for replicas in REPLICAS:
        ms = _milliseconds(layers, cases, replicas, **SELDOM)
        rows.append(
            [
                f"{replicas:,}",
                *(
                    f"{ms.get(phase, 0):.1f}"
                    for phase in ("gradient", "statistics", "inversions", "products")
                ),
                f"{sum(v for k, v in ms.items() if k.startswith('send')):.1f}",
                f"{sum(ms.values()):.0f}",
                f"{sum(ms.values()) / _first_order(ms):.2f}",
            ]
        )
    return table(
        [
            *["replicas", "gradient", "statistics", "inversions", "products"],
            *["sending", "all", "in first-order steps"],
        ],
        rows,
    )


SELDOM = {"cov_update_every": 10, "invert_every": 100, "share_products": False}
CHOICES: tuple[tuple[str, dict, int], ...] = (
    ("defaults, `placement_strategy=None`", {"share_inversions": False}, 1),
    ('defaults, `"replica_round_robin"`', {}, 1),
    ("and `cov_update_every=10`", {"cov_update_every": 10}, 1),
    (
        "and `invert_every=100`",
        {"cov_update_every": 10, "invert_every": 100},
        1,
    ),
    ("and `distribute_transformations=False`", SELDOM, 1),
    (
        "the same, every replica inverting all",
        {**SELDOM, "share_inversions": False},
        1,
    ),
    (
        "the line before it, and `cov_batch_fraction=0.25`",
        {**SELDOM, "cov_batch_fraction": 0.25},
        1,
    ),
    (
        "and four times the cases on a replica",
        {**SELDOM, "cov_batch_fraction": 0.25},
        4,
    ),
)


def choices_table(replicas: int = 1000) -> str:
    """First-order steps that one step takes, by settings."""
    rows = []
    for name, options, factor in CHOICES:
        row = [name]
        for _, layers, cases in JOBS:
            ms = _milliseconds(layers, factor * cases, replicas, **options)
            row.append(f"{sum(ms.values()) / _first_order(ms):.2f}")
        rows.append(row)
    return table(["settings", *(name for name, _, _ in JOBS)], rows)


def widths_table() -> str:
    """From which width on sharing work out saves more time than sending costs."""
    networks = {
        "300 GB/s, within a machine (NVLink)": 3e11,
        "25 GB/s, a port of 200 Gbit/s each": MACHINE.bandwidth,
        "1.25 GB/s, Ethernet of 10 Gbit/s": 1.25e9,
    }
    machines = {
        name: dataclasses.replace(MACHINE, bandwidth=bandwidth)
        for name, bandwidth in networks.items()
    }
    return table(
        ["network of a replica", "inversions", "products"],
        [
            [
                name,
                round(machine.width_to_share_inversions),
                round(machine.width_to_share_products),
            ]
            for name, machine in machines.items()
        ],
    )


def _milliseconds(
    layers: Sequence[Layer], cases: int, replicas: int, **options
) -> dict[str, float]:
    seconds = replica_cost.step_seconds(layers, MACHINE, replicas, cases, **options)
    return {name: 1e3 * value for name, value in seconds.items()}


def _first_order(milliseconds: Mapping[str, float]) -> float:
    """What every data-parallel optimizer takes."""
    return milliseconds["gradient"] + milliseconds["send gradients"]


def tables(counted: Mapping) -> dict[str, str]:
    """Title -> Markdown."""
    makers: dict[str, Callable[[], str]] = {
        f"Collectives of {STEPS} steps, number and bytes": lambda: collectives_table(
            counted
        ),
        "Factorisations of one update, and statistics": lambda: growth_table(counted),
        "Models": models_table,
        "Bytes of a step, in units of the gradients'": traffic_table,
        **{
            f"Milliseconds of a step: {name} a replica": lambda j=(layers, cases): (
                replicas_table(*j)
            )
            for name, layers, cases in JOBS
        },
        "1,000 replicas: a step in units of a first-order step": choices_table,
        "Widths from which sharing work out pays": widths_table,
    }
    return {title: make() for title, make in makers.items()}


def stored() -> dict[str, dict]:
    """The counts of the last run."""
    return json.loads(STORED.read_text())["counted"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stored", action="store_true", help="Do not count anew.")
    if parser.parse_args().stored:
        counted = stored()
    else:
        counted = count()
        measuring.write_result("replica_costs", {"counted": counted})
    for title, text in tables(counted).items():
        print(f"\n{title}\n\n{text}")


if __name__ == "__main__":
    main()
