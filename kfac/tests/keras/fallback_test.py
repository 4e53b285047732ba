"""Variables that K-FAC leaves to another optimizer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kfac.tests.keras import keras_cases as cases


def with_generic():
    """A model with variables that no layer pattern covers."""
    return keras.Sequential(
        [
            keras.Input((cases.FEATURES,)),
            keras.layers.Dense(6, name="covered"),
            keras.layers.PReLU(),
            keras.layers.Dense(cases.CLASSES),
        ]
    )


def test_generic_variables_get_a_diagonal_curvature_by_default():
    model = with_generic()
    optimizer = cases.make(model)
    blocks = [row.block for row in optimizer.explain(print_fn=None)]
    assert sorted(set(blocks)) == ["FullyConnectedKFACBasicFB", "NaiveDiagonalFB"]
    x, y = cases.data()
    losses = cases.losses_of_fit(model, x, y, epochs=4)
    assert losses[-1] < losses[0]


def test_a_fallback_optimizer_trains_what_is_generic_and_what_it_is_given():
    model = with_generic()
    sgd = keras.optimizers.SGD(0.5)
    optimizer = cases.make(model, fallback=sgd, fisher_approx={"covered": "fallback"})
    x, y = cases.data()
    alpha, kernel = model.layers[1].alpha, model.layers[0].kernel
    before = [alpha.numpy(), kernel.numpy(), model.layers[2].kernel.numpy()]

    def gradients():
        with tf.GradientTape() as tape:
            loss = cases.sparse_logits()(y, model(x))
        return tape.gradient(loss, [alpha.value, kernel.value])

    by_alpha, by_kernel = gradients()
    model.train_on_batch(x, y)
    np.testing.assert_allclose(alpha.numpy(), before[0] - 0.5 * by_alpha, rtol=1e-5)
    np.testing.assert_allclose(
        kernel.numpy(), before[1] - 0.5 * by_kernel, rtol=1e-5, atol=1e-6
    )
    assert np.abs(model.layers[2].kernel.numpy() - before[2]).max() > 0
    rows = optimizer.explain(print_fn=None)
    by_block = {row.variables[0].rpartition("/")[2]: row.block for row in rows[-3:]}
    assert by_block == {"kernel": "SGD", "bias": "SGD", "alpha": "SGD"}
    assert not any("covered" in n for n in optimizer.state_variable_names())
    assert int(sgd.iterations) == int(optimizer.iterations) == 1


def test_one_learning_rate_schedule_drives_both():
    model = with_generic()
    adam = keras.optimizers.Adam(0.02)
    optimizer = cases.make(model, fallback=adam, learning_rate=0.1)
    x, y = cases.data()
    model.train_on_batch(x, y)
    np.testing.assert_allclose(float(adam.learning_rate), 0.02, rtol=1e-6)
    optimizer.learning_rate = 0.05
    model.train_on_batch(x, y)
    np.testing.assert_allclose(float(adam.learning_rate), 0.01, rtol=1e-6)
    config = optimizer.get_config()["fallback"]["config"]
    np.testing.assert_allclose(config["learning_rate"], 0.01, rtol=1e-6)


def test_a_fallback_may_train_everything():
    model = cases.sequential()
    cases.make(model, fallback="adam", fisher_approx={keras.layers.Dense: "fallback"})
    x, y = cases.data()
    losses = cases.losses_of_fit(model, x, y, epochs=3)
    assert losses[-1] < losses[0]


def test_layers_left_to_nobody_are_refused():
    model = cases.sequential()
    cases.make(model, fisher_approx=["fallback", None])
    with pytest.raises(ValueError, match="pass fallback="):
        model.train_on_batch(*cases.data())


@pytest.mark.parametrize(
    ("fisher_approx", "fragment"),
    [({"nowhere": "kron"}, "nowhere"), (["kron"], "1 entries")],
)
def test_approximations_that_fit_no_layer_are_refused(fisher_approx, fragment):
    model = cases.sequential()
    cases.make(model, fisher_approx=fisher_approx)
    with pytest.raises(ValueError, match=fragment):
        model.train_on_batch(*cases.data())


def test_approximations_are_chosen_by_name_class_or_position():
    def blocks(fisher_approx):
        inputs = keras.Input((4, 6))
        hidden = keras.layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs)
        hidden = keras.layers.LayerNormalization(name="norm")(hidden)
        outputs = keras.layers.Dense(3, name="out")(hidden[:, 0])
        model = keras.Model(inputs, outputs)
        optimizer = cases.make(model, fisher_approx=fisher_approx)
        rows = optimizer.explain(print_fn=None)
        return {row.variables[0]: row.approximation for row in rows}

    default = blocks(None)
    assert default["out/kernel"] == "kron"
    chosen = blocks({"out": "diagonal", keras.layers.MultiHeadAttention: "kron_indep"})
    assert chosen["out/kernel"] == "diagonal"
    assert chosen["attention/query/kernel"] == "kron_indep"
    assert chosen["norm/gamma"] == default["norm/gamma"]
    assert blocks([None, None, "diagonal"])["out/kernel"] == "diagonal"
