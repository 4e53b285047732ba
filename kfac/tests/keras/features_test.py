"""What Keras lets one do in training, with Kfac."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kfac.tests.keras import keras_cases as cases


def test_one_output_weighted_by_class_sample_or_mask_is_the_same_step():
    x, y = cases.data()
    weights = np.where(y == 1, 2.0, 0.5).astype(np.float32)
    results = []
    for fit in (
        {"class_weight": {0: 0.5, 1: 2.0, 2: 0.5}},
        {"sample_weight": weights},
    ):
        keras.utils.set_random_seed(5)
        model = cases.sequential()
        cases.make(model)
        cases.losses_of_fit(model, x, y, epochs=2, **fit)
        results.append(cases.weights(model))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_masked_steps_have_no_part_in_the_statistics():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 8, size=(32, 4))
    ids[:, 2:] = 0  # Padding.
    y = rng.integers(3, size=(32, 4))
    moments = []
    for length in (4, 2):
        keras.utils.set_random_seed(6)
        model = keras.Sequential(
            [
                keras.Input((length,), dtype="int32"),
                layers.Embedding(8, 5, mask_zero=True),
                layers.Dense(3),
            ]
        )
        optimizer = cases.make(model, seed=2, estimation_mode="exact")
        model.train_on_batch(ids[:, :length], y[:, :length])
        name = "kfac/FisherEstimator/dense/kernel/output/cov/var"
        uses = length  # Second moments are means over all steps, masked or not.
        moments.append(uses * optimizer.state_variable(name).numpy())
    # The mean of the loss is over the 2 steps that are not masked, in both cases.
    np.testing.assert_allclose(moments[0], moments[1], rtol=1e-5)


def test_several_outputs_with_losses_and_weights_of_their_own():
    inputs = keras.Input((cases.FEATURES,))
    hidden = layers.Dense(6, activation="tanh")(inputs)
    outputs = {
        "kind": layers.Dense(cases.CLASSES, name="kind")(hidden),
        "size": layers.Dense(1, name="size")(hidden),
        "unused": layers.Dense(2, name="unused")(hidden),
    }
    model = keras.Model(inputs, outputs)
    x, y = cases.data()
    losses = {"kind": cases.sparse_logits(), "size": "mse"}
    cases.make(
        model, losses, {"loss_weights": {"kind": 1.0, "size": 0.3}}, learning_rate=0.3
    )
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        targets = {"kind": y, "size": x[:, :1]}
        history = cases.losses_of_fit(model, x, targets, epochs=6)
    assert history[-1] < 0.8 * history[0]


def test_schedules_drive_learning_rate_and_damping():
    schedule = keras.optimizers.schedules.ExponentialDecay
    model = cases.sequential()
    optimizer = cases.make(
        model, learning_rate=schedule(0.2, 2, 0.5), damping=schedule(0.4, 1, 0.5)
    )
    x, y = cases.data()
    cases.losses_of_fit(model, x, y, epochs=3)
    # The damping is that of the last step, of which there were two before.
    np.testing.assert_allclose(float(optimizer.damping), 0.1, rtol=1e-6)
    np.testing.assert_allclose(float(optimizer.learning_rate), 0.2 * 0.5**1.5, 1e-6)
    with pytest.raises(AttributeError, match="Can't set attribute: damping"):
        optimizer.damping = 1.0


def test_accumulated_gradients_move_the_weights_by_their_mean():
    x, y = cases.data()
    results = []
    for options, batches in (
        ({"gradient_accumulation_steps": 2}, [slice(0, 24), slice(24, 48)]),
        ({}, [slice(0, 48)]),
    ):
        keras.utils.set_random_seed(7)
        model = cases.sequential()
        # With an all-dominating damping the preconditioner is 1 / damping for both.
        cases.make(model, damping=1e12, learning_rate=1e11, **options)
        for batch in batches:
            model.train_on_batch(x[batch], y[batch])
        results.append(cases.weights(model))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_weight_decay_is_that_of_keras():
    # Zero inputs: no gradient, and no curvature, for the kernel.
    x, y = np.zeros((8, cases.FEATURES), np.float32), np.zeros(8, int)
    model = cases.sequential()
    optimizer = cases.make(model, weight_decay=0.5, learning_rate=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    before = cases.weights(model)[0]
    model.train_on_batch(x, y)
    np.testing.assert_allclose(cases.weights(model)[0], before * 0.95, rtol=1e-6)


def test_moving_averages_of_weights_replace_them_after_training():
    model = cases.sequential()
    optimizer = cases.make(model, use_ema=True, ema_momentum=0.5)
    x, y = cases.data()
    for _ in range(2):
        model.train_on_batch(x, y)
    averages = [average.numpy() for _, average in optimizer.averages()]
    optimizer.finalize_variable_values(model.trainable_variables)
    for weight, average in zip(cases.weights(model), averages, strict=True):
        np.testing.assert_array_equal(weight, average)


def test_layers_may_be_frozen_and_unfrozen_between_fits():
    model = cases.sequential()
    model.layers[0].trainable = False
    optimizer = cases.make(model, use_ema=True)
    x, y = cases.data()
    kernel = model.layers[0].kernel
    before = kernel.numpy()
    cases.losses_of_fit(model, x, y)
    np.testing.assert_array_equal(kernel.numpy(), before)
    state = set(optimizer.state_variable_names())
    assert not any("/dense/" in name for name in state)

    model.layers[0].trainable = True
    model.compile(optimizer=optimizer, loss=cases.sparse_logits())
    cases.losses_of_fit(model, x, y)
    assert np.abs(kernel.numpy() - before).max() > 1e-3
    assert state < set(optimizer.state_variable_names())
    counter = optimizer.state_variable("kfac/counter")
    assert int(counter) == int(optimizer.iterations) == 6


def test_variables_without_gradient_are_left_alone():
    class Idle(cases.Subclassed):
        def build(self, shape):
            self.idle = self.add_weight(shape=(2,), name="idle")

    model = Idle()
    optimizer = cases.make(model)
    x, y = cases.data()
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        losses = cases.losses_of_fit(model, x, y, epochs=4)
    assert losses[-1] < losses[0]
    rows = optimizer.explain(print_fn=None)
    (row,) = [row for row in rows if row.variables[0].endswith("idle")]
    assert row.reason == "the losses do not depend on it"


def test_penalties_and_added_losses_take_part_in_the_adaptation_of_damping():
    class Penalised(cases.Subclassed):
        def call(self, x, training=False):
            outputs = super().call(x)
            self.add_loss(0.1 * keras.ops.mean(outputs**2))
            return outputs

    model = Penalised()
    model.first.kernel_regularizer = keras.regularizers.L2(0.1)
    optimizer = cases.make(model, adaptive=True, damping=1.0, invert_every=1)
    x, y = cases.data()
    before = [cases.losses_of_fit(model, x, y, epochs=1)[0]]
    recorded = optimizer.state_variable("kfac/prev_loss").numpy()
    np.testing.assert_allclose(recorded, before, rtol=1e-5)


def test_batch_norm_statistics_and_dropout_seeds_advance_once_a_step():
    def counts(optimizer_for):
        keras.utils.set_random_seed(8)
        model = keras.Sequential(
            [
                keras.Input((cases.FEATURES,)),
                layers.Dense(6),
                layers.BatchNormalization(momentum=0.5),
                layers.Dropout(0.1),
                layers.Dense(cases.CLASSES),
            ]
        )
        model.compile(optimizer_for(model), cases.sparse_logits())
        x, y = cases.data()
        model.train_on_batch(x, y)
        return [v.numpy() for v in model.non_trainable_variables]

    by_kfac = counts(lambda model: cases.Kfac(adaptive=True, damping=1.0, model=model))
    by_sgd = counts(lambda model: keras.optimizers.SGD())
    for one, other in zip(by_kfac, by_sgd, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_burn_in_collects_statistics_without_counting_or_moving():
    model = cases.sequential()
    optimizer = cases.make(model, num_burnin_steps=3, weight_decay=0.1)
    x, y = cases.data()
    before = cases.weights(model)
    for _ in range(3):
        model.train_on_batch(x, y)
    assert int(optimizer.iterations) == 0
    assert int(optimizer.state_variable("kfac/counter")) == 0
    assert int(optimizer.state_variable("kfac/burnin_counter")) == 3
    for one, other in zip(cases.weights(model), before, strict=True):
        np.testing.assert_array_equal(one, other)
    weight = "kfac/FisherEstimator/dense/kernel/input/cov/total_weight"
    assert float(optimizer.state_variable(weight)) == 3.0  # A plain sum.
    model.train_on_batch(x, y)
    assert int(optimizer.iterations) == 1
    assert np.abs(cases.weights(model)[0] - before[0]).max() > 0


@pytest.mark.parametrize("eagerly", [False, True], ids=["graph", "eager"])
def test_a_step_that_raises_the_loss_is_undone(eagerly):
    keras.utils.set_random_seed(9)
    model = cases.sequential()
    optimizer = cases.make(
        model,
        compiled={"run_eagerly": eagerly},
        learning_rate=1e3,  # Each step overshoots.
        damping=0.1,
        adapt_damping=True,
        reject_bad_steps=True,
    )
    x, y = cases.data()
    before = cases.weights(model)
    model.train_on_batch(x, y)
    for one, other in zip(cases.weights(model), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert int(optimizer.state_variable("keras/rejected_steps")) == 1
    assert float(optimizer.damping) > 0.1


def test_a_good_step_is_not_undone():
    model = cases.sequential()
    optimizer = cases.make(model, adaptive=True, damping=1.0, reject_bad_steps=True)
    x, y = cases.data()
    losses = cases.losses_of_fit(model, x, y, epochs=4)
    assert losses[-1] < losses[0]
    assert int(optimizer.state_variable("keras/rejected_steps")) == 0


def test_a_batch_with_nan_leaves_no_trace_when_bad_steps_are_rejected():
    model = cases.sequential()
    optimizer = cases.make(model, adaptive=True, damping=1.0, reject_bad_steps=True)
    x, y = cases.data()
    model.train_on_batch(x, y)
    before = cases.weights(model)
    model.train_on_batch(np.where(x > 2, np.nan, x), y)
    for one, other in zip(cases.weights(model), before, strict=True):
        np.testing.assert_array_equal(one, other)
    for name in optimizer.state_variable_names():
        if "/cov/" in name or name.endswith("/kfac"):
            assert np.all(np.isfinite(optimizer.state_variable(name))), name
    losses = cases.losses_of_fit(model, x, y, epochs=3)
    assert losses[-1] < losses[0]


def test_sampled_targets_depend_on_the_seed_alone():
    x, y = cases.data()

    def train(seed):
        keras.utils.set_random_seed(10)
        model = cases.sequential()
        cases.make(model, seed=seed)
        model.train_on_batch(x, y)
        tf.random.normal([3])  # Advances TensorFlow's generators.
        model.train_on_batch(x, y)
        return cases.weights(model)[0]

    np.testing.assert_array_equal(train(1), train(1))
    assert np.abs(train(1) - train(2)).max() > 1e-6


def test_a_quarter_of_the_batch_gives_statistics_of_its_first_cases():
    x, y = cases.data()
    moments = []
    for fraction, rows in ((0.25, 48), (1.0, 12)):
        model = cases.sequential()
        optimizer = cases.make(model, cov_batch_fraction=fraction)
        model.train_on_batch(x[:rows], y[:rows])
        name = "kfac/FisherEstimator/dense/kernel/input/cov/var"
        moments.append(optimizer.state_variable(name).numpy())
    np.testing.assert_allclose(moments[0], moments[1], rtol=1e-6)


def test_a_rejected_step_takes_its_weight_decay_back():
    model = cases.sequential()
    optimizer = cases.make(
        model, adapt_damping=True, weight_decay=0.1, reject_bad_steps=True
    )
    x, y = cases.data()
    model.train_on_batch(x, y)
    before = cases.weights(model)
    model.train_on_batch(np.where(x > 2, np.nan, x), y)
    assert int(optimizer.state_variable("keras/rejected_steps")) == 1
    for one, other in zip(cases.weights(model), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_reading_loss_weights_serialises_nothing(recwarn):
    model = cases.sequential()
    cases.make(model, register_losses=lambda collection, outputs, batch: None)
    optimizer = cases.make(model, learning_rate=lambda: 0.1)
    cases.losses_of_fit(model, *cases.data(), epochs=1)
    assert int(optimizer.iterations) == 1
    assert not [w for w in recwarn if "saved configuration" in str(w.message)]


def test_without_a_seed_training_depends_on_keras_seed_alone():
    x, y = cases.data()

    def train(seed):
        keras.utils.set_random_seed(seed)
        model = cases.sequential()
        cases.make(model, seed=None)
        cases.losses_of_fit(model, x, y, epochs=2, batch_size=16)
        return cases.weights(model)[0]

    np.testing.assert_array_equal(train(1), train(1))


@pytest.mark.parametrize("with_lora", [False, True])
def test_quantised_layers_train_what_is_left_of_them(with_lora):
    model = cases.sequential()
    for layer in model.layers if with_lora else ():
        layer.enable_lora(2)
    for layer in model.layers:
        layer.quantize("int8")
    optimizer = cases.make(model)
    losses = cases.losses_of_fit(model, *cases.data(), epochs=5)
    assert losses[-1] < losses[0]
    trained = {v for row in optimizer.explain(print_fn=None) for v in row.variables}
    assert trained == {variable.path for variable in model.trainable_variables}
