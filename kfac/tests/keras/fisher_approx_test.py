"""What `fisher_approx` makes of layers of every kind."""

import keras
import numpy as np
import pytest
from keras import layers

from kfac.tests.keras import keras_cases as cases


def transformer():
    """An embedding, attention, norms, a convolution, sequences, a readout."""
    ids = keras.Input((4,), dtype="int32")
    hidden = layers.Embedding(7, 4, name="words")(ids)
    hidden = layers.MultiHeadAttention(2, 3, name="attention")(hidden, hidden)
    hidden = layers.LayerNormalization(name="norm")(hidden)
    hidden = layers.Dense(4, activation="tanh", name="steps")(hidden)
    hidden = layers.Conv1D(3, 2, name="conv")(hidden)
    hidden = layers.BatchNormalization(name="batch_norm")(hidden)
    hidden = layers.Flatten()(hidden)
    return keras.Model(ids, layers.Dense(cases.CLASSES, name="out")(hidden))


def chosen(model, fisher_approx):
    """Approximations by a part of the first variable's name."""
    optimizer = cases.make(model, fisher_approx=fisher_approx)
    rows = optimizer.explain(print_fn=None)
    return {row.variables[0]: row.approximation for row in rows}


def one_layer(layer, *shape):
    return keras.Sequential(
        [keras.Input(shape), layer, layers.Flatten(), layers.Dense(cases.CLASSES)]
    )


def test_one_name_is_meant_for_all_layers_that_have_the_approximation():
    keras.utils.set_random_seed(0)
    model = transformer()
    assert chosen(model, "ekfac") == {
        "words/embeddings": "kron_indep_in_diag",
        **{
            f"attention/{part}/kernel": "ekfac"
            for part in ("query", "key", "value", "attention_output")
        },
        "norm/gamma": "full",
        "steps/kernel": "ekfac",
        "conv/kernel": "ekfac",
        "batch_norm/gamma": "full",
        "out/kernel": "ekfac",
    }
    x, y = np.arange(48).reshape(12, 4) % 7, np.arange(12) % cases.CLASSES
    history = model.fit(x, y, epochs=8, verbose=0).history["loss"]
    assert history[-1] < history[0]
    plain = chosen(transformer(), "kron")
    assert plain == chosen(transformer(), None)
    assert plain["steps/kernel"] == "kron_indep"


def test_one_name_is_saved_with_the_configuration():
    optimizer = cases.make(cases.sequential(), fisher_approx="ekfac")
    config = optimizer.get_config()
    assert config["fisher_approx"] == "ekfac"
    assert type(optimizer).from_config(config).get_config() == config


@pytest.mark.parametrize(
    ("name", "fragment"), [("nonsense", "expected one of"), ("fallback", "no layer")]
)
def test_one_name_that_no_layer_can_have_is_refused(name, fragment):
    with pytest.raises(ValueError, match=fragment):
        chosen(cases.sequential(), name)


@pytest.mark.parametrize(
    ("make", "shape", "approximation", "expected"),
    [
        (
            lambda: layers.SimpleRNN(2, unroll=True, name="own"),
            (3, 2),
            "kron_series_2",
            {"kernel": "kron_series_2", "recurrent_kernel": "kron_series_2"},
        ),
        (
            lambda: layers.GRU(2, unroll=True, name="own"),
            (2, 2),
            "kron",
            {
                "kernel": "kron_indep",
                "recurrent_kernel": "kron_indep",
                "bias": "diagonal",
            },
        ),
        (
            lambda: layers.DepthwiseConv2D(2, name="own"),
            (3, 3, 2),
            "kron_depthwise",
            {"kernel": "kron_depthwise", "bias": "diagonal"},
        ),
        (
            lambda: layers.SeparableConv2D(2, 2, name="own"),
            (3, 3, 2),
            "ekfac",
            {"depthwise_kernel": "diagonal", "pointwise_kernel": "ekfac"},
        ),
        (
            lambda: layers.EinsumDense(
                "abc,cd->abd", output_shape=(3, 2), bias_axes="bd", name="own"
            ),
            (3, 2),
            "ekfac",
            {"kernel": "ekfac", "bias": "diagonal"},
        ),
        (lambda: layers.Dense(2, name="own"), (3, 2), "kron", {"kernel": "kron_indep"}),
        (
            lambda: layers.BatchNormalization(name="own"),
            (3, 2),
            "full",
            {"gamma": "full"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_layer_of_several_groups_has_it_where_they_can(
    make, shape, approximation, expected
):
    found = chosen(one_layer(make(), *shape), {"own": approximation})
    own = {k.split("/")[-1]: v for k, v in found.items() if "own/" in k}
    assert own == expected


@pytest.mark.parametrize(
    ("layer", "shape", "approximation", "fragment"),
    [
        (layers.Conv2DTranspose, (3, 3, 2), "ekfac", "own/kernel, own/bias can have"),
        (layers.Dense, (3, 2), "diagonal", "kron_series_1"),
        (layers.LayerNormalization, (3, 2), "ekfac", r"\['diagonal', 'full'\]"),
        (layers.BatchNormalization, (3, 2), "ekfac", r"\['diagonal', 'full'\]"),
        (layers.Dense, (3, 2), "nonsense", "expected one of"),
    ],
)
def test_what_no_parameter_of_a_layer_can_have_is_refused(
    layer, shape, approximation, fragment
):
    arguments = {layers.Conv2DTranspose: (2, 2), layers.Dense: (2,)}.get(layer, ())
    model = one_layer(layer(*arguments, name="own"), *shape)
    with pytest.raises(ValueError, match=fragment) as error:
        chosen(model, {"own": approximation})
    assert "Bad value" in str(error.value)


def test_asking_for_an_approximation_does_not_change_what_is_found():
    """Parameters stay in the groups that they form without being asked for."""
    default = chosen(transformer(), None)
    names = {"attention": "kron_reduce", "conv": "ekfac", "out": "diagonal"}
    assert list(chosen(transformer(), names)) == list(default)
