import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import fishleg, layer_inverses, state
from kfac.tests import graph_kinds
from kfac.tests.ops import fishleg_cases


def _trained(built, num_steps, learning_rate=0.02):
    op, progress = built.inverse.train(
        built.random_direction,
        built.curvature.multiply,
        learning_rate=learning_rate,
        num_steps=num_steps,
    )
    with tf.control_dependencies([op]):
        return tf.nest.map_structure(tf.identity, progress)


def _held_out_residual(built):
    residuals = [
        built.inverse.residual(
            built.random_direction(10**6 + i), built.curvature.multiply
        )
        for i in range(8)
    ]
    return tf.reduce_mean(residuals)


class _Learner:
    """Trains one Q by calls, and tells how good it is."""

    def __init__(self, case):
        self.store = state.VariableStore()
        self._case = case
        self.train = tf.function(self._train, autograph=False)
        self.residual = tf.function(self._residual, autograph=False)

    def _built(self):
        return fishleg_cases.build(self._case)

    def _train(self, num_steps, learning_rate):
        with self.store.as_default():
            return _trained(self._built(), num_steps, learning_rate)

    def _residual(self):
        with self.store.as_default():
            return _held_out_residual(self._built())


@pytest.mark.parametrize("case", fishleg_cases.CASES, ids=str)
def test_q_approaches_the_damped_inverse_of_a_fixed_fisher_matrix(case):
    learner = _Learner(case)
    before = float(learner.residual())
    for rate in (0.02, 0.004):  # Noise of the directions shrinks with the rate.
        learner.train(tf.constant(600), tf.constant(rate, tf.float64))
    after = float(learner.residual())
    assert before > 0.5
    assert after < 0.1


def test_training_finds_the_exact_inverse_of_a_kronecker_product():
    learner = _Learner(fishleg_cases.DENSE)
    for rate in (0.02, 0.002):
        learner.train(tf.constant(1500), tf.constant(rate, tf.float64))
    assert float(learner.residual()) < 1e-3


def test_the_auxiliary_loss_is_least_at_the_inverse():
    """A = -1/2 u' (F + δ)^-1 u there, and the residual vanishes."""
    learner = _Learner(fishleg_cases.DENSE)
    for rate in (0.02, 0.002):
        learner.train(tf.constant(1500), tf.constant(rate, tf.float64))

    @tf.function(autograph=False)
    def at_the_end():
        with learner.store.as_default():
            built = fishleg_cases.build(fishleg_cases.DENSE)
            u = built.random_direction(tf.constant(5, tf.int64))
            _, progress = built.inverse.train(lambda _: u, built.curvature.multiply)
            solution = built.curvature.solve(u, max_iterations=100, tolerance=1e-10)
            dot = lambda a, b: sum(
                tf.reduce_sum(x * y) for x, y in zip(a, b, strict=True)
            )
            return progress, -0.5 * dot(u, solution.x) / dot(u, u)

    progress, least = at_the_end()
    # The loss exceeds its least value by a quadratic form of the residual (1e-3).
    np.testing.assert_allclose(progress.loss, least, rtol=1e-4)
    assert least <= progress.loss + 1e-12
    assert float(progress.residual) < 1e-3


def test_one_step_is_adam_on_the_gradient_of_the_auxiliary_loss():
    """The gradient is compared with central differences of A as its definition says."""
    case, step = fishleg_cases.TWO_LAYERS, 1e-4
    rate = 0.01

    def auxiliary_loss(built, values, u):
        w = built.inverse._multiply(values, u)
        image = built.curvature.multiply(w)
        quadratic = sum(tf.reduce_sum(a * b) for a, b in zip(w, image, strict=True))
        linear = sum(tf.reduce_sum(a * b) for a, b in zip(w, u, strict=True))
        return 0.5 * quadratic - linear

    def build():
        built = fishleg_cases.build(case, initial_scale=0.3)
        u = built.random_direction(tf.constant(1, tf.int64))
        length = tf.sqrt(sum(tf.reduce_sum(part**2) for part in u))
        unit = [part / length for part in u]
        values = built.inverse._read(built.inverse._values)
        left = values[0]["left"]
        slopes = []
        for i, j in ((0, 0), (1, 3), (5, 5)):
            bump = step * tf.tensor_scatter_nd_update(
                tf.zeros_like(left), [[i, j]], tf.constant([1.0], left.dtype)
            )
            ends = [
                auxiliary_loss(
                    built, [{**values[0], "left": left + s * bump}, values[1]], unit
                )
                for s in (1, -1)
            ]
            slopes.append((ends[0] - ends[1]) / (2 * step))
        loss = auxiliary_loss(built, values, unit)
        op, progress = built.inverse.train(
            lambda _: u, built.curvature.multiply, learning_rate=rate
        )
        with tf.control_dependencies([op]):
            moved = built.inverse._values[0]["left"].read_value() - left
            moment = built.inverse._first[0]["left"].read_value()
        return slopes, moved, moment, loss, progress.loss

    slopes, moved, moment, loss, reported = graph_kinds.Run(
        graph_kinds.FUNCTION, build
    )()
    np.testing.assert_allclose(reported, loss, rtol=1e-12)
    entries = [moment[0, 0], moment[1, 3], moment[5, 5]]
    # Central differences of a polynomial of degree 4: relative error about step^2.
    np.testing.assert_allclose(10 * np.array(entries), slopes, rtol=1e-5)
    # Adam's first step has the rate as length in every coordinate that has a slope.
    # (Adam's epsilon, 1e-8, is small against these slopes.)
    moves = [moved[0, 0], moved[1, 3], moved[5, 5]]
    np.testing.assert_allclose(moves, -rate * np.sign(slopes), rtol=1e-4)


