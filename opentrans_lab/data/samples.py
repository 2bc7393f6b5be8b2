"""Samples, put together and finished on a device; and who they are, however they are shown.

A sample is what a data set reads or draws::

    image    (3, h, w) uint8
    segments (H, W) integers: an index into the picture's table of segments, -1 for none
    classes  (S,) int64, the class id of each segment
    regions  (K,) int64, those of the segments that are regions and to be seen
    file     its name, and ``index``, its number in the data set
    content  its ``digest``, in training; else ""
"""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..clip import ClassNames
from .scenes import IGNORE


class Sample(NamedTuple):
    """Which picture a batch shows, however it shows it."""

    content: str
    """Digest of the picture and its segments at their training size, not augmented."""
    regions: np.ndarray
    """(K,) int64, which of the picture's segments each mask of the batch is."""
    whole: Callable[[], dict]
    """The picture not augmented: ``image`` (3, S, S) uint8, ``segments`` (S, S), and ``regions``,
    the segments that are regions and to be seen there."""


def collate(samples: list[dict]) -> dict:
    """Samples of one size under the same keys: the two maps stacked, lists of all else."""
    part = {key: [sample[key] for sample in samples] for key in samples[0]}
    return part | {key: torch.stack(part[key]) for key in ("image", "segments")}


def annotate(
    part: dict,
    device: torch.device,
    names: ClassNames,
    length: int,
    whole: Callable[[int], dict],
    all_of_it: bool = True,
) -> dict:
    """Finish a batch on the device: what travels to it is small, and nothing waits for it."""
    segments = part["segments"].to(device, non_blocking=True).long()  # (B, H, W)
    labels, masks, classes = torch.empty_like(segments), [], []
    for row, (ids, regions) in enumerate(zip(part["classes"], part["regions"], strict=True)):
        table = torch.tensor([*ids.tolist(), IGNORE], device=device)  # segment -1 -> the last
        labels[row] = table[segments[row]]
        if not all_of_it:
            continue
        regions = torch.from_numpy(regions).to(device)
        masks.append(segments[row] == regions[:, None, None])
        classes.append(table[regions])
    batch = {
        "images": part["image"].to(device, non_blocking=True).float().div_(255),
        "labels": labels,
        "masks": masks,
        "classes": classes,
        "names": names,
        "files": part["file"],
    }
    if any(part["content"]):
        who = zip(part["content"], part["regions"], part["index"], strict=True)
        batch["samples"] = [Sample(c, r, partial(whole, i)) for c, r, i in who]
        batch["length"] = length
    return batch


def digest(image: Tensor, segments: Tensor, size: int) -> str:
    """What tells a picture, shown at ``size``, from all others: 40 hex digits."""
    found = hashlib.blake2b(f"{size} {tuple(image.shape)}".encode(), digest_size=20)
    for part in (image, segments.to(torch.int32)):
        found.update(part.cpu().contiguous().numpy())
    return found.hexdigest()
