"""Products in parameter space against explicit float64 matrices."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import curvature_matrix_vector_products as cmvp
from kfac.python.ops import loss_functions
from kfac.tests import graph_kinds, oracle
from kfac.tests.ops.curvature_scenarios import BATCH, SCENARIOS, Losses

tf1 = tf.compat.v1

every_network = pytest.mark.parametrize("name", SCENARIOS)


def _flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


def _dense_tensors(results):
    return [tf.convert_to_tensor(r) for r in results]


def _in_function(build):
    return graph_kinds.Run(graph_kinds.FUNCTION, build)()


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
@every_network
def test_fisher_products_are_those_of_the_explicit_matrix(name, kind):
    """F v; ‖Bᵀv‖² = vᵀ F v; B Bᵀ v = F v; the Gauss-Newton products are the same."""
    scenario = SCENARIOS[name]
    has_ggn = name != "mean and variance"
    v = scenario.vector()

    def build():
        computer = scenario.computer()
        inner = computer.multiply_fisher_factor_transpose(v)
        assert isinstance(inner, tuple)
        result = {
            "F": _dense_tensors(computer.multiply_fisher(v)),
            "Bt": list(inner),
            "BBt": _dense_tensors(computer.multiply_fisher_factor(inner)),
            "shapes": computer.fisher_factor_inner_shapes,
        }
        for t, static in zip(
            inner, computer.fisher_factor_inner_static_shapes, strict=True
        ):
            assert t.shape.as_list() == static.as_list()
        if has_ggn:
            ggn_inner = computer.multiply_ggn_factor_transpose(v)
            result["G"] = _dense_tensors(computer.multiply_ggn(v))
            result["GGt"] = _dense_tensors(computer.multiply_ggn_factor(ggn_inner))
            for t, static in zip(
                ggn_inner, computer.ggn_factor_inner_static_shapes, strict=True
            ):
                assert t.shape.as_list() == static.as_list()
            result["ggn shapes"] = computer.ggn_factor_inner_shapes
        return result

    result = graph_kinds.Run(kind, build)()
    expected = scenario.fisher @ _flat(v)
    for key in ("F", "BBt", *(("G", "GGt") if has_ggn else ())):
        assert oracle.relative_error(_flat(result[key]), expected) < 1e-12, key
    norm = sum(np.sum(t**2) for t in result["Bt"])
    np.testing.assert_allclose(norm, _flat(v) @ expected, rtol=1e-12)
    for t, shape in zip(result["Bt"], result["shapes"], strict=True):
        np.testing.assert_array_equal(t.shape, shape)


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
@every_network
def test_hessian_products_are_differences_of_gradients(name, kind):
    scenario = SCENARIOS[name]
    v = scenario.vector()
    result = graph_kinds.Run(kind, lambda: scenario.computer().multiply_hessian(v))()
    # Differences of step 1e-5 in float64 are good to about 1e-9.
    expected = scenario.hessian_product(v)
    assert oracle.relative_error(_flat(result), expected) < 1e-7


def test_all_matrices_agree_for_a_linear_network_with_natural_parameters():
    rng = np.random.default_rng(0)
    x, w, v = (rng.normal(size=shape) for shape in ([BATCH, 3], [3, 2], [3, 2]))

    def build():
        weight = graph_kinds.variable(w, "w")
        logits = tf.matmul(tf.constant(x), weight)
        loss = loss_functions.MultiBernoulliNegativeLogProbLoss(
            logits, targets=np.zeros([BATCH, 2])
        )
        # One bare tensor serves as the list of parameters.
        computer = cmvp.CurvatureMatrixVectorProductComputer(
            Losses((loss, 2.0)), weight, colocate_gradients_with_ops=False
        )
        return [
            computer.multiply_fisher(v),
            computer.multiply_ggn([v]),
            computer.multiply_hessian((v,)),
        ]

    (fisher,), (ggn,), (hessian,) = _in_function(build)
    np.testing.assert_array_equal(fisher, ggn)
    np.testing.assert_allclose(fisher, hessian, rtol=1e-12)


@pytest.mark.parametrize("v2_control_flow", [False, True])
def test_products_work_inside_a_conditional_of_a_session(v2_control_flow):
    """Differentiating, in a branch, what was computed outside of it."""
    scenario = SCENARIOS["two losses"]
    v = scenario.vector()
    kind = graph_kinds.V1_ON if v2_control_flow else graph_kinds.V1_OFF

    def build():
        computer = scenario.computer()
        predicate = tf1.placeholder_with_default(True, [])
        fisher = tf.cond(
            predicate,
            lambda: computer.multiply_fisher(v),
            lambda: [tf.zeros_like(a) for a in v],
        )
        inner = tf.cond(
            predicate,
            lambda: list(computer.multiply_fisher_factor_transpose(v)),
            lambda: [tf.zeros([BATCH, n], tf.float64) for n in (2, 3)],
        )
        return fisher, inner

    fisher, inner = graph_kinds.Run(kind, build)()
    expected = scenario.fisher @ _flat(v)
    assert oracle.relative_error(_flat(fisher), expected) < 1e-12
    norm = sum(np.sum(t**2) for t in inner)
    np.testing.assert_allclose(norm, _flat(v) @ expected, rtol=1e-12)


def test_an_embedding_table_gets_sparse_fisher_and_dense_hessian_products():
    scenario = SCENARIOS["embedding"]
    v = scenario.vector()

    def build():
        computer = scenario.computer()
        assert isinstance(computer.multiply_fisher(v)[0], tf.IndexedSlices)
        assert isinstance(computer.multiply_hessian(v)[0], tf.Tensor)
        # A sparse vector is as good as a dense one.
        sparse = tf.IndexedSlices(
            tf.constant(v[0][[4, 2, 1, 0, 3]]), [4, 2, 1, 0, 3], dense_shape=[5, 3]
        )
        return _dense_tensors(computer.multiply_fisher([sparse, v[1]]))

    expected = scenario.fisher @ _flat(v)
    assert oracle.relative_error(_flat(_in_function(build)), expected) < 1e-12


def test_derivatives_are_partial_where_one_parameter_depends_on_another():
    """y = a b with b = a²: for F, a and b are independent coordinates."""
    a, v = np.array([[2.0]]), [np.array([[1.0]]), np.array([[3.0]])]

    def build():
        first = graph_kinds.variable(a, "a")
        first = tf.convert_to_tensor(first)
        second = tf.square(first)
        loss = loss_functions.NormalMeanNegativeLogProbLoss(
            first * second, var=1.0, targets=[[0.0]]
        )
        computer = cmvp.CurvatureMatrixVectorProductComputer(
            Losses((loss, 1.0)), [first, second]
        )
        return computer.multiply_fisher(v), computer.multiply_hessian(v)

    fisher, hessian = _in_function(build)
    jacobian = np.array([4.0, 2.0])
    np.testing.assert_allclose(_flat(fisher), np.outer(jacobian, jacobian) @ [1, 3])
    # The Hessian takes total derivatives of ½ a² b², b moving with a. The gradient is
    # (a b² + 2 a³ b, a² b) = (3 a⁵, a⁴). Its entries have the derivatives
    # (15 a⁴, 4 a³) by a, and (2 a b + 2 a³, a²) by b alone.
    np.testing.assert_allclose(_flat(hessian), [240 * 1 + 32 * 3, 32 * 1 + 4 * 3])


def test_a_loss_may_take_a_parameter_itself():
    v = np.array([[1.0, -2.0]])

    def build():
        mean = graph_kinds.variable(np.array([[0.5, 0.3]]), "mean")
        loss = loss_functions.NormalMeanNegativeLogProbLoss(mean, var=0.25)
        tensor = tf.constant([[0.5, 0.3]], tf.float64)
        other = loss_functions.NormalMeanNegativeLogProbLoss(tensor, var=0.5)
        computer = cmvp.CurvatureMatrixVectorProductComputer(
            Losses((loss, 1.0), (other, 1.0)), [mean, tensor]
        )
        return computer.multiply_fisher([v, v])

    of_variable, of_tensor = _in_function(build)
    np.testing.assert_allclose(of_variable, 4 * v)
    np.testing.assert_allclose(of_tensor, 2 * v)
