"""Every block class on small random data, and the steps of a block's life.

`CASES` is what the contract suite runs over.  All data are float64 NumPy arrays; the
output gradients are arbitrary numbers, for a block does not know where they come from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import deferred
from kfac.python.ops import fisher_blocks as fb

tf1 = tf.compat.v1

BATCH = 4
USES = 3
DAMPING = 0.3


class Ids:
    """Integer ids and the number of classes; tensors cannot carry attributes."""

    def __init__(self, values: np.ndarray, depth: int):
        self.values = values
        self.depth = depth


@dataclasses.dataclass(frozen=True)
class Case:
    """A block class with options and data.

    Attributes:
      name: id of the test.
      make: layer collection -> block without towers.
      params: shape of the parameter, or tuple of shapes.
      inputs: shape of one case's input (of one use), or None for generic blocks.
      outputs: the same for the output.
      uses: number of uses given as a list, or None.
      ids: number of classes if the inputs are integer ids.
      only_inverse: whether the powers are 1 and -1 alone, without Cholesky factors.
    """

    name: str
    make: Callable[[Any], fb.FisherBlock]
    params: Any
    inputs: tuple[int, ...] | None = None
    outputs: tuple[int, ...] = ()
    uses: int | None = None
    ids: int | None = None
    only_inverse: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parameters."""
        is_group = isinstance(self.params[0], tuple)
        return self.params if is_group else (self.params,)

    def arrays(self, batch: int = BATCH, seed: int = 0) -> tuple[Any, Any]:
        """Inputs and one source's gradients; lists over uses where there are uses."""
        rng = np.random.RandomState(seed)
        if self.inputs is None:
            grads = [rng.normal(size=shape) for shape in self.shapes]
            is_group = isinstance(self.params[0], tuple)
            return None, tuple(grads) if is_group else grads[0]

        def one_use():
            if self.ids is not None:
                inputs = Ids(
                    rng.randint(self.ids, size=(batch, *self.inputs)), self.ids
                )
            else:
                inputs = rng.normal(size=(batch, *self.inputs)) + 0.3
            return inputs, rng.normal(size=(batch, *self.outputs))

        if self.uses is None:
            return one_use()
        inputs, grads = zip(*(one_use() for _ in range(self.uses)), strict=True)
        return list(inputs), list(grads)

    def vector(self, seed: int = 5) -> list[np.ndarray]:
        """Random numbers shaped like the parameters."""
        rng = np.random.RandomState(seed)
        return [rng.normal(size=shape) for shape in self.shapes]


def _filter_params(shape, bias=False):
    """Something with a shape, for constructors that look at parameters."""
    weights = tf.zeros(shape, tf.float64)
    return (weights, tf.zeros(shape[-1:], tf.float64)) if bias else weights


