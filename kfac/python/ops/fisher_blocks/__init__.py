"""Fisher blocks: the curvature of one parameter group each.

A block owns no state.  It is constructed for a group, is told the tensors of its
layer tower by tower, asks the collection for factors once the output gradients are
known, and then multiplies vectors shaped like the parameters by functions of
`block + damping I`.

| kind of layer | blocks |
|---|---|
| any parameter | `NaiveFullFB`, `NaiveDiagonalFB` |
| dense, embedding | `FullyConnectedKFACBasicFB`, `FullyConnectedDiagonalFB` |
| convolution | `ConvKFCBasicFB`, `ConvKFCReduceFB`, `ConvDiagonalFB` |
| depthwise convolution | `DepthwiseConvKFCBasicFB`, `DepthwiseConvDiagonalFB` |
| elementwise | `ScaleAndShiftFullFB`, `ScaleAndShiftDiagonalFB` |
| dense, several uses a case | `FullyConnectedMultiIndepFB`, `FullyConnectedReduceFB` |
| dense, time steps | `FullyConnectedSeriesFB` |
| convolution, several uses a case | `ConvKFCBasicMultiIndepFB` |

EKFAC: `FullyConnectedEKFACFB`, `ConvEKFACFB`, `FullyConnectedMultiEKFACFB` and
`ConvMultiEKFACFB`.
"""

from kfac.python.ops import config
from kfac.python.ops.fisher_blocks.base import (
    BlockDescription,
    FisherBlock,
    maybe_tuple,
)
from kfac.python.ops.fisher_blocks.convolution import ConvDiagonalFB, ConvKFCBasicFB
from kfac.python.ops.fisher_blocks.damping import (
    PI_OFF_NAME,
    PI_TRACENORM_NAME,
    PackagedFunc,
    _package_func,
    compute_pi_adjusted_damping,
    compute_pi_tracenorm,
    normalize_damping,
    set_global_constants,
)
from kfac.python.ops.fisher_blocks.depthwise import (
    DepthwiseConvDiagonalFB,
    DepthwiseConvKFCBasicFB,
    conv2d_filter_to_depthwise_conv2d_filter,
    depthwise_conv2d_filter_to_conv2d_filter,
)
from kfac.python.ops.fisher_blocks.eigenbasis import (
    ConvEKFACFB,
    ConvMultiEKFACFB,
    EigenbasisProductFB,
    FullyConnectedEKFACFB,
    FullyConnectedMultiEKFACFB,
)
from kfac.python.ops.fisher_blocks.full_and_diagonal import DiagonalFB, FullFB
from kfac.python.ops.fisher_blocks.fully_connected import (
    FullyConnectedDiagonalFB,
    FullyConnectedKFACBasicFB,
)
from kfac.python.ops.fisher_blocks.kronecker import KroneckerProductFB
from kfac.python.ops.fisher_blocks.multi_use import (
    ConvKFCBasicMultiIndepFB,
    FullyConnectedMultiIndepFB,
)
from kfac.python.ops.fisher_blocks.naive import NaiveDiagonalFB, NaiveFullFB
from kfac.python.ops.fisher_blocks.recurrent import (
    FullyConnectedSeriesFB,
    SeriesFBApproximation,
)
from kfac.python.ops.fisher_blocks.reduce import (
    ConvKFCReduceFB,
    FullyConnectedReduceFB,
)
from kfac.python.ops.fisher_blocks.scale_and_shift import (
    ScaleAndShiftDiagonalFB,
    ScaleAndShiftFullFB,
)
from kfac.python.ops.fisher_blocks.towers import (
    InputOutputMultiTower,
    InputOutputMultiTowerMultiUse,
)

__all__ = [
    "PI_OFF_NAME",
    "PI_TRACENORM_NAME",
    "BlockDescription",
    "ConvDiagonalFB",
    "ConvEKFACFB",
    "ConvKFCBasicFB",
    "ConvKFCBasicMultiIndepFB",
    "ConvKFCReduceFB",
    "ConvMultiEKFACFB",
    "DepthwiseConvDiagonalFB",
    "DepthwiseConvKFCBasicFB",
    "DiagonalFB",
    "EigenbasisProductFB",
    "FisherBlock",
    "FullFB",
    "FullyConnectedDiagonalFB",
    "FullyConnectedEKFACFB",
    "FullyConnectedKFACBasicFB",
    "FullyConnectedMultiEKFACFB",
    "FullyConnectedMultiIndepFB",
    "FullyConnectedReduceFB",
    "FullyConnectedSeriesFB",
    "InputOutputMultiTower",
    "InputOutputMultiTowerMultiUse",
    "KroneckerProductFB",
    "NaiveDiagonalFB",
    "NaiveFullFB",
    "PackagedFunc",
    "ScaleAndShiftDiagonalFB",
    "ScaleAndShiftFullFB",
    "SeriesFBApproximation",
    "_package_func",
    "compute_pi_adjusted_damping",
    "compute_pi_tracenorm",
    "conv2d_filter_to_depthwise_conv2d_filter",
    "depthwise_conv2d_filter_to_conv2d_filter",
    "maybe_tuple",
    "normalize_damping",
    "set_global_constants",
]

config.install_facade(
    __name__,
    {"NORMALIZE_DAMPING_POWER": "normalize_damping_power", "PI_TYPE": "pi_type"},
)
