"""What the paper's Figure 5 shows: any pictures, in any words, through any frameworks."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip import ClassNames, checked_names, readings
from ..data import IGNORE, Dataset
from ..errors import LabError, shown
from ..evaluation import fitted, predict, read_picture
from ..figures import verdicts
from ..files import find_pictures
from ..heads import segment_classes
from .recipe import Recipe

TITLES = {"deeplabv3": "DeepLabV3", "han": "Han et al.", "fcclip": "FC-CLIP"}
"""Frameworks as the paper writes them."""

LONGEST = 1024  # pixels of an own picture's longer side: no figure shows more


@dataclass(frozen=True)
class Words:
    """A vocabulary to segment with, and what a data set's classes are called in it."""

    names: tuple[str, ...]
    prompts: ClassNames
    things: Tensor  # (C,) bool: countable? Words that the data set does not know are
    ids: Tensor  # (D + 1,) int64: a class of the data set -> its word or IGNORE; IGNORE -> IGNORE

    @property
    def known(self) -> list[str]:
        """Those for which the data set has labels."""
        return [self.names[i] for i in self.ids.unique().tolist() if i != IGNORE]


@dataclass(frozen=True)
class View:
    """A picture to segment."""

    title: str
    picture: Tensor = field(repr=False)  # (3, H, W) float32 in [0, 1], to be shown
    image: Tensor = field(repr=False)  # (3, h, w) float32 in [0, 1], for the model
    truth: Tensor | None = field(repr=False)  # label map (H, W) int64 in the words, or none

    @property
    def size(self) -> tuple[int, int]:
        """Of label maps."""
        return tuple((self.picture[0] if self.truth is None else self.truth).shape)


def recipes(recipe: Recipe, frameworks: str, rows: str) -> dict[tuple[str, str], Recipe]:
    """``recipe`` for each of the space-separated frameworks and rows, by (framework, row).

    Raises:
        LabError: none, or one that does not exist (with those that do).
    """
    for key, value in {"frameworks": frameworks, "rows": rows}.items():
        if not value.split():
            raise LabError(f"{key}={value!r} names none; give one or more, separated by spaces")
    pairs = [(framework, row) for framework in frameworks.split() for row in rows.split()]
    return {pair: replace(recipe, framework=pair[0], row=pair[1]) for pair in pairs}


def vocabulary(text: str, data: Dataset) -> Words:
    """The words of ``"zebra, grass|meadow, sky"``, or of the data set where ``text`` is empty.

    ``|`` parts several names of one class, the best of which counts. A class of the data set is
    called by the word that is its name, else by the first that is another name of it, else it
    has no label.

    Raises:
        LabError: an empty word, or one that is there twice.
    """
    count = len(data.names)
    if not text.strip():
        ids = torch.tensor([*range(count), IGNORE])
        return Words(data.names, data.prompts, data.things, ids)
    prompts = [tuple(name.strip() for name in word.split("|")) for word in text.split(",")]
    try:
        names = checked_names(prompts)
    except LabError as error:
        raise LabError(f"vocabulary={text!r}: {error}") from None
    word = {read: i for i, group in enumerate(prompts) for read in readings(group)}
    ids = torch.full((count + 1,), IGNORE)
    for k, (name, others) in enumerate(zip(data.names, data.prompts, strict=True)):
        others = [others] if isinstance(others, str) else others
        own, *same = (word.get(read, IGNORE) for read in readings([name, *others]))
        ids[k] = own if own != IGNORE else min((i for i in same if i != IGNORE), default=IGNORE)
    things = torch.ones(len(names), dtype=torch.bool)
    kept = ids[:-1] != IGNORE
    things[ids[:-1][kept]] = data.things[kept].cpu()
    return Words(names, prompts, things, ids)


def data_views(data: Dataset, words: Words) -> Iterator[View]:
    """A data set's pictures in order; without truth where none of its classes has a word."""
    for batch in data.batches(1, train=False, regions=False):
        image, truth = batch["images"][0], words.ids[batch["labels"][0]]  # label -1: the last id
        yield View(batch["files"][0], image, image, truth if words.known else None)


def own_views(pictures: str, size: int, most: int = 0) -> list[View]:
    """Pictures that were named, read as ``picture.segment`` reads them.

    Args:
        pictures: see ``files.find_pictures``.
        size: shorter side for the model, in pixels; shown is at most ``LONGEST`` a side.
        most: the first so many only; 0: all.

    Raises:
        LabError: no such picture, or one that cannot be read.
    """
    views = []
    for path in find_pictures(pictures)[: most or None]:
        picture = read_picture(path)
        image, scale = fitted(picture, size), LONGEST / max(picture.shape[1:])
        if scale < 1:
            shape = [max(1, round(side * scale)) for side in picture.shape[1:]]
            picture = F.interpolate(picture[None], shape, mode="bilinear", antialias=True)[0]
        views.append(View(shown(path.name), picture.clamp(0, 1), image, None))
    return views


@torch.no_grad()
def label(model: nn.Module, view: View, words: Words) -> Tensor:
    """The best word for each pixel: (H, W) int64 on the CPU."""
    device = next(model.parameters()).device
    scores = model.scores(view.image[None].to(device), words.prompts)[0]
    return predict(scores, view.size).cpu()


@torch.no_grad()
def part(model: nn.Module, view: View, words: Words) -> tuple[Tensor, Tensor]:
    """Panoptic segments and their words, each (H, W) int64 on the CPU; no segment: -1, IGNORE."""
    device = next(model.parameters()).device
    ((segments, found),) = model.panoptic(view.image[None].to(device), words.prompts, words.things)
    both = torch.stack([segments, segment_classes(segments, found)])[None].double()
    segments, labels = F.interpolate(both, view.size, mode="nearest-exact")[0].long().cpu()
    return segments, labels


def right(labels: Tensor, truth: Tensor | None) -> float:
    """The share of labelled pixels that are right, NaN where there are none."""
    if truth is None:
        return float("nan")
    wrong, good, _ = torch.bincount(verdicts(labels, truth).flatten(), minlength=3).tolist()
    return good / (wrong + good) if wrong + good else float("nan")


def worst(
    model: nn.Module, views: Iterable[View], words: Words, most: int
) -> list[tuple[float, View, Tensor]]:
    """The views with the lowest share of right pixels: (share, view, label map), lowest first.

    Views without a labelled pixel are passed over.
    """
    found: list[tuple[float, View, Tensor]] = []
    for view in views:
        labels = label(model, view, words)
        share = right(labels, view.truth)
        if share == share:
            insort(found, (share, view, labels), key=lambda entry: entry[0])
            del found[most:]
    return found


def shares(
    views: Sequence[View], maps: Mapping[tuple[str, str], Sequence[Tensor]], words: Words
) -> pd.DataFrame:
    """A line for each picture and (framework, row): share right, largest class and its share."""
    lines = []
    for (framework, row), column in maps.items():
        for view, labels in zip(views, column, strict=True):
            counts = torch.bincount(labels.flatten(), minlength=len(words.names))
            lines.append({
                "picture": view.title, "framework": framework, "row": row,
                "right": right(labels, view.truth), "largest": words.names[int(counts.argmax())],
                "share": counts.max().item() / labels.numel(),
            })  # fmt: skip
    return pd.DataFrame(lines)