@pytest.mark.parametrize("case", fishleg_cases.CASES, ids=str)
def test_q_is_symmetric_positive_semi_definite_and_starts_as_a_multiple_of_one(case):
    def build():
        built = fishleg_cases.build(case, initial_scale=0.25)
        u, v = (built.random_direction(tf.constant(i, tf.int64)) for i in (1, 2))
        start = built.inverse.multiply(u)
        with tf.control_dependencies(start):
            progress = _trained(built, 20, 0.1)
        with tf.control_dependencies(list(progress)):
            return u, v, start, built.inverse.multiply(u), built.inverse.multiply(v)

    u, v, start, qu, qv = graph_kinds.Run(graph_kinds.FUNCTION, build)()
    flat = lambda parts: np.concatenate([np.ravel(part) for part in parts])
    np.testing.assert_allclose(flat(start), 0.25 * flat(u), rtol=1e-12)
    assert np.linalg.norm(flat(qu) - flat(start)) > 0.1
    np.testing.assert_allclose(flat(v) @ flat(qu), flat(u) @ flat(qv), rtol=1e-10)
    assert flat(u) @ flat(qu) > 0
    assert [part.shape for part in qu] == list(case.shapes)


@pytest.mark.parametrize("kind", [graph_kinds.V1_OFF, graph_kinds.COND])
def test_trains_in_sessions_and_branches(kind):
    def build():
        built = fishleg_cases.build(fishleg_cases.DENSE)
        before = _held_out_residual(built)
        with tf.control_dependencies([before]):
            progress = _trained(built, 100, 0.05)
        with tf.control_dependencies(list(progress)):
            return before, _held_out_residual(built)

    before, after = graph_kinds.Run(kind, build)()
    assert after < 0.6 * before


def test_a_second_trace_goes_on_with_the_first_ones_state():
    learner = _Learner(fishleg_cases.DENSE)
    learner.train(tf.constant(50), 0.05)
    learner.train(tf.constant(50), tf.constant(0.05, tf.float64))  # Another trace.
    steps = learner.store.named_variables()["steps"]
    assert int(steps) == 100
    assert len(learner.store.named_variables()) == 7  # L, R, 2 moments each, steps.


def test_state_survives_a_checkpoint(tmp_path):
    learner = _Learner(fishleg_cases.TWO_LAYERS)
    learner.train(tf.constant(30), 0.05)
    path = tf.train.Checkpoint(state=learner.store).save(str(tmp_path / "fishleg"))
    restored = _Learner(fishleg_cases.TWO_LAYERS)
    restored.residual()  # Makes the variables.
    tf.train.Checkpoint(state=restored.store).restore(path)
    for each in (learner, restored):
        each.train(tf.constant(10), 0.05)
    assert float(restored.residual()) == float(learner.residual())


def test_a_new_kind_of_layer_plugs_in_by_its_product():
    class Marker:
        """Stands for a Fisher block of one's own."""

    class SubMarker(Marker):
        pass

    @layer_inverses.register(Marker)
    class Scalar(layer_inverses.LayerInverse):
        def initial_values(self, scale):
            return {"root": np.array(np.sqrt(scale))}

        def multiply(self, values, vector):
            return [values["root"] ** 2 * part for part in vector]

    def build():
        weights = graph_kinds.variable(np.zeros([2, 3]), "w")
        layer = layer_inverses.of_block(SubMarker(), [weights])
        inverse = fishleg.InverseFisher([([weights], layer)], initial_scale=4.0)
        op, _ = inverse.train(
            lambda _: [tf.ones([2, 3], tf.float64)],
            lambda w: [2.0 * part for part in w],
            learning_rate=0.02,
            num_steps=400,
        )
        with tf.control_dependencies([op]):
            return inverse.multiply([tf.ones([2, 3], tf.float64)])

    (product,) = graph_kinds.Run(graph_kinds.FUNCTION, build)()
    # Adam circles the minimum within about its rate.
    np.testing.assert_allclose(product, np.full([2, 3], 0.5), rtol=0.03)


def test_a_side_that_is_too_long_has_a_diagonal_factor(monkeypatch):
    monkeypatch.setattr(layer_inverses.KroneckerInverse, "MAX_SIDE", 4)

    def build():
        weights = graph_kinds.variable(np.zeros([6, 3]), "w")
        layer = layer_inverses.KroneckerInverse(None, [weights])
        values = layer.initial_values(2.0)
        tensors = {k: tf.constant(v) for k, v in values.items()}
        return list(tensors.values()) + layer.multiply(
            tensors, [tf.ones([6, 3], tf.float64)]
        )

    left, right, product = graph_kinds.Run(graph_kinds.FUNCTION, build)()
    assert left.shape == (6,)
    assert right.shape == (3, 3)
    np.testing.assert_allclose(product, np.full([6, 3], 2.0))


@pytest.mark.parametrize("part", ["direction", "product"])
def test_a_step_that_is_not_finite_leaves_the_inverse_as_it_is(part):
    def build():
        built = fishleg_cases.build(fishleg_cases.DENSE)
        u = built.random_direction(tf.constant(1, tf.int64))
        spoilt = lambda vector: [np.nan * v for v in vector]
        direction = lambda _: spoilt(u) if part == "direction" else u
        multiply = built.curvature.multiply
        product = (lambda w: spoilt(multiply(w))) if part == "product" else multiply
        before = built.inverse.multiply(u)
        op, progress = built.inverse.train(direction, product, num_steps=2)
        with tf.control_dependencies([op, *before]):
            return before, built.inverse.multiply(u), progress.residual

    before, after, residual = graph_kinds.Run(graph_kinds.FUNCTION, build)()
    assert np.isnan(residual)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_scale_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        fishleg.InverseFisher([], initial_scale=0.0)
