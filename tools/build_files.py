"""Writes the BUILD files: one target a module, dependencies read from the imports.

python tools/build_files.py            # write
python tools/build_files.py --check    # say what is out of date, exit 1 if anything is
"""

from __future__ import annotations

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADER = """\
# Written by tools/build_files.py; run it after adding, removing or moving a module.
load("@rules_python//python:defs.bzl", "py_binary", "py_library", "py_test")

package(default_visibility = ["//visibility:public"])

licenses(["notice"])
"""


def packages() -> list[pathlib.Path]:
    """Folders with Python modules, relative to the repository's root."""
    modules = (
        path
        for top in ("kfac", "benchmarks", "tools")
        for path in ROOT.glob(f"{top}/**/*.py")
    )
    return sorted({path.parent.relative_to(ROOT) for path in modules})


def build_file(package: pathlib.Path) -> str:
    """The text of the BUILD file of one package."""
    rules = [_rule(path) for path in sorted((ROOT / package).glob("*.py"))]
    return HEADER + "".join(rules)


def _rule(path: pathlib.Path) -> str:
    source = path.read_text(encoding="utf-8")
    name = path.stem if path.stem != "__init__" else path.parent.name
    kind = "py_library"
    if path.stem.endswith("_test"):
        kind = "py_test"
    elif 'if __name__ == "__main__":' in source:
        kind = "py_binary"
    lines = [f"\n{kind}(", f'    name = "{name}",', f'    srcs = ["{path.name}"],']
    deps = sorted(_dependencies(path, ast.parse(source)) - {_label(path)})
    if deps:
        lines += ["    deps = [", *(f'        "{dep}",' for dep in deps), "    ],"]
    data = sorted(p.name for p in path.parent.glob("*.npz")) if name == "data" else []
    if data:
        lines.append(f"    data = {data},")
    return "\n".join([*lines, ")", ""])


def _dependencies(path: pathlib.Path, tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names.add(node.module)
    targets = (_target_of(name) for name in names if name.split(".")[0] == "kfac")
    return {_label(target) for target in targets if target is not None}


def _target_of(module: str) -> pathlib.Path | None:
    base = ROOT.joinpath(*module.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.exists():
            return candidate
    return None


def _label(path: pathlib.Path) -> str:
    package = path.parent.relative_to(ROOT)
    name = path.stem if path.stem != "__init__" else package.name
    return f"//{package.as_posix()}:{name}"


def stale() -> list[pathlib.Path]:
    """BUILD files that are missing or differ from what the modules call for."""
    targets = [
        (ROOT / package / "BUILD", build_file(package)) for package in packages()
    ]
    return [
        path.relative_to(ROOT)
        for path, text in targets
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main(argv: list[str]) -> int:
    """Writes, or with `--check` only compares."""
    if argv == ["--check"]:
        for path in stale():
            print(f"out of date: {path} (run python tools/build_files.py)")
        return 1 if stale() else 0
    for package in packages():
        (ROOT / package / "BUILD").write_text(build_file(package), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
