"""Loads models together with the state of their K-FAC optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import keras

from kfac.python.keras.kfac_optimizer import Kfac


def load_model(
    filepath: Any,
    custom_objects: Mapping[str, Any] | None = None,
    optimizer_name: str | None = None,
) -> keras.Model:
    """Loads a compiled model, and tells its `Kfac` which model it trains.

    Training continues where it stopped: with the same data, seed and shuffling it
    takes the same steps.  Not part of a file are `train_batch` and callables that are
    not registered with Keras.  Models with other optimizers are loaded as by Keras.

    Args:
      filepath: `.keras` or (legacy) `.h5` file, or an open `h5py.File`.
      custom_objects: names of classes and functions that are not registered.
      optimizer_name: new name for the optimizer.

    Returns:
      The compiled model.

    Raises:
      ValueError: the file holds no training configuration.
    """
    path = getattr(filepath, "filename", filepath)  # Of an open file.
    if path is not filepath:
        filepath.flush()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = keras.models.load_model(path, {"Kfac": Kfac, **(custom_objects or {})})
    if not model.compiled or model.optimizer is None:
        raise ValueError(
            f"{path} holds no training configuration: the model was not compiled when "
            "it was saved. Use keras.models.load_model, and compile."
        )
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    is_repaired = False
    if isinstance(optimizer, Kfac):
        is_repaired = _register(model, optimizer, str(path), optimizer_name)
    for warning in caught:
        if not (is_repaired and "Skipping variable loading" in str(warning.message)):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return model


def _register(model: keras.Model, optimizer: Kfac, path: str, name: str | None) -> bool:
    """Tells the optimizer its model; whether state was read that Keras had skipped."""
    if name is not None:
        optimizer.name = name
    optimizer.register_layers(model)
    is_wrapped = optimizer is not model.optimizer
    if path.endswith(".keras") and (is_wrapped or optimizer.fallback is not None):
        # Keras' loss scaling and the fallback optimizer had fewer variables than now
        # when their state was read, which made them skip it.
        model.load_weights(path)
        return True
    if is_wrapped:
        warnings.warn(
            "Keras' legacy format does not hold the state of an optimizer with loss "
            "scaling: Kfac starts afresh. Save the model as .keras instead."
        )
    return False
