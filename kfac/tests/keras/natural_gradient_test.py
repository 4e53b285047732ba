import keras
import numpy as np
import pytest
import tensorflow as tf

from kfac.python.keras.natural_gradient import NaturalGradient
from kfac.tests import oracle
from kfac.tests.keras import keras_cases as cases

DAMPING = 0.3
CASES = 12  # Explicit Jacobians take a while.


def _make(model, compiled=None, **kwargs):
    kwargs = {"learning_rate": 0.2, "damping": DAMPING, "seed": 1, **kwargs}
    if kwargs.get("adaptive"):
        kwargs["learning_rate"] = None
    optimizer = NaturalGradient(model=model, **kwargs)
    model.compile(optimizer=optimizer, loss=cases.sparse_logits(), **(compiled or {}))
    return optimizer


def _net(params, x):
    w1, b1, w2, b2 = params
    return [tf.matmul(tf.tanh(tf.matmul(x, w1) + b1), w2) + b2]


def _natural_gradient(params, x, y, matrix, matrix_cases=None):
    """By explicit matrices: `(C + damping I)^-1 g`, flat."""
    rows = oracle.example_gradients(_net, params, x, [oracle.Categorical()], [y])
    part = slice(matrix_cases)
    if matrix == "empirical_fisher":
        curvature = rows[part].T @ rows[part] / len(rows[part])
    else:
        curvature = oracle.fisher(_net, params, x[part], [oracle.Categorical()])
    damped = curvature + DAMPING * np.eye(len(curvature))
    return np.linalg.solve(damped, rows.mean(0))


def _flat(parts):
    return np.concatenate([np.ravel(part) for part in parts])


@pytest.mark.parametrize(
    ("curvature", "preconditioner"),
    [
        ("fisher", None),
        ("ggn", "diagonal"),
        ("empirical_fisher", None),
        ("empirical_fisher", "kfac"),
    ],
)
def test_a_step_is_the_damped_natural_gradient(curvature, preconditioner):
    x, y = cases.data(cases=CASES)
    x = x.astype(np.float64)
    with cases.dtype_policy("float64"):
        model = cases.sequential()
        optimizer = _make(
            model,
            curvature=curvature,
            preconditioner=preconditioner,
            learning_rate=0.5,
            momentum=0.0,
            cg_iterations=200,
            cg_tolerance=1e-8,
        )
        before = cases.weights(model)
        model.train_on_batch(x, y)
    expected = -0.5 * _natural_gradient(before, x, y, curvature)
    moved = _flat(cases.weights(model)) - _flat(before)
    assert oracle.relative_error(moved, expected) < 1e-6
    assert 0 < int(optimizer.cg_iterations) < 200
    assert float(optimizer.cg_residual) <= 1e-8


def test_the_curvature_may_be_of_a_part_of_the_batch():
    x, y = cases.data(cases=CASES)
    x = x.astype(np.float64)
    with cases.dtype_policy("float64"):
        model = cases.sequential()
        _make(
            model,
            qmodel_batch_fraction=0.25,
            learning_rate=1.0,
            momentum=0.0,
            cg_iterations=200,
            cg_tolerance=1e-8,
        )
        before = cases.weights(model)
        model.train_on_batch(x, y)
    expected = -_natural_gradient(before, x, y, "fisher", CASES // 4)
    moved = _flat(cases.weights(model)) - _flat(before)
    assert oracle.relative_error(moved, expected) < 1e-6


@pytest.mark.parametrize("warm", [True, False])
def test_a_warm_start_begins_with_the_last_solution(warm):
    model = cases.sequential()
    x, y = cases.data()
    # Without a step the second system is the first one.
    optimizer = _make(
        model, learning_rate=0.0, warm_start=warm, cg_iterations=50, cg_tolerance=1e-3
    )
    counts = []
    for _ in range(2):
        model.train_on_batch(x, y)
        counts.append(int(optimizer.cg_iterations))
    assert counts[0] > 2
    assert counts[1] == (0 if warm else counts[0])


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ({}, {"adaptive": True}),
        ({}, {"preconditioner": "kfac", "invert_every": 2, "adapt_damping": True}),
        ({"run_eagerly": True}, {"preconditioner": "diagonal"}),
        ({"jit_compile": True}, {"curvature": "empirical_fisher"}),
        ({}, {"num_burnin_steps": 1}),
    ],
    ids=["adaptive", "kfac, adapted damping", "eager", "xla", "burn-in"],
)
def test_the_training_loss_falls(mode, options):
    keras.utils.set_random_seed(3)
    model = cases.functional()
    _make(model, mode, **options)
    x, y = cases.data()
    history = cases.losses_of_fit(model, x, y, epochs=6)
    assert history[-1] < 0.75 * history[0]


