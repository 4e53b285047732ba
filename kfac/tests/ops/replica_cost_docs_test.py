"""The tables of `docs/distributed.md` are what is predicted now and was counted."""

import pathlib

import pytest

from benchmarks import replica_costs
from kfac.python.ops import replica_cost

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "distributed.md"
TABLES = replica_costs.tables(replica_costs.stored())


@pytest.mark.parametrize("title", TABLES)
def test_the_page_has_the_table(title):
    text = PAGE.read_text(encoding="utf-8")
    assert TABLES[title] in text, (
        "Paste the output of `python -m benchmarks.replica_costs --stored`."
    )


def cells(title):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TABLES[title].splitlines()[2:]
    ]


def test_executed_collectives_are_the_predicted_ones():
    (title,) = [title for title in TABLES if title.startswith("Collectives")]
    rows = cells(title)
    assert {row[0] for row in rows} >= {"gradients", "statistics", "inverses", "loss"}
    for _, predicted, *executed in rows:
        assert executed == [predicted] * 2


def test_executed_factorisations_and_statistics_are_the_predicted_ones():
    rows = cells("Factorisations of one update, and statistics")
    assert len(rows) == 9
    for _, replicas, cubes, executed, share, sent, received in rows:
        assert (cubes, sent) == (executed, received)
        assert share == f"1/{replicas}"  # Layers alike, as many as replicas or more.


def test_the_models_are_those_they_are_called_after():
    layers = replica_costs.resnet50()
    assert len(layers) == 54
    # 25,557,032 parameters without 53,120 of batch normalisation.
    assert sum(layer.parameters for layer in layers) == 25_503_912
    # The paper (He et al., arXiv 1512.03385, table 1) says 3.8 billion products.
    flops = replica_cost.gradient_flops(layers, cases=1)
    assert flops / 6 == pytest.approx(3.8e9, rel=0.02)
    blocks = sum(layer.parameters for layer in replica_costs.transformer()[1:-1])
    assert blocks == 24 * (4 * 1025 * 1024 + 1025 * 4096 + 4097 * 1024)
