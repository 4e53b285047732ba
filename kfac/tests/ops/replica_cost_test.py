"""Predicted costs of replicas; `distributed_mirrored_test` counts executed ones."""

import dataclasses

import numpy as np
import pytest

from kfac.python.ops import replica_cost
from kfac.python.ops.replica_cost import Layer

MACHINE = replica_cost.Machine(
    matmul=1e12, factorisation=1e11, bandwidth=1e9, latency=1e-5
)


def purposes(layers, **options):
    return {e.purpose: e.num_bytes for e in replica_cost.exchanges(layers, **options)}


@pytest.mark.parametrize("replicas", (2, 4, 8, 16))
def test_a_deep_net_is_shared_out_to_one_part_in_the_number_of_replicas(replicas):
    layers = [Layer(1000 + 10 * i, 1000) for i in range(24)]
    for shares in (
        replica_cost.inversion_flops(layers, replicas),
        replica_cost.product_flops(layers, replicas),
    ):
        # 24 layers on 16 replicas cannot do better than two layers on some.
        whole = sum(shares)
        assert max(shares) <= max(1.1 / replicas, 2.2 / 24) * whole


def test_the_time_of_a_step_is_the_sum_of_what_its_counts_take():
    layer = Layer(100, 50)
    one = replica_cost.step_seconds([layer], MACHINE, 1, cases=32)
    assert one["gradient"] == pytest.approx(6 * 32 * 5000 / 1e12)
    assert one["inversions"] == pytest.approx((1e6 + 125e3) * 10 / 3 / 1e11 / 10)
    assert sum(time for name, time in one.items() if "send" in name) == 0
    two = replica_cost.step_seconds([layer], MACHINE, 2, cases=32)
    assert two["inversions"] == pytest.approx(1e6 * 10 / 3 / 1e11 / 10)
    assert two["send gradients"] == pytest.approx(1e-5 + 20000 / 1e9)
    triangles = (5050 + 1275) * 4
    assert two["send statistics"] == pytest.approx(1e-5 + triangles / 1e9)


def test_periods_and_parts_of_the_batch_divide_their_phases():
    layers = [Layer(100, 50)] * 3
    often = replica_cost.step_seconds(layers, MACHINE, 4, 32)
    seldom = replica_cost.step_seconds(
        layers, MACHINE, 4, 32, 10, 100, cov_batch_fraction=0.25
    )
    ratios = {name: often[name] / seldom[name] for name in often}
    assert ratios == pytest.approx(
        {
            **dict.fromkeys(often, 1),
            "statistics": 40,
            "send statistics": 10,
            "inversions": 10,
            "send inverses": 10,
        }
    )


@pytest.mark.parametrize("count", (1, 5, 40))
def test_more_replicas_than_help_invert_no_faster(count):
    layers = [Layer(300, 100), *[Layer(200, 100)] * count]
    busiest = lambda n: max(replica_cost.inversion_flops(layers, n))
    enough = replica_cost.replicas_that_help(layers)
    assert busiest(enough) == busiest(10 * enough) == 10 / 3 * 300**3
    assert enough == 1 or busiest(enough - 1) > busiest(enough)


def test_a_shared_input_factor_travels_once_but_is_inverted_for_each_layer():
    alone, shared = Layer(10, 4), Layer(10, 4, row_factor="shared")
    apart, together = [alone] * 3, [alone, shared, shared]
    triangle = 4 * 55  # Bytes.
    assert (
        purposes(apart)["statistics"] - purposes(together)["statistics"] == 2 * triangle
    )
    # A count of fallbacks a factor, of which there are two less.
    assert purposes(apart)["inverses"] - purposes(together)["inverses"] == 2 * 4
    total = lambda layers: sum(replica_cost.inversion_flops(layers, 1))
    assert total(apart) == pytest.approx(total(together))
    # One factor's inverses are one piece of work.
    assert max(replica_cost.inversion_flops(together, 8)) == 3 * 10 / 3 * 10**3
    assert replica_cost.statistics_flops(apart, 7) - replica_cost.statistics_flops(
        together, 7
    ) == (2 * 7 * 2 * 10**2)
    memory = [replica_cost.memory_bytes(net) for net in (apart, together)]
    assert memory[0]["statistics"] - memory[1]["statistics"] == 4 * 2 * 10**2
    assert memory[0]["inverses"] == memory[1]["inverses"]


