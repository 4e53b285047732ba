"""Every estimation mode against explicit curvature matrices.

The generic full block holds the outer product of the *summed* gradient over the
batch size, so it is the whole curvature matrix for a batch of one example.
"""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import errors, signals
from kfac.python.ops.layer_collection import LayerCollection
from kfac.tests import estimator_cases as cases
from kfac.tests import graph_kinds, oracle

tf1 = tf.compat.v1

# float64 through a handful of matrix products.
EXACT = 1e-10


def run_full_block(case, mode, kind, in_branch=False, **options):
    """The generic block after one covariance update."""

    def build():
        model = cases.build(case)
        estimator = model.estimator(estimation_mode=mode, **options)
        updates, _ = estimator.make_vars_and_create_op_thunks()
        block = estimator.blocks[0]
        if not in_branch:
            return cases.after(cases.update_all(updates), block.full_fisher_block)

        def branch():
            with tf.control_dependencies([cases.update_all(updates)]):
                return tf.constant(True)

        yes = tf1.placeholder_with_default(True, [])
        updated = tf.cond(yes, branch, lambda: tf.constant(False))
        return cases.after(updated, block.full_fisher_block)

    return graph_kinds.Run(kind, build)()


@pytest.mark.parametrize("kind", graph_kinds.FAST)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_exact_mode_is_the_fisher_of_one_example(case, kind):
    case = case.first(1)
    actual = run_full_block(case, "exact", kind)
    assert oracle.relative_error(actual, case.fisher()) < EXACT


@pytest.mark.parametrize("in_branch", [False, True])
@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
@pytest.mark.parametrize("mode", ["exact_GGN", "empirical"])
def test_modes_give_the_same_matrix_in_every_graph(mode, kind, in_branch):
    case = cases.TWO_LOSSES.first(1)
    actual = run_full_block(case, mode, kind, in_branch)
    if mode == "empirical":
        gradient = case.example_gradients(square_root=True)[0]
        expected = np.outer(gradient, gradient)
    else:
        expected = case.fisher()
    assert oracle.relative_error(actual, expected) < EXACT


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_empirical_mode_is_the_outer_product_of_the_gradient(case):
    actual = run_full_block(case, "empirical", graph_kinds.FUNCTION)
    gradient = case.example_gradients(square_root=True).sum(axis=0)
    expected = np.outer(gradient, gradient) / len(case.x)
    assert oracle.relative_error(actual, expected) < EXACT


@pytest.mark.parametrize("case", cases.CASES[:3], ids=str)
def test_exact_ggn_is_the_fisher_for_natural_parameters(case):
    case = case.first(1)
    actual = run_full_block(case, "exact_GGN", graph_kinds.V1_ON)
    assert oracle.relative_error(actual, case.fisher()) < EXACT


@pytest.mark.parametrize(
    "case, mode",
    [(case, "gradients") for case in cases.CASES]
    + [(case, "curvature_prop") for case in cases.CASES]
    + [(cases.TWO_LOSSES, "curvature_prop_GGN")],
    ids=str,
)
def test_random_modes_tend_to_the_fisher_of_the_batch(case, mode):
    case = case.first(2)
    draws = 3000

    def build():
        model = cases.build(case)
        estimator = model.estimator(estimation_mode=mode, cov_ema_decay=0.5)
        updates, _ = estimator.make_vars_and_create_op_thunks()
        update = cases.update_all(updates, should_decay=False)
        factor = estimator.factors[0]
        return factor._cov_tensor, cases.after(update, lambda: factor.cov)

    run = graph_kinds.Run(graph_kinds.V1_ON, build)
    samples, averages = zip(*(run() for _ in range(draws)), strict=True)
    samples = np.stack(samples)
    # Without decay the factor holds the plain mean of the draws.
    np.testing.assert_allclose(averages[-1], samples.mean(axis=0), rtol=1e-9)
    standard_error = samples.std(axis=0) / np.sqrt(draws)
    # Unbiased: six standard errors for each of some hundred entries.
    deviation = np.abs(samples.mean(axis=0) - case.fisher())
    assert np.all(deviation <= 6 * standard_error + 1e-12)
    assert np.linalg.norm(standard_error) < 0.1 * np.linalg.norm(case.fisher())


@pytest.mark.parametrize("mode", ["exact", "empirical"])
def test_statistics_scale_with_the_coefficient(mode):
    case = cases.DENSE_SOFTMAX.first(1)
    tripled = dataclasses.replace(case, losses=[oracle.Categorical(coeff=3.0)])
    once = run_full_block(case, mode, graph_kinds.V1_ON)
    thrice = run_full_block(tripled, mode, graph_kinds.V1_ON)
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-10)


