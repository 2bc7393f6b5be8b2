"""Panoptic quality (Kirillov et al., CVPR 2019): are the segments found, and how well drawn?"""

from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import Positive, checked
from ..data import Dataset
from ..device import pick
from ..errors import LabError
from .evaluate import evaluating

GOOD = 0.5  # IoU above which two segments are one: then a segment has one partner at most
COLUMNS = ("iou", "tp", "fp", "fn")


@dataclass(frozen=True)
class PanopticQuality:
    """Shares are fractions of 1, means over the classes that occur; NaN where none does."""

    pq: float
    sq: float  # mean IoU of the segments that were found
    rq: float  # F1 of finding them
    pq_things: float
    pq_stuff: float
    per_class: pd.DataFrame  # id, name, thing, pq, sq, rq, tp, fp, fn


def count_segments(
    segments: Tensor, found: list[dict], labels: Tensor, masks: Tensor, classes: Tensor,
    n_classes: int,
) -> Tensor:  # fmt: skip
    """(C, 4) float64 of one picture: sum of IoU, true positives, false ones, and those missed.

    The definition of panopticapi. A prediction and a region of one class are partners above an IoU
    of 0.5; pixels that the ground truth leaves void do not count against a prediction. One without
    a partner that lies mostly on void or on a crowd of its class is no false positive.

    Args:
        segments: (H, W) int64, an ``id`` of ``found`` or -1. found: dicts with ``class``.
        labels: (H, W) int64 class ids or IGNORE. masks, classes: its regions (K, H, W) and (K,).
            Pixels that have a class and are in no region are its crowd. Differs from panopticapi
            where a class has several crowds: there the last one counts, here all do.
    """
    counts = torch.zeros(n_classes, len(COLUMNS), dtype=torch.float64)
    void = labels < 0
    kinds = torch.tensor([s["class"] for s in found], dtype=torch.int64)
    ids = torch.tensor([s["id"] for s in found], dtype=torch.int64, device=segments.device)
    predicted = segments == ids[:, None, None]  # (P, H, W)
    flat, truth = predicted.flatten(1).double(), masks.flatten(1).double()
    inter = (truth @ flat.T).cpu()  # (K, P)
    on_void = (flat @ void.flatten().double()).cpu()  # (P,)
    area, size = truth.sum(1).cpu(), flat.sum(1).cpu()
    union = area[:, None] + size - inter - on_void
    classes = classes.cpu()
    iou = torch.where(classes[:, None] == kinds, inter / union.clamp(min=1), 0.0)
    region, segment = (iou > GOOD).nonzero(as_tuple=True)
    for k, p in zip(region.tolist(), segment.tolist(), strict=True):
        counts[kinds[p], 0] += iou[k, p]
        counts[kinds[p], 1] += 1
    crowd = ~void & ~masks.any(0)
    free = set(range(len(found))) - set(segment.tolist())
    for p in free:
        here = predicted[p]
        excused = float(on_void[p]) + int((here & crowd & (labels == kinds[p])).sum())
        if size[p] > 0 and excused <= GOOD * float(size[p]):
            counts[kinds[p], 2] += 1
    for k in set(range(len(classes))) - set(region.tolist()):
        counts[classes[k], 3] += 1
    return counts


def summarise(counts: Tensor, names: tuple[str, ...], things: Tensor) -> PanopticQuality:
    """All of it from the sum (C, 4) of :func:`count_segments` over pictures."""
    iou, tp, fp, fn = counts.double().unbind(1)
    both = tp + (fp + fn) / 2
    nan = torch.full_like(iou, float("nan"))
    sq = torch.where(both > 0, iou / tp.clamp(min=1), nan)
    rq = torch.where(both > 0, tp / both.clamp(min=0.5), nan)
    table = pd.DataFrame({
        "id": range(len(names)), "name": names, "thing": things.tolist(),
        "pq": (sq * rq).tolist(), "sq": sq.tolist(), "rq": rq.tolist(),
        "tp": tp.long().tolist(), "fp": fp.long().tolist(), "fn": fn.long().tolist(),
    })  # fmt: skip
    mean = table[["pq", "sq", "rq"]].mean()
    by = table.groupby("thing")["pq"].mean()
    nothing = float("nan")
    return PanopticQuality(
        float(mean["pq"]), float(mean["sq"]), float(mean["rq"]),
        float(by.get(True, nothing)), float(by.get(False, nothing)), table,
    )  # fmt: skip


@checked
def evaluate_panoptic(
    model: nn.Module,
    dataset: Dataset,
    batch_size: Positive = 8,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> PanopticQuality:
    """Panoptic quality of a framework with ``panoptic`` on a split, at the labels' resolution.

    Raises:
        LabError: labels that do not tell things of one class apart (all data but COCO and the
            scenes: their labels are one class a pixel).
    """
    if not dataset.instances:
        raise LabError(
            f"{dataset.title}: no panoptic quality, since its labels do not tell two things of a "
            "class apart; use coco or scenes"
        )
    device, n_classes = pick(device), len(dataset.names)
    counts = torch.zeros(n_classes, len(COLUMNS), dtype=torch.float64)
    bar = tqdm(total=len(dataset), desc="panoptic", unit="image", disable=not progress, leave=False)
    with bar, evaluating(model, device):
        for batch in dataset.batches(batch_size, train=False, device=device):
            results = model.panoptic(batch["images"], dataset.prompts, dataset.things)
            truth = zip(batch["labels"], batch["masks"], batch["classes"], strict=True)
            for (segments, found), (labels, masks, classes) in zip(results, truth, strict=True):
                if segments.shape != labels.shape:
                    segments = F.interpolate(
                        segments[None, None].double(), labels.shape, mode="nearest-exact"
                    )[0, 0].long()
                counts += count_segments(segments, found, labels, masks, classes, n_classes)
            bar.update(len(batch["files"]))
    return summarise(counts, dataset.names, dataset.things)
