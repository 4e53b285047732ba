"""Training on several devices and machines: strategies, a loop, `fit` on workers."""

from kfac.python.keras.distributed.fit_on_workers import FitOnWorkers
from kfac.python.keras.distributed.loop import DistributedLoop, PeerLostError
from kfac.python.keras.distributed.strategies import make_strategy

__all__ = ["DistributedLoop", "FitOnWorkers", "PeerLostError", "make_strategy"]
