"""The one training loop, in one process or several."""

from .loop import Batch, TrainConfig, fit, to_device
from .processes import Chance, average, gathered, shared_mean, together, wait

__all__ = [
    "Batch",
    "Chance",
    "TrainConfig",
    "average",
    "fit",
    "gathered",
    "shared_mean",
    "to_device",
    "together",
    "wait",
]