CASES = (
    Case(
        "naive full",
        lambda lc: fb.NaiveFullFB(lc, (tf.zeros([2, 3]), tf.zeros([3]))),
        ((2, 3), (3,)),
    ),
    Case("naive diagonal", lambda lc: fb.NaiveDiagonalFB(lc, tf.zeros([2, 3])), (2, 3)),
    Case(
        "dense diagonal",
        lambda lc: fb.FullyConnectedDiagonalFB(lc, has_bias=True),
        ((3, 2), (2,)),
        (3,),
        (2,),
    ),
    Case(
        "dense kron",
        lambda lc: fb.FullyConnectedKFACBasicFB(lc, has_bias=True),
        ((3, 2), (2,)),
        (3,),
        (2,),
    ),
    Case(
        "dense kron with a bias of rank 2",
        lambda lc: fb.FullyConnectedKFACBasicFB(lc, has_bias=True),
        ((3, 2), (1, 2)),
        (3,),
        (2,),
    ),
    Case(
        "dense kron of weights of rank 3",
        lambda lc: fb.FullyConnectedKFACBasicFB(lc),
        (2, 2, 3),
        (4,),
        (3,),
    ),
    Case(
        "dense kron, diagonal input",
        lambda lc: fb.FullyConnectedKFACBasicFB(lc, False, True),
        (3, 2),
        (3,),
        (2,),
    ),
    Case(
        "dense kron, diagonal output",
        lambda lc: fb.FullyConnectedKFACBasicFB(lc, True, False, True),
        ((3, 2), (2,)),
        (3,),
        (2,),
    ),
    Case(
        "dense kron, both diagonal",
        lambda lc: fb.FullyConnectedKFACBasicFB(lc, True, True, True),
        ((3, 2), (2,)),
        (3,),
        (2,),
    ),
    Case(
        "embedding",
        lambda lc: fb.FullyConnectedKFACBasicFB(lc, False, True),
        (5, 2),
        (),
        (2,),
        ids=5,
    ),
    Case(
        "conv diagonal",
        lambda lc: fb.ConvDiagonalFB(
            lc, _filter_params((2, 2, 2, 2), bias=True), (1, 2, 1, 1), "SAME"
        ),
        ((2, 2, 2, 2), (2,)),
        (3, 3, 2),
        (2, 3, 2),
    ),
    Case(
        "grouped conv diagonal",
        lambda lc: fb.ConvDiagonalFB(
            lc, _filter_params((2, 2, 1, 4)), (1, 1, 1, 1), "SAME"
        ),
        (2, 2, 1, 4),
        (3, 3, 2),
        (3, 3, 4),
    ),
    Case(
        "conv kron",
        lambda lc: fb.ConvKFCBasicFB(
            lc,
            _filter_params((2, 2, 2, 2), bias=True),
            "VALID",
            strides=(1, 1, 2, 1),
            extract_patches_fn="extract_image_patches",
        ),
        ((2, 2, 2, 2), (2,)),
        (3, 4, 2),
        (2, 2, 2),
    ),
    Case(
        "conv kron, 1-D",
        lambda lc: fb.ConvKFCBasicFB(
            lc, _filter_params((2, 2, 3)), "SAME", strides=[2], data_format="NWC"
        ),
        (2, 2, 3),
        (5, 2),
        (3, 3),
    ),
    Case(
        "conv kron, 3-D",
        lambda lc: fb.ConvKFCBasicFB(lc, _filter_params((2, 1, 2, 1, 2)), "VALID"),
        (2, 1, 2, 1, 2),
        (3, 2, 2, 1),
        (2, 2, 1, 2),
    ),
    Case(
        "conv kron, SUA",
        lambda lc: fb.ConvKFCBasicFB(
            lc,
            _filter_params((2, 2, 3, 2), bias=True),
            "SAME",
            use_sua_approx_for_input_factor=True,
        ),
        ((2, 2, 3, 2), (2,)),
        (3, 3, 3),
        (3, 3, 2),
        only_inverse=True,
    ),
    Case(
        "conv reduce",
        lambda lc: fb.ConvKFCReduceFB(lc, _filter_params((2, 2, 2, 2), True), "SAME"),
        ((2, 2, 2, 2), (2,)),
        (3, 3, 2),
        (3, 3, 2),
    ),
    Case(
        "depthwise diagonal",
        lambda lc: fb.DepthwiseConvDiagonalFB(
            lc, _filter_params((2, 2, 3, 2)), (1, 1, 1, 1), "SAME"
        ),
        (2, 2, 3, 2),
        (3, 3, 3),
        (3, 3, 6),
    ),
    Case(
        "depthwise kron",
        lambda lc: fb.DepthwiseConvKFCBasicFB(
            lc, _filter_params((2, 1, 2, 2)), (1, 1, 1, 1), "VALID", rate=(2, 1)
        ),
        (2, 1, 2, 2),
        (4, 3, 2),
        (2, 3, 4),
    ),
    Case(
        "scale and shift, full",
        lambda lc: fb.ScaleAndShiftFullFB(lc, [1], [1]),
        ((1, 3), (3,)),
        (2, 3),
        (2, 3),
    ),
    Case(
        "scale, diagonal",
        lambda lc: fb.ScaleAndShiftDiagonalFB(lc, (1, 2), has_shift=False),
        (3,),
        (2, 2, 3),
        (2, 2, 3),
    ),
    Case(
        "dense, independent uses",
        lambda lc: fb.FullyConnectedMultiIndepFB(lc, has_bias=True),
        ((3, 2), (2,)),
        (3,),
        (2,),
        uses=USES,
    ),
    Case(
        "dense, independent uses, both diagonal",
        lambda lc: fb.FullyConnectedMultiIndepFB(lc, True, None, True, True),
        ((3, 2), (2,)),
        (3,),
        (2,),
        uses=USES,
    ),
    Case(
        "embedding, independent uses",
        lambda lc: fb.FullyConnectedMultiIndepFB(lc, diagonal_approx_for_input=True),
        (5, 2),
        (),
        (2,),
        uses=USES,
        ids=5,
    ),
    Case(
        "dense reduce",
        lambda lc: fb.FullyConnectedReduceFB(lc, has_bias=True),
        ((3, 2), (2,)),
        (3,),
        (2,),
        uses=USES,
    ),
    Case(
        "conv, independent uses",
        lambda lc: fb.ConvKFCBasicMultiIndepFB(
            lc, _filter_params((2, 1, 2, 2), bias=True), "SAME"
        ),
        ((2, 1, 2, 2), (2,)),
        (2, 2, 2),
        (2, 2, 2),
        uses=USES,
    ),
)


