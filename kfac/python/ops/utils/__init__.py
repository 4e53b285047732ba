"""Helpers of every other module: containers, algebra, graphs, replicas."""

from kfac.python.ops import config
from kfac.python.ops.utils.autodiff import (
    fwd_gradients,
    generate_random_signs,
    gradients,
)
from kfac.python.ops.utils.containers import (
    PartitionedTensor,
    SequenceDict,
    _as_list,
    cls_name,
    ensure_sequence,
)
from kfac.python.ops.utils.convolution import (
    extract_convolution_patches,
    extract_pointwise_conv2d_patches,
    is_data_format_channel_last,
    num_conv_locations,
)
from kfac.python.ops.utils.linalg import (
    cholesky,
    posdef_eig,
    posdef_eig_functions,
    posdef_eig_self_adjoint,
    posdef_eig_svd,
    posdef_inv,
    posdef_inv_cholesky,
    posdef_inv_eig,
    posdef_inv_functions,
    posdef_inv_matrix_inverse,
)
from kfac.python.ops.utils.moving_average import (
    AccumulatorVariable,
    MovingAverageVariable,
)
from kfac.python.ops.utils.pairs import (
    _check_match_lists_of_pairs,
    assert_variables_match_pairs_list,
    ip,
    ip_p,
    sprod,
    sprod_p,
    sum_,
    sum_p,
)
from kfac.python.ops.utils.replicas import (
    DistributedVarOp,
    MirroredVariableWrapper,
    all_average,
    all_sum,
    get_num_replicas,
    get_replica_id,
    get_tf_replicator,
    is_in_replica,
    is_replicated,
    is_tpu_replicated,
    map_gather,
    preferred_int_dtype,
    set_global_constants,
    smart_assign,
    smart_cond,
)
from kfac.python.ops.utils.reshaping import (
    column_to_tensors,
    get_shape,
    kronecker_product,
    layer_params_to_mat2d,
    mat2d_to_layer_params,
    tensors_to_column,
)
from kfac.python.ops.utils.scheduling import (
    batch_execute,
    multiline_print,
)
from kfac.python.ops.utils.sparse import (
    matmul_diag_sparse,
    matmul_sparse_dense,
)
from kfac.python.ops.utils.subgraph import (
    SubGraph,
    is_reference_variable,
)

__all__ = [
    "AccumulatorVariable",
    "DistributedVarOp",
    "MirroredVariableWrapper",
    "MovingAverageVariable",
    "PartitionedTensor",
    "SequenceDict",
    "SubGraph",
    "_as_list",
    "_check_match_lists_of_pairs",
    "all_average",
    "all_sum",
    "assert_variables_match_pairs_list",
    "batch_execute",
    "cholesky",
    "cls_name",
    "column_to_tensors",
    "ensure_sequence",
    "extract_convolution_patches",
    "extract_pointwise_conv2d_patches",
    "fwd_gradients",
    "generate_random_signs",
    "get_num_replicas",
    "get_replica_id",
    "get_shape",
    "get_tf_replicator",
    "gradients",
    "ip",
    "ip_p",
    "is_data_format_channel_last",
    "is_in_replica",
    "is_reference_variable",
    "is_replicated",
    "is_tpu_replicated",
    "kronecker_product",
    "layer_params_to_mat2d",
    "map_gather",
    "mat2d_to_layer_params",
    "matmul_diag_sparse",
    "matmul_sparse_dense",
    "multiline_print",
    "num_conv_locations",
    "posdef_eig",
    "posdef_eig_functions",
    "posdef_eig_self_adjoint",
    "posdef_eig_svd",
    "posdef_inv",
    "posdef_inv_cholesky",
    "posdef_inv_eig",
    "posdef_inv_functions",
    "posdef_inv_matrix_inverse",
    "preferred_int_dtype",
    "set_global_constants",
    "smart_assign",
    "smart_cond",
    "sprod",
    "sprod_p",
    "sum_",
    "sum_p",
    "tensors_to_column",
]

config.install_facade(
    __name__,
    {
        "POSDEF_INV_METHOD": "posdef_inv_method",
        "POSDEF_EIG_METHOD": "posdef_eig_method",
        "_TF_REPLICATOR": "tf_replicator",
    },
)
