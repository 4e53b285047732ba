import numpy as np
import pytest

from kfac.examples import classification, datasets, natural_gradient_mnist, reporting


@pytest.fixture(scope="module")
def histories():
    data = datasets.load().flat()
    return natural_gradient_mnist.compare(
        list(natural_gradient_mnist.METHODS),
        data,
        lambda: classification.batches(data, 500, seed=0),
        hidden_widths=[16],
        num_steps=12,
        eval_every=6,
        eval_size=500,
    )


def test_every_method_starts_equal_and_learns(histories):
    assert [h.name for h in histories] == list(natural_gradient_mnist.METHODS)
    starts = [h.metrics["train_loss"][0] for h in histories]
    np.testing.assert_allclose(starts, starts[0], rtol=1e-6)
    for history in histories:
        assert history.updates == [0, 6, 12]
        assert history.metrics["train_loss"][-1] < 0.8 * starts[0], history.name


def test_curvature_needs_fewer_updates_than_sgd(histories):
    final = {h.name: h.metrics["train_loss"][-1] for h in histories}
    # K-FAC's first steps are short, bounded by its norm constraint.
    for method in ("natural_fisher", "fishleg"):
        assert final[method] < final["sgd"]


def _run(name, seconds_an_update, accuracies):
    history = reporting.History(name)
    for update, accuracy in enumerate(accuracies):
        metrics = {"train_loss": 1.0, "test_accuracy": accuracy}
        history.record(update, seconds_an_update * update, metrics)
    return history


def test_the_table_tells_when_sgds_accuracy_was_reached():
    sgd = _run("sgd", 2.0, (10.0, 50.0, 90.0))
    rows = natural_gradient_mnist.table_rows([[sgd, _run("kfac", 3.0, (50, 90, 99))]])
    assert [row[-1] for row in rows] == ["4.0", "3.0"]
    assert natural_gradient_mnist.seconds_to(sgd, 95.0) is None


def test_the_table_shows_means_and_ranges_over_seeds():
    slow, fast = _run("sgd", 2.0, (10.0, 90.0)), _run("sgd", 1.0, (10.0, 80.0))
    never = _run("adam", 1.0, (10.0, 20.0))
    sgd, adam = natural_gradient_mnist.table_rows([[slow, never], [fast, never]])
    assert sgd == [
        *["sgd", "1", "1.5 (1.0-2.0)", "1.0000"],
        *["85.00 (80.00-90.00)", "1.5 (1.0-2.0)"],
    ]
    assert adam[-1] == "-"
