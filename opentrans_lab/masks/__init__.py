"""``Mask``, the value that travels: which weights of a CLIP tower live, found, saved, applied."""

from .mask import Mask
from .tower import FIRST, locate, prunable

__all__ = ["FIRST", "Mask", "locate", "prunable"]
