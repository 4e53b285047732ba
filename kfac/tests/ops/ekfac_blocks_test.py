"""EKFAC blocks: algebra, data formats, registration."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config, errors, layer_collection
from kfac.python.ops import fisher_blocks as fb
from kfac.tests import graph_kinds, oracle
from kfac.tests.ops import ekfac_cases
from kfac.tests.ops import fisher_blocks_cases as cases

tf1 = tf.compat.v1

TOLERANCE = dict(rtol=1e-9, atol=1e-11)


def _filter(shape, bias=False):
    weights = tf.zeros(shape, tf.float64)
    return (weights, tf.zeros(shape[-1:], tf.float64)) if bias else weights


BLOCKS = (
    cases.Case(
        "dense",
        lambda lc: fb.FullyConnectedEKFACFB(lc, has_bias=True),
        ((3, 2), (2,)),
        (3,),
        (2,),
    ),
    cases.Case(
        "dense, weights of rank 3, bias of rank 2",
        lambda lc: fb.FullyConnectedEKFACFB(lc, True),
        ((2, 2, 3), (1, 3)),
        (4,),
        (3,),
    ),
    cases.Case(
        "dense, products",
        lambda lc: fb.FullyConnectedEKFACFB(lc, scaling="product"),
        (3, 2),
        (3,),
        (2,),
    ),
    cases.Case(
        "dense, several uses",
        lambda lc: fb.FullyConnectedMultiEKFACFB(lc, has_bias=True),
        ((3, 2), (2,)),
        (3,),
        (2,),
        uses=cases.USES,
    ),
    cases.Case(
        "conv",
        lambda lc: fb.ConvEKFACFB(
            lc,
            _filter((2, 2, 2, 2), bias=True),
            "VALID",
            strides=(1, 1, 2, 1),
            extract_patches_fn="extract_image_patches",
        ),
        ((2, 2, 2, 2), (2,)),
        (3, 4, 2),
        (2, 2, 2),
    ),
    cases.Case(
        "conv, several uses",
        lambda lc: fb.ConvMultiEKFACFB(lc, _filter((2, 2, 1, 2)), "SAME"),
        (2, 2, 1, 2),
        (2, 3, 1),
        (2, 3, 2),
        uses=2,
    ),
)
every_block = pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)


def refreshed(block, grads, **options):
    """Statistics, then bases, then statistics in them; one op."""
    done = cases.update(block, grads, **options)
    with tf.control_dependencies([done]):
        return tf.group(
            *(f.make_covariance_update_op(0.9, 1.0) for f in block._factors())
        )


def vector_of(case, seed=5):
    vector = [tf.constant(v) for v in case.vector(seed)]
    return vector if len(vector) > 1 else vector[0]


@every_block
@pytest.mark.parametrize("kind", [graph_kinds.V1_OFF, graph_kinds.FUNCTION])
def test_products_are_those_of_functions_of_the_exactly_damped_block(case, kind):
    if kind != graph_kinds.FUNCTION and case not in (BLOCKS[0], BLOCKS[4]):
        pytest.skip("one dense layer and one convolution stand for all")

    def build():
        block, grads = cases.register(case, layer_collection.LayerCollection())
        with tf.control_dependencies([refreshed(block, grads)]):
            vector = vector_of(case)
            products = {
                str(exp): block.multiply_matpower(vector, exp)
                for exp in (-1, -0.5, 0.5, 1, 2)
            }
            products["inverse"] = block.multiply_inverse(vector)
            products["multiply"] = block.multiply(vector)
            factor_of = block.linear_operator(damped=True)
            return {
                "undamped": block.full_fisher_block(),
                "damped": factor_of.to_dense(),
                "products": products,
            }

    values = graph_kinds.Run(kind, build)()
    undamped, damped = values["undamped"], values["damped"]
    np.testing.assert_allclose(
        damped, undamped + cases.DAMPING * np.eye(len(undamped)), **TOLERANCE
    )
    expected = {str(e): oracle.matrix_power(damped, e) for e in (-1, -0.5, 0.5, 1, 2)}
    expected |= {"inverse": expected["-1"], "multiply": damped}
    for name, product in values["products"].items():
        np.testing.assert_allclose(
            cases.flat(product),
            expected[name] @ cases.flat(case.vector()),
            err_msg=name,
            **TOLERANCE,
        )


@every_block
def test_the_root_is_no_triangle_but_a_factor_of_the_damped_block(case):
    """K Kᵀ is the damped block, and the four products are of one K."""
    size = cases.size(case)

    def build():
        block, grads = cases.register(case, layer_collection.LayerCollection())
        with tf.control_dependencies([refreshed(block, grads)]):

            def matrix(multiply, **options):
                columns = []
                for unit in np.eye(size):
                    parts, start = [], 0
                    for shape in case.shapes:
                        stop = start + int(np.prod(shape))
                        parts.append(tf.constant(unit[start:stop].reshape(shape)))
                        start = stop
                    product = multiply(parts if len(parts) > 1 else parts[0], **options)
                    flat = [tf.reshape(t, [-1]) for t in tf.nest.flatten(product)]
                    columns.append(tf.concat(flat, 0))
                return tf.stack(columns, axis=1)

            return {
                "damped": block.linear_operator().to_dense(),
                "root": matrix(block.multiply_cholesky),
                "transpose": matrix(block.multiply_cholesky, transpose=True),
                "inverse": matrix(block.multiply_cholesky_inverse),
                "inverse transpose": matrix(
                    block.multiply_cholesky_inverse, transpose=True
                ),
            }

    if size > 20:
        pytest.skip("columns one by one; smaller blocks have the same algebra")
    values = graph_kinds.Run(graph_kinds.V1_ON, build)()
    root = values["root"]
    np.testing.assert_allclose(root @ root.T, values["damped"], **TOLERANCE)
    np.testing.assert_allclose(values["transpose"], root.T, **TOLERANCE)
    np.testing.assert_allclose(values["inverse"], np.linalg.inv(root), **TOLERANCE)
    np.testing.assert_allclose(
        values["inverse transpose"], np.linalg.inv(root).T, **TOLERANCE
    )


@every_block
def test_results_have_the_structure_and_shapes_of_the_vector(case):
    with tf.Graph().as_default():
        block, grads = cases.register(case, layer_collection.LayerCollection())
        cases.update(block, grads)
        vector = vector_of(case)
        result = block.multiply_inverse(vector)
        if isinstance(vector, list):
            assert isinstance(result, tuple)
            assert [r.shape for r in result] == [v.shape for v in vector]
        else:
            assert result.shape == vector.shape


def test_sparse_vectors_are_served_densely():
    case = BLOCKS[2]

    def build():
        block, grads = cases.register(case, layer_collection.LayerCollection())
        with tf.control_dependencies([refreshed(block, grads)]):
            values = tf1.placeholder_with_default(np.ones((2, 2)), [None, 2])
            sparse = tf.IndexedSlices(values, tf.constant([0, 2]), tf.constant([3, 2]))
            dense = tf.constant([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]], tf.float64)
            return block.multiply_inverse(sparse), block.multiply_inverse(dense)

    np.testing.assert_allclose(*graph_kinds.Run(graph_kinds.V1_ON, build)())


@every_block
def test_statistics_do_not_depend_on_how_the_data_arrive(case):
    def matrix(name, strategy="separate", **options):
        with tf1.variable_scope(name), config.override(tower_strategy=strategy):
            block, grads = cases.register(
                case, layer_collection.LayerCollection(), **options
            )
            with tf.control_dependencies([refreshed(block, grads)]):
                return block.full_fisher_block()

    def build():
        return {
            "plain": matrix("plain"),
            "deferred": matrix("deferred", wrap=cases.defer),
            "towers": matrix("towers", towers=2),
            "concat": matrix("concat", strategy="concat", towers=2),
            "two sources": matrix("two_sources", sources=2),
        }

    values = graph_kinds.Run(graph_kinds.V1_ON, build)()
    for name in ("deferred", "towers", "concat"):
        np.testing.assert_allclose(
            values[name], values["plain"], err_msg=name, **TOLERANCE
        )
    assert not np.allclose(values["two sources"], values["plain"])


def test_sequences_with_the_cases_first_give_the_same_block():
    """What Keras layers on sequences register."""
    rng = np.random.RandomState(0)
    inputs, grads = rng.randn(cases.BATCH, 3, 2), rng.randn(cases.BATCH, 3, 4)

    def matrix(name, batch_major):
        with tf1.variable_scope(name):
            collection = layer_collection.LayerCollection()
            weights = tf1.get_variable("w", [2, 4], tf.float64, use_resource=True)
            towers = [tf.constant(data) for data in (inputs, grads)]
            if not batch_major:
                towers = [tf.unstack(data, axis=1) for data in towers]
            collection.register_fully_connected_multi(
                weights,
                *towers,
                num_uses=3,
                approx="ekfac",
                **({"batch_major": True} if batch_major else {}),
            )
            (block,) = collection.get_blocks()
            (signals,) = block.tensors_to_compute_grads()
            with tf.control_dependencies([refreshed(block, ((signals,),))]):
                return block.full_fisher_block()

    def build():
        return matrix("first", True), matrix("last", False)

    np.testing.assert_allclose(
        *graph_kinds.Run(graph_kinds.V1_ON, build)(), **TOLERANCE
    )


def test_sources_add_up():
    """Two equal sources make twice the matrix."""
    case = BLOCKS[4]

    def matrix(name, sources):
        with tf1.variable_scope(name):
            block, grads = cases.register(case, layer_collection.LayerCollection())
            with tf.control_dependencies([refreshed(block, grads * sources)]):
                return block.full_fisher_block()

    def build():
        return matrix("once", 1), matrix("twice", 2)

    once, twice = graph_kinds.Run(graph_kinds.V1_ON, build)()
    np.testing.assert_allclose(twice, 2 * once, **TOLERANCE)


def test_without_normalised_damping_the_block_gets_that_of_all_its_uses():
    case = BLOCKS[4]

    def build():
        with config.override(normalize_damping_power=0.0):
            block, grads = cases.register(case, layer_collection.LayerCollection())
            block.instantiate_factors(grads, 0.25)
            for factor in block._factors():
                factor.instantiate_cov_variables()
            return block.multiply(vector_of(case))

    product = graph_kinds.Run(graph_kinds.V1_ON, build)()
    locations = 4
    np.testing.assert_allclose(
        cases.flat(product), 0.25 * locations * cases.flat(case.vector()), rtol=1e-12
    )


@pytest.mark.parametrize("name", ["ekfac", "ekfac_product"])
@pytest.mark.parametrize("case", ekfac_cases.CASES, ids=str)
def test_every_layer_family_registers_it_by_name(case, name):
    with tf.Graph().as_default():
        model = ekfac_cases.build(case, name)
        rows = model.collection.explain(print_fn=None)
    assert {row.approximation for row in rows} == {name}
    assert {row.reason for row in rows} == {None}


def test_the_names_are_constants():
    assert layer_collection.APPROX_EKFAC_NAME == "ekfac"
    assert layer_collection.APPROX_EKFAC_PRODUCT_NAME == "ekfac_product"


def test_it_can_be_a_default_and_a_linked_approximation():
    with tf.Graph().as_default():
        x, w = tf.ones([4, 3]), tf1.get_variable("w", [3, 2], use_resource=True)
        collection = layer_collection.LayerCollection()
        collection.set_default_fully_connected_approximation("ekfac")
        collection.register_fully_connected(w, x, x @ w)
        assert isinstance(collection.get_blocks()[0], fb.FullyConnectedEKFACFB)
        collection = layer_collection.LayerCollection()
        collection.define_linked_parameters(w, "ekfac")
        collection.register_fully_connected(w, x, x @ w)
        assert isinstance(collection.get_blocks()[0], fb.FullyConnectedEKFACFB)


def test_ids_are_refused_and_a_default_means_kfac_for_them():
    with tf.Graph().as_default():
        ids, table = tf.constant([0, 1]), tf1.get_variable("t", [5, 2])
        outputs = tf.gather(table, ids)
        collection = layer_collection.LayerCollection()
        with pytest.raises(errors.ArgumentError, match="ekfac.*kron_in_diag"):
            collection.register_fully_connected(
                table, ids, outputs, approx="ekfac", dense_inputs=False
            )
        collection.set_default_fully_connected_approximation("ekfac")
        collection.register_fully_connected(table, ids, outputs, dense_inputs=False)
        assert collection.get_blocks()[0].approximation == "kron_in_diag"


def test_towers_with_another_scaling_are_refused():
    with tf.Graph().as_default():
        x, w = tf.ones([4, 3]), tf1.get_variable("w", [3, 2], use_resource=True)
        collection = layer_collection.LayerCollection()
        collection.register_fully_connected(w, x, x @ w, approx="ekfac")
        with pytest.raises(errors.ArgumentError, match="scaling"):
            collection.register_fully_connected(
                w, x, x @ w, approx="ekfac_product", reuse=True
            )


def test_options_that_make_no_sense_are_refused():
    with tf.Graph().as_default():
        collection = layer_collection.LayerCollection()
        with pytest.raises(errors.ArgumentError, match="scaling='both'.*examples"):
            fb.FullyConnectedEKFACFB(collection, scaling="both")
        with pytest.raises(errors.ArgumentError, match="SUA"):
            fb.ConvEKFACFB(
                collection,
                _filter((2, 2, 1, 1)),
                "SAME",
                use_sua_approx_for_input_factor=True,
            )
