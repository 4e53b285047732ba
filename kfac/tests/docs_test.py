"""Every ```python block of the documentation runs, page by page."""

import pathlib
import re

import matplotlib
import pytest

from kfac.python.ops import layer_inverses

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Blocks marked `python no-run` are fragments.
_BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[tuple[int, str]]:
    """Line number and text of every block to run."""
    return [
        (page.count("\n", 0, match.start(1)), match.group(1))
        for match in _BLOCK.finditer(page)
    ]


def _page_id(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=_page_id)
def test_blocks_of_a_page_run_from_top_to_bottom(path, tmp_path, monkeypatch):
    found = blocks(path.read_text())
    if not found:
        pytest.skip("No block to run.")
    monkeypatch.chdir(tmp_path)
    # A page that registers an inverse would change what later tests find.
    registry = dict(layer_inverses._REGISTRY)
    monkeypatch.setattr(layer_inverses, "_REGISTRY", registry)
    matplotlib.use("Agg")
    namespace = {"__name__": "__main__"}
    for line, block in found:
        # Line numbers of errors are those of the page.
        code = compile("\n" * line + block, str(path), "exec")
        exec(code, namespace)


@pytest.mark.parametrize("path", PAGES, ids=_page_id)
def test_links_of_a_page_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    missing = [
        link
        for link in links
        if "://" not in link and not (path.parent / link).exists()
    ]
    assert not missing


def test_fragments_and_other_languages_are_left_out():
    page = (
        "```python\na = 1\n```\n```python no-run\nb\n```\n```text\nc\n```\n"
        "```python\nd = 2\nd += a\n```\n"
    )
    assert blocks(page) == [(1, "a = 1\n"), (10, "d = 2\nd += a\n")]
