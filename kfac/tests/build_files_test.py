"""The BUILD files list every module and test, with the imports as dependencies."""

import importlib.util
import pathlib

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "build_files.py"


@pytest.fixture(scope="module")
def build_files():
    spec = importlib.util.spec_from_file_location("build_files", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_files_are_what_the_modules_call_for(build_files):
    assert build_files.stale() == [], "run python tools/build_files.py"


def test_every_module_and_every_test_has_a_target(build_files):
    root = build_files.ROOT
    modules = [path.relative_to(root) for path in (root / "kfac").rglob("*.py")]
    assert len(modules) > 50
    for module in modules:
        text = (root / module.parent / "BUILD").read_text()
        assert f'srcs = ["{module.name}"]' in text
        if module.stem.endswith("_test"):
            assert f'py_test(\n    name = "{module.stem}"' in text
