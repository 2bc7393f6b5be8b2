"""What to look at: pictures of a data set or of the user's own, under any vocabulary."""

from __future__ import annotations

import glob
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .device import pick
from .errors import LabError
from .evaluate import evaluating, predict
from .heads.inference import segment_classes
from .layouts import IMAGE_SUFFIXES
from .loader import Dataset
from .picture import checked_names, read_picture, resized
from .scenes import IGNORE
from .text import ClassNames


class Sample(NamedTuple):
    """A picture, and what is in it where somebody has said so."""

    name: str
    image: Tensor
    """(3, H, W) float32 in [0, 1]."""
    labels: Tensor | None = None
    """(H, W) int64, an index into the vocabulary or ``IGNORE``."""


class Vocabulary(NamedTuple):
    """Classes to choose from."""

    names: tuple[str, ...]
    prompts: ClassNames
    """A class may have several names."""


def vocabulary(data: Dataset, text: str = "") -> Vocabulary:
    """The data set's classes, or those of ``text``: "zebra, grass|meadow, sky".

    Raises:
        LabError: an empty name, or one twice.
    """
    if not text:
        return Vocabulary(tuple(data.names), data.prompts)
    classes = [tuple(name.strip() for name in part.split("|")) for part in text.split(",")]
    prompts = [names[0] if len(names) == 1 else names for names in classes]
    return Vocabulary(checked_names(prompts), prompts)


def own_pictures(text: str) -> list[Sample]:
    """Files, folders of files, and patterns (``*.jpg``) separated by blanks; names with blanks in
    quotes. Read as ``opentrans-lab``'s ``segment`` reads them, in the order given.

    Raises:
        LabError: nothing there, or a file that is no picture.
    """
    paths = []
    for word in shlex.split(text):
        path = Path(word).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        else:
            found = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path))))
        if not found:
            raise LabError(
                f"pictures: there is no picture at {word}; give files, folders with "
                f"{', '.join(IMAGE_SUFFIXES)}, or patterns"
            )
        paths += found
    return [Sample(path.name, read_picture(path)) for path in paths]


def pictures(data: Dataset, words: Vocabulary, device: str = "auto") -> list[Sample]:
    """The data set's own pictures in order; pixels of a class that is not in ``words`` are ignored.

    Classes are told by their names.
    """
    index = {name: i for i, name in enumerate(words.names)}
    ids = torch.tensor([index.get(name, IGNORE) for name in data.names] + [IGNORE])
    found = []
    for batch in data.batches(1, train=False, device=device, regions=False):
        labels = batch["labels"][0]
        known = torch.where(labels == IGNORE, len(data.names), labels).to(ids.device)
        name = Path(batch["files"][0]).name
        found.append(Sample(name, batch["images"][0].cpu(), ids[known]))
    return found


def label_maps(
    model: nn.Module,
    samples: Sequence[Sample],
    words: Vocabulary,
    size: int | None = None,
    device: str | torch.device = "auto",
) -> list[Tensor]:
    """What ``model`` sees in each sample: (H, W) int64 at the sample's size, on the CPU.

    Args:
        size: the shorter side in pixels that the model is given; default: as the picture is.
    """
    maps, where = [], pick(device)
    with evaluating(model, where):
        for sample in samples:
            image = resized(sample.image, size)[None].to(where)
            scores = model.scores(image, words.prompts)[0].float()
            maps.append(predict(scores, tuple(sample.image.shape[1:])).cpu())
    return maps


def accuracy(found: Tensor, labels: Tensor) -> float:
    """Share of the labelled pixels that are right; NaN where none is labelled."""
    known = labels != IGNORE
    return (found == labels)[known].double().mean().item()


def wrong(found: Tensor, labels: Tensor, number: int) -> Tensor:
    """A label map to lay over a picture: ``number`` where ``found`` is wrong, ``IGNORE`` elsewhere
    (right, or nobody knows)."""
    bad = (found != labels) & (labels != IGNORE)
    return torch.where(bad, number, IGNORE)


def segments(
    model: nn.Module,
    samples: Sequence[Sample],
    words: Vocabulary,
    things: Tensor,
    device: str | torch.device = "auto",
) -> list[tuple[Tensor, Tensor]]:
    """Panoptic answers of a framework that has them: of each sample (segments, classes), both
    (H, W) int64 on the CPU.

    Args:
        things: (C,) bool, which classes come in instances.
    """
    found, where = [], pick(device)
    with evaluating(model, where):
        for sample in samples:
            ((parts, kinds),) = model.panoptic(sample.image[None].to(where), words.prompts, things)
            found.append((parts.cpu(), segment_classes(parts, kinds).cpu()))
    return found
