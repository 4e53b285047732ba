"""Every name of the reference API exists, with its parameters and defaults."""

import importlib
import inspect
import json
import pathlib

import pytest

API = json.loads(
    (pathlib.Path(__file__).parent / "conformance" / "api.json").read_text()
)
MODULES = [name for name in API if name != "kfac"]


def _cases(kind):
    return [
        (module, name, entry)
        for module in MODULES
        for name, entry in API[module].get(kind, {}).items()
    ]


def _ids(cases):
    return [f"{module.rsplit('.', 1)[1]}.{name}" for module, name, _ in cases]


def _check_parameters(callable_, expected, skip_first):
    """Every documented parameter is there, in order, with its default."""
    parameters = list(inspect.signature(callable_).parameters.values())
    if skip_first:
        parameters = parameters[1:]
    by_name = {p.name: p for p in parameters}
    positions = []
    for entry in expected:
        name, _, default = entry.partition("=")
        if name.startswith("*"):
            kinds = {p.kind for p in parameters}
            wanted = (
                inspect.Parameter.VAR_KEYWORD
                if name.startswith("**")
                else inspect.Parameter.VAR_POSITIONAL
            )
            assert wanted in kinds, f"no {name}"
            continue
        assert name in by_name, f"no parameter {name!r} in {list(by_name)}"
        positions.append(parameters.index(by_name[name]))
        parameter = by_name[name]
        if default:
            assert parameter.default is not inspect.Parameter.empty, name
            _check_default(parameter.default, default, name)
        else:
            assert parameter.kind is not inspect.Parameter.KEYWORD_ONLY, name
    assert positions == sorted(positions), "parameters are in another order"


def _check_default(actual, expected, name):
    try:
        value = eval(expected, {})  # Literals, from our own test data.
    except Exception:
        return  # A named object; its presence was checked.
    assert actual == value, f"{name}={actual!r}, expected {expected}"


def test_the_package_exports_every_public_name():
    package = importlib.import_module("kfac")
    missing = [name for name in API["kfac"]["exports"] if not hasattr(package, name)]
    assert not missing


@pytest.mark.parametrize(
    ("module", "name", "entry"), _cases("classes"), ids=_ids(_cases("classes"))
)
def test_class_has_the_documented_members(module, name, entry):
    cls = getattr(importlib.import_module(module), name)
    ancestors = {base.__name__ for base in cls.__mro__}
    for base in entry.get("bases") or []:
        if base.isidentifier():
            assert base in ancestors
    if entry.get("init") is not None:
        _check_parameters(cls.__init__, entry["init"], skip_first=True)
    for method, parameters in (entry.get("methods") or {}).items():
        member = inspect.getattr_static(cls, method)
        static = isinstance(member, staticmethod)
        _check_parameters(getattr(cls, method), parameters, skip_first=not static)
    for attribute in entry.get("properties") or []:
        assert hasattr(cls, attribute), attribute


@pytest.mark.parametrize(
    ("module", "name", "entry"), _cases("functions"), ids=_ids(_cases("functions"))
)
def test_function_has_the_documented_parameters(module, name, entry):
    function = getattr(importlib.import_module(module), name)
    _check_parameters(function, entry, skip_first=False)


@pytest.mark.parametrize(
    ("module", "name", "entry"), _cases("constants"), ids=_ids(_cases("constants"))
)
def test_constant_has_the_documented_value(module, name, entry):
    value = getattr(importlib.import_module(module), name)
    _check_default(value, entry, name)
