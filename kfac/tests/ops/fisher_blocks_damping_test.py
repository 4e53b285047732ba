"""Damping: normalisation, the split between factors, identities, settings."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config, layer_collection
from kfac.python.ops import fisher_blocks as fb
from kfac.python.ops import linear_operator as lo
from kfac.python.ops.rules import pi_damping
from kfac.tests import graph_kinds
from kfac.tests.ops import fisher_blocks_cases as cases


def _pi(left_trace, right_trace, left_dim=2, right_dim=3, dtype=np.float64):
    left, right = (tf.constant(trace, dtype) for trace in (left_trace, right_trace))
    return pi_damping.pi_tracenorm(left, left_dim, right, right_dim).numpy()


def test_pi_is_the_root_of_the_ratio_of_mean_eigenvalues():
    np.testing.assert_allclose(_pi(8.0, 3.0), np.sqrt((8 / 2) / (3 / 3)), rtol=1e-15)


@pytest.mark.parametrize(
    ("left", "right"),
    [(0.0, 3.0), (3.0, 0.0), (0.0, 0.0), (3.0, -1.0), (3.0, np.nan), (-3.0, -1.0)],
)
def test_pi_is_one_without_statistics_or_after_the_right_factor_diverged(left, right):
    assert _pi(left, right) == 1.0


@pytest.mark.parametrize("left", (np.nan, -1.0))
def test_a_bad_left_trace_shows_as_nan(left):
    assert np.isnan(_pi(left, 3.0))


def test_pi_has_the_dtype_of_the_traces():
    assert _pi(8.0, 3.0, dtype=np.float32).dtype == np.float32


@pytest.mark.parametrize("kind", (graph_kinds.V1_OFF, graph_kinds.XLA))
def test_the_split_multiplies_to_the_damping_for_full_and_diagonal_operators(kind):
    rng = np.random.RandomState(0)
    left = rng.normal(size=(4, 4))
    left = left @ left.T
    right = rng.uniform(1, 2, size=3)

    def build():
        return fb.compute_pi_adjusted_damping(
            lo.LinearOperatorFullMatrix(tf.constant(left)),
            lo.LinearOperatorDiag(tf.constant(right)),
            0.1,
        )

    left_damping, right_damping = graph_kinds.Run(kind, build)()
    pi = np.sqrt(np.trace(left) / 4 / np.mean(right))
    np.testing.assert_allclose([left_damping, right_damping], [0.1 * pi, 0.1 / pi])
    np.testing.assert_allclose(left_damping * right_damping, 0.01, rtol=1e-14)


def test_without_pi_both_sides_get_the_damping_as_given():
    damping = tf.constant(0.1)
    with config.override(pi_type=fb.PI_OFF_NAME):
        assert fb.compute_pi_adjusted_damping(None, None, damping) == (damping, damping)
        assert fb.compute_pi_adjusted_damping(None, None, damping)[0] is damping


def test_an_unknown_pi_type_is_refused():
    with (
        config.override(pi_type="no such thing"),
        pytest.raises(ValueError, match="off"),
    ):
        fb.compute_pi_adjusted_damping(None, None, 0.1)


def test_normalisation_divides_by_a_power_of_the_replications():
    assert fb.normalize_damping(0.8, 4) == 0.2
    with config.override(normalize_damping_power=0.5):
        assert fb.normalize_damping(0.8, 4) == 0.4
    for off in (0, 0.0):
        with config.override(normalize_damping_power=off):
            assert fb.normalize_damping(0.8, 4) == 0.8


def test_module_constants_are_a_facade_of_the_settings():
    with config.override():
        assert fb.NORMALIZE_DAMPING_POWER == 1.0
        assert fb.PI_TYPE == fb.PI_TRACENORM_NAME
        fb.set_global_constants(normalize_damping_power=0.5)
        assert (fb.NORMALIZE_DAMPING_POWER, fb.PI_TYPE) == (0.5, "tracenorm")
        fb.set_global_constants(pi_type="off")
        assert (fb.NORMALIZE_DAMPING_POWER, fb.PI_TYPE) == (0.5, "off")
        fb.NORMALIZE_DAMPING_POWER = 0.0
        assert config.settings().normalize_damping_power == 0.0
    assert fb.NORMALIZE_DAMPING_POWER == 1.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", ("a",)),
        (("a", 1), ("a", 1)),
        (["a", lambda: "b"], ("a", "b")),
        (lambda: 7, (7,)),
    ],
)
def test_a_packaged_function_evaluates_the_functions_in_its_id(given, expected):
    function = fb.PackagedFunc(lambda: 3.0, given)
    assert function() == 3.0
    assert function.func_id == expected


def _block(name, damping=0.3):
    block, grads = cases.register(cases.case(name), layer_collection.LayerCollection())
    block.instantiate_factors(grads, damping)
    return block


def test_damping_ids_name_the_factors_and_the_damping():
    with tf.Graph().as_default():
        plain = _block("dense kron")
        conv = _block("conv kron")
        diagonal = _block("conv diagonal")
        full = _block("naive full")
    names = ("cov", plain.input_factor.name, "cov", plain.output_factor.name)
    start = ("compute_pi_adjusted_damping", *names)
    assert plain._input_damping_func.func_id == (*start, 0.3, "power", 0.5, "ref", 0)
    assert plain._output_damping_func.func_id == (*start, 0.3, "power", 0.5, "ref", 1)
    locations = 2 * 2
    assert conv._input_damping_func.func_id[-7:] == (
        *("normalize_damping", 0.3, locations),
        *("power", 0.5, "ref", 0),
    )
    locations = 2 * 3
    assert diagonal._damping_func.func_id == (
        *(locations, "mult", "normalize_damping", 0.3, locations),
    )
    assert full._damping_func.func_id == (0.3,)


def test_settings_are_read_when_a_damping_function_is_called():
    def build():
        block = _block("conv kron")
        diagonal = _block("conv diagonal")
        for factor in block._factors():
            factor.instantiate_cov_variables()
        values = {"before": block.damping}
        with config.override(normalize_damping_power=0.0, pi_type="off"):
            values["input"] = block._input_damping_func()
            values["output"] = block._output_damping_func()
            values["diagonal"] = diagonal._damping_func()
            values["property"] = block.damping
        return tf.nest.map_structure(tf.convert_to_tensor, values)

    values = graph_kinds.Run(graph_kinds.V1_ON, build)()
    np.testing.assert_allclose(values["before"], 0.3 / 4, rtol=1e-6)
    np.testing.assert_allclose(values["input"], np.sqrt(0.3), rtol=1e-6)
    np.testing.assert_allclose(values["output"], np.sqrt(0.3), rtol=1e-6)
    np.testing.assert_allclose(values["diagonal"], 6 * 0.3, rtol=1e-6)
    # The property is fixed when the factors are instantiated.
    np.testing.assert_allclose(values["property"], 0.3 / 4, rtol=1e-6)


@pytest.mark.parametrize("kind", graph_kinds.FAST)
@pytest.mark.parametrize("name", ("dense kron", "conv diagonal", "naive full"))
def test_a_variable_damping_is_read_at_the_time_of_the_product(name, kind):
    """The variable may even be of another dtype than the statistics."""
    case = cases.case(name)

    def build():
        damping = graph_kinds.variable(0.3, "damping", np.float32, trainable=False)
        block, grads = cases.register(case, layer_collection.LayerCollection())
        done = cases.update(block, grads, damping=damping, exps=(-1,))
        with tf.control_dependencies([done]):
            vector = [tf.constant(v) for v in case.vector()]
            first = block.multiply(vector)
        with tf.control_dependencies([cases.flat_tensor(first)]):
            changed = damping.assign(0.9)
        with tf.control_dependencies([changed]):
            return first, block.multiply(vector), block.multiply_inverse(vector)

    first, second, stale = (cases.flat(v) for v in graph_kinds.Run(kind, build)())
    if name == "dense kron":
        assert not np.allclose(first, second)
    else:
        # float32(0.9) - float32(0.3) is 0.6 up to 6e-8.
        np.testing.assert_allclose(
            second - first, 0.6 * cases.flat(case.vector()), rtol=1e-6
        )
    assert np.all(np.isfinite(stale))


@pytest.mark.parametrize("bad", ("input_factor", "output_factor"))
def test_training_goes_on_when_a_factor_has_diverged(bad):
    """No exception: the last good inverses are served."""
    case = cases.case("dense kron")
    with tf.Graph().as_default():
        block, grads = cases.register(case, layer_collection.LayerCollection())
        done = cases.update(block, grads, exps=(-1,))
        vector = [tf.constant(v) for v in case.vector()]
        product = block.multiply_inverse(vector)
        variable = getattr(block, bad)._cov._var
        spoil = variable.assign(variable * np.nan)
        again = [op for f in block._factors() for op in f.make_inverse_update_ops()]
        with tf.compat.v1.Session() as session:
            session.run(tf.compat.v1.global_variables_initializer())
            session.run(done)
            before = cases.flat(session.run(product))
            session.run(spoil)
            session.run(again)
            after = cases.flat(session.run(product))
    assert np.all(np.isfinite(after))
    if bad == "input_factor":
        # NaN in A makes the damping of G NaN too, so both keep their last inverse.
        np.testing.assert_array_equal(after, before)
