"""What one K-FAC step costs, in units of Adam's step on the same model and batch.

    python benchmarks/step_cost.py                       # all of it, about 4 minutes
    python benchmarks/step_cost.py --only=convnet

Contenders take turns step by step within one process; the ratio is that of the sums
over a round (a whole period of the inverses), its median over rounds is the figure.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

import kfac
from benchmarks import measuring
from kfac.examples import (
    autoencoder_mnist,
    autoencoder_model,
    datasets,
    keras_models,
    reporting,
)

COV_UPDATE_EVERY, INVERT_EVERY = 10, 100
LIMIT = 1.35  # What a step of K-FAC with these periods may cost, in Adam's steps.


def keras_step(
    model_name: str, batch: tuple, make_optimizer: Callable
) -> Callable[[], None]:
    """A training step of a compiled model, as `fit` runs it."""
    keras.utils.set_random_seed(0)
    model = keras_models.MODELS[model_name]()
    model.compile(
        optimizer=make_optimizer(model),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.make_train_function()
    batches = itertools.repeat(batch)
    return lambda: model.train_function(batches)


def kfac_optimizer(model: keras.Model, **options) -> keras.optimizers.Optimizer:
    return kfac.keras.optimizers.Kfac(
        learning_rate=0.01,
        damping=0.01,
        norm_constraint=1e-2,
        cov_update_every=COV_UPDATE_EVERY,
        invert_every=INVERT_EVERY,
        seed=0,
        model=model,
        **options,
    )


def measure_keras(model_name: str, batch_size: int, rounds: int) -> dict:
    """Ratios of K-FAC's mean step to Adam's, and times by phase."""
    data = datasets.load()
    batch = (
        tf.constant(data.x_train[:batch_size]),
        tf.constant(data.y_train[:batch_size]),
    )
    makers = {
        "adam": lambda model: keras.optimizers.Adam(1e-3),
        "kfac": kfac_optimizer,
        "kfac, 1/4 of the batch": lambda model: kfac_optimizer(
            model, cov_batch_fraction=0.25
        ),
    }
    steps = {name: keras_step(model_name, batch, make) for name, make in makers.items()}
    # One period first: tracing, and the inverses' denser schedule at the start.
    measuring.interleaved(steps, 1, INVERT_EVERY)
    times = measuring.interleaved(steps, rounds, INVERT_EVERY)
    result = {"model": model_name, "batch_size": batch_size, "rounds": rounds}
    for name in steps:
        result[name] = {
            **compared(name, times),
            "phases_milliseconds": phases(times[0][name], name != "adam"),
        }
    return result


def compared(name: str, times: tuple[measuring.Times, measuring.Times]) -> dict:
    """Figures of a contender, and their ratios to Adam's."""
    elapsed, worked = times
    ratio, least, largest = measuring.paired_ratio(elapsed[name], elapsed["adam"])
    mean = statistics.median(measuring.round_means(elapsed[name]))
    return {
        "milliseconds": 1e3 * mean,
        "ratio_to_adam": ratio,
        "least_ratio": least,
        "largest_ratio": largest,
        "processor_ratio": measuring.paired_ratio(worked[name], worked["adam"])[0],
    }


def phases(rounds: list[list[float]], has_curvature: bool) -> dict[str, float]:
    """Least milliseconds of a plain step, and what the other phases add to them.

    The least time is what other work on the machine disturbs least.
    """
    steps = np.array(rounds) * 1e3
    numbers = np.arange(steps.shape[1])
    with_statistics = numbers % COV_UPDATE_EVERY == 0
    with_inverses = numbers % INVERT_EVERY == 0
    plain = steps[:, ~with_statistics].min()
    if not has_curvature:
        return {"plain step": float(plain)}
    statistics_too = steps[:, with_statistics & ~with_inverses].min()
    return {
        "plain step": float(plain),
        "statistics add": float(statistics_too - plain),
        "inverses add": float(steps[:, with_inverses].min() - statistics_too),
    }


def measure_autoencoder(batch_size: int, rounds: int) -> dict:
    """Adaptive K-FAC on the autoencoder, curvature from parts of the batch."""
    images = tf.constant(datasets.load().flat().x_train[:batch_size])
    fractions = {"1, 1": (1.0, 1.0), "1/4, 1": (0.25, 1.0), "1/4, 1/4": (0.25, 0.25)}
    steps = {}
    model = autoencoder_model.Autoencoder()
    adam = autoencoder_mnist.keras_step(model, "adam", 1e-3, 1e-5)
    steps["adam"] = lambda: adam(images)
    for name, (statistics_part, model_part) in fractions.items():
        step = autoencoder_mnist.kfac_step(
            autoencoder_model.Autoencoder(),
            kfac.state.VariableStore(),
            l2_reg=1e-5,
            cov_batch_fraction=statistics_part,
            qmodel_batch_fraction=model_part,
        )
        steps[f"kfac, {name}"] = lambda step=step: step(images)
    measuring.interleaved(steps, 1, 5)
    times = measuring.interleaved(steps, rounds, 5)
    result = {"model": "autoencoder", "batch_size": batch_size, "rounds": rounds}
    for name in steps:
        to_whole, _, _ = measuring.paired_ratio(times[0][name], times[0]["kfac, 1, 1"])
        result[name] = {**compared(name, times), "ratio_to_whole_batch": to_whole}
    return result


def show(result: dict) -> None:
    rows = [
        [
            name,
            values["milliseconds"],
            values["ratio_to_adam"],
            f"{values['least_ratio']:.2f} to {values['largest_ratio']:.2f}",
            values["processor_ratio"],
            "; ".join(
                f"{phase} {ms:.1f}"
                for phase, ms in values.get("phases_milliseconds", {}).items()
            ),
        ]
        for name, values in result.items()
        if isinstance(values, dict)
    ]
    reporting.print_table(
        f"{result['model']}, batch {result['batch_size']}",
        [
            "contender",
            "ms a step",
            "in Adam steps",
            "range",
            "processor",
            "least ms by phase",
        ],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", choices=["convnet", "transformer", "autoencoder"], default=None
    )
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for name in ("convnet", "transformer"):
        if arguments.only in (None, name):
            result = measure_keras(name, arguments.batch_size, arguments.rounds)
            show(result)
            measuring.write_result(f"step_cost_{name}", result)
            if name == "convnet":
                ratio = result["kfac"]["ratio_to_adam"]
                verdict = "within" if ratio <= LIMIT else "ABOVE"
                print(f"K-FAC costs {ratio:.2f} Adam steps: {verdict} {LIMIT}.")
    if arguments.only in (None, "autoencoder"):
        result = measure_autoencoder(1024, arguments.rounds)
        show(result)
        measuring.write_result("step_cost_autoencoder", result)


if __name__ == "__main__":
    main()
