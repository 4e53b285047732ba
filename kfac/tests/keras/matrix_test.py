"""Kfac trains: model kind x loss x compile mode x precision.

The cells that run are chosen such that any two levels of different columns meet in
one of them.
"""

import itertools

import keras
import numpy as np
import pytest

from kfac.python.keras.losses import UnsupportedLossError
from kfac.tests.keras import keras_cases as cases

MODELS = {
    "sequential": cases.sequential,
    "functional": cases.functional,
    "subclassed": cases.Subclassed,
    "nested": cases.nested,
}
LOSSES = {
    "sparse": (None, cases.sparse_logits),
    "categorical": ("softmax", lambda: "categorical_crossentropy"),
    "binary": ("sigmoid", lambda: "binary_crossentropy"),
    "squared": (None, lambda: "mse"),
}
MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
}
PRECISIONS = ("float32", "float64", "mixed_bfloat16", "mixed_float16")


def pairwise_cells():
    """Few cells that contain every pair of levels, found greedily."""
    columns = [list(MODELS), list(LOSSES), list(MODES), list(PRECISIONS)]
    missing = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(4), 2)
        for a in columns[i]
        for b in columns[j]
    }
    chosen = []
    while missing:

        def pairs(cell):
            return set(itertools.combinations(enumerate(cell), 2)) & missing

        # XLA takes seconds to compile, so it is used where it adds most.
        best = max(
            itertools.product(*columns),
            key=lambda cell: len(pairs(cell)) - 1.5 * (cell[2] == "xla"),
        )
        missing -= pairs(best)
        chosen.append(best)
    return chosen


CELLS = pairwise_cells()


def targets(loss, y):
    one_hot = np.eye(cases.CLASSES, dtype=np.float32)[y]
    return y if loss == "sparse" else one_hot


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_the_training_loss_falls(cell):
    kind, loss, mode, precision = cell
    keras.utils.set_random_seed(3)
    x, y = cases.data()
    activation, make_loss = LOSSES[loss]
    with cases.dtype_policy(precision):
        model = MODELS[kind](activation)
        # XLA's first step of `fit` has no inverses yet.
        optimizer = cases.make(
            model, make_loss(), MODES[mode], learning_rate=0.3, damping=0.1
        )
        losses = cases.losses_of_fit(model, x, targets(loss, y), epochs=8)
    assert losses[-1] < 0.8 * losses[0], losses
    assert int(optimizer.iterations) == 8
    dtypes = {v.dtype.name for v in factor_variables(optimizer)}
    assert dtypes == {"float64" if precision == "float64" else "float32"}


def factor_variables(optimizer):
    names = optimizer.state_variable_names()
    return [optimizer.state_variable(n) for n in names if n.endswith("/cov/var")]


def test_all_pairs_of_levels_are_covered_by_few_cells():
    assert len(CELLS) <= 20


@pytest.mark.parametrize(
    "loss", ["mae", keras.losses.Huber(), keras.losses.KLDivergence()]
)
def test_losses_of_unknown_curvature_are_refused_before_training(loss):
    model = cases.sequential()
    cases.make(model, loss)
    x, y = cases.data()
    with pytest.raises(UnsupportedLossError, match="register_losses"):
        cases.losses_of_fit(model, x, targets("squared", y))


def test_a_module_that_is_not_keras_has_no_fit_but_trains_by_steps():
    model = cases.Module()
    optimizer = cases.Kfac(
        learning_rate=0.3, damping=0.1, model=model, loss=cases.sparse_logits()
    )
    x, y = cases.data()
    losses = [float(optimizer.step(x, y)["loss"]) for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0], losses
