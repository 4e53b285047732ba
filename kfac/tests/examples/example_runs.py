"""Runs example programs inside a test: tiny data, chosen flags, histories back."""

from __future__ import annotations

import numpy as np
from absl import flags
from absl.testing import flagsaver

from kfac.examples import datasets, program

FLAGS = flags.FLAGS


def write_few_images(folder, train=300, test=40) -> str:
    """A folder with the first images of the embedded sample, for `--data_dir`."""
    data = datasets.load()
    np.savez(
        folder / "mnist.npz",
        x_train=np.uint8(255 * data.x_train[:train]),
        y_train=data.y_train[:train],
        x_test=np.uint8(255 * data.x_test[:test]),
        y_test=data.y_test[:test],
    )
    return str(folder)


def with_flags(module, **values):
    """Context with the flags of `module`'s program, and some set by the test."""
    if not FLAGS.is_parsed():
        FLAGS(["test"])
    return flagsaver.flagsaver(**{**getattr(module, "DEFAULTS", {}), **values})


def run(module, monkeypatch, **values) -> list:
    """Runs the program; gives the histories that it would report."""
    reported = []

    def report(title, histories, columns, curves):
        assert set(columns) | set(curves) <= set(histories[0].metrics)
        reported.extend(histories)

    with monkeypatch.context() as patches, with_flags(module, **values):
        patches.setattr(program, "report", report)
        module.main([])
    return reported


def few_images_flags(folder) -> dict:
    """Flags of a short run on `write_few_images`."""
    return {
        "data_dir": folder,
        "batch_size": 100,
        "train_steps": 6,
        "train_seconds": None,
        "eval_every": 3,
        "eval_size": 100,
        "plot": None,
    }