@pytest.mark.parametrize("preconditioner", [None, "diagonal", "kfac"])
def test_a_batch_that_is_not_finite_leaves_no_traces(preconditioner):
    x, y = cases.data()
    bad = x.copy()
    bad[3] = np.nan
    model = cases.sequential()
    optimizer = _make(model, preconditioner=preconditioner)
    model.train_on_batch(x, y)
    before = cases.weights(model)
    model.train_on_batch(bad, y)
    # Momentum is all that moves the parameters: the solution of NaN is zero.
    assert np.isfinite(_flat(cases.weights(model))).all()
    assert int(optimizer.cg_iterations) == 0
    losses = cases.losses_of_fit(model, x, y, epochs=6)
    assert losses[-1] < losses[0]
    assert int(optimizer.cg_iterations) > 0
    assert oracle.relative_error(_flat(cases.weights(model)), _flat(before)) > 1e-2


def test_all_products_of_a_step_see_the_same_dropout():
    x, y = cases.data(cases=CASES)
    with cases.dtype_policy("float64"):
        model = keras.Sequential(
            [
                keras.Input((cases.FEATURES,)),
                keras.layers.Dense(6, activation="tanh"),
                keras.layers.Dropout(0.5, seed=1),
                keras.layers.Dense(cases.CLASSES),
            ]
        )
        optimizer = _make(model, cg_iterations=300, cg_tolerance=1e-9)
        model.train_on_batch(x.astype(np.float64), y)
    # Of a matrix that changed, the iteration would not find the inverse.
    assert float(optimizer.cg_residual) <= 1e-9
    assert int(optimizer.cg_iterations) < 300


def test_there_is_nothing_to_report_before_the_first_step():
    optimizer = NaturalGradient(learning_rate=0.1, damping=0.1)
    assert optimizer.cg_iterations == 0
    assert np.isnan(optimizer.cg_residual)


def test_training_goes_on_from_a_saved_model_as_if_it_had_not_stopped(tmp_path):
    x, y = cases.data()
    keras.utils.set_random_seed(4)
    model = cases.sequential()
    _make(model, preconditioner="diagonal", cg_iterations=7)
    model.fit(x, y, batch_size=24, epochs=2, shuffle=False, verbose=0)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert isinstance(loaded.optimizer, NaturalGradient)
    loaded.optimizer.register_layers(loaded)
    for each in (model, loaded):
        each.fit(x, y, batch_size=24, epochs=2, shuffle=False, verbose=0)
    for one, other in zip(*map(cases.weights, (model, loaded)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_state_survives_a_checkpoint(tmp_path):
    x, y = cases.data()
    models = []
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        model = cases.sequential()
        _make(model)
        cases.losses_of_fit(model, x, y, epochs=2)
        models.append(model)
    saved, restored = (
        tf.train.Checkpoint(model=m, optimizer=m.optimizer) for m in models
    )
    restored.restore(saved.save(str(tmp_path / "checkpoint")))
    for model in models:
        cases.losses_of_fit(model, x, y, epochs=2)
    for one, other in zip(*map(cases.weights, models), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_configuration_makes_an_equal_optimizer():
    optimizer = NaturalGradient(
        learning_rate=0.1,
        damping=0.2,
        curvature="ggn",
        preconditioner="kfac",
        cg_iterations=7,
        cg_tolerance=0.05,
        warm_start=False,
        norm_constraint=0.01,
    )
    config = optimizer.get_config()
    assert NaturalGradient.from_config(config).get_config() == config
    assert config["curvature"] == "ggn"
    assert config["momentum_type"] == "regular"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curvature": "hessian"}, "curvature must be one of .*got 'hessian'"),
        ({"preconditioner": "jacobi"}, "preconditioner must be .*got 'jacobi'"),
        ({"preconditioner": False}, "preconditioner must be"),
        ({"cg_iterations": 0}, "cg_iterations must be an integer"),
        ({"cg_iterations": 2.5}, "cg_iterations must be an integer"),
        ({"cg_tolerance": 1.0}, "cg_tolerance must be a number in"),
        ({"cg_tolerance": np.nan}, "cg_tolerance must be a number in"),
        ({"warm_start": "no"}, "warm_start must be True or False"),
        ({"damping": None}, "needs a damping"),
        ({"cg_steps": 3}, "unknown arguments"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    arguments = {"learning_rate": 0.1, "damping": 0.1, **arguments}
    with pytest.raises(ValueError, match=message):
        NaturalGradient(**arguments)
