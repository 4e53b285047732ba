"""The report of what covers every parameter, and the strict check."""

import re

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import layer_collection as lc_lib
from kfac.python.ops import report
from kfac.tests import graph_kinds
from kfac.tests.ops.layer_collection_cases import (
    BATCH,
    CASES,
    data,
    register,
    unchanged,
)


def _collection():
    """A dense layer, a diagonal one, and two generic parameters."""
    x, hidden, out = data(3), data(4), data(2)
    lc = lc_lib.LayerCollection()
    variables = {
        name: graph_kinds.variable(np.zeros(shape), f"model/{name}", np.float32)
        for name, shape in (
            ("dense/kernel", [3, 4]),
            ("dense/bias", [4]),
            ("out/kernel", [4, 2]),
            ("temperature", []),
            ("offset", [5]),
        )
    }
    kernel, bias, out_kernel, temperature, offset = variables.values()
    lc.register_fully_connected((kernel, bias), x, hidden)
    lc.register_fully_connected(out_kernel, hidden, out, approx="diagonal")
    lc.register_generic(temperature, BATCH)
    lc.register_generic((offset,), BATCH, approx="full")
    lc.generic_reasons[temperature.ref()] = "used by an op that is no layer"
    lc.register_squared_error_loss(out)
    return lc


def _instantiate(lc):
    for block in lc.get_blocks():
        tensors = block.tensors_to_compute_grads()
        grads = tf.nest.map_structure(tf.ones_like, tensors)
        block.instantiate_factors((grads,), 0.1)
        block.register_inverse()
    for factor in lc.get_factors():
        factor.instantiate_cov_variables()
        factor.instantiate_inv_variables()


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_every_group_has_a_row_before_and_after_the_factors_exist(kind):
    def build():
        lc = _collection()
        with unchanged(lc):
            before = report.explain(lc)
        _instantiate(lc)
        after = report.explain(lc)
        names = [[name.split("model/")[-1] for name in row.variables] for row in after]
        assert names == [
            ["dense/kernel", "dense/bias"],
            ["out/kernel"],
            ["temperature"],
            ["offset"],
        ]
        assert [row.shapes for row in after] == [
            ((3, 4), (4,)),
            ((4, 2),),
            ((),),
            ((5,),),
        ]
        assert [row.approximation for row in after] == [
            "kron",
            "diagonal",
            "diagonal",
            "full",
        ]
        assert [row.factor_sides for row in before] == [(), (), (), ()]
        assert [row.factor_sides for row in after] == [
            ((4, 4), (4, 4)),
            ((4, 2),),
            ((),),
            ((5, 5),),
        ]
        assert [row.towers for row in after] == [1, 1, 1, 1]
        assert [row.uses for row in after[:2]] == [1, 1]
        # float32: 4 bytes an entry; diagonal factors keep no inverses.
        assert [row.factor_bytes for row in before] == [0, 0, 0, 0]
        assert [row.factor_bytes for row in after] == [128, 32, 4, 100]
        assert [row.inverse_bytes for row in after] == [128, 0, 0, 100]
        return tf.constant(0)

    graph_kinds.Run(kind, build)()


def test_generic_rows_have_a_reason_and_no_others():
    with tf.Graph().as_default():
        rows = report.explain(_collection())
    assert [row.reason for row in rows] == [
        None,
        None,
        "used by an op that is no layer",
        "registered as generic by the caller",
    ]


def test_a_group_has_the_reasons_of_all_its_members():
    with tf.Graph().as_default():
        lc = lc_lib.LayerCollection()
        x, y, z = (graph_kinds.variable([1.0], name) for name in "xyz")
        lc.register_generic((x, y, z), BATCH, approx="full")
        lc.generic_reasons.update({v.ref(): "no pattern" for v in (x, y)})
        (row,) = report.explain(lc)
    assert row.reason == "no pattern; registered as generic by the caller"


def test_rows_are_frozen():
    with tf.Graph().as_default():
        row = report.explain(_collection())[0]
    with pytest.raises(AttributeError):
        row.towers = 2


@pytest.mark.parametrize("method", sorted(CASES))
def test_every_kind_of_layer_can_be_explained(method):
    with tf.Graph().as_default():
        lc = lc_lib.LayerCollection()
        arguments = CASES[method].arguments()
        register(lc, method, arguments)
        register(lc, method, arguments, reuse=True)
        rows = lc.explain(print_fn=None)
        assert {row.towers for row in rows} == {2}
        assert rows[-1].block == CASES[method].block.__name__
        assert len(report.format_table(rows).splitlines()) >= 4 + len(rows)


def test_the_table_has_a_line_for_every_group_and_totals():
    with tf.Graph().as_default():
        lc = _collection()
        _instantiate(lc)
        printed = []
        rows = lc.explain(print_fn=printed.append)
    (table,) = printed
    assert table == report.format_table(rows)
    lines = table.splitlines()
    assert lines[0].startswith("Parameters")
    assert re.search(
        r"^model/dense/\(kernel, bias\) +3x4, 4 +FullyConnectedKFACBasicFB +kron +"
        r"4x4, 4x4 +1 +1 +128 B +128 B$",
        table,
        re.MULTILINE,
    )
    assert re.search(r"^Total +264 B +228 B$", table, re.MULTILINE)
    assert "  model/temperature: used by an op that is no layer" in lines
    assert all(line == line.rstrip() for line in lines)


def test_an_empty_collection_has_a_table_of_headings():
    with tf.Graph().as_default():
        rows = report.explain(lc_lib.LayerCollection())
    assert rows == []
    assert "Total" in report.format_table(rows)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB")]
    + [(3 << 30, "3.0 GiB"), (2048 << 30, "2048.0 GiB")],
)
def test_bytes_have_units(count, text):
    assert report.format_bytes(count) == text


def test_strict_refuses_generic_parameters_with_their_reasons():
    with tf.Graph().as_default():
        lc = _collection()
        with unchanged(lc), pytest.raises(ValueError, match="2 parameter") as error:
            lc.check_strict()
    assert isinstance(error.value, report.GenericParametersError)
    assert [row.block for row in error.value.rows] == ["NaiveDiagonalFB", "NaiveFullFB"]
    for text in ("model/temperature", "no layer", "model/offset", "by the caller"):
        assert text in str(error.value)
    assert "dense" not in str(error.value)


def test_strict_accepts_layers_of_every_kind():
    with tf.Graph().as_default():
        lc = lc_lib.LayerCollection()
        for method in CASES:
            if method != "register_generic":
                register(lc, method, CASES[method].arguments())
        assert lc.check_strict() is None