def test_integer_and_tensor_coefficients_are_served():
    def build(coeff):
        model = cases.build(cases.DENSE_SOFTMAX.first(1))
        loss = model.collection.losses[0]
        model.collection.loss_coeffs[loss] = coeff()
        estimator = model.estimator(estimation_mode="exact")
        updates, _ = estimator.make_vars_and_create_op_thunks()
        return cases.after(
            cases.update_all(updates), estimator.blocks[0].full_fisher_block
        )

    expected = 4 * cases.DENSE_SOFTMAX.first(1).fisher()
    for coeff in (lambda: 4, lambda: tf.constant(4.0), lambda: tf.constant(4)):
        actual = graph_kinds.Run(graph_kinds.V1_ON, lambda c=coeff: build(c))()
        assert oracle.relative_error(actual, expected) < EXACT


def test_more_coordinates_than_fit_one_vectorised_pass_are_all_used(monkeypatch):
    monkeypatch.setattr(signals, "_MAX_VECTORIZED_SOURCES", 2)
    case = cases.DENSE_SOFTMAX.first(1)  # Three coordinates: chunks of two and one.
    actual = run_full_block(case, "exact", graph_kinds.FUNCTION)
    assert oracle.relative_error(actual, case.fisher()) < EXACT


def test_outputs_with_several_axes_have_a_source_per_coordinate():
    x = np.random.RandomState(0).randn(1, 3)
    w = np.random.RandomState(1).randn(3, 6)

    def build():
        inputs = tf1.placeholder_with_default(x, [1, 3])
        weights = graph_kinds.variable(w, "w")
        out = tf.reshape(tf.matmul(inputs, weights), [-1, 2, 3])
        collection = LayerCollection()
        collection.register_squared_error_loss(out)
        collection.register_generic(weights, 1, approx="full")
        model = cases.Model(cases.DENSE_SOFTMAX, collection, [weights], inputs, [out])
        estimator = model.estimator(estimation_mode="exact")
        updates, _ = estimator.make_vars_and_create_op_thunks()
        return cases.after(
            cases.update_all(updates), estimator.blocks[0].full_fisher_block
        )

    expected = 2 * np.kron(x.T @ x, np.eye(6))
    actual = graph_kinds.Run(graph_kinds.FUNCTION, build)()
    assert oracle.relative_error(actual, expected) < EXACT


def finalize(case, generic=True, **options):
    targets = options.pop("targets", True)
    with tf.Graph().as_default():
        model = cases.build(case, generic=generic, targets=targets)
        model.estimator(**options).create_ops_and_vars_thunks()


def test_an_unknown_mode_is_reported_at_finalisation():
    with tf.Graph().as_default():
        estimator = cases.build(cases.DENSE_SOFTMAX).estimator(estimation_mode="exakt")
    with pytest.raises(ValueError, match="estimation_mode.*exakt"):
        estimator.make_vars_and_create_op_thunks()  # Outside the model's graph.


def test_empirical_mode_needs_targets_at_finalisation():
    finalize(cases.TWO_LOSSES, targets=False, estimation_mode="gradients")
    with pytest.raises(errors.MissingTargetsError):
        finalize(cases.TWO_LOSSES, targets=False, estimation_mode="empirical")


def test_exact_modes_need_static_output_sizes():
    with tf.Graph().as_default():
        w = tf1.get_variable("w", initializer=np.eye(2), use_resource=True)
        out = tf.matmul(tf1.placeholder(tf.float64, [4, 2]), w)
        out = tf1.placeholder_with_default(out, [4, None])
        model = cases.build(cases.DENSE_SOFTMAX, generic=False)
        model.collection.register_squared_error_loss(out)
        with pytest.raises(ValueError, match="static output sizes"):
            model.estimator(
                variables=[], estimation_mode="exact"
            ).create_ops_and_vars_thunks()


def test_mat_types():
    expected = {
        "gradients": "Fisher",
        "empirical": "Empirical_Fisher",
        "curvature_prop": "Fisher",
        "curvature_prop_GGN": "GGN",
        "exact": "Fisher",
        "exact_GGN": "GGN",
    }
    assert {mode: signal.mat_type for mode, signal in signals.SIGNALS.items()} == (
        expected
    )
    with tf.Graph().as_default():
        model = cases.build(cases.DENSE_SOFTMAX)
        for mode, mat_type in expected.items():
            assert model.estimator(estimation_mode=mode).mat_type == mat_type
