"""One contract for every block class: life cycle, products, data formats."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config, deferred, layer_collection
from kfac.python.ops import fisher_blocks as fb
from kfac.python.ops.rules import scalars
from kfac.tests import graph_kinds, oracle
from kfac.tests.ops import fisher_blocks_cases as cases

tf1 = tf.compat.v1

# One representative of every algebra for the expensive kinds of graphs.
REPRESENTATIVES = (
    "naive full",
    "naive diagonal",
    "dense kron",
    "conv kron, SUA",
    "depthwise diagonal",
)
# Float64 throughout; eigendecompositions and inverses of matrices of condition number
# below 1e3 lose at most some 1e-12.
TOLERANCE = dict(rtol=1e-9, atol=1e-11)


def _damped_matrix(block):
    """NumPy-ready pieces of the damped block in its own parameters' order.

    Full and diagonal: `F` and the damping. Kronecker: `c`, `A`, `G` and two dampings.
    """
    if isinstance(block, fb.KroneckerProductFB):
        left = block._left_operator(block.input_factor.get_cov_as_linear_operator())
        return {
            "c": tf.constant(float(block._renorm_coeff), tf.float64),
            "A": left.to_dense(),
            "G": block.output_factor.get_cov_as_linear_operator().to_dense(),
            "dA": scalars.cast(block._input_damping_func(), tf.float64),
            "dG": scalars.cast(block._output_damping_func(), tf.float64),
        }
    return {
        "F": block._factor.get_cov_as_linear_operator().to_dense(),
        "d": scalars.cast(block._damping_func(), tf.float64),
    }


def _dense(pieces):
    """Undamped and damped matrix."""
    if "F" in pieces:
        return pieces["F"], pieces["F"] + pieces["d"] * np.eye(len(pieces["F"]))
    a, g = pieces["A"], pieces["G"]
    return pieces["c"] * np.kron(a, g), pieces["c"] * np.kron(
        a + pieces["dA"] * np.eye(len(a)), g + pieces["dG"] * np.eye(len(g))
    )


def _embedding(case, block):
    """Matrix from a vector to the coordinates that the block's matrix acts on."""
    n = cases.size(case)
    if not isinstance(block, fb.DepthwiseConvKFCBasicFB):
        return np.eye(n)
    height, width, channels, multiplier = case.params
    columns = []
    for unit in np.eye(n):
        full = np.zeros((height, width, channels, channels, multiplier))
        filter = unit.reshape(height, width, channels, multiplier)
        for i in range(channels):
            full[:, :, i, i] = filter[:, :, i]
        columns.append(full.reshape(-1))
    return np.stack(columns, axis=1)


def _products(case, block, exps, cholesky):
    """All products of the block with one vector, flattened."""
    vector = [tf.constant(v) for v in case.vector()]
    vector = vector if len(vector) > 1 else vector[0]
    results = {("power", exp): block.multiply_matpower(vector, exp) for exp in exps}
    results["multiply"] = block.multiply(vector)
    results["inverse"] = block.multiply_inverse(vector)
    if cholesky:
        for transpose in (False, True):
            results["cholesky", transpose] = block.multiply_cholesky(vector, transpose)
            results["cholesky inverse", transpose] = block.multiply_cholesky_inverse(
                vector, transpose
            )
    return results


def _run(case, kind, sources=1):
    """Values of everything the algebra promises, after one update."""
    exps = (-1, 1) if case.only_inverse else (-1, -0.5, 0.5, 1)
    blocks = []

    def build():
        block, grads = cases.register(
            case, layer_collection.LayerCollection(), sources=sources
        )
        blocks.append(block)
        done = cases.update(block, grads, exps=exps, cholesky=not case.only_inverse)
        with tf.control_dependencies([done]):
            products = _products(case, block, exps, not case.only_inverse)
            return {
                "full": block.full_fisher_block(),
                "pieces": _damped_matrix(block),
                "products": {str(k): v for k, v in products.items()},
            }

    return graph_kinds.Run(kind, build)(), blocks[0], exps


