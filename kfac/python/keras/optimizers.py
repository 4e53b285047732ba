"""The Keras 3 optimizers."""

from kfac.python.keras import arguments
from kfac.python.keras.arguments import CurvatureUpdates, DampingAdaptation
from kfac.python.keras.fishleg import FishLeg
from kfac.python.keras.kfac_optimizer import Kfac
from kfac.python.keras.natural_gradient import NaturalGradient
from kfac.python.keras.option_checks import MUTABLE
from kfac.python.keras.traced import TracedKfac

__all__ = [
    "CurvatureUpdates",
    "DampingAdaptation",
    "FishLeg",
    "Kfac",
    "NaturalGradient",
]

_MUTABLE_HYPER_PARAMS = set(MUTABLE)
_KFAC_OPT_CLASS = TracedKfac
_DEFAULT_KWARGS = dict(arguments.REFERENCE_DEFAULTS)
