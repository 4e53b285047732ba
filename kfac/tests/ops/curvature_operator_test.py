"""The curvature as linear operators, against dense matrices."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import curvature_operator, errors, estimator, layer_collection
from kfac.python.ops import fisher_blocks as fb
from kfac.tests import graph_kinds, oracle
from kfac.tests.ops import ekfac_cases
from kfac.tests.ops import fisher_blocks_cases as cases

tf1 = tf.compat.v1

DAMPING = 0.3
# Inverses of matrices of condition number below 1e4, in float64.
TOLERANCE = dict(rtol=1e-8, atol=1e-9)


class OneBlock:
    """What `curvature_operator` asks of an estimator, for blocks by themselves."""

    def __init__(self, blocks):
        self.layers = self
        self.fisher_blocks = blocks


def everything(operator, x, is_positive):
    """All that TensorFlow offers on an operator."""
    found = {
        "dense": operator.to_dense(),
        "matvec": operator.matvec(x),
        "matmul": operator.matmul(tf.stack([x, 2 * x], axis=1)),
        "trace": operator.trace(),
        "diag": operator.diag_part(),
    }
    if is_positive:
        root = curvature_operator.square_root(operator)
        found |= {
            "solvevec": operator.solvevec(x),
            "logdet": operator.log_abs_determinant(),
            "root": root.to_dense(),
        }
    return found


def check_everything(found, matrix, x):
    expected = {
        "dense": matrix,
        "matvec": matrix @ x,
        "matmul": np.stack([matrix @ x, 2 * matrix @ x], axis=1),
        "trace": np.trace(matrix),
        "diag": np.diag(matrix),
    }
    if "root" in found:
        expected["solvevec"] = np.linalg.solve(matrix, x)
        expected["logdet"] = np.linalg.slogdet(matrix)[1]
        found = found | {"root": found["root"] @ found["root"].T}
        expected["root"] = matrix
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **TOLERANCE)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_kind_of_block_is_the_operator_it_multiplies_by(case):
    size = cases.size(case)
    x = np.random.RandomState(0).randn(size)
    parts = np.split(x, np.cumsum([np.prod(s, dtype=int) for s in case.shapes])[:-1])

    def build():
        block, grads = cases.register(case, layer_collection.LayerCollection())
        done = cases.update(block, grads, damping=DAMPING, exps=(-1,))
        with tf.control_dependencies([done]):
            made = OneBlock({"params": block})
            vector = [
                tf.constant(p.reshape(s))
                for p, s in zip(parts, case.shapes, strict=True)
            ]
            return {
                "product": block.multiply(vector if len(vector) > 1 else vector[0]),
                "block": block.full_fisher_block(),
                "damped": everything(
                    curvature_operator.curvature_operator(made), x, True
                ),
                "undamped": everything(
                    curvature_operator.curvature_operator(made, damped=False), x, False
                ),
                "shifted": everything(
                    curvature_operator.shifted_operator(made, 7.0, 0.2), x, True
                ),
            }

    values = graph_kinds.Run(graph_kinds.V1_ON, build)()
    matrix = values["block"]
    check_everything(values["undamped"], matrix, x)
    check_everything(values["shifted"], 7 * matrix + 0.2 * np.eye(size), x)
    check_everything(values["damped"], values["damped"]["dense"], x)
    np.testing.assert_allclose(
        values["damped"]["matvec"], cases.flat(values["product"]), **TOLERANCE
    )


def test_blocks_without_a_matrix_are_refused():
    case = cases.Case(
        "series", lambda lc: fb.FullyConnectedSeriesFB(lc), (3, 2), (3,), (2,), uses=3
    )
    with tf.Graph().as_default():
        block, grads = cases.register(case, layer_collection.LayerCollection())
        cases.update(block, grads, exps=(-1,))
        made = OneBlock({"params": block})
        for make in (
            curvature_operator.curvature_operator,
            curvature_operator.shifted_operator,
        ):
            with pytest.raises(NotImplementedError, match="FullyConnectedSeriesFB"):
                make(made)


def mixed_estimator():
    """A dense layer by EKFAC, one by K-FAC, and a generic full block."""
    model = ekfac_cases.build(ekfac_cases.DENSE, "ekfac")
    (w, b, v), out = model.variables, model.out
    collection = layer_collection.LayerCollection()
    scale = graph_kinds.variable(np.ones(3) + 0.5, "scale")
    hidden_in = tf.matmul(model.x, w) + b
    hidden = tf.tanh(hidden_in)
    logits = tf.matmul(hidden, v)
    out = logits * scale
    collection.register_generic(scale, len(ekfac_cases.DENSE.x), approx="full")
    collection.register_fully_connected(v, hidden, logits)
    collection.register_fully_connected((w, b), model.x, hidden_in, approx="ekfac")
    collection.register_softmax_cross_entropy_loss(out)
    return estimator.make_fisher_estimator(
        variables=[w, b, v, scale],
        cov_ema_decay=0.9,
        damping=DAMPING,
        layer_collection=collection,
        estimation_mode="exact",
    )


@pytest.mark.parametrize("kind", graph_kinds.FAST)
def test_the_whole_operator_is_what_the_estimator_multiplies_by(kind):
    rng = np.random.RandomState(1)
    vectors = [rng.randn(*shape) for shape in ((3, 4), (4,), (4, 3), (3,))]

    def build():
        made = mixed_estimator()
        cov, inv = made.make_vars_and_create_op_thunks()
        tensors = [tf.constant(vector) for vector in vectors]
        pairs = list(zip(tensors, made.variables, strict=True))

        def read():
            operator = curvature_operator.curvature_operator(made)
            flat = curvature_operator.flatten(made, pairs[::-1])
            return {
                "flat": flat,
                "product": curvature_operator.unflatten(made, operator.matvec(flat)),
                "multiplied": made.multiply(pairs),
                "kinds": [type(block).__name__ for block in operator.operators],
            }

        found = ekfac_cases.in_turn([ekfac_cases.update(cov), ekfac_cases.update(inv)])
        with tf.control_dependencies([found]):
            found = read()
        assert found.pop("kinds") == [
            "LinearOperatorFullMatrix",
            "LinearOperatorKronecker",
            "LinearOperatorEigenbasis",
        ]
        # Blocks in the order of registration, not that of the variables.
        by_name = {v.name.split(":")[0]: t for t, v in found["product"]}
        assert list(by_name) == ["scale", "p2", "p0", "p1"]
        found["product"] = [by_name[name] for name in ("p0", "p1", "p2", "scale")]
        found["multiplied"] = [t for t, _ in found["multiplied"]]
        return found

    found = graph_kinds.Run(kind, build)()
    order = [vectors[i].ravel() for i in (3, 2, 0, 1)]
    np.testing.assert_array_equal(found["flat"], np.concatenate(order))
    for a, e in zip(found["product"], found["multiplied"], strict=True):
        np.testing.assert_allclose(a, e, **TOLERANCE)


def small_operator(kind):
    """An operator with a Kronecker and an eigenbasis block, and its dense matrix."""

    def build():
        case = ekfac_cases.LINEAR
        made = ekfac_cases.build(case, kind).estimator(damping=0.5)
        cov, inv = made.make_vars_and_create_op_thunks()
        done = ekfac_cases.in_turn([ekfac_cases.update(cov), ekfac_cases.update(inv)])
        with tf.control_dependencies([done]):
            operator = curvature_operator.curvature_operator(made)
            count = 20000
            return {
                "dense": operator.to_dense(),
                "samples": curvature_operator.sample(operator, count, seed=1),
                "again": curvature_operator.sample(operator, 3, seed=1),
                "unseeded": curvature_operator.sample(operator, 3),
                "inverse": curvature_operator.sample(
                    operator, count, inverse=True, seed=2
                ),
            }

    return graph_kinds.Run(graph_kinds.V1_ON, build)()


@pytest.mark.parametrize("kind", ["kron", "ekfac"])
def test_samples_have_the_operator_or_its_inverse_as_covariance(kind):
    found = small_operator(kind)
    for samples, expected in (
        (found["samples"], found["dense"]),
        (found["inverse"], np.linalg.inv(found["dense"])),
    ):
        count, size = samples.shape
        covariance = samples.T @ samples / count
        # An entry of a sample covariance has the variance (C_ii C_jj + C_ij²) / n.
        diagonal = np.diag(expected)
        error = np.sqrt((np.outer(diagonal, diagonal) + expected**2) / count)
        assert np.all(np.abs(covariance - expected) < 5 * error)
        mean_error = np.sqrt(diagonal / count)
        assert np.all(np.abs(samples.mean(axis=0)) < 5 * mean_error)
    assert found["again"].shape == (3, size)
    assert not np.allclose(found["unseeded"], found["again"])


def test_several_vectors_become_several_tensors():
    with tf.Graph().as_default(), tf1.Session() as session:
        made = mixed_estimator()
        made.make_vars_and_create_op_thunks()
        vectors = np.arange(2 * 31.0).reshape(2, 31)
        pairs = curvature_operator.unflatten(made, vectors)
        tensors = session.run([t for t, _ in pairs])
    assert [t.shape for t in tensors] == [(2, 3), (2, 4, 3), (2, 3, 4), (2, 4)]
    np.testing.assert_array_equal(
        np.concatenate([t.reshape(2, -1) for t in tensors], axis=1), vectors
    )


def test_vectors_that_do_not_fit_are_refused():
    with tf.Graph().as_default():
        made = mixed_estimator()
        made.make_vars_and_create_op_thunks()
        variables = curvature_operator.parameters(made)
        pairs = [(tf.zeros(v.shape, tf.float64), v) for v in variables]
        curvature_operator.flatten(made, pairs[::-1])
        with pytest.raises(KeyError, match="No tensor is given"):
            curvature_operator.flatten(made, pairs[1:])
        pairs[0] = (tf.zeros([7], tf.float64), variables[0])
        with pytest.raises(ValueError, match=r"shape \(7,\); expected"):
            curvature_operator.flatten(made, pairs)
        for shape in ([30], [31, 2]):
            with pytest.raises(ValueError, match=r"\[\.\.\., 31\]"):
                curvature_operator.unflatten(made, tf.zeros(shape))


def test_it_works_eagerly_after_a_function_has_made_the_estimator():
    kept = {}

    def build():
        kept["estimator"] = made = mixed_estimator()
        cov, inv = made.make_vars_and_create_op_thunks()
        return ekfac_cases.in_turn(
            [
                ekfac_cases.update(cov),
                ekfac_cases.update(inv),
                lambda: curvature_operator.curvature_operator(made).to_dense(),
            ]
        )

    inside = graph_kinds.Run(graph_kinds.FUNCTION, build)()
    operator = curvature_operator.curvature_operator(kept["estimator"])
    np.testing.assert_allclose(operator.to_dense().numpy(), inside, rtol=1e-12)
    vector = tf.ones(operator.shape[:1], tf.float64)
    solution = operator.solvevec(vector).numpy()
    np.testing.assert_allclose(solution, np.linalg.solve(inside, vector), **TOLERANCE)


def test_without_variables_it_says_what_to_do():
    with tf.Graph().as_default():
        made = mixed_estimator()
        with pytest.raises(
            errors.ArgumentError, match="make_vars_and_create_op_thunks"
        ):
            curvature_operator.curvature_operator(made)


def test_oracle_of_the_whole_matrix():
    """One example: EKFAC and full blocks are the exact blocks of the Fisher matrix."""
    case = ekfac_cases.DENSE.first(1)

    def build():
        made = ekfac_cases.build(case, "ekfac").estimator()
        cov, inv = made.make_vars_and_create_op_thunks()
        return ekfac_cases.in_turn(
            [
                ekfac_cases.update(cov),
                ekfac_cases.update(inv),
                lambda: curvature_operator.curvature_operator(made, False).to_dense(),
            ]
        )

    actual = graph_kinds.Run(graph_kinds.V1_ON, build)()
    first, second = case.fisher_blocks()
    zeros = np.zeros((len(first), len(second)))
    expected = np.block([[first, zeros], [zeros.T, second]])
    assert oracle.relative_error(actual, expected) < 1e-10