def test_a_diagonal_factor_costs_its_length():
    embedding = Layer(5000, 8, uses=20, row_factor="one_hot")
    softmax = Layer(9, 5000, uses=20, column_factor="diagonal")
    layers = [embedding, softmax]
    assert purposes(layers)["statistics"] == 4 * (5000 + 36 + 45 + 5000)
    assert purposes(layers)["inverses"] == 4 * (36 + 45 + 2)
    assert sum(replica_cost.inversion_flops(layers, 1)) == pytest.approx(
        10 / 3 * (8**3 + 9**3)
    )
    assert sum(replica_cost.product_flops(layers, 1)) == 2 * (
        5000 * 8 * 8 + 9 * 5000 * 9
    )
    # Look-ups multiply nothing.
    assert replica_cost.gradient_flops(layers, 3) == 6 * 3 * 20 * 9 * 5000
    assert replica_cost.statistics_flops(layers, 3) == 2 * 3 * 20 * (
        8**2 + 9**2 + 2 * 9 * 5000
    )


def test_one_factor_alone_may_cover_a_group():
    full, diagonal = (Layer(12, 1, 1, kind, "none") for kind in ("full", "diagonal"))
    assert purposes([full, diagonal])["statistics"] == 4 * (78 + 12)
    assert purposes([full, diagonal])["inverses"] == 4 * (78 + 1)
    assert replica_cost.memory_bytes([full, diagonal])["statistics"] == 4 * (144 + 12)


def test_memory_is_every_replicas_own_and_packs_the_largest_exchange():
    layers = [Layer(100, 50), Layer(51, 10)]
    sides = [100, 50, 51, 10]
    memory = replica_cost.memory_bytes(layers, number_bytes=8)
    assert memory["parameters"] == memory["momentum"] == 8 * (5000 + 510)
    assert memory["statistics"] == memory["inverses"] == 8 * sum(n**2 for n in sides)
    triangles = sum(n * (n + 1) // 2 for n in sides)
    assert memory["exchange"] == 2 * 8 * (triangles + len(sides))
    apart = replica_cost.memory_bytes(layers, share_inversions=False, number_bytes=8)
    assert apart["exchange"] == 2 * 8 * triangles
    assert {**apart, "exchange": 0} == {**memory, "exchange": 0}


@pytest.mark.parametrize("what", ("share_inversions", "share_products"))
def test_sharing_pays_from_the_width_that_the_rates_give(what):
    machine = dataclasses.replace(MACHINE, latency=0.0)
    threshold = getattr(machine, f"width_to_{what}")

    def saved(width):
        seconds = []
        for share in (True, False):
            options = {"share_products": False, what: share}
            seconds.append(
                replica_cost.step_seconds(
                    [Layer(width, width)] * 1000, machine, 1000, cases=1, **options
                )
            )
        return sum(seconds[1].values()) - sum(seconds[0].values())

    assert saved(int(0.9 * threshold)) < 0 < saved(int(1.1 * threshold))


def test_a_collective_of_a_thousand_replicas_takes_ten_latencies():
    seconds = MACHINE.all_reduce_seconds(10**6, 1000)
    assert seconds == pytest.approx(10 * 1e-5 + 2 * 0.999 * 1e-3)
    assert MACHINE.all_reduce_seconds(10**6, 1) == 0


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: Layer(3, 4, row_factor="fuul"), ["row_factor='fuul'", "one_hot"]),
        (lambda: Layer(3, 4, column_factor="shared"), ["column_factor", "diagonal"]),
        (
            lambda: replica_cost.exchanges([Layer(3, 4, row_factor="shared")]),
            ["Layer(rows=3", "before it"],
        ),
        (
            lambda: replica_cost.exchanges(
                [Layer(5, 4), Layer(3, 4, row_factor="shared")]
            ),
            ["Layer(rows=3", "before it"],
        ),
    ],
)
def test_layers_that_cannot_be_are_refused(build, words):
    with pytest.raises(ValueError) as caught:
        build()
    assert all(word in str(caught.value) for word in words)


def test_shares_add_up_to_the_whole():
    layers = [Layer(20 + i, 30 - i, uses=i + 1) for i in range(7)]
    for count in (replica_cost.inversion_flops, replica_cost.product_flops):
        np.testing.assert_allclose(sum(count(layers, 5)), sum(count(layers, 1)))
