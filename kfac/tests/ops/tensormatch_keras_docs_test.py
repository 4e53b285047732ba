"""docs/keras_layers.md says what the scanner's table of Keras layers says.

python -m kfac.tests.ops.tensormatch_keras_docs_test      # write the page again
"""

import pathlib

from kfac.tests.ops.tensormatch_keras_case import GENERIC
from kfac.tests.ops.tensormatch_keras_cases import CASES

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "keras_layers.md"

_HEAD = """\
# Keras layers

What `auto_register_layers` (and so the Keras optimizer) makes of Keras' layers: the
block that its parameters get by default, and whether the gradient rebuilt from what
the block captured (inputs and output gradients) was found equal to the true one, in
float64, which proves that coverage, scale, sharing and layout are right. Parameters
without such a block get a diagonal one from the square of their gradient; `explain()`
tells why.

Written by `python -m kfac.tests.ops.tensormatch_keras_docs_test`; the tests run every
row. Shapes are those of the input, without the batch.

| layer and input | parameters | block | verified |
|---|---|---|---|
"""


def page() -> str:
    """The page's text."""
    rows = []
    for case in CASES:
        first = f"{case.name} `{case.shape}`"
        for parameters, block in case.blocks.items():
            verified = "no: nothing to rebuild" if block == GENERIC else "yes"
            names = parameters.replace(",", ", ").replace(".*", "")
            rows.append(f"| {first} | {names} | `{block}` | {verified} |")
            first = ""
    return _HEAD + "\n".join(rows) + "\n"


def test_the_page_is_what_the_table_says():
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "write it again: python -m kfac.tests.ops.tensormatch_keras_docs_test"
    )


def test_the_table_has_a_row_for_each_layer_promised():
    names = " ".join(case.name for case in CASES)
    for layer in (
        "Dense", "Conv1D", "Conv2D", "Conv3D", "DepthwiseConv2D", "SeparableConv1D",
        "SeparableConv2D", "BatchNormalization", "LayerNormalization",
        "GroupNormalization", "RMSNormalization", "Embedding", "EinsumDense",
        "MultiHeadAttention", "GroupQueryAttention", "SimpleRNN", "LSTM", "GRU", "LoRA",
    ):  # fmt: skip
        assert layer in names, layer


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
