"""The authors' files: ``seg_backbone_imp{k}.pth``, state dicts of torch.nn.utils.prune.

Under the key ``backbone`` they hold the CLIP tower with ``<layer>.weight_orig`` (the weights before
the mask) and ``<layer>.weight_mask`` (0 or 1) for every pruned convolution, all else as usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LabError
from ..files import atomic_path, prefixes, read_tensors
from .tower import FIRST

KEY = "backbone"
_MARK = "_mask"


def read_authors(path: str | Path) -> dict[str, Tensor]:
    """Bool masks by the tower's parameter names, from a file of torch.nn.utils.prune.

    The tower may lie anywhere in it (``backbone``, then ``visual.``). A mask that keeps all of the
    first convolution is dropped, since the lab's masks never speak of it.

    Raises:
        LabError: unreadable, holds more than tensors, or has no masks.
    """
    state = read_tensors(path)
    masks = {k.removesuffix(_MARK): v for k, v in state.items() if k.endswith(f"weight{_MARK}")}
    stems = list(prefixes(masks, ["layer1.0.conv1.weight"]))
    if len(stems) != 1:
        what = "more than one tower" if stems else "no 'layer1.0.conv1.weight_mask'"
        raise LabError(f"{path} has {what}; expected a CLIP ResNet pruned by torch.nn.utils.prune")
    tower = {k.removeprefix(stems[0]): v for k, v in masks.items() if k.startswith(stems[0])}
    for name, tensor in tower.items():
        if not ((tensor == 0) | (tensor == 1)).all():
            raise LabError(f"{path}: the mask of {name!r} holds other values than 0 and 1")
    if FIRST in tower and tower[FIRST].all():
        del tower[FIRST]
    return {name: tensor.bool() for name, tensor in tower.items()}


def write_authors(
    tower: Mapping[str, Tensor], masks: Mapping[str, Tensor], path: str | Path
) -> None:
    """Write a tower's state dict and its masks in the authors' form, atomically."""
    state = {}
    for key, value in tower.items():
        value = value.detach().cpu().contiguous().clone()
        if key in masks:
            state[f"{key}_orig"] = value
            state[f"{key}{_MARK}"] = masks[key].to(value.dtype)
        else:
            state[key] = value
    with atomic_path(path) as partial:
        torch.save({KEY: state}, partial)