def _check_algebra(case, kind):
    values, block, exps = _run(case, kind)
    undamped, damped = _dense(values["pieces"])
    embed = _embedding(case, block)
    vector = cases.flat(case.vector())
    expected = {
        str(("power", exp)): oracle.matrix_power(damped, exp) for exp in exps
    } | {"multiply": damped, "inverse": np.linalg.inv(damped)}
    if not case.only_inverse:
        root = np.linalg.cholesky(damped)
        for transpose in (False, True):
            matrix = root.T if transpose else root
            expected[str(("cholesky", transpose))] = matrix
            inverse = np.linalg.inv(matrix)
            expected[str(("cholesky inverse", transpose))] = inverse
    np.testing.assert_allclose(
        values["full"], embed.T @ undamped @ embed, err_msg="full", **TOLERANCE
    )
    assert expected.keys() == values["products"].keys()
    for name, matrix in expected.items():
        np.testing.assert_allclose(
            cases.flat(values["products"][name]),
            embed.T @ matrix @ embed @ vector,
            err_msg=name,
            **TOLERANCE,
        )


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_products_are_those_of_functions_of_the_damped_block(case):
    _check_algebra(case, graph_kinds.V1_ON)


@pytest.mark.parametrize("name", REPRESENTATIVES)
@pytest.mark.parametrize("kind", (graph_kinds.V1_OFF, graph_kinds.FUNCTION))
def test_products_are_right_in_every_kind_of_graph(name, kind):
    _check_algebra(cases.case(name), kind)


