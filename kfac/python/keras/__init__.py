"""K-FAC for Keras 3: optimizers, callbacks, saving, and the pieces between."""

from kfac.python.keras import callbacks, optimizers, saving_utils, utils

__all__ = ["callbacks", "optimizers", "saving_utils", "utils"]
