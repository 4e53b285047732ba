"""What tests of the scanner share: small graphs, scanning, comparing collections."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import layer_collection as lc
from kfac.python.ops import utils
from kfac.python.ops.tensormatch import graph_search as gs
from kfac.tests import graph_kinds

tf1 = tf.compat.v1

BATCH = 5
GENERIC = "NaiveDiagonalFB"


def data(*shape, seed=0):
    """Float32 input whose leading dimension is the batch, known or not."""
    sizes = [BATCH if size is None else size for size in shape]
    value = np.random.default_rng(seed).normal(size=sizes).astype(np.float32)
    # Not a constant: the shape may be unknown, and it depends on nothing.
    return tf1.placeholder_with_default(value, shape)


def ids(*shape, depth=7):
    value = np.zeros([BATCH if size is None else size for size in shape], np.int32)
    return tf1.placeholder_with_default(value % depth, shape)


def variable(name, *shape):
    size = int(np.prod(shape)) if shape else 1
    value = np.linspace(-1.0, 1.0, size).reshape(shape).astype(np.float32)
    return graph_kinds.variable(value, name)


def collection_of(*outputs, name=None, reuse=False):
    """A collection with a squared error loss of each output, flattened to rows."""
    collection = lc.LayerCollection()
    for output in outputs:
        add_loss(collection, output, name, reuse)
    return collection


def add_loss(collection, output, name=None, reuse=False):
    sizes = output.shape.as_list()
    if len(sizes) != 2:
        output = tf.reshape(output, [-1, int(np.prod(sizes[1:]))])
    collection.register_squared_error_loss(output, name=name, reuse=reuse)


def scan(output, variables, batch_size=None, collection=None):
    """Scans what `output` depends on; returns the collection."""
    collection = collection or collection_of(output)
    gs.register_layers(collection, variables, batch_size=batch_size)
    return collection


def blocks(collection):
    """Names of parameters -> class of block."""
    return {
        names(params): type(block).__name__
        for params, block in collection.fisher_blocks.items()
    }


def names(params):
    group = params if isinstance(params, tuple) else (params,)
    return ",".join(v.name.split(":")[0] for v in group)


def reason(collection, v):
    return collection.generic_reasons[v.ref()]


def check_uses(collection, variables):
    """The audit of registered uses, as an optimizer makes it."""
    collection.finalize()
    collection.check_registration(variables)


def assert_equal_collections(first, second):
    """Same parameters, same kinds of blocks, the very same tensors."""
    assert blocks(first) == blocks(second)
    for params, block in first.fisher_blocks.items():
        other = second.fisher_blocks[params]
        assert getattr(block, "_num_uses", None) == getattr(other, "_num_uses", None)
        if not hasattr(block, "_inputs"):
            assert block._batch_sizes == other._batch_sizes
            continue
        for side in ("_inputs", "_outputs"):
            mine = tf.nest.flatten(getattr(block, side))
            theirs = tf.nest.flatten(getattr(other, side))
            for one, another in zip(mine, theirs, strict=True):
                assert one is another or resolved(one) is resolved(another)


def resolved(tensor):
    """The tensor itself if it was wrapped to carry a number of classes."""
    return tensor if isinstance(tensor, tf.Tensor) else tensor.resolve()


def subgraph(output):
    return utils.SubGraph([output])


def assert_generic(output, variables, text, others=None):
    """With a batch size: generic for this reason. Without: an error that says it."""
    collection = collection_of(output)
    with pytest.raises((ValueError, gs.AmbiguousRegistrationError), match=text):
        gs.register_layers(collection, variables)
    assert blocks(collection) == {}
    gs.register_layers(collection, variables, batch_size=BATCH)
    others = others or {}
    found = blocks(collection)
    for v in variables:
        name = v.name.split(":")[0]
        if not any(name in group.split(",") for group in others):
            assert found[name] == GENERIC
            others = {**others, name: GENERIC}
    assert found == others
    texts = [
        reason(collection, v)
        for v in variables
        if v.ref() in collection.generic_reasons
    ]
    assert any(text in each for each in texts), texts
    check_uses(collection, variables)
