"""Names of the approximations, and which block each one means in each layer family."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from kfac.python.ops import errors
from kfac.python.ops import fisher_blocks as fb

APPROX_KRONECKER_NAME = "kron"
APPROX_KRONECKER_IN_DIAG_NAME = "kron_in_diag"
APPROX_KRONECKER_OUT_DIAG_NAME = "kron_out_diag"
APPROX_KRONECKER_BOTH_DIAG_NAME = "kron_both_diag"
APPROX_DIAGONAL_NAME = "diagonal"
APPROX_FULL_NAME = "full"
APPROX_KRONECKER_SUA_NAME = "kron_sua"
APPROX_KRONECKER_INDEP_NAME = "kron_indep"
APPROX_KRONECKER_INDEP_IN_DIAG_NAME = "kron_indep_in_diag"
APPROX_KRONECKER_INDEP_OUT_DIAG_NAME = "kron_indep_out_diag"
APPROX_KRONECKER_INDEP_BOTH_DIAG_NAME = "kron_indep_both_diag"
APPROX_KRONECKER_SERIES_1_NAME = "kron_series_1"
APPROX_KRONECKER_SERIES_2_NAME = "kron_series_2"
# KFAC-reduce, R. Eschenhagen et al., arXiv 2311.00636, section 3.3.
APPROX_KRONECKER_REDUCE_NAME = "kron_reduce"
# Depthwise convolutions have no name for their Kronecker block in the reference API,
# where "kron" is documented to be refused.
APPROX_KRONECKER_DEPTHWISE_NAME = "kron_depthwise"
# EKFAC, T. George et al., arXiv 1806.03884; second moments in the Kronecker eigenbasis
# from the gradients of single examples, or the products of K-FAC.
APPROX_EKFAC_NAME = "ekfac"
APPROX_EKFAC_PRODUCT_NAME = "ekfac_product"

BlockFactory = Callable[..., Any]


def _diagonal_sides(block: type, plain: str, in_: str, out: str, both: str) -> dict:
    """The four variants of a block with diagonal factors on neither/one/both sides."""
    return {
        name: functools.partial(
            block,
            diagonal_approx_for_input=diagonal_input,
            diagonal_approx_for_output=diagonal_output,
        )
        for name, diagonal_input, diagonal_output in (
            (plain, False, False),
            (in_, True, False),
            (out, False, True),
            (both, True, True),
        )
    }


def _ekfac(block: type) -> dict:
    """Both scalings of an EKFAC block."""
    return {
        APPROX_EKFAC_NAME: block,
        APPROX_EKFAC_PRODUCT_NAME: functools.partial(block, scaling="product"),
    }


# Family -> approximation name -> callable that makes the block.
BLOCK_TYPES: Mapping[str, Mapping[str, BlockFactory]] = {
    "generic": {
        APPROX_FULL_NAME: fb.NaiveFullFB,
        APPROX_DIAGONAL_NAME: fb.NaiveDiagonalFB,
    },
    "fully_connected": {
        **_diagonal_sides(
            fb.FullyConnectedKFACBasicFB,
            APPROX_KRONECKER_NAME,
            APPROX_KRONECKER_IN_DIAG_NAME,
            APPROX_KRONECKER_OUT_DIAG_NAME,
            APPROX_KRONECKER_BOTH_DIAG_NAME,
        ),
        APPROX_DIAGONAL_NAME: fb.FullyConnectedDiagonalFB,
        **_ekfac(fb.FullyConnectedEKFACFB),
    },
    "conv2d": {
        APPROX_KRONECKER_NAME: fb.ConvKFCBasicFB,
        APPROX_KRONECKER_SUA_NAME: functools.partial(
            fb.ConvKFCBasicFB, use_sua_approx_for_input_factor=True
        ),
        APPROX_KRONECKER_REDUCE_NAME: fb.ConvKFCReduceFB,
        APPROX_DIAGONAL_NAME: fb.ConvDiagonalFB,
        **_ekfac(fb.ConvEKFACFB),
    },
    "fully_connected_multi": {
        **_diagonal_sides(
            fb.FullyConnectedMultiIndepFB,
            APPROX_KRONECKER_INDEP_NAME,
            APPROX_KRONECKER_INDEP_IN_DIAG_NAME,
            APPROX_KRONECKER_INDEP_OUT_DIAG_NAME,
            APPROX_KRONECKER_INDEP_BOTH_DIAG_NAME,
        ),
        APPROX_KRONECKER_SERIES_1_NAME: functools.partial(
            fb.FullyConnectedSeriesFB, option=fb.SeriesFBApproximation.option1
        ),
        APPROX_KRONECKER_SERIES_2_NAME: functools.partial(
            fb.FullyConnectedSeriesFB, option=fb.SeriesFBApproximation.option2
        ),
        APPROX_KRONECKER_REDUCE_NAME: fb.FullyConnectedReduceFB,
        **_ekfac(fb.FullyConnectedMultiEKFACFB),
    },
    "conv2d_multi": {
        APPROX_KRONECKER_INDEP_NAME: fb.ConvKFCBasicMultiIndepFB,
        **_ekfac(fb.ConvMultiEKFACFB),
    },
    "scale_and_shift": {
        APPROX_FULL_NAME: fb.ScaleAndShiftFullFB,
        APPROX_DIAGONAL_NAME: fb.ScaleAndShiftDiagonalFB,
    },
    "conv1d": {
        APPROX_KRONECKER_NAME: fb.ConvKFCBasicFB,
        **_ekfac(fb.ConvEKFACFB),
    },
    "convolution": {
        APPROX_KRONECKER_NAME: fb.ConvKFCBasicFB,
        **_ekfac(fb.ConvEKFACFB),
    },
    "depthwise_conv2d": {
        APPROX_DIAGONAL_NAME: fb.DepthwiseConvDiagonalFB,
        APPROX_KRONECKER_DEPTHWISE_NAME: fb.DepthwiseConvKFCBasicFB,
    },
}

# What a family uses when nobody says anything else.  The last three cannot be set.
DEFAULT_APPROXIMATIONS: Mapping[str, str] = {
    "generic": APPROX_DIAGONAL_NAME,
    "fully_connected": APPROX_KRONECKER_NAME,
    "conv2d": APPROX_KRONECKER_NAME,
    "fully_connected_multi": APPROX_KRONECKER_INDEP_NAME,
    "conv2d_multi": APPROX_KRONECKER_INDEP_NAME,
    "scale_and_shift": APPROX_FULL_NAME,
    "conv1d": APPROX_KRONECKER_NAME,
    "convolution": APPROX_KRONECKER_NAME,
    "depthwise_conv2d": APPROX_DIAGONAL_NAME,
}

# Approximations whose input factor is diagonal, the only ones for integer ids (and
# exact there: the second moment of one-hot vectors is a diagonal matrix).
WITH_DIAGONAL_INPUT_FACTOR = frozenset(
    {
        APPROX_KRONECKER_IN_DIAG_NAME,
        APPROX_KRONECKER_BOTH_DIAG_NAME,
        APPROX_KRONECKER_INDEP_IN_DIAG_NAME,
        APPROX_KRONECKER_INDEP_BOTH_DIAG_NAME,
    }
)

# What an approximation is called in layers that a case uses several times. Whether a
# layer is one of them depends on the data, not on who asks for the approximation.
_NAMES_FOR_SEVERAL_USES = {
    APPROX_KRONECKER_NAME: APPROX_KRONECKER_INDEP_NAME,
    APPROX_KRONECKER_IN_DIAG_NAME: APPROX_KRONECKER_INDEP_IN_DIAG_NAME,
    APPROX_KRONECKER_OUT_DIAG_NAME: APPROX_KRONECKER_INDEP_OUT_DIAG_NAME,
    APPROX_KRONECKER_BOTH_DIAG_NAME: APPROX_KRONECKER_INDEP_BOTH_DIAG_NAME,
}

# What a family's default means for integer ids.
_DEFAULT_FOR_IDS = {
    "fully_connected": {
        APPROX_KRONECKER_OUT_DIAG_NAME: APPROX_KRONECKER_BOTH_DIAG_NAME,
        APPROX_DIAGONAL_NAME: APPROX_KRONECKER_BOTH_DIAG_NAME,
    },
    "fully_connected_multi": {
        APPROX_KRONECKER_INDEP_OUT_DIAG_NAME: APPROX_KRONECKER_INDEP_BOTH_DIAG_NAME,
    },
}
_KRONECKER_FOR_IDS = {
    "fully_connected": APPROX_KRONECKER_IN_DIAG_NAME,
    "fully_connected_multi": APPROX_KRONECKER_INDEP_IN_DIAG_NAME,
}


def default_for_ids(family: str, default: str) -> str:
    """The variant of a default approximation that takes integer ids as inputs."""
    if default in WITH_DIAGONAL_INPUT_FACTOR:
        return default
    return _DEFAULT_FOR_IDS[family].get(default, _KRONECKER_FOR_IDS[family])


def name_in(approximation: Any, table: Mapping[str, BlockFactory]) -> Any:
    """What the family with this table calls an approximation, as far as it has it.

    A layer's approximation may be chosen before it is known how often a case uses the
    layer: "kron" and its diagonal variants mean "kron_indep" and so on then.
    """
    if approximation in table:
        return approximation
    other = _NAMES_FOR_SEVERAL_USES.get(approximation)
    return other if other in table else approximation


def check_in_table(
    approximation: Any, table: Mapping[str, BlockFactory], what: str
) -> None:
    """Refuses a name that is not in the family's table.

    Raises:
      ArgumentError: as said.
    """
    if not isinstance(approximation, str) or approximation not in table:
        raise errors.ArgumentError(
            f"Bad value {approximation!r} for {what}; expected one of {sorted(table)}."
        )
