import dataclasses
import sys
import types
import unittest.mock

import pytest

from kfac.python.ops import config, fisher_blocks, fisher_factors, optimizer, utils


@pytest.fixture
def facade(monkeypatch):
    module = types.ModuleType("facade_module")
    monkeypatch.setitem(sys.modules, "facade_module", module)
    config.install_facade("facade_module", {"DEBIAS": "zero_debias", "PI": "pi_type"})
    with config.override():
        yield module


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.settings().zero_debias = False


def test_replace_changes_what_is_given_and_none_leaves_alone():
    with config.override():
        before = config.settings()
        config.replace(zero_debias=False, pi_type=None)
        after = config.settings()
        assert after == dataclasses.replace(before, zero_debias=False)
        assert before.zero_debias


def test_override_is_undone_also_after_an_error():
    before = config.settings()
    with pytest.raises(KeyError):
        with config.override(zero_debias=False) as inside:
            assert config.settings() is inside
            assert not inside.zero_debias
            raise KeyError
    assert config.settings() is before


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="no_such_setting"):
        config.replace(no_such_setting=1)


def test_module_attributes_read_and_write_the_settings(facade):
    assert facade.DEBIAS is True
    facade.DEBIAS = False
    assert config.settings().zero_debias is False
    config.replace(zero_debias=True, pi_type="off")
    assert facade.DEBIAS is True
    assert facade.PI == "off"


def test_an_assignment_of_none_means_none(facade):
    facade.PI = None
    assert config.settings().pi_type is None


def test_patching_gives_back_what_was_set_before(facade):
    config.replace(pi_type="off", zero_debias=False)
    with unittest.mock.patch.object(facade, "PI", "patched"):
        with unittest.mock.patch("facade_module.PI", "again"):
            assert config.settings().pi_type == "again"
        assert facade.PI == config.settings().pi_type == "patched"
    assert facade.PI == config.settings().pi_type == "off"
    with unittest.mock.patch.multiple(facade, PI="tracenorm", DEBIAS=True):
        assert config.settings().zero_debias
    assert config.settings().pi_type == "off"
    assert not config.settings().zero_debias


_QMODEL = "include_damping_in_qmodel_change"


@pytest.mark.parametrize(
    ("module", "name", "setting", "value"),
    [
        (fisher_factors, "ZERO_DEBIAS", "zero_debias", False),
        (fisher_blocks, "PI_TYPE", "pi_type", "off"),
        (utils, "POSDEF_INV_METHOD", "posdef_inv_method", "eig"),
        (optimizer, f"_{_QMODEL.upper()}", _QMODEL, True),
    ],
)
def test_global_constants_survive_a_patch(module, name, setting, value):
    default = getattr(config.Settings, setting)
    with config.override():
        module.set_global_constants(**{setting: value})
        with unittest.mock.patch.object(module, name, default):
            assert getattr(config.settings(), setting) != value
        assert getattr(module, name) == getattr(config.settings(), setting) == value


def test_settings_are_restored_only_after_an_error():
    with config.override():
        before = config.settings()
        with pytest.raises(KeyError), config.restored_on_error():
            config.replace(zero_debias=False)
            raise KeyError
        assert config.settings() is before
        with config.restored_on_error():
            config.replace(zero_debias=False)
        assert not config.settings().zero_debias


def test_module_attributes_can_be_patched(facade, monkeypatch):
    with unittest.mock.patch.object(facade, "DEBIAS", False):
        assert config.settings().zero_debias is False
    assert config.settings().zero_debias is True
    with monkeypatch.context() as patch:
        patch.setattr(facade, "PI", "off")
        assert config.settings().pi_type == "off"
    assert config.settings().pi_type == "tracenorm"