@pytest.mark.parametrize("kind", (graph_kinds.COND, graph_kinds.XLA))
def test_kronecker_products_are_right_in_branches_and_under_xla(kind):
    _check_algebra(cases.case("dense kron"), kind)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_results_have_the_structure_and_shapes_of_the_vector(case):
    with tf.Graph().as_default():
        block, grads = cases.register(case, layer_collection.LayerCollection())
        cases.update(block, grads, exps=(-1,))
        vector = [tf.constant(v) for v in case.vector()]
        if len(vector) == 1:
            assert block.multiply(vector[0]).shape == vector[0].shape
            return
        for given in (vector, tuple(vector)):
            for result in (block.multiply(given), block.multiply_inverse(given)):
                assert isinstance(result, tuple)
                assert [r.shape for r in result] == [v.shape for v in vector]
                assert all(r.dtype == tf.float64 for r in result)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_statistics_do_not_depend_on_how_the_data_arrive(case):
    """Deferred data, two towers, concatenated towers: the same matrix."""

    def matrix(name, strategy="separate", **options):
        with tf1.variable_scope(name), config.override(tower_strategy=strategy):
            block, grads = cases.register(
                case, layer_collection.LayerCollection(), **options
            )
            done = cases.update(block, grads)
            with tf.control_dependencies([done]):
                return block.full_fisher_block()

    def build():
        result = {
            "plain": matrix("plain"),
            "deferred": matrix("deferred", wrap=cases.defer),
            "towers": matrix("towers", towers=2),
        }
        if case.inputs is not None:
            result["concat"] = matrix("concat", strategy="concat", towers=2)
        return result

    values = graph_kinds.Run(graph_kinds.V1_ON, build)()
    for name, value in values.items():
        np.testing.assert_allclose(
            value, values["plain"], err_msg=name, rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize("name", ("naive full", "naive diagonal"))
def test_generic_blocks_divide_by_the_size_of_the_sub_batch(name):
    def matrix(scope, map_batch_size):
        with tf1.variable_scope(scope):
            block, grads = cases.register(
                cases.case(name), layer_collection.LayerCollection(), towers=2
            )
            block.use_sub_batch(lambda tensor: tensor, map_batch_size)
            done = cases.update(block, grads)
            with tf.control_dependencies([done]):
                return block.full_fisher_block()

    def build():
        return matrix("whole", lambda n: n), matrix("part", lambda n: n // 2)

    whole, part = graph_kinds.Run(graph_kinds.V1_ON, build)()
    np.testing.assert_allclose(part, 2 * whole, rtol=1e-12)


@pytest.mark.parametrize(
    "case", [c for c in cases.CASES if c.inputs is not None], ids=lambda c: c.name
)
def test_the_sub_batch_matrix_is_that_of_the_part(case):
    half = cases.BATCH // 2
    parts = {}

    def cut(data):
        part = data if isinstance(data, tf.Tensor) else None
        if part is None:
            return deferred.DeferredTensor(
                lambda: tf.convert_to_tensor(data)[:half],
                [half, *data.shape[1:]],
                data.dtype,
                data.name,
                one_hot_depth=data.one_hot_depth,
            )
        return parts.setdefault(id(data), data[:half])

    def build():
        with tf1.variable_scope("sub_batch"):
            block, grads = cases.register(case, layer_collection.LayerCollection())
            block.use_sub_batch(cut, lambda batch: batch // 2)
            done = cases.update(block, tf.nest.map_structure(cut, grads))
            with tf.control_dependencies([done]):
                through_map = block.full_fisher_block()
        with tf1.variable_scope("part"):
            collection = layer_collection.LayerCollection()
            block = case.make(collection)
            inputs, grads = case.arrays()
            inputs, grads = (cases.shards(data, 2)[0] for data in (inputs, grads))
            grads = cases.constant(grads)
            block.register_additional_tower(cases.constant(inputs), grads)
            done = cases.update(block, ((grads,),))
            with tf.control_dependencies([done]):
                return through_map, block.full_fisher_block()

    through_map, direct = graph_kinds.Run(graph_kinds.V1_ON, build)()
    np.testing.assert_allclose(through_map, direct, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_the_description_says_what_the_block_is_and_costs(case):
    with tf.Graph().as_default():
        block, grads = cases.register(
            case, layer_collection.LayerCollection(), towers=2
        )
        before = block.description()
        assert before.factor_sides == ()
        assert before.factor_bytes == before.inverse_bytes == 0
        cases.update(block, grads, exps=(-1,))
        after = block.description()
    assert before.block == after.block == type(block).__name__
    assert after.approximation
    assert before.approximation == after.approximation
    assert before.uses == after.uses
    assert before.towers == after.towers == 2
    entries = sum(int(np.prod(sides)) for sides in after.factor_sides)
    assert after.factor_bytes == 8 * entries
    stored = sum(
        int(np.prod(v.shape)) for f in block._factors() for v in f.get_inv_vars()
    )
    assert after.inverse_bytes == 8 * stored


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_factors_of_registered_blocks_are_named_after_the_parameters(case):
    with tf.Graph().as_default():
        collection = layer_collection.LayerCollection()
        variable = tf1.get_variable("layer/w", [2], use_resource=True)
        block, grads = cases.register(case, collection)
        collection.fisher_blocks[variable] = block
        block.instantiate_factors(grads, cases.DAMPING)
        names = [factor.name for factor in block._factors()]
    if isinstance(block, fb.KroneckerProductFB):
        assert names == ["layer/w/input", "layer/w/output"]
    else:
        assert names == [f"layer/w/{block.approximation}"]


def test_products_before_any_statistic_are_those_of_the_damping_alone():
    """Whatever the normalisation, the damping of the whole block is the one given."""
    # The bias has second moment 1 from the start in the SUA factor.
    chosen = [case for case in cases.CASES if case.name != "conv kron, SUA"]

    def build():
        products = []
        for number, case in enumerate(chosen):
            with tf1.variable_scope(f"case{number}"):
                block, grads = cases.register(case, layer_collection.LayerCollection())
                block.instantiate_factors(grads, 0.25)
                for factor in block._factors():
                    factor.instantiate_cov_variables()
            vector = [tf.constant(v) for v in case.vector()]
            products.append(block.multiply(vector if len(vector) > 1 else vector[0]))
        return products

    products = graph_kinds.Run(graph_kinds.V1_ON, build)()
    for case, product in zip(chosen, products, strict=True):
        np.testing.assert_allclose(
            cases.flat(product),
            0.25 * cases.flat(case.vector()),
            rtol=1e-12,
            err_msg=case.name,
        )


def test_unregistered_powers_of_dense_blocks_are_refused():
    with tf.Graph().as_default():
        block, grads = cases.register(
            cases.case("dense kron"), layer_collection.LayerCollection()
        )
        cases.update(block, grads, exps=(-1,))
        with pytest.raises(KeyError):
            block.multiply_matpower([tf.constant(v) for v in _dense_vector()], -0.5)


def _dense_vector():
    return cases.case("dense kron").vector()


def test_abstract_classes_cannot_be_instantiated():
    for cls in (fb.FisherBlock, fb.FullFB, fb.DiagonalFB, fb.KroneckerProductFB):
        with pytest.raises(TypeError, match="abstract"):
            cls(None)
