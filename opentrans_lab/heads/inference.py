"""From a head's maps to pictures of any size, and from masks to panoptic segments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import IGNORE
from ..pruning import GREY

STRIDE = 32  # of the coarsest map


def pad(images: Tensor) -> Tensor:
    """Grey to the right and below, up to multiples of 32, which the trunk would cut down to."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE), value=GREY)


def cut(maps: Tensor, size: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """The part of ``maps`` (B, C, h, w) of a ``padded`` picture that shows its first ``size``."""
    if tuple(size) == tuple(padded):
        return maps
    y, x = size[0] / padded[0], size[1] / padded[1]  # share of the padded picture
    shape = [len(maps), 1, math.ceil(maps.shape[-2] * y), math.ceil(maps.shape[-1] * x)]
    part = maps.new_tensor([[x, 0, x - 1], [0, y, y - 1]]).expand(len(maps), 2, 3)
    grid = F.affine_grid(part, shape, align_corners=False)
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)


def segment_classes(segments: Tensor, found: list[dict]) -> Tensor:
    """Class of each pixel (H, W) int64 for what ``merge`` gives, IGNORE for those of no segment."""
    table = segments.new_tensor([*(segment["class"] for segment in found), IGNORE])
    return table[segments]  # -1 is the last


def merge(
    classes: Tensor,
    masks: Tensor,
    things: Sequence[bool],
    size: tuple[int, int],
    threshold: float = 0.8,
    overlap: float = 0.8,
) -> tuple[Tensor, list[dict]]:
    """Mask2Former's panoptic post-processing of one picture.

    A query counts if its best class has more than ``threshold`` and is not "no object". A pixel
    goes to the query with the largest class x mask probability. A query that keeps less than
    ``overlap`` of its own mask is dropped. Segments of a class that is no thing are one.

    Args:
        classes: (Q, C + 1) probabilities. masks: (Q, h, w) logits. size: of the result.

    Returns:
        segment of each pixel (H, W) int64, -1 for none, and the segments: ``id`` (the position in
        this list), ``class`` and ``score``.
    """
    segments: list[dict] = []
    result = torch.full(size, -1, dtype=torch.int64, device=masks.device)
    scores, best = classes.max(-1)  # (Q,)
    kept = (best < len(things)) & (scores > threshold)
    if not kept.any():
        return result, segments
    masks = F.interpolate(masks[None, kept], size, mode="bilinear", align_corners=False)
    masks, scores, best = masks[0].sigmoid(), scores[kept], best[kept]
    owner = (scores[:, None, None] * masks).argmax(0)  # (H, W)
    stuff: dict[int, int] = {}  # class -> its segment
    for k, (kind, score) in enumerate(zip(best.tolist(), scores.tolist(), strict=True)):
        won, own = owner == k, masks[k] >= 0.5
        inside = won & own
        if not inside.any() or won.sum() < overlap * own.sum():
            continue
        if kind in stuff:
            segment = segments[stuff[kind]]
            segment["score"] = max(segment["score"], score)
        else:
            segment = {"id": len(segments), "class": kind, "score": score}
            segments.append(segment)
            if not things[kind]:
                stuff[kind] = segment["id"]
        result[inside] = segment["id"]
    return result, segments
