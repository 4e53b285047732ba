"""The plan's figures are those of the graphs and variables that training makes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kfac.python.keras.optimizers import Kfac
from kfac.python.keras.planning import graph_cost
from kfac.python.keras.planning import plan as planning
from kfac.python.ops import estimator, replica_cost, state
from kfac.python.ops.layer_collection import LayerCollection

BATCH = 12


def _perceptron():
    return keras.Sequential(
        [
            keras.Input((7,)),
            keras.layers.Dense(9, "tanh", use_bias=False),
            keras.layers.Dense(5, use_bias=False),
        ]
    )


def _convnet():
    return keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            keras.layers.Conv2D(4, 3, 2, "same", use_bias=False, activation="relu"),
            keras.layers.Conv2D(6, 2, use_bias=False, padding="same"),
            keras.layers.Flatten(),
            keras.layers.Dense(3, use_bias=False),
        ]
    )


def _attention():
    x = keras.Input((6, 8))
    attended = keras.layers.MultiHeadAttention(2, 3, use_bias=False)(x, x)
    y = keras.layers.Dense(4, use_bias=False)(x + attended)
    return keras.Model(x, y)


MODELS = {"perceptron": _perceptron, "convnet": _convnet, "attention": _attention}


def _plan(model, batch_size=BATCH, **kwargs):
    return planning.plan(model, batch_size, print_fn=None, **kwargs)


def _trace(build, model):
    """The graph of `build(x)`, with a store in force."""
    store = state.VariableStore()

    def traced(x):
        with store.as_default():
            return build(x)

    specs = tf.TensorSpec([BATCH, *model.inputs[0].shape[1:]])
    function = tf.function(traced, autograph=False).get_concrete_function(specs)
    return function.graph, store


def _profiled_flops(graph):
    """Name of op -> operations as TensorFlow counts them."""
    builder = tf.compat.v1.profiler.ProfileOptionBuilder
    options = builder(builder.float_operation()).with_empty_output().build()
    root = tf.compat.v1.profiler.profile(graph, cmd="graph", options=options)
    found, waiting = {}, [root]
    while waiting:
        node = waiting.pop()
        waiting += node.children
        found[node.name] = node.float_ops
    return found


@pytest.mark.parametrize("name", ["perceptron", "convnet"])
def test_gradient_operations_are_those_that_tensorflow_counts(name):
    # (Its counts for products of batches overlook a transposition.)
    model = MODELS[name]()
    variables = [v.value for v in model.trainable_variables]

    def build(x):
        outputs = model(x, training=True)
        return [outputs, *tf.gradients(outputs, variables)]

    graph, _ = _trace(build, model)
    profiled = _profiled_flops(graph)
    ops = graph_cost.behind(graph.outputs)
    counts = {op.name: graph_cost.flops([op]) for op in ops}
    products = {name: count for name, count in counts.items() if count}
    assert products == {name: profiled[name] for name in products}
    assert _plan(model).phase("gradient").flops == sum(products.values()) > 0


def test_operations_of_single_ops():
    def build(x):
        image = tf.reshape(x, [1, 8, 8, 2])
        return [
            tf.einsum("abc,cd->abd", tf.ones([2, 3, 4]), tf.ones([4, 5])),
            tf.matmul(tf.ones([6, 2, 3]), tf.ones([6, 4, 3]), transpose_b=True),
            tf.nn.conv2d(image, tf.ones([3, 3, 2, 5]), 2, "SAME"),
            tf.nn.depthwise_conv2d(image, tf.ones([3, 3, 2, 2]), [1] * 4, "SAME"),
        ]

    function = tf.function(build, autograph=False)
    outputs = function.get_concrete_function(tf.TensorSpec([128])).graph.outputs
    counts = [graph_cost.flops(graph_cost.behind([output])) for output in outputs]
    assert counts == [
        2 * 2 * 3 * 4 * 5,
        2 * 6 * 2 * 4 * 3,
        2 * (4 * 4 * 5) * (3 * 3 * 2),
        2 * (8 * 8 * 4) * (3 * 3),
    ]


def test_known_ops_and_what_they_need_are_not_counted_again():
    def build(x):
        first = tf.matmul(x, x)
        second = tf.matmul(first, x)
        known = graph_cost.behind([first])
        more = graph_cost.behind([second], known)
        assert graph_cost.flops(known) == graph_cost.flops(more) == 2 * 4**3
        assert graph_cost.bytes_between(known, more) == 4 * 4**2
        return second

    tf.function(build, autograph=False).get_concrete_function(tf.TensorSpec([4, 4]))


@pytest.mark.parametrize("name", MODELS)
def test_curvature_operations_are_those_of_the_graph_that_computes_them(name):
    model = MODELS[name]()
    variables = [v.value for v in model.trainable_variables]
    counted = {}

    def build(x):
        outputs = model(x, training=True)
        forward = graph_cost.behind([outputs])
        collection = LayerCollection()
        collection.register_squared_error_loss(outputs)
        collection.auto_register_layers(variables, batch_size=BATCH)
        curvature = estimator.make_fisher_estimator(
            variables=variables,
            cov_ema_decay=0.9,
            damping=0.1,
            layer_collection=collection,
        )
        updates, _ = curvature.make_vars_and_create_op_thunks()
        with tf.control_dependencies([thunk() for thunk in updates]):
            updated = tf.constant(0)
        # The statistics' forward pass is one of its own in training.
        counted["statistics"] = graph_cost.flops(graph_cost.behind([updated]))
        vectors = [(tf.ones_like(v), v) for v in variables]
        products = [p for p, _ in curvature.multiply_inverse(vectors)]
        ops = graph_cost.behind(products, forward)
        counted["preconditioning"] = graph_cost.flops(ops)
        # What placement deals out by.
        dealt = sum(block.product_flops() for block in curvature.blocks)
        assert dealt == counted["preconditioning"]
        counted["inverses"] = sum(f.inverse_flops() for f in curvature.factors)
        return updated

    with state.parameter_names({v.value.ref(): v.path for v in model.variables}):
        _trace(build, model)
    planned = _plan(model)
    for phase, expected in counted.items():
        np.testing.assert_allclose(
            planned.phase(phase).flops, expected, rtol=1e-12, err_msg=phase
        )


def test_memory_kept_is_that_of_the_state_after_training():
    model = MODELS["convnet"]()
    model.compile(
        optimizer=Kfac(learning_rate=0.1, damping=0.1, model=model), loss="mse"
    )
    model.train_on_batch(np.ones([4, 8, 8, 2]), np.ones([4, 3]))
    kept = sum(
        int(np.prod(v.shape)) * v.dtype.size
        for v in model.optimizer._store.named_variables().values()
        if v.shape.rank > 0
    )
    planned = _plan(model, 4)
    parameters = 4 * model.count_params()
    assert planned.kept_bytes == parameters + kept
    assert planned.peak_bytes > planned.kept_bytes


def test_parts_and_periods_divide_the_cost():
    model = MODELS["perceptron"]()
    whole = _plan(model)
    part = _plan(model, cov_batch_fraction=0.25, cov_update_every=10, invert_every=50)
    statistics = part.phase("statistics")
    # ceil(12 / 4) = 3 cases are a quarter exactly.
    assert statistics.flops == whole.phase("statistics").flops / 4
    assert statistics.flops_a_step == statistics.flops / 10
    assert part.phase("inverses").every == 50
    assert part.flops_a_step == pytest.approx(
        sum(phase.flops / phase.every for phase in part.phases)
    )


def test_options_come_from_the_compiled_optimizer():
    model = MODELS["perceptron"]()
    optimizer = Kfac(damping=0.1, model=model, adaptive=True, cov_update_every=7)
    model.compile(optimizer=optimizer, loss="mse")
    planned = _plan(model)
    assert planned.phase("statistics").every == 7
    assert planned.phase("damping adaptation").every == 5
    forward = planned.phase("damping adaptation").flops / 2
    # A forward pass, and for each of two vectors a product as costly as one and a
    # half: the first layer's input has no tangent.
    assert forward < planned.phase("quadratic model").flops <= 5 * forward
    assert _plan(model, cov_update_every=2).phase("statistics").every == 2


def test_adaptive_options_are_completed_as_the_optimizer_does():
    model = MODELS["perceptron"]()
    assert _plan(model, adaptive=True).phase("inverses").every == 5
    model.compile(
        optimizer=Kfac(learning_rate=0.1, damping=0.1, model=model), loss="mse"
    )
    assert "quadratic model" not in {phase.name for phase in _plan(model).phases}
    assert _plan(model, adaptive=True).phase("quadratic model").flops > 0


@pytest.mark.parametrize("name", MODELS)
def test_costs_of_replicas_agree_with_those_of_one(name):
    planned = _plan(MODELS[name]())
    layers = planned.on_replicas()
    (inversions,) = replica_cost.inversion_flops(layers, 1)
    (products,) = replica_cost.product_flops(layers, 1)
    assert inversions == pytest.approx(planned.phase("inverses").flops)
    assert products == pytest.approx(planned.phase("preconditioning").flops)
    memory = replica_cost.memory_bytes(layers)
    assert memory["parameters"] == planned.phase("gradient").kept_bytes
    assert memory["statistics"] == planned.phase("statistics").kept_bytes
    assert memory["inverses"] == planned.phase("inverses").kept_bytes
    if name == "perceptron":  # No strides or borders, and nothing but layers.
        # The gradient of the first layer's input, which is not needed.
        of_input = 2 * BATCH * layers[0].parameters
        for phase, count in (
            ("gradient", replica_cost.gradient_flops),
            ("statistics", replica_cost.statistics_flops),
        ):
            assert count(layers, BATCH) == planned.phase(phase).flops + of_input


def test_what_replica_cost_does_not_know_is_refused():
    planned = _plan(MODELS["perceptron"](), fisher_approx="ekfac")
    with pytest.raises(ValueError, match="not known of ekfac.*which dense"):
        planned.on_replicas()


def test_layers_that_share_a_factor_follow_each_other():
    layers = _plan(MODELS["attention"]()).on_replicas()
    kinds = [layer.row_factor for layer in layers]
    first = kinds.index("shared")
    assert kinds[first - 1 : first + 2] == ["full", "shared", "shared"]
    assert {layer.rows for layer in layers[first - 1 : first + 2]} == {8}


@pytest.mark.parametrize(
    "inputs, approximation",
    [((4,), "kron_out_diag"), ((3, 4), "kron_indep_out_diag")],
)
def test_advice_about_a_large_factor_can_be_followed(inputs, approximation):
    model = keras.Sequential(
        [keras.Input(inputs), keras.layers.Dense(20_000, name="wide")]
    )
    (warning,) = [w for w in _plan(model).warnings if "20,000 by 20,000" in w]
    assert f"fisher_approx={{'wide': {approximation!r}}}" in warning
    better = _plan(model, fisher_approx={"wide": approximation})
    assert not any("20,000 by" in warning for warning in better.warnings)


def test_layers_of_the_fallback_optimizer_cost_no_curvature():
    planned = _plan(MODELS["perceptron"](), fisher_approx=[None, "fallback"])
    assert [layer.row.shapes for layer in planned.layers] == [((7, 9),)]


def test_a_wide_softmax_is_warned_about_and_the_advice_helps():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(50_000, name="vocabulary")]
    )
    planned = _plan(model)
    factor = 4 * 50_000**2
    assert planned.phase("statistics").kept_bytes > factor
    (warning, *_) = planned.warnings
    advice = "fisher_approx={'vocabulary': 'kron_out_diag'}"
    assert "9.3 GiB" in warning and advice in warning
    better = _plan(model, fisher_approx={"vocabulary": "kron_out_diag"})
    assert better.kept_bytes < 4e6 and not better.warnings


def test_expensive_phases_and_generic_blocks_are_warned_about():
    class Scaled(keras.layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(shape[-1], shape[-1]), name="table")

        def call(self, x):
            return x * keras.ops.sum(keras.ops.sin(self.table), axis=0)

    model = keras.Sequential([keras.Input((100,)), Scaled(), keras.layers.Dense(2)])
    warnings = " ".join(_plan(model, 2).warnings)
    assert "table: covered by a generic diagonal block only" in warnings
    assert "invert_every=" in warnings


def test_the_table_lists_every_phase_and_the_largest_layers():
    lines = []
    planned = planning.plan(MODELS["convnet"](), BATCH, print_fn=lines.append)
    (table,) = lines
    assert table == str(planned)
    for phase in planned.phases:
        assert phase.name in table
    assert "18x18, 4x4" in table
    assert f"{planned.ratio_to_gradient:.2f} gradients" in table


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs["a"])


def test_inputs_of_subclassed_models_are_given():
    model = Subclassed()
    x = {"a": tf.ones([2, 5])}
    model(x)
    with pytest.raises(ValueError, match="Subclassed does not say.*pass x="):
        _plan(model)
    expected = 2 * 2 * BATCH * 5 * 3  # Forward pass, and the kernel's gradient.
    assert _plan(model, x=x).phase("gradient").flops == expected


def test_unusable_arguments_are_refused():
    model = MODELS["perceptron"]()
    with pytest.raises(ValueError, match=r"unknown arguments \['invert_evry'\]"):
        _plan(model, invert_evry=3)
    with pytest.raises(ValueError, match="needs a Kfac.*Adam"):
        _plan(model, optimizer=keras.optimizers.Adam())
    sequences = keras.Sequential([keras.Input((None, 3)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="pass x= with every size"):
        _plan(sequences)


@pytest.mark.parametrize(
    ("count", "text"),
    [(5, "5 FLOP"), (1234, "1.23 kFLOP"), (2.5e9, "2.5 GFLOP"), (4e15, "4e+03 TFLOP")],
)
def test_operations_are_printed_with_units(count, text):
    assert planning.format_flops(count) == text
