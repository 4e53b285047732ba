import numpy as np
import pytest
import tensorflow as tf
from absl import app

from kfac.examples import datasets, dense_network, exact_fisher, fisher_quality
from kfac.tests import oracle
from kfac.tests.examples import example_runs

DAMPING = 0.02


@pytest.fixture(scope="module")
def data():
    return datasets.load()


@pytest.fixture(scope="module")
def measured(data):
    images = fisher_quality.pooled(data.x_train[:400])
    network = dense_network.Network([49, 5, 10], seed=1)
    loss = dense_network.train(
        network,
        images,
        data.y_train[:400],
        num_steps=60,
        batch_size=100,
        learning_rate=1e-2,
    )
    assert loss < 2.0  # Chance is log 10 = 2.3.
    x, y = images[:60], data.y_train[:60]
    qualities, terms = fisher_quality.measure(network, x, y, DAMPING)
    return network, x, y, qualities, terms


def _of(qualities, layer, approximation):
    return next(
        q for q in qualities if (q.layer, q.approximation) == (layer, approximation)
    )


def _statistics(seed=0, cases=50):
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=[cases, 3, 2]) * rng.exponential(size=[cases, 1, 1])
    moments = np.einsum("bik,bjk->bij", factors, factors)
    return exact_fisher.LayerStatistics(rng.exponential(size=[cases, 4]), moments)


def test_cumulants_add_up_to_the_error():
    statistics = _statistics()
    error = statistics.exact() - statistics.kronecker()
    np.testing.assert_allclose(
        statistics.third_order() + statistics.fourth_order(), error, atol=1e-13
    )
    assert np.linalg.norm(error) > 0.1 * np.linalg.norm(statistics.exact())


def test_third_order_terms_vanish_for_inputs_of_mean_zero():
    statistics = _statistics()
    centred = exact_fisher.LayerStatistics(
        statistics.inputs - statistics.inputs.mean(0), statistics.output_moments
    )
    np.testing.assert_allclose(centred.third_order(), 0, atol=1e-13)
    np.testing.assert_allclose(
        centred.fourth_order(), statistics.fourth_order(), atol=1e-13
    )


def test_the_exact_block_is_that_of_a_sum_over_cases():
    statistics = _statistics(cases=7)
    expected = np.mean(
        [
            np.kron(np.outer(a, a), g)
            for a, g in zip(statistics.inputs, statistics.output_moments, strict=True)
        ],
        axis=0,
    )
    np.testing.assert_allclose(statistics.exact(), expected, rtol=1e-12)


def test_the_exact_blocks_are_those_of_explicit_jacobians(measured):
    network, x, y, qualities, _ = measured
    params = [v.numpy().astype(np.float64) for v in network.trainable_variables]

    def net(params, x):
        b1, w1, b2, w2 = params  # tf.Module sorts variables by attribute name.
        return [tf.matmul(tf.tanh(tf.matmul(x, w1) + b1), w2) + b2]

    x64 = x[:20].astype(np.float64)
    fisher = oracle.fisher(net, params, x64, [oracle.Categorical()])
    rows = oracle.example_gradients(net, params, x64, [oracle.Categorical()], [y[:20]])
    sizes = np.cumsum([0, *(p.size for p in params)])
    part = {name: np.arange(*sizes[i : i + 2]) for i, name in enumerate("bwcv")}
    model, empirical = fisher_quality.layer_statistics(network, x[:20], y[:20])
    for i, order in enumerate((("w", "b"), ("v", "c"))):
        index = np.concatenate([part[name] for name in order])
        block = np.ix_(index, index)
        # The network computes in float32.
        assert oracle.relative_error(model[i].exact(), fisher[block]) < 1e-5
        second_moment = (rows.T @ rows / len(rows))[block]
        assert oracle.relative_error(empirical[i].exact(), second_moment) < 1e-5


def test_the_librarys_blocks_are_those_of_the_formulas(measured):
    network, x, y, qualities, _ = measured
    model, _ = fisher_quality.layer_statistics(network, x, y)
    for statistics, layer in zip(model, ("layer_1", "layer_2"), strict=True):
        kfac = _of(qualities, layer, "K-FAC").matrix
        assert oracle.relative_error(kfac, statistics.kronecker()) < 1e-4
        diagonal = _of(qualities, layer, "diagonal").matrix
        expected = np.diag(np.diag(statistics.exact()))
        assert oracle.relative_error(diagonal, expected) < 1e-4


@pytest.mark.parametrize("layer", ["layer_1", "layer_2"])
def test_errors_are_ordered_as_theory_says(measured, layer):
    *_, qualities, terms = measured
    error = {
        name: _of(qualities, layer, name).error
        for name in ("exact", "K-FAC", "EKFAC", "diagonal", "empirical")
    }
    assert error["exact"] == 0
    assert 0 < error["EKFAC"] < error["K-FAC"]
    assert error["K-FAC"] < error["diagonal"]
    assert error["empirical"] > 0
    # EKFAC is damped exactly, K-FAC factor by factor.
    ekfac, kfac = (_of(qualities, layer, name) for name in ("EKFAC", "K-FAC"))
    np.testing.assert_allclose(ekfac.inverse_error, ekfac.exact_damping_error, 1e-3)
    assert kfac.exact_damping_error < kfac.inverse_error
    row = next(row for row in terms if row[0] == layer)
    np.testing.assert_allclose(row[1], error["K-FAC"], rtol=1e-4)
    assert row[1] <= row[2] + row[3] + 1e-12


@pytest.mark.parametrize(("size", "most"), [(7, 10), (10, 10), (23, 5), (24, 5)])
def test_cells_of_the_picture_hold_the_largest_absolute_values(size, most):
    matrix = np.random.default_rng(0).normal(size=(size, size))
    picture = fisher_quality.coarsened(matrix, most)
    assert picture.shape[0] == picture.shape[1] <= most
    cell = -(-size // most)
    for i, j in np.ndindex(*picture.shape):
        rows, columns = (slice(cell * k, cell * (k + 1)) for k in (i, j))
        assert picture[i, j] == np.abs(matrix[rows, columns]).max()


def test_the_picture_is_written(measured, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "pictures" / "fisher.png"
    fisher_quality.draw(measured[3], str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_inverse_without_damping_is_refused():
    with (
        example_runs.with_flags(fisher_quality, damping=0.0),
        pytest.raises(app.UsageError, match="damping"),
    ):
        fisher_quality.main([])
