"""What does each part of a classifier bring? The same pictures with the whole and with one part.

A framework that classifies twice lists its parts in ``PARTS``: a name, and the attributes that
leave only that part. Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import Dataset
from ..device import pick
from ..evaluation import confusion, evaluating, predict
from ..pruning import PruneConfig
from .lab import Lab, cached
from .recipe import Recipe
from .rows import segment_stage

SPLITS = ("seen", "unseen")


def part_table(
    lab: Lab, recipe: Recipe, config: PruneConfig, rows: str, draws: int = 1000
) -> pd.DataFrame:
    """How much better the whole classifier is than each of its parts, for trained ``rows``.

    Returns:
        one line for each row, part and kind of names: ``row, part, names, whole, alone`` (mIoU in
        %), ``gain`` (their difference in points) with ``low`` and ``high``, its 95 % interval over
        the pictures. Empty for a framework with one classifier.
    """
    lines = []
    for row in rows.split():
        changed = replace(recipe, row=row)
        done = segment_stage(lab, changed, config)

        def work(folder: Path, done=done, changed=changed) -> dict:
            model = done.model(lab, changed)
            data = lab.data("val", limit=recipe.eval_images or None)
            return {"lines": compare_parts(model, data, recipe.batch_size, lab.device, draws)}

        _, result = cached("parts", {"model": done.folder.name, "draws": draws}, work)
        lines += [{"row": row, **line} for line in result["lines"]]
    return pd.DataFrame(lines)


def compare_parts(
    model: nn.Module, dataset: Dataset, batch_size: int = 16,
    device: str | torch.device = "auto", draws: int = 1000,
) -> list[dict]:  # fmt: skip
    """The lines of :func:`part_table` for one model; none if it has no ``PARTS``."""
    parts = getattr(model, "PARTS", {})
    if not parts:
        return []
    whole = picture_counts(model, dataset, batch_size, device)
    lines = []
    for part, attributes in parts.items():
        with _changed(model, attributes):
            alone = picture_counts(model, dataset, batch_size, device)
        for names, subset in zip(SPLITS, (dataset.seen, ~dataset.seen), strict=True):
            if subset.any():
                found = gain(whole[..., subset], alone[..., subset], draws)
                lines.append({"part": part, "names": names, **found})
    return lines


@contextmanager
def _changed(model: nn.Module, attributes: dict[str, float]) -> Iterator[None]:
    before = {name: getattr(model, name) for name in attributes}
    for name, value in attributes.items():
        setattr(model, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(model, name, value)


def picture_counts(
    model: nn.Module, dataset: Dataset, batch_size: int, device: str | torch.device = "auto"
) -> Tensor:
    """Pixels (N, 3, C) int64 of each picture: right, in the ground truth, and predicted."""
    device, found = pick(device), []
    bar = tqdm(total=len(dataset), desc="parts", unit="image", leave=False)
    with bar, evaluating(model, device):
        for batch in dataset.batches(batch_size, train=False, device=device):
            scores = model.scores(batch["images"], dataset.prompts)  # (B, C, h, w)
            for one, label in zip(scores, batch["labels"], strict=True):
                counts = confusion(predict(one, tuple(label.shape)), label, len(dataset.names))
                found.append(torch.stack([counts.diagonal(), counts.sum(1), counts.sum(0)]).cpu())
            bar.update(len(scores))
    return torch.stack(found)


def gain(whole: Tensor, alone: Tensor, draws: int = 1000, seed: int = 0) -> dict[str, float]:
    """mIoU in % of both, their difference in points, and its 95 % interval.

    The interval is the bootstrap's over pictures (percentiles of ``draws`` resamples), which are
    the same for both: what makes a picture hard is not counted as doubt about the difference. A
    class in few pictures is missing from some resamples, and the interval then leans to one side.

    Args:
        whole, alone: (N, 3, C) counts of the same N pictures, see ``picture_counts``.
    """
    both = torch.stack([whole, alone], dim=1).double().numpy()  # (N, 2, 3, C)
    count = len(both)
    random = np.random.default_rng(seed)
    often = random.multinomial(count, [1 / count] * count, size=draws)  # (draws, N)
    mious = _miou(np.tensordot(often, both, axes=1))  # (draws, 2)
    first, second = _miou(both.sum(0))
    low, high = np.nanquantile(mious[:, 0] - mious[:, 1], (0.025, 0.975))
    return {
        "whole": first, "alone": second, "gain": first - second, "low": float(low),
        "high": float(high),
    }  # fmt: skip


def _miou(counts: np.ndarray) -> np.ndarray:
    """In %, over the classes that occur: (…, 3, C) -> (…)."""
    right, truth, predicted = np.moveaxis(counts, -2, 0)
    union = truth + predicted - right
    values = np.where(truth > 0, right / np.maximum(union, 1), 0)
    occur = (truth > 0).sum(-1)
    return np.where(occur, 100 * values.sum(-1) / np.maximum(occur, 1), math.nan)
