"""K-FAC for TensorFlow: second-order optimization by Kronecker-factored curvature.

Submodules and classes are imported when first used, so `import kfac` is cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_OPS = "kfac.python.ops."

# Public name -> module, or "module:attribute".
_EXPORTS = {
    "AsyncInvCovUpdateKfacOpt": (
        _OPS + "kfac_utils.async_inv_cov_update_kfac_opt:AsyncInvCovUpdateKfacOpt"
    ),
    "CurvatureMatrixVectorProductComputer": (
        _OPS + "curvature_matrix_vector_products:CurvatureMatrixVectorProductComputer"
    ),
    "KfacOptimizer": _OPS + "optimizer:KfacOptimizer",
    "LayerCollection": _OPS + "layer_collection:LayerCollection",
    "PeriodicInvCovUpdateKfacOpt": (
        _OPS + "kfac_utils.periodic_inv_cov_update_kfac_opt:PeriodicInvCovUpdateKfacOpt"
    ),
    "async_inv_cov_update_kfac_opt": _OPS + "kfac_utils.async_inv_cov_update_kfac_opt",
    "curvature_matrix_vector_products": _OPS + "curvature_matrix_vector_products",
    "curvature_operator": _OPS + "curvature_operator",
    "data_reader": _OPS + "kfac_utils.data_reader",
    "data_reader_alt": _OPS + "kfac_utils.data_reader_alt",
    "estimator": _OPS + "estimator",
    "fisher_blocks": _OPS + "fisher_blocks",
    "fisher_factors": _OPS + "fisher_factors",
    "fishleg": _OPS + "fishleg",
    "graph_matcher": _OPS + "tensormatch.graph_matcher",
    "graph_search": _OPS + "tensormatch.graph_search",
    "keras": "kfac.python.keras",
    "laplace": _OPS + "laplace",
    "layer_collection": _OPS + "layer_collection",
    "layer_inverses": _OPS + "layer_inverses",
    "linear_operator": _OPS + "linear_operator",
    "loss_functions": _OPS + "loss_functions",
    "natural_gradient": _OPS + "natural_gradient",
    "op_queue": _OPS + "op_queue",
    "optimizer": _OPS + "optimizer",
    "periodic_inv_cov_update_kfac_opt": (
        _OPS + "kfac_utils.periodic_inv_cov_update_kfac_opt"
    ),
    "placement": _OPS + "placement",
    "state": _OPS + "state",
    "utils": _OPS + "utils",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'kfac' has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    value = importlib.import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
