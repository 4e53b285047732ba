"""The curvature stays out of XLA in a compiled `fit` on a CPU."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kfac.tests.keras import keras_cases as cases


def after_fit(compiled, make_model=cases.sequential, **options):
    """Weights after two epochs with a ragged last batch."""
    keras.utils.set_random_seed(30)
    model = make_model()
    optimizer = cases.make(model, compiled=compiled, **options)
    x, y = cases.data()
    losses = cases.losses_of_fit(model, x, y, epochs=2, batch_size=20)
    assert int(optimizer.iterations) == 6
    return [*cases.weights(model), losses]


@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        ({"cov_update_every": 2, "invert_every": 3}, {"steps_per_execution": 2}),
        ({"adaptive": True, "damping": 1.0}, {}),
    ],
    ids=["fixed, several steps an execution", "adaptive"],
)
def test_steps_are_the_same_with_and_without_xla(options, compiled):
    by_xla = after_fit({"jit_compile": True, **compiled}, **options)
    native = after_fit(compiled, **options)
    for one, other in zip(by_xla, native, strict=True):
        # XLA fuses, and thereby rounds, differently.
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_a_model_that_is_built_by_its_first_batch_is_compiled_too():
    weights = after_fit({"jit_compile": True}, cases.Subclassed)
    assert all(np.all(np.isfinite(w)) for w in weights)


def op_types_of_step(**compiled):
    """Types of the operations of a training step and of what it calls."""
    model = cases.sequential()
    cases.make(model, compiled=compiled)
    graphs = []
    train_step = model.train_step

    def spying_train_step(data):
        result = train_step(data)
        graphs.append(tf.compat.v1.get_default_graph())
        return result

    model.train_step = spying_train_step
    model.train_on_batch(*cases.data())
    definition = graphs[-1].as_graph_def()
    types = {node.op for node in definition.node}
    for function in definition.library.function:
        types |= {node.op for node in function.node_def}
    return types


def test_only_a_step_that_is_not_compiled_contains_factorisations():
    assert "Cholesky" not in op_types_of_step(jit_compile=True)
    assert "Cholesky" in op_types_of_step()


def test_a_compiled_training_step_of_ones_own_contains_everything():
    class OwnStep(cases.Subclassed):
        def train_step(self, data):
            return super().train_step(data)

    model = OwnStep()
    optimizer = cases.make(model, compiled={"jit_compile": True})
    with pytest.warns(UserWarning, match="overrides train_step"):
        model.train_on_batch(*cases.data())
    inverse = "kfac/FisherEstimator/dense/kernel/input/matpower_exp-1_damp0"
    assert np.abs(optimizer.state_variable(inverse)).max() > 0
