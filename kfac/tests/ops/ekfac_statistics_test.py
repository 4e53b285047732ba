"""Squared coordinates of the gradients of examples, against slow NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import deferred, utils
from kfac.python.ops.fisher_factors import example_gradients, statistics
from kfac.tests import graph_kinds

tf1 = tf.compat.v1

BATCH = 5
# Sums of a few hundred float64 products.
TOLERANCE = dict(rtol=1e-11, atol=1e-11)


def orthogonal(size, seed):
    return np.linalg.qr(np.random.RandomState(seed).randn(size, size))[0]


def slow_sum_of_squares(rows, grads, input_basis, output_basis):
    """One example, source and use at a time."""
    total = 0
    for source in grads:
        for b in range(len(rows)):
            gradient = sum(
                np.outer(a, g) for a, g in zip(rows[b], source[b], strict=True)
            )
            total += (input_basis.T @ gradient @ output_basis) ** 2
    return total


def run(build):
    return graph_kinds.Run(graph_kinds.V1_ON, build)()


def dynamic(array):
    """A tensor of unknown batch size."""
    return tf1.placeholder_with_default(array, [None, *array.shape[1:]])


@pytest.mark.parametrize("sources", [1, 3])
# A single use; few, where rotating the rows is cheaper; many, where it is not.
@pytest.mark.parametrize("uses", [1, 2, 9])
def test_the_sum_of_squares_is_that_of_every_examples_gradient(uses, sources):
    rng = np.random.RandomState(uses)
    rows = rng.randn(BATCH, uses, 4)
    grads = [rng.randn(BATCH, uses, 3) for _ in range(sources)]
    bases = orthogonal(4, 1), orthogonal(3, 2)
    actual = run(
        lambda: example_gradients.sum_of_squares(
            tf.constant(rows), [tf.constant(g) for g in grads], *bases
        )
    )
    np.testing.assert_allclose(
        actual, slow_sum_of_squares(rows, grads, *bases), **TOLERANCE
    )


@pytest.mark.parametrize("has_dynamic_batch", [False, True])
@pytest.mark.parametrize("limit", [1, 50, 1 << 24])
def test_chunks_of_the_batch_give_the_same_mean(limit, has_dynamic_batch, monkeypatch):
    monkeypatch.setattr(statistics, "MAX_CHUNK_ELEMENTS", limit)
    rng = np.random.RandomState(0)
    images, grads = rng.randn(BATCH, 4, 4, 2), rng.randn(2, BATCH, 3, 3, 3)
    bases = orthogonal(9, 1), orthogonal(3, 2)
    wrap = dynamic if has_dynamic_batch else tf.constant

    def build():
        examples = example_gradients.ConvolutionExamples(
            (wrap(images),),
            tuple((wrap(source),) for source in grads),
            (2, 2, 2, 3),
            "VALID",
            9,
            has_bias=True,
        )
        return example_gradients.mean_of_squares(examples, 0, [0, 1], *bases)

    patches = np.stack(
        [
            images[:, i : i + 2, j : j + 2].reshape(BATCH, 8)
            for i in range(3)
            for j in range(3)
        ],
        axis=1,
    )
    rows = np.concatenate([patches, np.ones((BATCH, 9, 1))], axis=2)
    expected = slow_sum_of_squares(rows, grads.reshape(2, BATCH, 9, 3), *bases)
    np.testing.assert_allclose(run(build), expected / BATCH, **TOLERANCE)


def check_examples(make, rows, grads):
    """The data of tower 0 are `rows` and `grads` `[batch, uses, features]`."""

    def build():
        examples = make()
        size = examples.batch_size(0, 0)
        return {
            "rows": examples.rows(examples.inputs(0)),
            "grads": examples.grads(0, 0),
            "batch": tf.convert_to_tensor(size),
            "sides": [
                tf.constant(n) for n in (examples.uses, examples.d_in, examples.d_out)
            ],
        }

    values = run(build)
    np.testing.assert_allclose(values["rows"], rows, rtol=1e-14)
    np.testing.assert_allclose(values["grads"], grads, rtol=1e-14)
    assert values["batch"] == len(rows)
    assert values["sides"] == [rows.shape[1], rows.shape[2], grads.shape[2]]


def layouts(use_first):
    """Arrays `[uses, batch, ...]` as the layouts that blocks hand over."""
    uses, batch = use_first.shape[:2]
    folded = use_first.reshape(uses * batch, *use_first.shape[2:])
    return {
        "folded": lambda: tf.constant(folded),
        "partitioned": lambda: utils.PartitionedTensor(
            tuple(tf.constant(use) for use in use_first)
        ),
        "deferred": lambda: deferred.DeferredTensor(
            lambda: tf.constant(folded), folded.shape, tf.float64, "folded:0"
        ),
        "dynamic": lambda: dynamic(folded),
    }


@pytest.mark.parametrize("layout", ["canonical", "folded", "partitioned", "deferred"])
def test_examples_of_a_dense_layer_lead_whatever_the_layout(layout):
    rng = np.random.RandomState(0)
    inputs, grads = rng.randn(3, BATCH, 2), rng.randn(3, BATCH, 4)
    of_inputs, of_grads = (
        {"canonical": lambda data=data: tf.constant(data), **layouts(data)}[layout]
        for data in (inputs, grads)
    )
    ones = np.ones((BATCH, 3, 1))
    check_examples(
        lambda: example_gradients.Examples(
            (of_inputs(),), ((of_grads(),),), has_bias=True, num_uses=3
        ),
        np.concatenate([np.swapaxes(inputs, 0, 1), ones], axis=2),
        np.swapaxes(grads, 0, 1),
    )


@pytest.mark.parametrize("layout", ["folded", "partitioned", "deferred", "dynamic"])
def test_examples_of_a_convolution_have_locations_of_all_uses(layout):
    rng = np.random.RandomState(0)
    images, grads = rng.randn(2, BATCH, 3, 5, 2), rng.randn(2, BATCH, 2, 2, 3)
    mask = np.array([1.0, 0, 1, 1, 0, 1, 1, 1]).reshape(2, 2, 2)
    of_images, of_grads = (layouts(data)[layout] for data in (images, grads))
    patches = np.stack(
        [
            images[use][:, i : i + 2, j : j + 3 : 2] * mask
            for use in range(2)
            for i in range(2)
            for j in (0, 2)
        ],
        axis=1,
    )
    check_examples(
        lambda: example_gradients.ConvolutionExamples(
            (of_images(),),
            ((of_grads(),),),
            (2, 2, 2, 3),
            "VALID",
            4,
            strides=(1, 1, 2, 1),
            dilation_rate=(1, 1, 2, 1),
            extract_patches_fn="extract_image_patches",
            patch_mask=tf.constant(mask),
            num_uses=2,
        ),
        patches.reshape(BATCH, 8, 8),
        np.swapaxes(grads, 0, 1).reshape(BATCH, 8, 3),
    )


def test_mean_squares_of_features_are_the_rotated_second_moment():
    rows = np.random.RandomState(0).randn(BATCH, 3, 4)
    basis = orthogonal(4, 1)
    actual = run(
        lambda: example_gradients.mean_square_of_features(tf.constant(rows), basis)
    )
    flat = rows.reshape(-1, 4)
    moment = flat.T @ flat / len(flat)
    np.testing.assert_allclose(actual, np.diag(basis.T @ moment @ basis), **TOLERANCE)
