"""Layer collections of Keras models."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kfac.python.keras import utils
from kfac.python.ops.layer_collection import LayerCollection
from kfac.tests.keras import keras_cases as cases


def convnet():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(3, 3, activation="relu", name="conv"),
            layers.LayerNormalization(name="norm"),
            layers.Flatten(),
            layers.Dense(4, activation="softmax", name="dense"),
        ]
    )


def test_a_model_becomes_a_collection_of_its_layers_and_losses():
    model = convnet()
    collection = utils.get_layer_collection(
        model,
        "sparse_categorical_crossentropy",
        loss_weights=[0.5],
        fisher_approx={"dense": "diagonal", layers.Conv2D: "kron"},
        seed=7,
    )
    blocks = {
        "conv": "ConvKFCBasicFB",
        "norm": "ScaleAndShiftFullFB",
        "dense": "FullyConnectedDiagonalFB",
    }
    for name, block in blocks.items():
        weights = [v.value for v in model.get_layer(name).weights]
        assert type(collection.fisher_blocks[weights]).__name__ == block
    (loss,) = collection.losses
    assert type(loss).__name__ == "CategoricalLogitsNegativeLogProbLoss"
    assert loss._default_seed == 7
    assert collection.loss_coeffs[loss] == 0.5
    trained = {id(v.value) for v in model.trainable_variables}
    assert {id(v) for v in collection.registered_variables} == trained


def test_frozen_layers_are_left_out():
    model = convnet()
    model.get_layer("norm").trainable = False
    collection = utils.get_layer_collection(model, "mse")
    assert len(collection.fisher_blocks) == 2


def test_a_graph_of_ones_own_registers_its_tensors():
    model = cases.sequential()

    @tf.function(autograph=False)
    def registered(x):
        collection = LayerCollection()
        result = utils.get_layer_collection(
            model, cases.sparse_logits(), layer_collection=collection, inputs=x
        )
        assert result is collection
        (loss,) = collection.losses
        assert loss.params.graph is x.graph
        return loss.params

    x, _ = cases.data()
    np.testing.assert_allclose(
        registered(tf.constant(x)), model(x), rtol=1e-4, atol=1e-6
    )


def test_without_a_loss_only_layers_are_registered():
    collection = utils.get_layer_collection(cases.sequential())
    assert not collection.losses
    assert len(collection.fisher_blocks) == 2


@pytest.mark.parametrize(
    ("loss", "fragment"),
    [
        ({"a": "mse", "c": "mse"}, "loss dict"),
        (["mse"], "loss dict"),
        ("mse", "loss dict"),
        (["mse", "mae"], "loss function:"),
    ],
)
def test_losses_that_do_not_fit_the_outputs_are_refused(loss, fragment):
    inputs = keras.Input((3,))
    outputs = [layers.Dense(2, name="a")(inputs), layers.Dense(2, name="b")(inputs)]
    with pytest.raises(ValueError, match=fragment):
        utils.get_layer_collection(keras.Model(inputs, outputs), loss)


def test_a_model_of_unknown_inputs_wants_some():
    model = cases.Subclassed()
    model(cases.data()[0])
    with pytest.raises(ValueError, match="inputs="):
        utils.get_layer_collection(model, "mse")


def test_the_parent_of_an_activation_is_its_input():
    with tf.Graph().as_default():
        x = tf.compat.v1.placeholder(tf.float32, [2])
        assert utils.get_parent(tf.identity(tf.nn.relu(tf.identity(x)))) is x
        with pytest.raises(ValueError, match="more than one parent tensor."):
            utils.get_parent(x + 1.0)


@pytest.mark.parametrize(
    ("loss", "serialized"),
    [
        (None, None),
        ("mse", "mse"),
        (keras.losses.mean_squared_error, "mean_squared_error"),
        (["mse", keras.losses.binary_crossentropy], ["mse", "binary_crossentropy"]),
        ({"a": "mse"}, {"a": "mse"}),
    ],
)
def test_losses_are_serialized_element_by_element(loss, serialized):
    assert utils.serialize_loss(loss) == serialized


def test_loss_objects_are_serialized_as_their_configuration():
    serialized = utils.serialize_loss(keras.losses.MeanSquaredError())
    assert serialized["class_name"] == "MeanSquaredError"


def test_layer_classes_are_serialized_with_a_prefix():
    given = {layers.Dense: "kron", "a": "diagonal", "kfac_class_Conv2D": "kron"}
    assert utils.serialize_fisher_approx(given) == {
        "kfac_class_Dense": "kron",
        "a": "diagonal",
        "kfac_class_Conv2D": "kron",
    }
    assert utils.serialize_fisher_approx(["kron", None]) == ["kron", None]


def test_containers_are_verified_against_layer_names():
    verify = utils._get_verified_dict
    assert verify(None, "things", ["a"]) == verify({}, "things", ["a"]) == {}
    assert verify(["x"], "things", ["a"]) == {"a": "x"}
    given = {"a": 1, layers.Dense: 2, "kfac_class_Conv2D": 3}
    assert verify(given, "things", ["a"]) == given
    for wrong in ({"b": 1}, [], ["x", "y"], ("x",), {"x"}):
        with pytest.raises(ValueError, match="things"):
            verify(wrong, "things", ["a"])


@pytest.mark.parametrize(
    ("activation", "loss"),
    [
        (None, cases.sparse_logits()),
        ("softmax", "sparse_categorical_crossentropy"),
        ("softmax", keras.losses.SparseCategoricalCrossentropy()),
    ],
)
def test_the_loss_function_is_what_a_compiled_model_reports(activation, loss):
    model = cases.sequential(activation)
    model.layers[0].kernel_regularizer = keras.regularizers.L2(0.1)
    model.compile("sgd", loss)
    x, y = cases.data()
    loss_fn = utils.get_loss_fn(model, loss, training=False)
    reported = model.evaluate(x, y, verbose=0)
    np.testing.assert_allclose(loss_fn((x, y)), reported, rtol=1e-5)
    np.testing.assert_allclose(loss_fn((x, y), model(x)), reported, rtol=1e-5)


def test_the_loss_function_weights_several_outputs():
    inputs = keras.Input((3,))
    outputs = [layers.Dense(2, name="a")(inputs), layers.Dense(2, name="b")(inputs)]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"a": "mse", "b": "mae"}, loss_weights={"a": 1.0, "b": 0.5})
    x = np.ones((4, 3), np.float32)
    y = [np.zeros((4, 2)), np.zeros((4, 2))]
    loss_fn = utils.get_loss_fn(
        model, {"a": "mse", "b": "mae"}, loss_weights={"b": 0.5}
    )
    reported = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    np.testing.assert_allclose(loss_fn((x, y)), reported, rtol=1e-5)
