"""The frameworks that a mask travels into: one dict, from key to builder."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..checks import choose
from ..clip import Backbone
from ..device import float32
from ..errors import LabError
from .deeplabv3 import DeepLabV3
from .fcclip import FCCLIP
from .han import Han

FRAMEWORKS: dict[str, Callable[..., nn.Module]] = {
    "deeplabv3": DeepLabV3,
    "han": Han,
    "fcclip": FCCLIP,
}
PRESETS = ("paper", "mini")  # of every framework: the published sizes, or narrower ones


@float32()
def build(framework: str, backbone: Backbone, preset: str = "mini", **options) -> nn.Module:
    """A segmentation model with ``forward``, ``loss(outputs, targets)`` and ``scores``.

    The vocabulary is an argument of ``scores`` and part of a training batch, never of the model.

    ``backbone`` becomes the model's own: a framework sets its stride and what trains in it.

    Raises:
        LabError: unknown framework or preset, or a backbone that belongs to a model already.
    """
    choose("framework", framework, FRAMEWORKS)
    if owner := backbone.__dict__.get("_owner"):
        raise LabError(
            f"this backbone is part of a model of {owner!r} already, which has changed it; load "
            "another one for each model"
        )
    model = FRAMEWORKS[framework](backbone, preset=preset, **options)
    backbone.__dict__["_owner"] = framework
    return model
