import pytest

from kfac.examples import cg_preconditioning, datasets, dense_network


@pytest.fixture(scope="module")
def solvers():
    data = datasets.load().flat()
    network = dense_network.Network([784, 16, 10])
    dense_network.train(
        network,
        data.x_train[:500],
        data.y_train[:500],
        num_steps=30,
        batch_size=100,
        learning_rate=3e-3,
    )
    return {
        name: cg_preconditioning.make_solver(
            network, data.x_train[:100], data.y_train[:100], name
        )
        for name in cg_preconditioning.PRECONDITIONERS
    }


def test_preconditioning_by_kfac_cuts_the_iterations(solvers):
    counts = {}
    for name, solve in solvers.items():
        outcome = solve(0.003, 300, 0.1)
        assert outcome.residual <= 0.1
        counts[name] = outcome.iterations
    assert counts["K-FAC"] <= 0.6 * counts["none"]
    assert counts["K-FAC"] < counts["diagonal"]
    assert counts["EKFAC"] <= 0.6 * counts["none"]


def test_the_decrease_grows_with_iterations_and_faster_with_kfac(solvers):
    decreases = {
        name: [solve(0.003, count, 0.0).decrease for count in (2, 4, 60)]
        for name, solve in solvers.items()
    }
    for values in decreases.values():
        assert 0 < values[0] < values[1] < values[2]
        # After 60 iterations all are at the minimum, but for rounding.
        assert abs(values[2] / decreases["none"][2] - 1) < 0.01
    assert decreases["K-FAC"][0] > decreases["none"][0]


@pytest.mark.parametrize("name", cg_preconditioning.PRECONDITIONERS)
def test_iterations_stop_at_the_cap(solvers, name):
    assert solvers[name](1e-4, 3, 0.0).iterations == 3


def test_the_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    curves = {(name, 0.1): [0.5, 0.1] for name in cg_preconditioning.PRECONDITIONERS}
    path = tmp_path / "cg.png"
    cg_preconditioning.plot(curves, str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
