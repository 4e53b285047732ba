"""Models whose layers change between fits, or that another one takes the place of."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kfac.tests.keras import keras_cases as cases


def recompiled(model, optimizer):
    model.compile(optimizer=optimizer, loss=cases.sparse_logits())
    return cases.losses_of_fit(model, *cases.data(), epochs=3)


def test_replaced_layers_start_afresh_and_the_others_go_on(tmp_path):
    model = cases.sequential()
    optimizer = cases.make(model)
    cases.losses_of_fit(model, *cases.data())
    velocities = ["kfac/dense/kernel/kfac", "kfac/dense_1/kernel/kfac"]
    kept, dropped = (optimizer.state_variable(name).numpy() for name in velocities)
    assert np.abs(dropped).max() > 0
    model.pop()
    model.add(layers.Dense(cases.CLASSES))  # Of the same shape.
    model.compile(optimizer=optimizer, loss=cases.sparse_logits())
    model.make_train_function()
    found = [optimizer.state_variable(name).numpy() for name in velocities]
    np.testing.assert_array_equal(found[0], kept)
    np.testing.assert_array_equal(found[1], 0.0)
    losses = cases.losses_of_fit(model, *cases.data())
    assert losses[-1] < losses[0]
    tf.train.Checkpoint(optimizer=optimizer).save(tmp_path / "checkpoint")


def test_layers_may_be_replaced_by_more_and_wider_ones():
    model = cases.sequential()
    optimizer = cases.make(model)
    cases.losses_of_fit(model, *cases.data())
    model.pop()
    model.add(layers.Dense(4, activation="tanh"))
    model.add(layers.Dense(cases.CLASSES))
    losses = recompiled(model, optimizer)
    assert losses[-1] < losses[0]
    assert len(optimizer.explain(print_fn=None)) == 3


def test_a_second_model_starts_afresh():
    first, second = cases.sequential(), cases.sequential(hidden=8)
    optimizer = cases.make(first)
    cases.losses_of_fit(first, *cases.data())
    optimizer.register_layers(second, loss=cases.sparse_logits())
    assert int(optimizer.state_variable("kfac/counter")) == 0
    losses = recompiled(second, optimizer)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="register_layers"):
        cases.losses_of_fit(first, *cases.data())


def test_a_model_that_is_not_registered_is_told_apart():
    registered, other = cases.sequential(), cases.sequential()
    optimizer = cases.make(registered)
    other.compile(optimizer=optimizer, loss=cases.sparse_logits())
    with pytest.raises(ValueError, match="variables of another model"):
        cases.losses_of_fit(other, *cases.data())
    losses = cases.losses_of_fit(registered, *cases.data())
    assert losses[-1] < losses[0]


def test_a_fallback_optimizer_says_that_it_cannot_be_told_of_new_variables():
    model = keras.Sequential(
        [
            keras.Input((cases.FEATURES,)),
            layers.Dense(6),
            layers.PReLU(),
            layers.Dense(cases.CLASSES),
        ]
    )
    model.layers[1].trainable = False
    optimizer = cases.make(model, fallback="adam")
    cases.losses_of_fit(model, *cases.data())
    model.layers[1].trainable = True
    with pytest.raises(ValueError, match="fallback optimizer Adam.*new Kfac"):
        recompiled(model, optimizer)


def test_an_unbuilt_model_is_explained_by_its_inputs():
    model = cases.Subclassed()
    optimizer = cases.make(model)
    rows = optimizer.explain(cases.data()[0], print_fn=None)
    assert [row.factor_sides for row in rows] == [((6, 6), (6, 6)), ((7, 7), (3, 3))]


def test_statistics_of_the_targets_wait_for_a_batch():
    model = cases.sequential()
    optimizer = cases.make(model, estimation_mode="empirical")
    x, y = cases.data()
    with pytest.raises(ValueError, match="targets"):
        optimizer.explain(x)
    losses = cases.losses_of_fit(model, x, y)
    assert losses[-1] < losses[0]
    assert len(optimizer.explain(print_fn=None)) == 2