def case(name: str) -> Case:
    """The case of that name."""
    return next(c for c in CASES if c.name == name)


def constant(data: Any) -> Any:
    """Arrays as tensors, `Ids` as a deferred tensor that says so; lists as tuples."""
    if isinstance(data, (list, tuple)):
        return tuple(constant(part) for part in data)
    if isinstance(data, Ids):
        tensor = tf.constant(data.values, tf.int64)
        return _deferred(tensor, one_hot_depth=data.depth)
    return tf.constant(data)


def defer(data: Any) -> Any:
    """Tensors as deferred tensors."""
    if isinstance(data, tuple):
        return tuple(defer(part) for part in data)
    return _deferred(data) if isinstance(data, tf.Tensor) else data


def _deferred(tensor: tf.Tensor, one_hot_depth: int | None = None) -> Any:
    return deferred.DeferredTensor(
        lambda: tensor,
        tensor.shape,
        tensor.dtype,
        tensor.name,
        one_hot_depth=one_hot_depth,
    )


def shards(data: Any, count: int) -> list[Any]:
    """Equal parts of the batch of arrays."""
    if isinstance(data, list):
        parts = [shards(use, count) for use in data]
        return [list(uses) for uses in zip(*parts, strict=True)]
    if isinstance(data, Ids):
        return [Ids(part, data.depth) for part in np.split(data.values, count)]
    return np.split(data, count)


def register(
    the_case: Case,
    collection: Any,
    towers: int = 1,
    sources: int = 1,
    wrap: Callable[[Any], Any] = lambda data: data,
) -> tuple[fb.FisherBlock, tuple]:
    """A block with its towers, and the gradients for `instantiate_factors`.

    Args:
      the_case: what to make.
      collection: `LayerCollection` or a stand-in.
      towers: number of equal shards of the batch.
      sources: number of sources, with different gradients.
      wrap: applied to every structure of tensors.
    """
    block = the_case.make(collection)
    grads_list = []
    if the_case.inputs is None:
        for _ in range(towers):
            block.register_additional_tower(BATCH // towers)
        for seed in range(sources):
            grads_list.append(wrap(constant(the_case.arrays(seed=seed)[1])))
        return block, tuple(grads_list)
    inputs, _ = the_case.arrays()
    for source in range(sources):
        grads = shards(the_case.arrays(seed=source)[1], towers)
        grads_list.append(tuple(wrap(constant(shard)) for shard in grads))
    for tower, shard in enumerate(shards(inputs, towers)):
        # The block looks at no more than the shape of its outputs.
        block.register_additional_tower(wrap(constant(shard)), grads_list[0][tower])
    return block, tuple(grads_list)


def update(
    block: fb.FisherBlock,
    grads_list: tuple,
    damping: Any = DAMPING,
    exps: tuple[float, ...] = (),
    cholesky: bool = False,
) -> tf.Operation:
    """One statistics update followed by one inverse update, as one op."""
    block.instantiate_factors(grads_list, damping)
    factors = block._factors()
    for factor in factors:
        factor.instantiate_cov_variables()
    for exp in exps:
        block.register_matpower(exp)
    if cholesky:
        block.register_cholesky()
        block.register_cholesky_inverse()
    for factor in factors:
        factor.instantiate_inv_variables()
    covs = [factor.make_covariance_update_op(0.9, 1.0) for factor in factors]
    with tf.control_dependencies(covs):
        inverses = [op for f in factors for op in f.make_inverse_update_ops()]
        # A diagonal factor has no inverse to update.
        return tf.group(*inverses, *covs)


def flat(tensors: Any) -> np.ndarray:
    """Arrays, flattened row-major and concatenated."""
    parts = tensors if isinstance(tensors, (list, tuple)) else [tensors]
    return np.concatenate([np.reshape(part, [-1]) for part in parts])


def size(the_case: Case) -> int:
    """Number of parameters."""
    return sum(math.prod(shape) for shape in the_case.shapes)


def flat_tensor(tensors: Any) -> tf.Tensor:
    """Tensors, flattened row-major and concatenated."""
    return tf.concat([tf.reshape(t, [-1]) for t in tf.nest.flatten(tensors)], 0)
