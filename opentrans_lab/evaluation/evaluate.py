"""Evaluation: one confusion matrix over a split, and everything follows from it."""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import Must, Positive, checked
from ..clip import ClassNames
from ..data import IGNORE, Batch, Dataset
from ..device import pick
from ..errors import LabError
from ..files import atomic_path, writable_folder
from ..heads import cut
from ..train import together

PIECE = 2**25  # upsampled scores that are held at a time (128 MB)
SCORES = 2**26  # scores of a model, at stride 4
SAVE_SECONDS = 30.0  # between saves of the progress
Window = Annotated[
    int, Must("a multiple of 4, or 0 for whole pictures", lambda n: n >= 0 and n % 4 == 0)
]


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
    skipped: list[tuple[str, str]] = field(default_factory=list)  # file and why it was not read


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

    Equal to numpy's mean of their IoUs to the last bit; NaN where there are none.

    ``subset`` (C,) bool restricts the mean, not the confusion: a seen class still loses where
    an unseen one is predicted.
    """
    values = iou(confusion).cpu()
    values = values if subset is None else values[subset.cpu()]
    values = values[~values.isnan()]
    return float(values.numpy().mean()) if len(values) else math.nan


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


@checked
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    batch_size: Positive = 16,
    device: str | torch.device = "auto",
    progress: bool = True,
    window: Window = 0,
    out: Path | None = None,
) -> Evaluation:
    """Segment a whole split over its vocabulary and count, at the labels' own resolution.

    ``model.scores(images, class_names)`` gives scores (B, C, h, w) at any resolution. The model
    goes to ``device`` and is in evaluation mode meanwhile. Under ``torch.distributed`` every
    process takes its share of the pictures, each exactly once, and all return the whole.

    Args:
        window: side of the square that slides over larger pictures in steps of two thirds, its
            scores averaged; a multiple of 4, or 0 for whole pictures.
        out: folder for progress; an interrupted evaluation goes on from there. What is finished
            leaves nothing in it.

    Raises:
        LabError: a sample that cannot be read (unless ``dataset.on_error`` is ``"skip"``), or
            ``out`` holds the progress of another evaluation.
    """
    device, share, n_classes = pick(device), together(), len(dataset.names)
    about = {
        "data": dataset.title, "names": list(dataset.names), "size": dataset.size or 0,
        "batch_size": batch_size, "window": window, "share": list(share),
    }  # fmt: skip
    if out:
        about |= {"files": dataset.fingerprint(), "weights": _digest(model)}
        out = writable_folder(out)
    file = out / f"evaluation-{share[0]}.safetensors" if out else None
    counts, before, lost = _resume(file, about, n_classes)
    counts, consumed, saved = counts.to(device), before, time.monotonic()
    bar = tqdm(total=len(dataset), initial=min(before * share[1], len(dataset)), desc="evaluate",
               unit="image", disable=not progress or share[0] > 0, leave=False)  # fmt: skip
    with bar, evaluating(model, device):
        for batch in dataset.batches(
            batch_size, start=before // batch_size, train=False, device=device, share=share,
            regions=False,
        ):  # fmt: skip
            for images, labels in _portions(batch, n_classes):
                scores = _scores(model, images, dataset.prompts, window)  # (b, C, h, w)
                for row, label in zip(scores, labels, strict=True):
                    counts += confusion(predict(row, tuple(label.shape)), label, n_classes)
            consumed += len(batch["files"])
            bar.update(len(batch["files"]) * share[1])
            read = consumed + len(dataset.skipped)  # whole steps, at their ends
            if file and read % batch_size == 0 and time.monotonic() - saved > SAVE_SECONDS:
                _save(file, about, counts, read, lost + dataset.skipped)
                saved = time.monotonic()
    counts, skipped = _together(counts, lost + dataset.skipped)
    if file:
        file.unlink(missing_ok=True)
    return replace(summarise(counts.cpu(), dataset.names, dataset.seen), skipped=skipped)


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """``model`` on ``device`` in evaluation mode and without gradients, then as it was."""
    modes = {module: module.training for module in model.modules()}
    model.to(device).eval()
    try:
        # No inference mode: the model may cache embeddings now and train on them later.
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():  # one by one: frozen parts may have had their own
            module.training = mode


def _portions(batch: Batch, n_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch in portions whose scores at stride 4 are held at a time."""
    cells = math.prod(math.ceil(side / 4) for side in batch["images"].shape[-2:])
    most = max(1, SCORES // (n_classes * cells))
    yield from zip(batch["images"].split(most), batch["labels"].split(most), strict=True)


def _scores(model: nn.Module, images: Tensor, class_names: ClassNames, window: int) -> Tensor:
    """Scores of whole pictures, or the mean of a sliding window's at stride 4."""
    size = tuple(images.shape[-2:])
    if not window or max(size) <= window:
        return model.scores(images, class_names)
    images = F.pad(images, (0, -size[1] % 4, 0, -size[0] % 4), mode="replicate")
    padded = tuple(images.shape[-2:])
    total = images.new_zeros(len(images), len(class_names), *(n // 4 for n in padded))
    often = images.new_zeros(total.shape[-2:])
    for top, left in product(*(_places(n, window) for n in padded)):
        cut_out = images[..., top : top + window, left : left + window]
        shape = [n // 4 for n in cut_out.shape[-2:]]
        here = slice(top // 4, top // 4 + shape[0]), slice(left // 4, left // 4 + shape[1])
        part = model.scores(cut_out, class_names).float()
        total[..., *here] += F.interpolate(part, shape, mode="bilinear", align_corners=False)
        often[here] += 1
    return cut(total / often, size, padded)


def _places(length: int, window: int) -> list[int]:
    """Where windows begin: steps of two thirds, the last one at the end."""
    last = max(0, length - window)
    return [*range(0, last, max(4, window * 2 // 3 // 4 * 4)), last]


# --- several processes, and interruptions -------------------------------------------------------


def _digest(model: nn.Module) -> str:
    """The model's weights in a word: progress is not to be mixed with that of others."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _together(counts: Tensor, skipped: list) -> tuple[Tensor, list]:
    """The sum of all processes' counts, and what any of them skipped."""
    if (processes := together()[1]) > 1:
        dist.all_reduce(counts)
        parts: list = [None] * processes
        dist.all_gather_object(parts, skipped)
        skipped = [entry for part in parts for entry in part]
    return counts, sorted(map(tuple, skipped))


def _resume(file: Path | None, about: dict, n_classes: int) -> tuple[Tensor, int, list]:
    """Counts so far, how many pictures were read for them, and those that could not be."""
    if file is None or not file.exists():
        return torch.zeros(n_classes, n_classes, dtype=torch.int64), 0, []
    with safe_open(file, "pt") as saved:
        told = json.loads(saved.metadata()["progress"])
        if told["about"] != about:
            raise LabError(f"{file} is the progress of another evaluation; delete it, or name "
                           "another folder")  # fmt: skip
        return saved.get_tensor("counts"), told["read"], told["skipped"]


def _save(file: Path, about: dict, counts: Tensor, read: int, skipped: list) -> None:
    told = json.dumps({"about": about, "read": read, "skipped": skipped})
    with atomic_path(file) as path:
        save_file({"counts": counts.cpu()}, path, {"progress": told})


def summarise(counts: Tensor, names: tuple[str, ...], seen: Tensor) -> Evaluation:
    """All metrics of a confusion matrix (C, C) over ``names``, of which ``seen`` (C,) bool."""
    values, pixels = iou(counts), counts.sum(1)
    total = pixels.sum().double()
    per_class = pd.DataFrame({
        "id": range(len(names)), "name": names, "seen": seen.tolist(), "iou": values.tolist(),
        "pixels": pixels.tolist(),
    })  # fmt: skip
    return Evaluation(
        miou=miou(counts),
        miou_seen=miou(counts, seen),
        miou_unseen=miou(counts, ~seen),
        pixel_accuracy=float(counts.diagonal().sum() / total),
        fwiou=float((values.nan_to_num() * pixels).sum() / total),
        per_class=per_class,
        confusion=counts,
    )
