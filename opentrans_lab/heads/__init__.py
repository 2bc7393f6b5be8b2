"""The frameworks a mask travels into, one file each, and the dict that lists them."""

from .deeplabv3 import DeepLabV3
from .fcclip import FCCLIP
from .frameworks import FRAMEWORKS, PRESETS, build
from .han import Han
from .inference import cut, segment_classes

__all__ = ["DeepLabV3", "FCCLIP", "FRAMEWORKS", "Han", "PRESETS", "build", "cut", "segment_classes"]
