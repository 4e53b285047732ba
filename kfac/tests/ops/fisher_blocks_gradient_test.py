"""The gradient rebuilt from captured data is the gradient of the parameters."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import deferred, layer_collection
from kfac.python.ops import fisher_blocks as fb
from kfac.tests import graph_kinds

tf1 = tf.compat.v1
BATCH = 3
RNG = np.random.RandomState(0)


def _normal(*shape):
    return tf.constant(RNG.normal(size=shape))


def _true_and_rebuilt(block, params, towers):
    """Gradients of a nonlinear scalar by differentiation and from the block.

    `towers` holds pairs of inputs and outputs, each a tensor or a tuple over uses.
    """
    for inputs, outputs in towers:
        block.register_additional_tower(inputs, outputs)
    flat = tf.nest.flatten([outputs for _, outputs in towers])
    loss = tf.add_n([tf.reduce_sum(tf.sin(o) + o**2) for o in flat])
    structure = block.tensors_to_compute_grads()
    grads = tf.nest.pack_sequence_as(structure, tf.gradients(loss, flat))
    return tf.gradients(loss, params), tf.nest.flatten(block.rebuild_gradient(grads))


def _check(build, kind=graph_kinds.V1_ON):
    """`build` returns pairs of lists of tensors, by name."""
    for name, (true, rebuilt) in graph_kinds.Run(kind, build)().items():
        assert len(true) == len(rebuilt), name
        for expected, actual in zip(true, rebuilt, strict=True):
            assert actual.shape == expected.shape, name
            np.testing.assert_allclose(
                actual, expected, rtol=1e-10, atol=1e-11, err_msg=name
            )


def _grid(ranks_and_kernels):
    """Kernels, paddings, strides and dilations; TensorFlow has no two of the last."""
    for kernel, padding in itertools.product(ranks_and_kernels, ("SAME", "VALID")):
        for stride, dilation in ((1, 1), (2, 1), (1, 2)):
            yield kernel, padding, [stride] * len(kernel), [dilation] * len(kernel)


@pytest.mark.parametrize("has_bias", (False, True))
def test_of_convolutions_of_any_rank(has_bias):
    def build():
        results = {}
        kernels = ((1,), (3,), (1, 1), (2, 3), (2, 1, 2))
        for kernel, padding, strides, dilations in _grid(kernels):
            size = {1: (7,), 2: (6, 5), 3: (4, 3, 5)}[len(kernel)]
            weights, bias = _normal(*kernel, 2, 3), _normal(3)
            inputs = _normal(BATCH, *size, 2)
            outputs = tf.nn.convolution(
                inputs, weights, strides=strides, padding=padding, dilations=dilations
            )
            params = (weights, bias) if has_bias else weights
            block = fb.ConvKFCBasicFB(
                layer_collection.LayerCollection(),
                params,
                padding,
                strides=strides,
                dilation_rate=dilations,
            )
            results[str((kernel, padding, strides, dilations))] = _true_and_rebuilt(
                block,
                tf.nest.flatten(params),
                [(inputs, outputs + bias if has_bias else outputs)],
            )
            assert block._count_locations() == np.prod(outputs.shape[1:-1].as_list())
        return results

    _check(build)


def test_of_diagonal_and_depthwise_and_grouped_convolutions():
    def build():
        results = {}
        for kernel, padding, strides, dilations in _grid([(2, 3)]):
            key = str((padding, strides, dilations))
            four = dict(strides=[1, *strides, 1], padding=padding, data_format="NHWC")
            collection = layer_collection.LayerCollection()
            inputs = _normal(BATCH, 6, 5, 4)
            convolve = dict(strides=strides, padding=padding, dilations=dilations)

            weights = _normal(*kernel, 4, 3)
            block = fb.ConvDiagonalFB(
                collection, weights, dilations=[1, *dilations, 1], **four
            )
            outputs = tf.nn.convolution(inputs, weights, **convolve)
            results["plain" + key] = _true_and_rebuilt(
                block, [weights], [(inputs, outputs)]
            )

            weights = _normal(*kernel, 2, 6)  # Two groups.
            block = fb.ConvDiagonalFB(
                collection, weights, dilations=[1, *dilations, 1], **four
            )
            outputs = tf.concat(
                [
                    tf.nn.convolution(part, filter, **convolve)
                    for part, filter in zip(
                        tf.split(inputs, 2, axis=-1),
                        tf.split(weights, 2, axis=-1),
                        strict=True,
                    )
                ],
                axis=-1,
            )
            results["grouped" + key] = _true_and_rebuilt(
                block, [weights], [(inputs, outputs)]
            )

            weights = _normal(*kernel, 4, 2)
            outputs = tf.nn.depthwise_conv2d(
                inputs, weights, four["strides"], padding, dilations=dilations
            )
            for cls in (fb.DepthwiseConvDiagonalFB, fb.DepthwiseConvKFCBasicFB):
                block = cls(collection, weights, rate=dilations, **four)
                results[cls.__name__ + key] = _true_and_rebuilt(
                    block, [weights], [(inputs, outputs)]
                )
        return results

    _check(build)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_of_dense_layers_with_any_number_of_uses(kind):
    uses = 3

    def build():
        collection = layer_collection.LayerCollection()
        results = {}
        weights, bias = _normal(4, 2), _normal(2)
        params = [weights, bias]

        towers = [(x, x @ weights + bias) for x in (_normal(BATCH, 4), _normal(2, 4))]
        for cls in (fb.FullyConnectedKFACBasicFB, fb.FullyConnectedDiagonalFB):
            block = cls(collection, has_bias=True)
            results[cls.__name__] = _true_and_rebuilt(block, params, towers)

        listed = tuple(_normal(BATCH, 4) for _ in range(uses))
        outputs = tuple(x @ weights + bias for x in listed)
        folded = tf.concat(listed, axis=0)
        formats = {
            "lists": (listed, outputs),
            "folded": (folded, folded @ weights + bias),
            "folded inputs": (tf.concat(listed, axis=0), outputs),
            "rank 3": (tf.stack(listed), tf.stack(listed) @ weights + bias),
        }
        for cls in (
            fb.FullyConnectedMultiIndepFB,
            fb.FullyConnectedReduceFB,
            fb.FullyConnectedSeriesFB,
        ):
            for name, tower in formats.items():
                block = cls(collection, has_bias=True, num_uses=uses)
                results[cls.__name__ + name] = _true_and_rebuilt(block, params, [tower])
        return results

    _check(build, kind)


def test_of_convolutions_with_several_uses():
    def build():
        collection = layer_collection.LayerCollection()
        weights, bias = _normal(2, 2, 2, 3), _normal(3)
        listed = tuple(_normal(BATCH, 4, 3, 2) for _ in range(2))

        def layer(x):
            return tf.nn.convolution(x, weights, padding="VALID") + bias

        folded = tf.concat(listed, axis=0)
        formats = {
            "lists": (listed, tuple(layer(x) for x in listed)),
            "folded": (folded, layer(folded)),
        }
        return {
            name: _true_and_rebuilt(
                fb.ConvKFCBasicMultiIndepFB(
                    collection, (weights, bias), "VALID", num_uses=2
                ),
                [weights, bias],
                [tower],
            )
            for name, tower in formats.items()
        }

    _check(build)


def test_of_embeddings_is_dense_and_adds_repeated_ids():
    def build():
        collection = layer_collection.LayerCollection()
        table = _normal(5, 2)

        def lookup(*ids):
            tensor = tf.constant(ids)
            captured = deferred.DeferredTensor(
                lambda: tensor, tensor.shape, tensor.dtype, tensor.name, one_hot_depth=5
            )
            return captured, tf.nn.embedding_lookup(table, tensor)

        first, second = lookup(1, 1, 4), lookup(0, 4, 1)
        single = fb.FullyConnectedKFACBasicFB(collection, False, True)
        several = fb.FullyConnectedMultiIndepFB(
            collection, diagonal_approx_for_input=True
        )
        both = tuple(zip(first, second, strict=True))
        results = {
            "single": _true_and_rebuilt(single, table, [first]),
            "several": _true_and_rebuilt(several, table, [both]),
        }
        return {
            name: ([tf.convert_to_tensor(true[0])], rebuilt)
            for name, (true, rebuilt) in results.items()
        }

    _check(build)


def test_of_elementwise_layers_sums_over_the_broadcast_axes():
    def build():
        collection = layer_collection.LayerCollection()
        results = {}
        for scale_shape, shift_shape, scale_dims, shift_dims in (
            ((4,), (4,), (1, 2), (1, 2)),
            ((2, 3, 4), (4,), (), (1, 2)),
            ((3, 4), (2, 1, 4), (1,), (2,)),
        ):
            scale, shift = _normal(*scale_shape), _normal(*shift_shape)
            inputs = _normal(BATCH, 2, 3, 4)
            block = fb.ScaleAndShiftFullFB(collection, scale_dims, shift_dims)
            true, rebuilt = _true_and_rebuilt(
                block, [scale, shift], [(inputs, inputs * scale + shift)]
            )
            # The block has no parameters to take the shape [2, 1, 4] from.
            rebuilt[1] = tf.reshape(rebuilt[1], shift_shape)
            results[str((scale_shape, shift_shape))] = true, rebuilt

            block = fb.ScaleAndShiftDiagonalFB(collection, scale_dims, has_shift=False)
            results[str(scale_shape)] = _true_and_rebuilt(
                block, [scale], [(inputs, inputs * scale)]
            )
        return results

    _check(build)


def test_has_the_shapes_of_the_registered_parameters():
    def build():
        collection = layer_collection.LayerCollection()
        weights = graph_kinds.variable(RNG.normal(size=(2, 2, 3)), "weights")
        bias = graph_kinds.variable(RNG.normal(size=(1, 3)), "bias")
        scale = graph_kinds.variable(RNG.normal(size=(1, 1, 4)), "scale")
        inputs = _normal(BATCH, 4)
        outputs = inputs @ tf.reshape(weights, [4, 3]) + bias
        dense = fb.FullyConnectedKFACBasicFB(collection, has_bias=True)
        collection.fisher_blocks[weights, bias] = dense
        images = _normal(BATCH, 2, 4)
        elementwise = fb.ScaleAndShiftFullFB(collection, (1,), has_shift=False)
        collection.fisher_blocks[scale] = elementwise
        return {
            "dense": _true_and_rebuilt(dense, [weights, bias], [(inputs, outputs)]),
            "scale": _true_and_rebuilt(
                elementwise, [scale], [(images, images * scale)]
            ),
        }

    _check(build)


def test_uses_the_sub_batch_if_there_is_one():
    def build():
        weights, inputs = _normal(4, 2), _normal(BATCH, 4)
        part = inputs[:2]
        outputs = part @ weights
        block = fb.FullyConnectedKFACBasicFB(layer_collection.LayerCollection())
        block.use_sub_batch(
            lambda tensor: part if tensor is inputs else tensor, lambda size: 2
        )
        return {"part": _true_and_rebuilt(block, [weights], [(inputs, outputs)])}

    _check(build)


def test_a_patch_mask_masks_the_gradient():
    def build():
        weights = _normal(2, 2, 2, 3)
        mask = np.array([1.0, 0, 0, 1, 1, 1, 0, 1]).reshape(2, 2, 2)
        inputs = _normal(BATCH, 4, 4, 2)
        outputs = tf.nn.convolution(inputs, weights * mask[..., None], padding="SAME")
        block = fb.ConvKFCBasicFB(
            layer_collection.LayerCollection(), weights, "SAME", patch_mask=mask
        )
        return {"masked": _true_and_rebuilt(block, [weights], [(inputs, outputs)])}

    _check(build)


def test_generic_blocks_have_nothing_to_rebuild_from():
    with tf.Graph().as_default():
        params = tf.zeros([2])
        for cls in (fb.NaiveDiagonalFB, fb.NaiveFullFB):
            block = cls(layer_collection.LayerCollection(), params)
            assert block.rebuild_gradient(params) is None
