"""Rebuilt gradients agree where a registration is right, and name it where not."""

import math

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import layer_collection as lc_lib
from kfac.python.ops import verification
from kfac.python.ops.verification import Agreement, LayerVerificationError
from kfac.tests import graph_kinds

BATCH = 5
FLOAT = np.float64


class Net:
    """Embedding, convolution, scale and shift, shared dense layer, dense layer."""

    def __init__(self, penalty=0.0, drop_use=False, scale=1.0, nonlinear=False):
        rng = np.random.default_rng(3)

        def parameter(name, *shape):
            return graph_kinds.variable(rng.normal(size=shape), name, FLOAT)

        self.table = parameter("table", 9, 16)
        self.filter = parameter("filter", 2, 2, 1, 3)
        self.filter_bias = parameter("filter_bias", 3)
        self.gain = parameter("gain", 3)
        self.shift = parameter("shift", 3)
        self.shared = parameter("shared", 27, 27)
        self.shared_bias = parameter("shared_bias", 27)
        self.out = parameter("out", 27, 2)
        self.temperature = parameter("temperature")

        ids = tf.constant(rng.integers(0, 9, size=[BATCH]), tf.int32)
        embedded = tf.gather(self.table, ids)
        image = tf.reshape(embedded, [BATCH, 4, 4, 1])
        conv = tf.nn.conv2d(image, self.filter, 1, "VALID") + self.filter_bias
        activations = tf.tanh(conv)
        scaled = activations * self.gain + self.shift
        first = tf.reshape(scaled, [BATCH, 27])
        uses = [first]
        outputs = []
        for _ in range(2):
            outputs.append(tf.matmul(uses[-1], self.shared) + self.shared_bias)
            uses.append(tf.tanh(outputs[-1]))
        logits = tf.matmul(uses[-1], self.out)
        scaled_logits = logits * scale
        logits_seen = tf.tanh(scaled_logits) if nonlinear else scaled_logits
        self.logits = logits_seen * self.temperature
        self.loss = tf.reduce_sum(self.logits**2 * rng.normal(size=[BATCH, 2]))
        self.loss += penalty * tf.reduce_sum(self.filter**2)

        self.lc = lc_lib.LayerCollection()
        self.lc.register_fully_connected(self.table, ids, embedded, dense_inputs=False)
        self.lc.register_conv2d(
            (self.filter, self.filter_bias), [1, 1, 1, 1], "VALID", image, conv
        )
        self.lc.register_scale_and_shift((self.gain, self.shift), activations, scaled)
        count = 1 if drop_use else 2
        self.lc.register_fully_connected_multi(
            (self.shared, self.shared_bias), uses[:count], outputs[:count]
        )
        self.lc.register_fully_connected(self.out, uses[-1], logits_seen)
        self.lc.register_generic(self.temperature, BATCH)

    def agreements(self):
        return verification.compare_gradients_of(self.lc, self.loss)


LAYERS = ["table", "filter", "gain", "shared", "out"]


def _evaluate(kind=graph_kinds.V1_ON, **options):
    run = graph_kinds.Run(kind, lambda: Net(**options).agreements())
    # In a conditional's branch names of variables are prefixed.
    return {
        name.split(",")[0].rpartition("/")[2]: Agreement(*agreement)
        for name, agreement in run().items()
    }


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
def test_a_right_registration_rebuilds_every_gradient(kind):
    agreements = _evaluate(kind)
    # Generic parameters capture nothing to rebuild from.
    assert list(agreements) == LAYERS
    for agreement in agreements.values():
        # float64 sums of at most some hundred products in another order.
        assert agreement.relative_error < 1e-12
        assert math.isclose(agreement.scale, 1.0, rel_tol=1e-12)
        assert math.isclose(agreement.cosine, 1.0, rel_tol=1e-12)
    verification.check(agreements, tolerance=1e-12)


@pytest.mark.parametrize(
    ("options", "layer", "cause"),
    [
        ({"penalty": 3.0}, "filter", "penalty"),
        ({"drop_use": True}, "shared", "not registered"),
        ({"scale": 2.0}, "out", "0.5 times"),
        ({"nonlinear": True}, "out", "nonlinearity"),
    ],
    ids=["penalty on weights", "missing use", "constant factor", "after a tanh"],
)
def test_a_wrong_registration_is_named_with_its_cause(options, layer, cause):
    agreements = _evaluate(**options)
    with pytest.raises(LayerVerificationError, match=f"{layer}: relative") as error:
        verification.check(agreements)
    assert list(error.value.layers) == [layer]
    assert error.value.layers[layer].relative_error > 0.01
    assert cause in str(error.value)
    assert isinstance(error.value, ValueError)


