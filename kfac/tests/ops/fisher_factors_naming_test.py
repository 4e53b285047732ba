"""Scope strings, damping ids, unique names, and the settings façade."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config, deferred, utils
from kfac.python.ops import fisher_factors as ff
from kfac.python.ops.fisher_factors import naming
from kfac.tests import graph_kinds
from kfac.tests.ops.fisher_factor_cases import damping_func

tf1 = tf.compat.v1


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as new_graph:
        yield new_graph


def tensor(name, shape=(3, 2)):
    return tf1.placeholder(tf.float32, shape, name=name)


def test_scope_string_joins_a_fragment_per_parameter():
    x, y = tensor("x"), tensor("y")
    params = [(2, 3), "a", False, (x, [y])]
    assert ff.scope_string_from_params(params) == "2-3_a_False_x_0__y_0"
    assert ff.scope_string_from_params([None, (), [True, 2], x]) == "None__True-2_x_0"
    assert ff.scope_string_from_params(x) == "x_0"
    assert ff.scope_string_from_params("SAME") == "SAME"


def test_scope_string_takes_variables_partitioned_and_deferred_tensors():
    with tf1.variable_scope("scope"):
        variable = tf1.get_variable("v", (), use_resource=True)
    x, y = tensor("x"), tensor("y")
    parts = utils.PartitionedTensor((x, y))
    waiting = deferred.DeferredTensor(lambda: x, x.shape, x.dtype, name="late:0")
    string = ff.scope_string_from_params([variable, parts, (parts, x), waiting])
    assert string == "scope_v_0_x_0__y_0_x_0__y_0__x_0_late_0"


@pytest.mark.parametrize(
    "param", [1.5, np.float32(1), np.zeros(2), tf.TensorShape([2]), {"a": 1}]
)
def test_unsupported_parameters_are_named_with_their_type(param):
    with pytest.raises(ValueError, match=type(param).__name__):
        ff.scope_string_from_params([param])


def test_a_list_of_ints_and_something_else_has_no_name():
    with pytest.raises(AttributeError):
        ff.scope_string_from_params([(1, None)])


def test_names_lose_slashes_and_colons_and_pass_the_sanitizer():
    with tf1.name_scope("outer"):
        x = tensor("x")
    assert ff.scope_string_from_name(x) == "outer_x_0"
    with config.override(
        get_sanitized_name_fn=lambda name: name.removeprefix("outer_")
    ):
        assert ff.scope_string_from_name([x, (x,)]) == "x_0__x_0"
        factor = ff.FullyConnectedKroneckerFactor(((x,),))
        assert factor.name == "ff_fckron_x_0_False"
    # The name, once taken, outlives the setting.
    assert factor.name == "ff_fckron_x_0_False"


def test_strings_of_scalars_are_their_python_repr():
    assert ff.scalar_or_tensor_to_string(0.5) == "0.5"
    assert ff.scalar_or_tensor_to_string("a") == "'a'"
    # `repr(np.float64(0.5))` has parentheses, which no variable name may have.
    assert ff.scalar_or_tensor_to_string(np.float64(0.5)) == "0.5"
    assert ff.scalar_or_tensor_to_string(tensor("x")) == "x_0"
    x = tensor("x2")
    assert (
        ff.list_to_string(["ref", 2, 1e-5, x, (x, x)]) == "ref_2_1e-05_x2_0_x2_0__x2_0"
    )


def test_damping_ids_are_what_the_function_carries():
    func = damping_func(0.1, "id")
    assert ff.graph_func_to_id(func) == ("id",)
    assert ff.graph_func_to_string(func) == "id"
    for reader in (ff.graph_func_to_id, ff.graph_func_to_string):
        with pytest.raises(AttributeError):
            reader(lambda: 0.1)


def test_ids_with_tensors_are_hashable_in_a_function_too():
    ids = []

    @tf.function
    def trace(damping):
        for _ in range(2):
            ids.append(ff.graph_func_to_id(damping_func(0.1, damping)))
        return damping

    with tf.init_scope():
        trace(tf.constant(0.1))
    assert ids[0] == ids[1] and hash(ids[0]) == hash(ids[1])


@pytest.mark.parametrize("func_id", [np.float32(1e20), "a b(c)+", 1e30])
def test_any_damping_id_gives_a_legal_variable_name(func_id):
    factor = ff.FullyConnectedKroneckerFactor(((tensor("x"),),))
    factor.register_inverse(damping_func(0.1, func_id))
    factor.instantiate_inv_variables()
    assert len(factor.get_inv_vars()) == 1


def test_var_scopes_of_the_classes():
    x, g, mask = (
        tensor("x", (3, 4, 4, 2)),
        tensor("g", (3, 4, 4, 5)),
        tensor("m", (1, 2, 2)),
    )
    v, w = tensor("v"), tensor("w")
    image = (2, 2, 2, 5)
    expected = {
        "ff_naivefull_v_0__w_0_3": ff.NaiveFullFactor(((v, w),), 3),
        "ff_naivediag_v_0__w_0_3": ff.NaiveDiagonalFactor((v, w), 3),
        "ff_diag_kron_v_0_w_0": ff.DiagonalKroneckerFactor(((v,), (w,)), True),
        "ff_diag_kron_v_0": ff.DiagonalMultiKF(((v,),), 3),
        "ff_diagfc_v_0_w_0": ff.FullyConnectedDiagonalFactor((v,), ((w,),)),
        "ff_scaleshift_v_0_w_0__w_0_1_None_False_diagonal": (
            ff.ScaleAndShiftDiagonalFactor((v,), ((w,), (w,)), (1,), has_shift=False)
        ),
        "ff_convdiag_x_0_g_0": ff.ConvDiagonalFactor(
            (x,), ((g,),), image, (1, 1, 1, 1), "SAME"
        ),
        "ff_fckron_v_0_w_0_True": ff.FullyConnectedKroneckerFactor(((v, w),), True),
        "ff_fc_multi_v_0_3_False": ff.FullyConnectedMultiKF(((v,),), 3),
        "ff_convinkron_x_0_1-2-2-5_1-2_SAME_None_NHWC_True_m_0": (
            ff.ConvInputKroneckerFactor(
                (x,),
                (1, 2, 2, 5),
                "SAME",
                (1, 2),
                None,
                "NHWC",
                None,
                True,
                None,
                None,
                mask,
            )
        ),
        "ff_convinsuakron_x_0_2-2-2-5_False": ff.ConvInputSUAKroneckerFactor(
            (x,), image
        ),
        "ff_convoutkron_g_0_g_0": ff.ConvOutputKroneckerFactor(((g,), (g,))),
    }
    for scope, factor in expected.items():
        assert factor._var_scope == scope


def test_different_factors_of_one_scope_string_get_different_names():
    x = tensor("x")
    first = ff.DiagonalKroneckerFactor(((x,),), False)
    biased = ff.DiagonalKroneckerFactor(((x,),), True)
    multi = ff.DiagonalMultiKF(((x,),), 3)
    same = ff.DiagonalKroneckerFactor(((x,),), False)
    names = [factor.name for factor in (first, biased, multi, same)]
    scope = "ff_diag_kron_x_0"
    assert names == [scope, f"{scope}_1", f"{scope}_2", scope]
    assert biased._var_scope == scope
    for factor in (first, biased, multi):
        factor.instantiate_cov_variables()  # Of different shapes; would clash.


def test_scope_strings_that_coincide_by_accident_do_not_share_variables():
    with tf1.name_scope("a"):
        nested = tensor("b")
    flat = tensor("a_b")
    assert ff.scope_string_from_name(nested) == ff.scope_string_from_name(flat)
    names = {ff.FullyConnectedKroneckerFactor(((t,),)).name for t in (nested, flat)}
    assert len(names) == 2


def test_remembered_names_do_not_keep_a_graph_alive():
    with tf.Graph().as_default() as temporary:
        name = ff.FullyConnectedKroneckerFactor(((tensor("x"),),)).name
    watcher = weakref.ref(temporary)
    del temporary
    gc.collect()
    assert watcher() is None
    assert naming.unique_scope(name, "somebody else") == name


# --- settings -------------------------------------------------------------------------


CONSTANTS = {
    "INIT_COVARIANCES_AT_ZERO": (True, False),
    "ZERO_DEBIAS": (True, False),
    "INIT_INVERSES_AT_ZERO": (True, False),
    "EIGENVALUE_DECOMPOSITION_THRESHOLD": (4, 7),
    "EIGENVALUE_CLIPPING_THRESHOLD": (0.0, 0.5),
    "ASSUME_ZERO_MEAN_ACTIVATIONS": (False, True),
    "SUBTRACT_MEAN_CONTRIB_FROM_COV": (True, False),
    "TOWER_STRATEGY": ("separate", "concat"),
    "_SUB_SAMPLE_INPUTS": (False, True),
    "_INPUTS_TO_EXTRACT_PATCHES_FACTOR": (0.2, 0.5),
    "_SUB_SAMPLE_PATCHES": (False, True),
    "_MAX_NUM_PATCHES": (10000000, 5),
    "_MAX_NUM_PATCHES_PER_DIMENSION": (3.0, 1.5),
    "_USE_PATCHES_SECOND_MOMENT_OP": (False, True),
}


@pytest.mark.parametrize("constant", CONSTANTS)
def test_constants_read_and_write_the_settings(constant):
    default, other = CONSTANTS[constant]
    field = constant.lower().lstrip("_")
    with config.override():
        assert getattr(ff, constant) == default
        ff.set_global_constants(**{field: other})
        assert getattr(ff, constant) == getattr(config.settings(), field) == other
        ff.set_global_constants(**{field: None})
        assert getattr(ff, constant) == other
        setattr(ff, constant, default)
        assert getattr(config.settings(), field) == default


def test_initializers_are_chosen_at_import():
    with config.override(init_covariances_at_zero=False, init_inverses_at_zero=False):
        for initializer in (
            ff.inverse_initializer,
            ff.covariance_initializer,
            ff.diagonal_covariance_initializer,
        ):
            assert initializer is tf1.zeros_initializer


def test_placement_helper_ignores_empty_devices_and_concatenated_towers():
    for device, strategy, expected in (
        ("/device:CPU:1", "separate", "/device:CPU:1"),
        ("/device:CPU:1", "concat", ""),
        ("", "separate", ""),
        (None, "separate", ""),
    ):
        with config.override(tower_strategy=strategy):
            with ff.maybe_place_on_device(device):
                assert tf1.placeholder(tf.float32).device == expected


@pytest.mark.parametrize("kind", [graph_kinds.V1_OFF])
def test_shapes_are_plain_ints_with_v2_behaviour_off(kind):
    def build():
        x = tf.constant(np.ones((4, 3)), tf.float32)
        factor = ff.FullyConnectedKroneckerFactor(((x,),), True)
        assert all(type(dim) is int for dim in factor._cov_shape)
        assert type(factor.batch_size()) is int
        factor.instantiate_cov_variables()
        with tf.control_dependencies([factor.make_covariance_update_op(1.0, 1.0)]):
            return factor.cov

    np.testing.assert_allclose(graph_kinds.Run(kind, build)(), np.ones((4, 4)))
