"""What the thunks make, and when it runs."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config, estimator, layer_collection
from kfac.tests import estimator_cases as cases
from kfac.tests import graph_kinds

tf1 = tf.compat.v1

X = np.random.RandomState(0).randn(4, 3)
W = np.random.RandomState(1).randn(3, 5)
V = np.random.RandomState(2).randn(5, 2)


def two_layers(feed_shape=(4, 3), mode="empirical", batch=4, **options):
    """Two dense layers, Kronecker-factored, squared error against zero."""
    x = tf1.placeholder_with_default(X, feed_shape)
    w, v = graph_kinds.variable(W, "w"), graph_kinds.variable(V, "v")
    hidden = tf.matmul(x, w, name="hidden")
    out = tf.matmul(tf.tanh(hidden), v)
    collection = layer_collection.LayerCollection()
    collection.register_fully_connected(w, x, hidden)
    collection.register_fully_connected(v, tf.tanh(hidden), out)
    collection.register_squared_error_loss(out, targets=tf.zeros_like(out))
    arguments = dict(
        variables=[w, v],
        cov_ema_decay=0.5,
        damping=0.1,
        layer_collection=collection,
        estimation_mode=mode,
    )
    return estimator.make_fisher_estimator(**(arguments | options))


def numpy_statistics():
    """Second moments: inputs and output gradients of both layers."""
    h = np.tanh(X @ W)
    of_out = 2 * h @ V
    of_hidden = of_out @ V.T * (1 - h**2)
    return [m.T @ m / len(X) for m in (X, of_hidden, h, of_out)]


@pytest.mark.parametrize("kind", graph_kinds.ALL)
def test_an_update_and_an_inverse_serve_the_damped_kronecker_product(kind):
    def build():
        made = two_layers()
        updates, inverses = made.make_vars_and_create_op_thunks()
        with tf.control_dependencies([cases.update_all(updates)]):
            inverted = cases.update_all(inverses)
        vectors = [(tf.ones_like(var), var) for var in made.variables]

        def products():
            return [t for t, _ in made.multiply_inverse(vectors[::-1])]

        return cases.after(inverted, lambda: [made.get_cov_vars(), products()])

    covs, products = graph_kinds.Run(kind, build)()
    for actual, expected in zip(tf.nest.flatten(covs), numpy_statistics(), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-10)
    for product, pair, shape in (
        (products[1], numpy_statistics()[:2], W.shape),
        (products[0], numpy_statistics()[2:], V.shape),
    ):
        a, g = pair
        pi = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
        a = a + np.sqrt(0.1) * pi * np.eye(len(a))
        g = g + np.sqrt(0.1) / pi * np.eye(len(g))
        expected = np.linalg.inv(a) @ np.ones(shape) @ np.linalg.inv(g)
        np.testing.assert_allclose(product, expected, rtol=1e-8)


def test_a_thunk_touches_its_own_factor_only():
    with tf.Graph().as_default(), tf1.Session() as session:
        made = two_layers()
        step = tf1.placeholder_with_default(0, [])
        cov_variables, updates, _, _ = made.create_ops_and_vars_thunks()
        assert not tf1.global_variables("FisherEstimator")
        for thunk in cov_variables:
            assert thunk() is None
        op = tf.case([(tf.equal(step, i), thunk) for i, thunk in enumerate(updates)])
        session.run(tf1.global_variables_initializer())
        covs = [factor.cov for factor in made.factors]
        for i in range(len(updates)):
            before = session.run(covs)
            session.run(op, {step: i})
            after = session.run(covs)
            changed = [
                not np.array_equal(a, b) for a, b in zip(before, after, strict=True)
            ]
            assert changed == [j == i for j in range(4)]
            np.testing.assert_allclose(after[i], numpy_statistics()[i], rtol=1e-10)


def test_variables_live_under_the_scope_with_stable_names():
    with tf.Graph().as_default():
        two_layers().make_vars_and_create_op_thunks(scope="outer/inner")
        names = {v.op.name for v in tf1.global_variables("outer/inner")}
        assert {
            "outer/inner/w/input/cov/var",
            "outer/inner/w/input/cov/total_weight",
            "outer/inner/v/output/matpower_exp-1_damp0",
        } <= names
    with tf.Graph().as_default():
        two_layers(name="Fisher").make_vars_and_create_op_thunks()
        assert tf1.global_variables("Fisher/w/input/cov/var")


def test_variable_thunks_run_once():
    with tf.Graph().as_default():
        made = two_layers()
        made.make_vars_and_create_op_thunks()
        with pytest.raises(AssertionError):
            made.make_vars_and_create_op_thunks()


def test_state_variables_are_variables_and_complete():
    with tf.Graph().as_default():
        made = two_layers()
        made.make_vars_and_create_op_thunks()
        state = made.state_variables()
        assert all(isinstance(v, tf.Variable) for v in state)
        found = {v.name for v in state}
        assert found == {v.name for v in tf1.global_variables("FisherEstimator")}
        assert [len(of_factor) for of_factor in made.get_inv_vars()] == [1, 1, 1, 1]


@pytest.mark.parametrize("tensor", [False, True])
def test_should_decay_selects_between_decay_and_a_running_sum(tensor):
    with tf.Graph().as_default(), tf1.Session() as session:
        made = two_layers()
        updates, _ = made.make_vars_and_create_op_thunks()
        if tensor:
            flag = tf1.placeholder(tf.bool, [])
            op = cases.update_all(updates, should_decay=flag)
            ops = {decay: (op, {flag: decay}) for decay in (True, False)}
        else:
            ops = {
                decay: (cases.update_all(updates, should_decay=decay), {})
                for decay in (True, False)
            }
        session.run(tf1.global_variables_initializer())
        weight = made.factors[0]._cov._total_weight
        weights = []
        for decay in (False, False, True, True):
            session.run(*ops[decay])
            weights.append(session.run(weight))
        assert weights == [1.0, 2.0, 2.0, 2.0]  # cov_ema_decay is 1/2.


def test_without_debiasing_the_average_is_not_inflated():
    with config.override(zero_debias=False), tf.Graph().as_default():
        made = two_layers()
        updates, _ = made.make_vars_and_create_op_thunks()
        op = cases.update_all(updates)
        with tf1.Session() as session:
            session.run(tf1.global_variables_initializer())
            for _ in range(60):
                session.run(op)
            covs = session.run([factor.cov for factor in made.factors])
    for cov, expected in zip(covs, numpy_statistics(), strict=True):
        np.testing.assert_allclose(cov, expected, rtol=1e-10)


def test_static_batch_sizes_are_compared_when_the_update_is_built():
    with tf.Graph().as_default():
        updates, _ = two_layers(batch_size=5).make_vars_and_create_op_thunks()
        with pytest.raises(ValueError, match="w/input.* 4 cases, but 5.*passed"):
            updates[0]()
    with tf.Graph().as_default():
        x = tf1.placeholder(tf.float64, [4, 3])
        w = tf1.get_variable("w", initializer=W, use_resource=True)
        v = tf1.get_variable("v", initializer=V, use_resource=True)
        hidden = tf.matmul(x, w)
        twice = tf.concat([hidden, hidden], 0)
        out = tf.matmul(twice, v)
        collection = layer_collection.LayerCollection()
        collection.register_fully_connected(w, x, hidden)
        collection.register_fully_connected(v, twice, out)
        collection.register_squared_error_loss(out)
        model = cases.Model(cases.DENSE_SOFTMAX, collection, [w, v], x, [out])
        updates, _ = model.estimator().make_vars_and_create_op_thunks()
        updates[1]()
        with pytest.raises(ValueError, match="v/input.* 8 cases, but 4.*w/input"):
            updates[2]()


@pytest.mark.parametrize("static", ["factor", "expectation", "neither"])
def test_dynamic_batch_sizes_are_compared_when_the_update_runs(static):
    with tf.Graph().as_default(), tf1.Session() as session:
        shape = (4, 3) if static == "factor" else (None, 3)
        size = tf1.placeholder_with_default(5, [])
        made = two_layers(shape, batch_size=5 if static == "expectation" else size)
        updates, _ = made.make_vars_and_create_op_thunks()
        op = cases.update_all(updates)
        session.run(tf1.global_variables_initializer())
        with pytest.raises(tf.errors.InvalidArgumentError, match="batch_size"):
            session.run(op)
        if static != "expectation":
            session.run(op, {size: 4})


def test_round_robin_placement_cycles_over_devices():
    with tf.Graph().as_default():
        devices = ["/cpu:0", "/cpu:1"]
        made = two_layers(
            cov_devices=devices, inv_devices=iter(devices), trans_devices=devices
        )
        updates, inverses = made.make_vars_and_create_op_thunks(scope="test")
        expected = ["/device:CPU:0", "/device:CPU:1"] * 2
        assert [thunk().device for thunk in updates] == expected
        assert [thunk().device for thunk in inverses] == expected
        assert [factor._cov._var.device for factor in made.factors] == expected
        matrices = [
            variable
            for factor in made.factors
            for variable in factor._matpower_by_exp_and_damping.values()
        ]
        assert [variable.device for variable in matrices] == [""] * 4
        pairs = [(tf.ones_like(var), var) for var in made.variables]
        products = [t.device for t, _ in made.multiply_inverse(pairs)]
        assert products == expected[:2]


def test_largest_inverses_first_evens_out_the_load():
    with tf.Graph().as_default():
        made = two_layers(
            inv_devices=["/cpu:0", "/cpu:1"], inv_assignment="largest_first"
        )
        _, inverses = made.make_vars_and_create_op_thunks()
        # Sizes 3, 5, 5, 2: the two of size 5 must not share a device.
        devices = [thunk().device for thunk in inverses]
        assert devices[1] != devices[2] and devices[0] != devices[3]


def test_an_inverse_update_reads_the_damping_of_its_own_time():
    def build():
        damping = graph_kinds.variable(7.0, "damping", np.float64, trainable=False)
        made = two_layers(damping=damping)
        updates, inverses = made.make_vars_and_create_op_thunks()
        with tf.control_dependencies([cases.update_all(updates)]):
            adapted = tf.group(tf1.assign(damping, 0.1))
        with tf.control_dependencies([adapted]):
            inverted = cases.update_all(inverses)
        return cases.after(inverted, made.get_inv_vars)

    a, g = numpy_statistics()[:2]
    pi = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
    expected = np.linalg.inv(a + np.sqrt(0.1) * pi * np.eye(len(a)))
    for kind in graph_kinds.FAST:
        actual = graph_kinds.Run(kind, build)()[0][0]
        np.testing.assert_allclose(actual, expected, rtol=1e-8)


def test_products_need_every_variable_and_a_registered_power():
    with tf.Graph().as_default():
        made = two_layers(exps=(-1, -0.5), compute_cholesky=True)
        made.make_vars_and_create_op_thunks()
        w, v = made.variables
        pairs = [(tf.ones_like(w), w), (tf.ones_like(v), v)]
        made.multiply_matpower(-0.5, pairs)
        made.multiply(pairs)
        made.multiply_cholesky(pairs, transpose=True)
        with pytest.raises(KeyError):
            made.multiply_matpower(2, pairs)
        with pytest.raises(KeyError):
            made.multiply_cholesky_inverse(pairs)
        with pytest.raises(KeyError):
            made.multiply_inverse(pairs[:1])
        other = tf1.get_variable("other", initializer=W, use_resource=True)
        with pytest.raises(KeyError):
            made.multiply_inverse([*pairs, (pairs[0][0], other)])


def test_cholesky_products_square_to_the_block_and_its_inverse():
    def build():
        made = two_layers(compute_cholesky=True, compute_cholesky_inverse=True)
        updates, inverses = made.make_vars_and_create_op_thunks()
        with tf.control_dependencies([cases.update_all(updates)]):
            inverted = cases.update_all(inverses)
        pairs = [(tf.ones_like(var), var) for var in made.variables]

        def products():
            root = made.multiply_cholesky(made.multiply_cholesky(pairs, transpose=True))
            inverse = made.multiply_cholesky_inverse(
                made.multiply_cholesky_inverse(pairs), transpose=True
            )
            results = [
                root,
                made.multiply(pairs),
                inverse,
                made.multiply_inverse(pairs),
            ]
            return [[t for t, _ in result] for result in results]

        return cases.after(inverted, products)

    root, block, inverse, block_inverse = graph_kinds.Run(graph_kinds.V1_ON, build)()
    for i in range(2):
        np.testing.assert_allclose(root[i], block[i], rtol=1e-8)
        np.testing.assert_allclose(inverse[i], block_inverse[i], rtol=1e-8)


def test_a_bad_covariance_is_counted_by_its_factor():
    with tf.Graph().as_default(), tf1.Session() as session:
        made = two_layers()
        updates, inverses = made.make_vars_and_create_op_thunks()
        spoil = made.factors[1]._cov._var.assign(np.full([5, 5], np.nan))
        update, invert = cases.update_all(updates), cases.update_all(inverses)
        session.run(tf1.global_variables_initializer())
        count = made.fallbacks()
        session.run(update)
        session.run(invert)
        assert session.run(count) == 0
        session.run(spoil)
        session.run(invert)
        assert session.run(count) >= 1
