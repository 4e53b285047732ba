"""What must hold of every loss: one suite, all classes."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import loss_functions
from kfac.tests import graph_kinds, oracle
from kfac.tests.ops import loss_cases
from kfac.tests.ops.loss_cases import CASES, IDS, in_function, per_case

every_loss = pytest.mark.parametrize("case", CASES, ids=IDS)


def _inner_indices(case):
    return list(np.ndindex(*case.inner_shape[1:]))


@functools.cache
def _matrices(case, dtype=np.float64):
    """F, B, Bᵀ and one-hot columns as explicit matrices per case `[batch, ., .]`."""

    def build():
        loss = case.loss(dtype)
        sizes = [int(np.prod(p.shape[1:])) for p in case.params]
        fisher, transpose, factor, columns = [], [], [], []
        for unit in np.eye(sum(sizes)):
            parts = np.split(np.tile(unit, [case.batch, 1]), np.cumsum(sizes)[:-1], 1)
            vector = case.structure(
                [
                    a.reshape(p.shape).astype(dtype)
                    for a, p in zip(parts, case.params, strict=True)
                ]
            )
            fisher.append(per_case(loss.multiply_fisher(vector)))
            inner = loss.multiply_fisher_factor_transpose(vector)
            transpose.append(tf.reshape(inner, [case.batch, -1]))
        for index in _inner_indices(case):
            unit = np.zeros(case.inner_shape, dtype)
            unit[(slice(None), *index)] = 1
            factor.append(per_case(loss.multiply_fisher_factor(unit)))
            columns.append(
                per_case(loss.multiply_fisher_factor_replicated_one_hot(index))
            )
        return {
            "F": tf.stack(fisher, 2),
            "B": tf.stack(factor, 2),
            "Bt": tf.stack(transpose, 2),
            "columns": tf.stack(columns, 2),
        }

    return in_function(build)


@functools.cache
def _scores(case):
    """Gradient of the NLL for each outcome `[outcomes, batch, size]`, with weights."""

    @tf.function(autograph=False)
    def score(targets):
        params = [tf.constant(p) for p in case.params]
        loss = case.loss(params=params)
        return per_case(tf.gradients(loss._evaluate(targets), params))

    outcomes = case.outcomes()
    scores = np.stack([score(tf.constant(t)).numpy() for t, _ in outcomes])
    return scores, np.stack([w for _, w in outcomes])


@every_loss
def test_factor_times_its_transpose_is_the_fisher_matrix(case):
    m = _matrices(case)
    np.testing.assert_allclose(m["B"] @ m["B"].transpose(0, 2, 1), m["F"], atol=1e-14)


@every_loss
def test_transpose_product_is_the_transpose_of_the_factor_product(case):
    m = _matrices(case)
    np.testing.assert_allclose(m["Bt"], m["B"].transpose(0, 2, 1), atol=1e-15)


@every_loss
def test_one_hot_products_are_the_columns_of_the_factor(case):
    m = _matrices(case)
    np.testing.assert_array_equal(m["columns"], m["B"])


@every_loss
def test_fisher_matrix_is_the_covariance_of_the_score(case):
    scores, weights = _scores(case)
    np.testing.assert_allclose(np.einsum("ob,obi->bi", weights, scores), 0, atol=1e-13)
    covariance = np.einsum("ob,obi,obj->bij", weights, scores, scores)
    np.testing.assert_allclose(covariance, _matrices(case)["F"], atol=1e-13)


@pytest.mark.parametrize("case", [c for c in CASES if c.natural], ids=lambda c: c.name)
def test_fisher_matrix_is_the_hessian_for_natural_parameters(case):
    targets = case.some_targets()

    def build():
        params = tf.constant(case.params[0])
        nll = case.loss(params=[params])._evaluate(targets)
        gradient = tf.reshape(tf.gradients(nll, params)[0], [case.batch, -1])
        rows = [
            tf.gradients(gradient[:, i], params)[0] for i in range(gradient.shape[1])
        ]
        return tf.stack([tf.reshape(row, [case.batch, -1]) for row in rows], 1)

    np.testing.assert_allclose(in_function(build), _matrices(case)["F"], atol=1e-13)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("normal", oracle.Normal(var=0.3)),
        ("normal mean and variance", oracle.NormalMeanVariance()),
        ("categorical", oracle.Categorical()),
        ("one-hot categorical", oracle.Categorical()),
        ("Bernoulli", oracle.Bernoulli()),
    ],
)
def test_fisher_matrix_is_the_oracles(name, expected):
    case = loss_cases.BY_NAME[name]
    outputs = np.concatenate(case.params, 1)
    wanted = np.stack([expected.fisher(row) for row in outputs])
    np.testing.assert_allclose(_matrices(case)["F"], wanted, atol=1e-14)


@pytest.mark.parametrize("name", ["categorical", "one-hot categorical"])
def test_softmax_factor_is_diag_q_minus_p_q(name):
    case = loss_cases.BY_NAME[name]
    p = loss_cases.softmax(case.params[0])
    expected = [np.diag(np.sqrt(row)) - np.outer(row, np.sqrt(row)) for row in p]
    np.testing.assert_allclose(_matrices(case)["B"], expected, atol=1e-15)


@every_loss
def test_float32_products_agree_with_float64(case):
    single, double = _matrices(case, np.float32), _matrices(case)
    for key, matrix in single.items():
        assert matrix.dtype == np.float32
        # A few roundings of numbers of order one; sums over at most four terms.
        np.testing.assert_allclose(matrix, double[key], rtol=1e-5, atol=1e-6)


@every_loss
def test_value_is_the_log_likelihood_in_either_dtype(case):
    """By the distribution written down in NumPy, summed over batch and outputs."""
    targets = case.some_targets()
    if case.kind == "real":
        mean = case.params[0]
        var = case.params[1] if len(case.params) == 2 else case.kwargs["var"]
        terms = (targets - mean) ** 2 / (2 * var) + np.log(2 * np.pi * var) / 2
    elif case.kind == "binary":
        p = 1 / (1 + np.exp(-case.params[0]))
        terms = -np.log(np.where(targets == 1, p, 1 - p))
    else:
        log_p = np.log(loss_cases.softmax(case.params[0]))
        one_hot = targets
        if case.kind == "class":
            one_hot = np.eye(log_p.shape[-1])[targets]
        terms = -one_hot * log_p

    def build():
        return [case.loss(d, targets=targets).evaluate() for d in ("f4", "f8")]

    single, double = in_function(build)
    np.testing.assert_allclose(double, terms.sum(), rtol=1e-13)
    np.testing.assert_allclose(single, terms.sum(), rtol=1e-5)
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    assert double.shape == ()


@every_loss
def test_value_is_that_of_the_tfp_distribution(case):
    pytest.importorskip("tensorflow_probability")
    targets = case.some_targets()

    def build():
        loss = case.loss(targets=targets)
        sample = loss.dist.sample(seed=1)
        same_as_ours = loss.sample(1)
        assert sample.shape == same_as_ours.shape
        assert sample.dtype == same_as_ours.dtype
        return loss.evaluate(), -tf.reduce_sum(loss.dist.log_prob(targets))

    ours, tfp = in_function(build)
    np.testing.assert_allclose(ours, tfp, rtol=1e-12)


@every_loss
def test_inner_shapes_with_unknown_batch_and_unknown_size(case):
    sizes = {"size": None, "batch": case.params[0].shape[-1]}
    for unknown, last in sizes.items():
        static = [None, *case.params[0].shape[1:-1], last]
        found = {}

        def build(*params):
            loss = case.loss(params=params)
            index = tuple(0 for _ in case.inner_shape[1:])
            column = loss.multiply_fisher_factor_replicated_one_hot(index)
            shape = loss.fisher_factor_inner_static_shape
            assert isinstance(shape, tf.TensorShape)
            found["static"] = shape.as_list()
            tf.nest.map_structure(
                lambda c, p: p.shape.assert_is_compatible_with(c.shape),
                column,
                loss.inputs,
            )
            if case.natural:
                same = loss.ggn_factor_inner_static_shape
                assert isinstance(same, tf.TensorShape)
                assert same.as_list() == shape.as_list()
            return loss.fisher_factor_inner_shape, per_case(column)

        specs = [tf.TensorSpec(static, tf.float64) for _ in case.params]
        traced = tf.function(build, autograph=False, input_signature=specs)
        shape, column = traced(*[tf.constant(p) for p in case.params])
        assert shape.dtype == tf.int32
        np.testing.assert_array_equal(shape, case.inner_shape)
        inner_last = None if last is None else case.inner_shape[-1]
        expected = [None, *case.inner_shape[1:-1], inner_last]
        assert found["static"] == expected, unknown
        np.testing.assert_array_equal(column, _matrices(case)["B"][:, :, 0])


@every_loss
def test_one_hot_products_are_vectorised_over_a_tensor_index(case):
    def build():
        loss = case.loss()
        indices = tf.constant(_inner_indices(case))
        return tf.vectorized_map(
            lambda index: per_case(
                loss.multiply_fisher_factor_replicated_one_hot(tf.unstack(index))
            ),
            indices,
        )

    columns = in_function(build)
    np.testing.assert_allclose(columns.transpose(1, 2, 0), _matrices(case)["B"])


@every_loss
def test_one_hot_index_must_have_one_entry_per_inner_axis_in_range(case):
    inner = case.inner_shape[1:]

    def build():
        product = case.loss().multiply_fisher_factor_replicated_one_hot
        for index in [(), (0,) * (len(inner) + 1)]:
            with pytest.raises(AssertionError, match=str(len(index))):
                product(index)
        for bad in (-1, inner[-1]):
            with pytest.raises(ValueError, match="outside"):
                product((*[0] * (len(inner) - 1), bad))
        return tf.constant(0)

    in_function(build)


@every_loss
def test_products_take_vectors_by_either_name(case):
    def build():
        loss = case.loss()
        products = [loss.multiply_fisher, loss.multiply_fisher_factor_transpose]
        if case.natural:
            products += [loss.multiply_ggn, loss.multiply_ggn_factor_transpose]
        vector = case.structure(list(case.params))
        pairs = [(product, vector) for product in products]
        pairs.append((loss.multiply_fisher_factor, np.ones(case.inner_shape)))
        return [
            (per_case(product(vector=v)), per_case(product(vecs=v)))
            for product, v in pairs
        ]

    for first, second in in_function(build):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("case", [c for c in CASES if c.natural], ids=lambda c: c.name)
def test_gauss_newton_members_are_the_fisher_members(case):
    def build():
        loss = case.loss()
        v = case.params[0]
        index = (0,) * (v.ndim - 1)
        return [
            (loss.multiply_ggn(v), loss.multiply_fisher(v)),
            (loss.multiply_ggn_factor(v), loss.multiply_fisher_factor(v)),
            (
                loss.multiply_ggn_factor_transpose(v),
                loss.multiply_fisher_factor_transpose(v),
            ),
            (
                loss.multiply_ggn_factor_replicated_one_hot(index),
                loss.multiply_fisher_factor_replicated_one_hot(index),
            ),
            (loss.ggn_factor_inner_shape, loss.fisher_factor_inner_shape),
        ]

    for ggn, fisher in in_function(build):
        np.testing.assert_array_equal(ggn, fisher)


def test_mean_and_variance_have_no_gauss_newton_matrix():
    loss = loss_cases.BY_NAME["normal mean and variance"].loss()
    calls = [
        lambda: loss.multiply_ggn(None),
        lambda: loss.multiply_ggn_factor(None),
        lambda: loss.multiply_ggn_factor_transpose(None),
        lambda: loss.multiply_ggn_factor_replicated_one_hot((0,)),
        lambda: loss.ggn_factor_inner_shape,
        lambda: loss.ggn_factor_inner_static_shape,
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="natural"):
            call()
    natural = loss_functions.NaturalParamsNegativeLogProbLoss
    assert not isinstance(loss, natural)


@every_loss
def test_params_are_the_very_objects_given(case):
    def build():
        params = [tf.constant(p) for p in case.params]
        targets = case.some_targets()
        loss = case.loss(params=params, targets=targets)
        assert loss.targets is targets
        assert loss.dtype == tf.float64
        for given, kept in zip(params, tf.nest.flatten(loss.params), strict=True):
            assert given is kept
        for given, kept in zip(params, tf.nest.flatten(loss.inputs), strict=True):
            assert given is kept
        assert isinstance(loss.params, tuple) == (len(params) == 2)
        assert {loss: 1}[loss] == 1
        assert loss != case.loss(params=params, targets=targets)
        return params[0]

    in_function(build)


@every_loss
def test_arrays_serve_as_params_and_keep_their_precision(case):
    """Eagerly, too: a loss on arrays needs no graph."""
    loss = case.cls(*case.params, **case.kwargs, targets=case.some_targets())
    assert loss.dtype == np.float64
    product = per_case(loss.multiply_fisher(loss.params))
    flat = per_case([tf.constant(p) for p in case.params])
    expected = np.einsum("bij,bj->bi", _matrices(case)["F"], flat)
    np.testing.assert_allclose(product, expected, atol=1e-14)
    assert np.isfinite(loss.evaluate())
    assert np.isfinite(loss.evaluate_on_sample(seed=(1, 2)))


@pytest.mark.parametrize("kind", graph_kinds.ALL_AND_XLA)
@every_loss
def test_losses_work_in_every_kind_of_graph(case, kind):
    vector = case.structure(list(case.params))

    def build():
        loss = case.loss(targets=case.some_targets())
        return {
            "nll": loss.evaluate(),
            "F": per_case(loss.multiply_fisher(vector)),
            "Bt": loss.multiply_fisher_factor_transpose(vector),
            "column": per_case(
                loss.multiply_fisher_factor_replicated_one_hot(
                    (0,) * len(case.inner_shape[1:])
                )
            ),
            "shape": loss.fisher_factor_inner_shape,
            "stateful": loss.evaluate_on_sample(seed=3),
            "stateless": loss.evaluate_on_sample(seed=tf.constant([3, 4])),
        }

    result = graph_kinds.Run(kind, build)()
    m = _matrices(case)
    flat = np.concatenate([p.reshape(case.batch, -1) for p in case.params], 1)
    fisher = np.einsum("bij,bj->bi", m["F"], flat)
    np.testing.assert_allclose(result["F"], fisher, atol=1e-13)
    transposed = np.einsum("bij,bj->bi", m["Bt"], flat)
    np.testing.assert_allclose(
        result["Bt"], transposed.reshape(case.inner_shape), atol=1e-13
    )
    np.testing.assert_allclose(result["column"], m["B"][:, :, 0], atol=1e-13)
    np.testing.assert_array_equal(result["shape"], case.inner_shape)
    for key in ("nll", "stateful", "stateless"):
        assert np.isfinite(result[key]), key
