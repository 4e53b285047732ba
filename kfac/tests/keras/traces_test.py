"""How often `fit` traces its training step."""

import keras
import pytest

from kfac.tests.keras import keras_cases as cases


class Counting(keras.Sequential):
    """Counts the traces of its training step."""

    traces = 0

    def train_step(self, data):
        self.traces += 1
        return super().train_step(data)


def counting_model():
    return Counting(cases.sequential().layers)


def traces_of_fit(make_optimizer, **compiled):
    """Traces of a first fit with a ragged last batch, and of all further ones."""
    model = counting_model()
    x, y = cases.data()
    optimizer = make_optimizer(model)
    model.compile(optimizer, cases.sparse_logits(), **compiled)
    cases.losses_of_fit(model, x, y, epochs=2, batch_size=20)
    first = model.traces
    optimizer.learning_rate = 0.01
    if hasattr(optimizer, "damping"):
        optimizer.damping = 0.5
    cases.losses_of_fit(model, x, y, epochs=2, batch_size=20)
    return first, model.traces - first


def kfac_with(**kwargs):
    def make(model):
        return cases.Kfac(learning_rate=0.1, damping=0.1, model=model, **kwargs)

    return make


@pytest.mark.filterwarnings("ignore:.*overrides train_step")
@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        ({}, {}),
        ({"use_ema": True, "gradient_accumulation_steps": 2}, {}),
        ({"cov_update_every": 3, "num_burnin_steps": 2}, {"steps_per_execution": 2}),
    ],
    ids=["plain", "averages and accumulation", "burn-in, several steps an execution"],
)
def test_fit_traces_as_often_as_with_adam(options, compiled):
    by_adam = traces_of_fit(lambda model: keras.optimizers.Adam(), **compiled)
    first, further = traces_of_fit(kfac_with(**options), **compiled)
    assert first <= by_adam[0]
    assert further == 0


def test_a_step_of_ones_own_is_traced_once_for_all_dampings_and_batch_sizes():
    model = cases.sequential()
    optimizer = cases.make(model)
    x, y = cases.data()
    counts = []
    model_call = model.call

    def counting_call(*args, **kwargs):
        counts.append(1)
        return model_call(*args, **kwargs)

    optimizer.step(x, y)
    optimizer.step(x[:10], y[:10])
    model.call = counting_call
    for size in (20, 30, 40):
        optimizer.damping = size / 100
        optimizer.step(x[:size], y[:size])
    assert not counts
