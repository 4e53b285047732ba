"""The code in the documentation runs, and its assertions hold."""

import pathlib
import re
import runpy

import pytest

DOCS = pathlib.Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize("page", ["ekfac.md", "curvature_operator.md"])
def test_the_code_of_the_page_runs(page, tmp_path):
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    # A file, so that AutoGraph finds the source as it would for a reader.
    program = tmp_path / "program.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    runpy.run_path(str(program))
