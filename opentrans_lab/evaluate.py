"""Evaluation: one confusion matrix over a split, and everything follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import IGNORE, Dataset
from .device import pick

PIECE = 2**25  # upsampled scores that are held at a time (128 MB)


@dataclass(frozen=True)
class Evaluation:
    """Shares are fractions of 1, NaN where no pixel says anything about them."""

    miou: float  # mean IoU over the classes that occur in the ground truth
    miou_seen: float  # the same over names seen in segmentation training, and over the others
    miou_unseen: float
    pixel_accuracy: float
    fwiou: float  # IoU weighted by each class's share of the pixels
    per_class: pd.DataFrame  # id, name, seen, iou, pixels; iou is NaN where pixels = 0
    confusion: Tensor  # (C, C) int64 on the CPU: rows are ground truth, columns predictions


def confusion(pred: Tensor, label: Tensor, n_classes: int) -> Tensor:
    """Counts (C, C) int64 of (label, prediction) pairs, on their device, without IGNORE.

    ``pred`` and ``label`` are integer tensors of one shape with values in 0..C-1; ``label`` may
    also hold IGNORE.
    """
    valid = label != IGNORE
    pairs = label[valid].long() * n_classes + pred[valid].long()
    return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)


def iou(confusion: Tensor) -> Tensor:
    """IoU of each class (C,) float64, NaN for classes that do not occur in the ground truth."""
    counts = confusion.double()
    hit, truth = counts.diagonal(), counts.sum(1)
    union = truth + counts.sum(0) - hit
    return torch.where(truth > 0, hit / union, math.nan)


def miou(confusion: Tensor, subset: Tensor | None = None) -> float:
    """Mean IoU over the classes that occur in the ground truth, the benchmarks' rule.

    ``subset`` (C,) bool restricts the mean, not the confusion: a seen class still loses where
    an unseen one is predicted.
    """
    values = iou(confusion)
    return float((values if subset is None else values[subset.to(values.device)]).nanmean())


def predict(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Best class (H, W) int64 of scores (C, h, w) upsampled bilinearly to ``size``.

    Classes are upsampled a few at a time, so memory does not grow with the vocabulary.
    """
    step = max(1, PIECE // (size[0] * size[1]))
    best, winner = None, None
    for first in range(0, len(scores), step):
        piece = scores[None, first : first + step].float()
        if piece.shape[-2:] != size:
            piece = F.interpolate(piece, size=size, mode="bilinear", align_corners=False)
        top, index = piece[0].max(0)  # (H, W)
        if best is None:
            best, winner = top, index
        else:
            winner = torch.where(top > best, index + first, winner)
            best = torch.maximum(top, best)
    return winner


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int = 16,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> Evaluation:
    """Segment a whole split over its vocabulary and count, at the labels' own resolution.

    ``model.scores(images, class_names)`` gives logits (B, C, h, w) at any resolution. The model
    goes to ``device`` and is in evaluation mode meanwhile.
    """
    device = pick(device)
    n_classes = len(dataset.names)
    counts = torch.zeros(n_classes, n_classes, dtype=torch.int64, device=device)
    modes = {module: module.training for module in model.modules()}
    model.to(device).eval()
    bar = tqdm(total=len(dataset), desc="evaluate", unit="image", disable=not progress, leave=False)
    try:
        # No inference mode: the model may cache embeddings now and train on them later.
        with bar, torch.no_grad():
            for batch in dataset.batches(batch_size, train=False, device=device):
                scores = model.scores(batch["images"], dataset.prompts)  # (B, C, h, w)
                for row, label in zip(scores, batch["labels"], strict=True):
                    counts += confusion(predict(row, tuple(label.shape)), label, n_classes)
                bar.update(len(scores))
    finally:
        for module, mode in modes.items():  # one by one: frozen parts may have had their own
            module.training = mode
    return summarise(counts.cpu(), dataset.names, dataset.seen)


def summarise(counts: Tensor, names: tuple[str, ...], seen: Tensor) -> Evaluation:
    """All metrics of a confusion matrix (C, C) over ``names``, of which ``seen`` (C,) bool."""
    values, pixels = iou(counts), counts.sum(1)
    total = pixels.sum().double()
    per_class = pd.DataFrame(
        {
            "id": range(len(names)),
            "name": names,
            "seen": seen.tolist(),
            "iou": values.tolist(),
            "pixels": pixels.tolist(),
        }
    )
    return Evaluation(
        miou=miou(counts),
        miou_seen=miou(counts, seen),
        miou_unseen=miou(counts, ~seen),
        pixel_accuracy=float(counts.diagonal().sum() / total),
        fwiou=float((values.nan_to_num() * pixels).sum() / total),
        per_class=per_class,
        confusion=counts,
    )