def test_outputs_that_the_loss_does_not_depend_on_are_told_apart():
    def build():
        w = graph_kinds.variable(np.ones([2, 2]), "w", FLOAT)
        v = graph_kinds.variable(np.ones([2, 2]), "v", FLOAT)
        x = tf.ones([BATCH, 2], FLOAT)
        lc = lc_lib.LayerCollection()
        lc.register_fully_connected(w, x, tf.matmul(x, w))  # Not the one used below.
        lc.register_fully_connected(v, x, tf.matmul(x, v))  # Not used at all.
        loss = tf.reduce_sum(tf.matmul(x, w))
        return verification.compare_gradients_of(lc, loss)

    agreements = graph_kinds.Run(graph_kinds.V1_ON, build)()
    assert agreements["v"] == (0.0, 0.0, 0.0)
    assert agreements["w"].relative_error == 1.0
    with pytest.raises(LayerVerificationError, match="is zero") as error:
        verification.check(agreements)
    assert list(error.value.layers) == ["w"]


def test_towers_are_summed():
    def build():
        w = graph_kinds.variable(np.ones([2, 2]), "w", FLOAT)
        lc = lc_lib.LayerCollection()
        loss = 0.0
        for tower in range(2):
            x = tf.ones([BATCH, 2], FLOAT) * (tower + 1)
            y = tf.matmul(x, w)
            lc.register_fully_connected(w, x, y, reuse=tower > 0)
            loss += tf.reduce_sum(y**2)
        return verification.compare_gradients_of(lc, loss)

    agreements = graph_kinds.Run(graph_kinds.V1_ON, build)()
    assert agreements["w"].relative_error < 1e-12


def test_groups_of_one_name_are_told_apart():
    variables = [tf.Variable(np.ones([2, 2])) for _ in range(3)]

    def build():
        lc = lc_lib.LayerCollection()
        loss = 0.0
        for w in variables:
            x = tf.ones([BATCH, 2], FLOAT)
            y = tf.matmul(x, w)
            lc.register_fully_connected(w, x, y)
            loss += tf.reduce_sum(y**2)
        return verification.compare_gradients_of(lc, loss)

    agreements = graph_kinds.Run(graph_kinds.FUNCTION, build)()
    assert list(agreements) == ["Variable", "Variable #2", "Variable #3"]


def test_the_gradients_can_come_from_anywhere():
    def build():
        w = graph_kinds.variable(np.ones([2, 2]), "w", FLOAT)
        b = graph_kinds.variable(np.ones([2]), "b", FLOAT)
        x = tf.ones([BATCH, 2], FLOAT)
        lc = lc_lib.LayerCollection()
        lc.register_fully_connected((w, b), x, tf.matmul(x, w) + b)
        grads = tf.ones([BATCH, 2], FLOAT)
        true = tf.fill([2, 2], tf.constant(BATCH, FLOAT)), 2.0 * tf.ones([2], FLOAT)
        with pytest.raises(ValueError, match="1 blocks, but 0 output"):
            verification.compare(lc, [], [true])
        return verification.compare(lc, [(grads,)], [true])

    agreement = graph_kinds.Run(graph_kinds.V1_ON, build)()["w, b"]
    # Rebuilt: five ones in every entry; true: 5 in the weights and 2 in the bias.
    rebuilt, true = np.full(6, 5.0), np.array([5.0] * 4 + [2.0] * 2)
    error = np.linalg.norm(rebuilt - true) / np.linalg.norm(rebuilt)
    np.testing.assert_allclose(agreement.relative_error, error, rtol=1e-12)
    np.testing.assert_allclose(agreement.scale, rebuilt @ true / (true @ true))
    cosine = rebuilt @ true / np.linalg.norm(rebuilt) / np.linalg.norm(true)
    np.testing.assert_allclose(agreement.cosine, cosine, rtol=1e-12)


def test_nan_is_a_disagreement():
    nan = float("nan")
    with pytest.raises(LayerVerificationError, match="NaN"):
        verification.check({"layer": Agreement(nan, nan, nan)})


def test_nothing_to_compare_is_no_disagreement():
    assert verification.check({}) is None
    assert verification.check({"layer": Agreement(9e-4, 1.0, 1.0)}) is None
