"""The frameworks that a mask travels into: one dict, from key to builder."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .backbone import Backbone
from .errors import LabError
from .heads.deeplabv3 import DeepLabV3
from .heads.fcclip import FCCLIP
from .heads.han import Han

FRAMEWORKS: dict[str, Callable[..., nn.Module]] = {
    "deeplabv3": DeepLabV3,
    "han": Han,
    "fcclip": FCCLIP,
}
PRESETS = ("paper", "mini")  # of every framework: the published sizes, or narrower ones


def build(framework: str, backbone: Backbone, preset: str = "mini", **options) -> nn.Module:
    """A segmentation model with ``forward``, ``loss(outputs, targets)`` and ``scores``.

    The vocabulary is an argument of ``scores`` and part of a training batch, never of the model.

    Raises:
        LabError: unknown framework or preset.
    """
    if framework not in FRAMEWORKS:
        raise LabError(f"unknown framework {framework!r}; use one of {', '.join(FRAMEWORKS)}")
    return FRAMEWORKS[framework](backbone, preset=preset, **options)
