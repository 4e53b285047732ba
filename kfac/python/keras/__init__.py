"""K-FAC for Keras 3: optimizers, callbacks, saving, and the pieces between."""

from kfac.python.keras import (
    callbacks,
    distributed,
    fishleg,
    natural_gradient,
    optimizers,
    saving_utils,
    utils,
)
from kfac.python.keras.planning.plan import plan

__all__ = [
    "callbacks",
    "distributed",
    "fishleg",
    "natural_gradient",
    "optimizers",
    "plan",
    "saving_utils",
    "utils",
]
