"""Registry of a model's layers and losses.

A `LayerCollection` maps parameter groups to Fisher blocks (each a model of one
diagonal block of the curvature matrix) and holds the losses that define the curvature.
"""

from kfac.python.ops.layer_collection.approximations import (
    APPROX_DIAGONAL_NAME,
    APPROX_EKFAC_NAME,
    APPROX_EKFAC_PRODUCT_NAME,
    APPROX_FULL_NAME,
    APPROX_KRONECKER_BOTH_DIAG_NAME,
    APPROX_KRONECKER_DEPTHWISE_NAME,
    APPROX_KRONECKER_IN_DIAG_NAME,
    APPROX_KRONECKER_INDEP_BOTH_DIAG_NAME,
    APPROX_KRONECKER_INDEP_IN_DIAG_NAME,
    APPROX_KRONECKER_INDEP_NAME,
    APPROX_KRONECKER_INDEP_OUT_DIAG_NAME,
    APPROX_KRONECKER_NAME,
    APPROX_KRONECKER_OUT_DIAG_NAME,
    APPROX_KRONECKER_REDUCE_NAME,
    APPROX_KRONECKER_SERIES_1_NAME,
    APPROX_KRONECKER_SERIES_2_NAME,
    APPROX_KRONECKER_SUA_NAME,
)
from kfac.python.ops.layer_collection.collection import LayerCollection
from kfac.python.ops.layer_collection.default import (
    get_default_layer_collection,
    set_default_layer_collection,
)
from kfac.python.ops.layer_collection.losses import LossNameError
from kfac.python.ops.layer_collection.parameters_dict import LayerParametersDict
from kfac.python.ops.layer_collection.reuse import VARIABLE_SCOPE

__all__ = [
    "APPROX_DIAGONAL_NAME",
    "APPROX_EKFAC_NAME",
    "APPROX_EKFAC_PRODUCT_NAME",
    "APPROX_FULL_NAME",
    "APPROX_KRONECKER_BOTH_DIAG_NAME",
    "APPROX_KRONECKER_DEPTHWISE_NAME",
    "APPROX_KRONECKER_INDEP_BOTH_DIAG_NAME",
    "APPROX_KRONECKER_INDEP_IN_DIAG_NAME",
    "APPROX_KRONECKER_INDEP_NAME",
    "APPROX_KRONECKER_INDEP_OUT_DIAG_NAME",
    "APPROX_KRONECKER_IN_DIAG_NAME",
    "APPROX_KRONECKER_NAME",
    "APPROX_KRONECKER_OUT_DIAG_NAME",
    "APPROX_KRONECKER_REDUCE_NAME",
    "APPROX_KRONECKER_SERIES_1_NAME",
    "APPROX_KRONECKER_SERIES_2_NAME",
    "APPROX_KRONECKER_SUA_NAME",
    "LayerCollection",
    "LayerParametersDict",
    "LossNameError",
    "VARIABLE_SCOPE",
    "get_default_layer_collection",
    "set_default_layer_collection",
]
