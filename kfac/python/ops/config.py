"""The library's numeric settings: one frozen dataclass, replaced as a whole.

Every module that needs a setting reads `config.settings()` at the moment its
documentation names; nothing mutates a setting in place.  The upper-case module
attributes of the reference API (`fisher_factors.ZERO_DEBIAS`, ...) are a façade
over this object, see `install_facade`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def _identity(name: str) -> str:
    return name


@dataclasses.dataclass(frozen=True)
class Settings:
    """Process-wide defaults.

    Attributes:
      init_covariances_at_zero: start second moments at zero (else identity/ones).
      zero_debias: divide moving averages by their accumulated weight.
      init_inverses_at_zero: start inverses at zero (else identity).
      eigenvalue_decomposition_threshold: from this many inverses (different
        dampings) of one factor on, one eigendecomposition serves all of them.
      eigenvalue_clipping_threshold: lower clip of eigenvalues before damping, >= 0.
      assume_zero_mean_activations: SUA input factor drops the mean term.
      subtract_mean_contrib_from_cov: SUA input factor still removes the mean's
        outer product from the covariance when zero mean is assumed.
      sub_sample_inputs: default for convolution input sub-sampling.
      inputs_to_extract_patches_factor: fraction of the batch kept by it.
      sub_sample_patches: default for convolution patch sub-sampling.
      max_num_patches: absolute cap on patches kept by it.
      max_num_patches_per_dimension: cap per column of the patch matrix.
      use_patches_second_moment_op: ask for a fused kernel that is not available.
      tower_strategy: "separate" or "concat".
      get_sanitized_name_fn: str -> str hook on tensor-derived scope fragments.
      normalize_damping_power: exponent of the damping normalisation of layers with
        several locations or uses; 0 switches the normalisation off.
      pi_type: "tracenorm" or "off", how damping is split between two factors.
      posdef_inv_method: "cholesky", "matrix_inverse" or "eig".
      posdef_eig_method: "self_adjoint" or "svd".
      tf_replicator: object with `num_replicas_in_sync`, `current_replica_id`,
        `all_sum` and `map_gather` that replaces `tf.distribute`, or None.
      include_damping_in_qmodel_change: count the damping term in `qmodel_change`.
      cholesky_jitters: multiples of the mean diagonal tried, in order, when a
        Cholesky factorisation fails.
    """

    init_covariances_at_zero: bool = True
    zero_debias: bool = True
    init_inverses_at_zero: bool = True
    eigenvalue_decomposition_threshold: int = 4
    eigenvalue_clipping_threshold: float = 0.0
    assume_zero_mean_activations: bool = False
    subtract_mean_contrib_from_cov: bool = True
    sub_sample_inputs: bool = False
    inputs_to_extract_patches_factor: float = 0.2
    sub_sample_patches: bool = False
    max_num_patches: int = 10000000
    max_num_patches_per_dimension: float = 3.0
    use_patches_second_moment_op: bool = False
    tower_strategy: str = "separate"
    get_sanitized_name_fn: Callable[[str], str] = _identity
    normalize_damping_power: float = 1.0
    pi_type: str = "tracenorm"
    posdef_inv_method: str = "cholesky"
    posdef_eig_method: str = "self_adjoint"
    tf_replicator: Any = None
    include_damping_in_qmodel_change: bool = False
    cholesky_jitters: tuple[float, ...] = (1e-6, 1e-4, 1e-2)


_current = Settings()

# Module name -> (module, attribute -> field of the settings).
_facades: dict[str, tuple[types.ModuleType, dict[str, str]]] = {}


def settings() -> Settings:
    """The settings in force."""
    return _current


def replace(**changes: Any) -> None:
    """Puts a copy with `changes` in force; `None` values leave a field alone."""
    changes = {key: value for key, value in changes.items() if value is not None}
    _put_in_force(dataclasses.replace(_current, **changes))


def _put_in_force(new: Settings) -> None:
    global _current
    _current = new
    for module, fields in _facades.values():
        _mirror(module, fields)


def _mirror(module: types.ModuleType, fields: Mapping[str, str]) -> None:
    # `unittest.mock` gives back what it finds here, and deletes what it does not.
    for name, field in fields.items():
        vars(module)[name] = getattr(_current, field)


@contextlib.contextmanager
def override(**changes: Any) -> Iterator[Settings]:
    """Like `replace`, undone on exit."""
    before = _current
    replace(**changes)
    try:
        yield _current
    finally:
        _put_in_force(before)


@contextlib.contextmanager
def restored_on_error() -> Iterator[None]:
    """Undoes changes of the settings if the block within raises."""
    before = _current
    try:
        yield
    except BaseException:
        _put_in_force(before)
        raise


def install_facade(module_name: str, fields: Mapping[str, str]) -> None:
    """Makes module attributes read and write settings.

    Args:
      module_name: `__name__` of the module that carries the attributes.
      fields: attribute name -> field of `Settings`.
    """

    def facade(field: str) -> property:
        def assign(module: types.ModuleType, value: Any) -> None:
            # Unlike `replace`, an assignment of None means None.
            _put_in_force(dataclasses.replace(_current, **{field: value}))

        return property(lambda module: getattr(_current, field), assign)

    module = sys.modules[module_name]
    attributes = {name: facade(field) for name, field in fields.items()}
    module.__class__ = type("SettingsModule", (types.ModuleType,), attributes)
    _facades[module_name] = module, dict(fields)
    _mirror(module, fields)
