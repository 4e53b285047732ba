"""Factorisations stay out of XLA in a compiled `fit` on a CPU."""

import keras
import numpy as np
import tensorflow as tf

from kfac.tests.keras import keras_cases as cases

INVERSE = "kfac/FisherEstimator/dense/kernel/input/matpower_exp-1_damp0"
COVARIANCE = "kfac/FisherEstimator/dense/kernel/input/cov/var"
WEIGHT = "kfac/FisherEstimator/dense/kernel/input/cov/total_weight"


def test_a_compiled_fit_finds_inverses_of_the_statistics_so_far():
    model = cases.sequential()
    optimizer = cases.make(
        model, compiled={"jit_compile": True}, damping=0.5, invert_every=1
    )
    x, y = cases.data()
    names = (INVERSE, COVARIANCE, WEIGHT)
    model.train_on_batch(x, y)
    inverse, covariance, weight = (optimizer.state_variable(n).numpy() for n in names)
    # Damped by some share of the damping, which is not of interest here.
    product = inverse @ covariance / weight
    eigenvalues = np.linalg.eigvals(product).real
    assert np.all((eigenvalues > 0) & (eigenvalues < 1))
    assert np.allclose(product @ covariance, covariance @ product.T, atol=1e-4)


def test_steps_after_the_first_one_precondition_alike_with_and_without_xla():
    x, y = cases.data()
    directions = []
    for compiled in (True, False):
        keras.utils.set_random_seed(30)
        model = cases.sequential()
        optimizer = cases.make(
            model,
            compiled={"jit_compile": compiled},
            momentum=0.0,
            estimation_mode="exact",
            cov_ema_decay=0.0,
        )
        optimizer.learning_rate = 0.0
        model.train_on_batch(x, y)  # Same weights: the same statistics and inverses.
        before = cases.weights(model)
        optimizer.learning_rate = 0.1
        model.train_on_batch(x, y)
        pairs = zip(cases.weights(model), before, strict=True)
        directions.append([after - start for after, start in pairs])
    for one, other in zip(*directions, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_compiled_step_contains_no_factorisation():
    model = cases.sequential()
    cases.make(model, compiled={"jit_compile": True})
    graphs = []
    train_step = model.train_step

    def spying_train_step(data):
        result = train_step(data)
        graphs.append(tf.compat.v1.get_default_graph())
        return result

    model.train_step = spying_train_step
    model.train_on_batch(*cases.data())
    assert "Cholesky" not in all_op_types(graphs[-1])


def test_an_uncompiled_step_contains_its_factorisations():
    model = cases.sequential()
    cases.make(model)
    graphs = []
    train_step = model.train_step

    def spying_train_step(data):
        result = train_step(data)
        graphs.append(tf.compat.v1.get_default_graph())
        return result

    model.train_step = spying_train_step
    model.train_on_batch(*cases.data())
    assert "Cholesky" in all_op_types(graphs[-1])


def all_op_types(graph):
    """Types of the operations of a graph and of the functions it calls."""
    definition = graph.as_graph_def()
    types = {node.op for node in definition.node}
    for function in definition.library.function:
        types |= {node.op for node in function.node_def}
    return types
