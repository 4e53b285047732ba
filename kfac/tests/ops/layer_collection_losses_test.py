"""Losses: names, towers, coefficients, evaluation."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import layer_collection as lc_lib
from kfac.python.ops import loss_functions as lf
from kfac.python.ops.errors import MissingTargetsError
from kfac.tests import graph_kinds
from kfac.tests.ops.layer_collection_cases import BATCH, data, unchanged

tf1 = tf.compat.v1

# Method -> (class of the loss, name it gets, further positional arguments).
METHODS = {
    "register_categorical_predictive_distribution": (
        lf.CategoricalLogitsNegativeLogProbLoss,
        "categorical_predictive_distribution",
    ),
    "register_softmax_cross_entropy_loss": (
        lf.CategoricalLogitsNegativeLogProbLoss,
        "sparse_softmax_cross_entropy_loss",
    ),
    "register_onehot_categorical_predictive_distribution": (
        lf.OnehotCategoricalLogitsNegativeLogProbLoss,
        "onehot_categorical_predictive_distribution",
    ),
    "register_normal_predictive_distribution": (
        lf.NormalMeanNegativeLogProbLoss,
        "normal_predictive_distribution",
    ),
    "register_squared_error_loss": (
        lf.NormalMeanNegativeLogProbLoss,
        "squared_error_loss",
    ),
    "register_normal_mean_variance_predictive_distribution": (
        lf.NormalMeanVarianceNegativeLogProbLoss,
        "normal_mean_variance_predictive_distribution",
    ),
    "register_multi_bernoulli_predictive_distribution": (
        lf.MultiBernoulliNegativeLogProbLoss,
        "multi_bernoulli_predictive_distribution",
    ),
    "register_sigmoid_cross_entropy_loss": (
        lf.MultiBernoulliNegativeLogProbLoss,
        "sigmoid_cross_entropy_loss",
    ),
}


@pytest.fixture(autouse=True)
def graph(request):
    """A v1 graph, unless the test runs in a kind of graph of its own."""
    if "kind" in request.fixturenames:
        yield None
        return
    with tf.Graph().as_default() as g:
        yield g


@pytest.fixture
def lc(graph):
    return lc_lib.LayerCollection()


def _register(lc, method, **kwargs):
    """Registers a loss of new tensors; returns its first tensor."""
    first = data(3)
    rest = [data(3) + 1.0] if "mean_variance" in method else []
    assert getattr(lc, method)(first, *rest, **kwargs) is None
    return first


def test_a_new_collection_has_no_losses(lc):
    assert lc.losses == []
    assert lc.towers_by_loss == ()
    assert lc.eval_losses() == []
    with pytest.raises(ValueError, match="No loss"):
        lc.total_loss()
    with pytest.raises(ValueError, match="No loss"):
        lc.total_sampled_loss()
    with pytest.raises(ValueError, match="target_mode"):
        lc.eval_losses(target_mode="datum")
    with pytest.raises(ValueError, match="coeff_mode"):
        lc.total_loss(coeff_mode="squared")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_each_method_makes_its_loss_under_its_name(lc, method):
    loss_class, name = METHODS[method]
    targets = data(3)
    first = _register(lc, method, seed=3, targets=targets, coeff=0.25)
    (loss,) = lc.losses
    assert type(loss) is loss_class
    assert list(lc._loss_dict) == [name]
    assert loss.targets is targets
    assert loss._default_seed == 3
    assert tf.nest.flatten(loss.inputs)[0] is first
    assert lc.loss_coeffs[loss] == 0.25
    assert lc.loss_colocation_ops[loss] is first


@pytest.mark.parametrize("method", sorted(METHODS))
def test_nameless_losses_are_numbered_in_the_collection(lc, method):
    name = METHODS[method][1]
    with tf1.name_scope("somewhere"):
        _register(lc, method)
    with pytest.raises(ValueError, match="coeff"):
        _register(lc, method, coeff="bad")
    _register(lc, method, name=f"{name}_1")
    _register(lc, method, name="")
    other = lc_lib.LayerCollection()
    _register(other, method)
    assert list(lc._loss_dict) == [name, f"{name}_1", f"{name}_2"]
    assert list(other._loss_dict) == [name]


def test_squared_error_is_a_normal_loss_of_variance_one_half(lc):
    lc.register_squared_error_loss(data(3))
    lc.register_normal_predictive_distribution(data(3))
    lc.register_normal_predictive_distribution(data(3), 2.0)
    assert [loss._var for loss in lc.losses] == [0.5, 0.5, 2.0]


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("reuse", [True, tf1.AUTO_REUSE, "VARIABLE_SCOPE"])
def test_reuse_adds_a_tower_to_a_known_name(lc, method, reuse):
    _register(lc, method, name="one")
    _register(lc, method, name="two", coeff=2)
    with tf1.variable_scope("tower_1", reuse=True):
        _register(lc, method, name="one", reuse=reuse)
    assert [len(towers) for towers in lc.towers_by_loss] == [2, 1]
    assert [loss for towers in lc.towers_by_loss for loss in towers] == lc.losses
    assert lc._loss_dict["one"] == list(lc.towers_by_loss[0])
    assert len(lc.loss_coeffs) == len(lc.loss_colocation_ops) == 3
    assert [lc.loss_coeffs[loss] for loss in lc.losses] == [1.0, 1.0, 2]


def test_auto_reuse_of_an_unknown_name_makes_a_loss(lc):
    lc.register_squared_error_loss(data(2), name="new", reuse=tf1.AUTO_REUSE)
    lc.register_squared_error_loss(data(2), reuse=tf1.AUTO_REUSE)
    lc.register_squared_error_loss(data(2), reuse=tf1.AUTO_REUSE)
    assert list(lc._loss_dict) == ["new", "squared_error_loss", "squared_error_loss_1"]


def test_a_tower_needs_the_coefficient_of_the_first(lc):
    coeff = tf.constant(0.5)
    lc.register_squared_error_loss(data(2), name="loss", coeff=coeff)
    lc.register_squared_error_loss(data(2), name="loss", coeff=coeff, reuse=True)
    for other in (0.5, tf.constant(0.5), 1.0):
        with unchanged(lc), pytest.raises(ValueError, match="coefficient"):
            lc.register_squared_error_loss(
                data(2), name="loss", coeff=other, reuse=True
            )
    lc.register_squared_error_loss(data(2), name="plain", coeff=1)
    lc.register_squared_error_loss(data(2), name="plain", coeff=1.0, reuse=True)
    with unchanged(lc), pytest.raises(ValueError, match="coefficient"):
        lc.register_squared_error_loss(data(2), name="plain", coeff=coeff, reuse=True)


def test_a_loss_object_of_ones_own_can_be_registered(lc):
    loss = lf.MultiBernoulliNegativeLogProbLoss(data(2))
    op = data(1)
    assert lc._register_loss_function(loss, op, "mine", coeff=3) is None
    assert lc.losses == [loss]
    assert lc._loss_dict["mine"] == [loss]
    assert lc.loss_colocation_ops == {loss: op}
    assert lc.loss_coeffs == {loss: 3}


# Evaluation.


def _squared_error(prediction, targets):
    """Negative log-likelihood of variance 1/2, with its normalising constant."""
    error = np.sum((np.asarray(prediction) - targets) ** 2)
    return error + prediction.size * 0.5 * np.log(np.pi)


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
def test_losses_on_data_are_scaled_by_the_coefficient_mode(kind):
    rng = np.random.default_rng(0)
    predictions = rng.normal(size=[2, BATCH, 3])
    targets = rng.normal(size=[BATCH, 3])
    expected = np.array([_squared_error(p, targets) for p in predictions])

    def build():
        lc = lc_lib.LayerCollection()
        for prediction, coeff in zip(predictions, (4, tf.constant(9.0)), strict=True):
            lc.register_squared_error_loss(
                tf.constant(prediction), targets=tf.constant(targets), coeff=coeff
            )
        values = [lc.eval_losses(coeff_mode=m) for m in ("regular", "sqrt", "off")]
        return tf.convert_to_tensor(values), lc.total_loss(), lc.total_loss("sqrt")

    values, total, root = graph_kinds.Run(kind, build)()
    assert values.dtype == np.float64
    factors = np.array([[4, 9], [2, 3], [1, 1]])
    # The targets are float64: only rounding of that type is left, also for a
    # coefficient whose root is taken.
    np.testing.assert_allclose(values, factors * expected, rtol=1e-12)
    np.testing.assert_allclose(total, values[0].sum(), rtol=1e-12)
    np.testing.assert_allclose(root, values[1].sum(), rtol=1e-12)


def test_the_root_of_a_coefficient_has_the_precision_of_the_loss(lc):
    targets = tf.zeros([BATCH, 3], tf.float64)
    lc.register_squared_error_loss(targets + 1.0, targets=targets, coeff=2.0)
    with tf1.Session() as session:
        root, plain = session.run([lc.total_loss("sqrt"), lc.total_loss("off")])
    np.testing.assert_allclose(root, np.sqrt(2.0) * plain, rtol=1e-15)


def test_losses_on_samples_need_no_targets_and_follow_the_seed(lc):
    logits = tf.random.stateless_normal([BATCH, 5], [1, 2])
    lc.register_softmax_cross_entropy_loss(logits, seed=7, coeff=2.0)
    once = lc.total_sampled_loss()
    lc.register_softmax_cross_entropy_loss(logits, seed=7, coeff=2.0)
    tf1.set_random_seed(1)
    twice = lc.total_sampled_loss()
    with pytest.raises(MissingTargetsError):
        lc.eval_losses("data")
    tf1.set_random_seed(1)
    root = lc.total_sampled_loss(coeff_mode="sqrt")
    with tf1.Session() as session:
        values = session.run([twice, root])
        assert np.isfinite(session.run(once))
    # Equal seeds draw equal samples, so both losses and both modes see the same.
    np.testing.assert_allclose(values[0], np.sqrt(2.0) * values[1], rtol=1e-6)


def test_a_negative_coefficient_has_no_root(lc):
    lc.register_squared_error_loss(data(2), targets=data(2), coeff=-1.0)
    assert len(lc.eval_losses()) == 1
    with pytest.raises(ValueError, match="not negative"):
        lc.eval_losses(coeff_mode="sqrt")


def test_losses_are_evaluated_on_the_device_of_their_inputs(lc):
    with tf.device("/cpu:1"):
        prediction = data(2)
    lc.register_squared_error_loss(prediction, targets=data(2))
    (value,) = lc.eval_losses()
    assert value.device == prediction.device
    assert value.device.endswith("CPU:1") or value.device.endswith("cpu:1")
