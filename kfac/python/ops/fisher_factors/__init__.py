"""Fisher factors: running second moments of per-layer quantities.

A factor owns the moving average of one second moment and the damped matrix functions
of it (inverse, other powers, Cholesky factors) that somebody registered. Fisher blocks
combine what factors serve; the estimator runs their updates.

The upper-case attributes of this module read and write `config.settings()`.
"""

from __future__ import annotations

from collections.abc import Callable

from kfac.python.ops import config
from kfac.python.ops.fisher_factors.base import (
    FisherFactor,
    covariance_initializer,
    diagonal_covariance_initializer,
    inverse_initializer,
    maybe_place_on_device,
)
from kfac.python.ops.fisher_factors.conv_diagonal import (
    ConvDiagonalFactor,
    DepthwiseConvDiagonalFactor,
    GroupedConvDiagonalFactor,
)
from kfac.python.ops.fisher_factors.convolution import (
    ConvInputKroneckerFactor,
    ConvInputMultiKF,
    ConvOutputKroneckerFactor,
    ConvOutputMultiKF,
)
from kfac.python.ops.fisher_factors.dense import DenseSquareMatrixFactor
from kfac.python.ops.fisher_factors.diagonal import (
    DiagonalFactor,
    DiagonalKroneckerFactor,
    DiagonalMultiKF,
)
from kfac.python.ops.fisher_factors.eigenbasis import (
    EigenbasisFactor,
    ExampleEigenbasisFactor,
    ProductEigenbasisFactor,
)
from kfac.python.ops.fisher_factors.fully_connected import (
    FullyConnectedDiagonalFactor,
    FullyConnectedKroneckerFactor,
)
from kfac.python.ops.fisher_factors.naive import NaiveDiagonalFactor, NaiveFullFactor
from kfac.python.ops.fisher_factors.naming import (
    graph_func_to_id,
    graph_func_to_string,
    list_to_string,
    scalar_or_tensor_to_string,
    scope_string_from_name,
    scope_string_from_params,
)
from kfac.python.ops.fisher_factors.recurrent import FullyConnectedMultiKF
from kfac.python.ops.fisher_factors.scale_and_shift import (
    ScaleAndShiftDiagonalFactor,
    ScaleAndShiftFactor,
    ScaleAndShiftFullFactor,
)
from kfac.python.ops.fisher_factors.statistics import append_homog, compute_cov
from kfac.python.ops.fisher_factors.sua import ConvInputSUAKroneckerFactor
from kfac.python.ops.fisher_factors.subsample import (
    _random_tensor_gather,
    _subsample_patches,
)
from kfac.python.ops.fisher_factors.weight_sharing import (
    ConvInputReduceKroneckerFactor,
    ConvOutputReduceKroneckerFactor,
    FullyConnectedReduceKroneckerFactor,
)

__all__ = [
    "ConvDiagonalFactor",
    "ConvInputKroneckerFactor",
    "ConvInputMultiKF",
    "ConvInputReduceKroneckerFactor",
    "ConvInputSUAKroneckerFactor",
    "ConvOutputKroneckerFactor",
    "ConvOutputMultiKF",
    "ConvOutputReduceKroneckerFactor",
    "DenseSquareMatrixFactor",
    "DepthwiseConvDiagonalFactor",
    "DiagonalFactor",
    "DiagonalKroneckerFactor",
    "DiagonalMultiKF",
    "EigenbasisFactor",
    "ExampleEigenbasisFactor",
    "FisherFactor",
    "FullyConnectedDiagonalFactor",
    "FullyConnectedKroneckerFactor",
    "FullyConnectedMultiKF",
    "FullyConnectedReduceKroneckerFactor",
    "GroupedConvDiagonalFactor",
    "NaiveDiagonalFactor",
    "NaiveFullFactor",
    "ProductEigenbasisFactor",
    "ScaleAndShiftDiagonalFactor",
    "ScaleAndShiftFactor",
    "ScaleAndShiftFullFactor",
    "_random_tensor_gather",
    "_subsample_patches",
    "append_homog",
    "compute_cov",
    "covariance_initializer",
    "diagonal_covariance_initializer",
    "graph_func_to_id",
    "graph_func_to_string",
    "inverse_initializer",
    "list_to_string",
    "maybe_place_on_device",
    "scalar_or_tensor_to_string",
    "scope_string_from_name",
    "scope_string_from_params",
    "set_global_constants",
]


def set_global_constants(
    init_covariances_at_zero: bool | None = None,
    zero_debias: bool | None = None,
    init_inverses_at_zero: bool | None = None,
    eigenvalue_decomposition_threshold: int | None = None,
    eigenvalue_clipping_threshold: float | None = None,
    assume_zero_mean_activations: bool | None = None,
    subtract_mean_contrib_from_cov: bool | None = None,
    sub_sample_inputs: bool | None = None,
    inputs_to_extract_patches_factor: float | None = None,
    sub_sample_patches: bool | None = None,
    max_num_patches: int | None = None,
    max_num_patches_per_dimension: float | None = None,
    tower_strategy: str | None = None,
    get_sanitized_name_fn: Callable[[str], str] | None = None,
    use_patches_second_moment_op: bool | None = None,
) -> None:
    """Replaces the settings that are given; `None` leaves a setting alone.

    The settings are those of `config.Settings`. `init_*_at_zero` have no effect on
    the initializers, which are chosen when the library is imported.
    """
    config.replace(**locals())


config.install_facade(
    __name__,
    {
        "INIT_COVARIANCES_AT_ZERO": "init_covariances_at_zero",
        "ZERO_DEBIAS": "zero_debias",
        "INIT_INVERSES_AT_ZERO": "init_inverses_at_zero",
        "EIGENVALUE_DECOMPOSITION_THRESHOLD": "eigenvalue_decomposition_threshold",
        "EIGENVALUE_CLIPPING_THRESHOLD": "eigenvalue_clipping_threshold",
        "ASSUME_ZERO_MEAN_ACTIVATIONS": "assume_zero_mean_activations",
        "SUBTRACT_MEAN_CONTRIB_FROM_COV": "subtract_mean_contrib_from_cov",
        "TOWER_STRATEGY": "tower_strategy",
        "_SUB_SAMPLE_INPUTS": "sub_sample_inputs",
        "_INPUTS_TO_EXTRACT_PATCHES_FACTOR": "inputs_to_extract_patches_factor",
        "_SUB_SAMPLE_PATCHES": "sub_sample_patches",
        "_MAX_NUM_PATCHES": "max_num_patches",
        "_MAX_NUM_PATCHES_PER_DIMENSION": "max_num_patches_per_dimension",
        "_USE_PATCHES_SECOND_MOMENT_OP": "use_patches_second_moment_op",
        "_GET_SANITIZED_NAME_FN": "get_sanitized_name_fn",
    },
)
