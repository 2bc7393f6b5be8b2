"""Data sets and the mini lab's world: what a batch holds, and how files become it."""

from . import scenes
from .datasets import DATASETS, load_dataset, places
from .loader import Batch, Dataset
from .samples import Sample
from .scenes import IGNORE

__all__ = ["Batch", "DATASETS", "Dataset", "IGNORE", "Sample", "load_dataset", "places", "scenes"]
