"""Data sets by their key: ``load_dataset("scenes", "val")``. What they yield: see ``loader``."""

import os
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import count, repeat
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..checks import Count, checked, choose
from ..files import unreadable
from . import scenes
from .benchmarks import BENCHMARKS, BenchmarkFiles, benchmark_places
from .layouts import CocoPanoptic, Folder
from .loader import Batch, Dataset, Keys, check_split
from .samples import annotate, collate, digest
from .scenes import IGNORE

__all__ = ["DATASETS", "IGNORE", "Batch", "Dataset", "Scenes", "load_dataset"]


@checked
def load_dataset(
    dataset: str,
    split: str = "train",
    data_root: str | Path | None = None,
    size: Count | None = None,
    limit: Count | None = None,
    jitter: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
) -> Dataset:
    """Open one split of a data set by its key in ``DATASETS``.

    Args:
        split: ``train`` or ``val``; ``scenes`` also has ``shifted``, and ``folder`` has whatever
            folders lie in ``images/``.
        data_root: the data set's folder; else the environment variable OPENTRANS_DATA, for
            the benchmarks also DETECTRON2_DATASETS.
        size: side of the square training images (default 512, ``scenes`` 128). In evaluation the
            shorter side of the image (default: as it is on disk).
        limit: use the first ``limit`` samples only. Scenes in training are endless without it;
            with it they are a pool, each drawn once and kept as bytes.
        jitter: large-scale jitter in training (0.1 to 2 times ``size``); not for ``scenes``.
        on_error: ``"skip"`` leaves out what is missing or cannot be read in evaluation, and lists
            it in ``.skipped``; ``"raise"`` stops. Training always stops.

    Empty values (``None``, 0, ``""``) mean the default.

    Raises:
        LabError: unknown data set or split, or files that are missing or contradict each other.
    """
    choose("dataset", dataset, DATASETS)
    try:
        data = DATASETS[dataset](split, data_root or None, limit or None)
    except OSError as error:
        raise unreadable(error) from error
    data.size, data.jitter, data.on_error = size or data.size, jitter, on_error
    if on_error == "raise":
        data.complete()
    return data


def places(dataset: str) -> list[str]:
    """Where under its root the files of a data set lie, of all its splits; nowhere for others."""
    if dataset in BENCHMARKS:
        return benchmark_places(dataset)
    if dataset == "coco":
        return [
            os.path.join(folder, place.format(split=split))
            for folder in ("", "coco")
            for place in CocoPanoptic.PLACES
            for split in ("train", "val")
        ]
    return list(Folder.PLACES) if dataset == "folder" else []


class Scenes(Dataset):
    """The procedural world, rendered on the device that asks for it.

    ``train`` shows seen names only, and its vocabulary holds no other. ``val`` and ``shifted``
    (other backgrounds, noise and scales) have all 200 names. No scene is in two splits.
    """

    SPLITS = {"train": ("base", "seen"), "val": ("base", "all"), "shifted": ("shifted", "all")}
    ALL = 2**31  # scenes of one world that are told apart
    EVALUATED = 512  # without a limit
    instances = True
    size = 128

    def __init__(self, split: str, data_root: object, limit: int | None) -> None:
        check_split(split, self.SPLITS, "scenes")
        self.split = split
        self.world = 1 + list(self.SPLITS).index(split)
        self.domain, self.pool = self.SPLITS[split]
        self.endless = split == "train" and limit is None
        self.length = limit or (self.ALL if self.endless else self.EVALUATED)
        seen = torch.tensor(scenes.SEEN)
        kept = seen if self.pool == "seen" else torch.ones_like(seen)
        self.names = tuple(n for n, k in zip(scenes.CLASSES, kept.tolist(), strict=True) if k)
        self.prompts = self.names
        self.seen = seen[kept]
        self.things = (torch.arange(len(seen)) < len(scenes.THINGS))[kept]
        self.ids = torch.where(kept, kept.cumsum(0) - 1, IGNORE)  # index into CLASSES -> class id
        amount = "endless" if self.endless else f"{self.length} images"
        self.title = f"mini lab scenes ({split}, {amount})"

    def _keys(
        self, batch_size: int, seed: int, start: int, train: bool, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Keys]:
        if not (train and self.endless):
            yield from super()._keys(batch_size, seed, start, train, share)
            return
        for step in count(start):
            drawn = np.random.default_rng([seed, 0, step]).integers(self.ALL, size=batch_size)
            yield [(index, 0) for index in drawn.tolist()]

    def _batches(
        self, keys: Iterator[Keys], seed: int, train: bool, device: torch.device, regions: bool,
        workers: int | None,
    ) -> Iterator[Batch]:  # fmt: skip
        pool = self._pool(device) if train and not self.endless else None
        for step in keys:
            chosen = [index for index, _ in step]
            if pool is not None:
                self._fill(pool, chosen, device)
                part = collate([pool[index] for index in chosen])
                yield annotate(part, device, self.names, len(self), pool.__getitem__, regions)
                continue
            drawn, ids = self._draw(chosen, device)
            yield {
                "images": drawn.images,
                "labels": ids[drawn.labels],
                "masks": drawn.masks,
                "classes": [ids[c] for c in drawn.classes],
                "names": self.names,
                "files": [self._file(index) for index in chosen],
            }

    def _draw(self, chosen: list[int], device: torch.device) -> tuple[scenes.Scenes, torch.Tensor]:
        """These scenes, and a table from their labels to our classes (-1 takes the last)."""
        ids = torch.cat([self.ids, torch.tensor([IGNORE])]).to(device)
        drawn = scenes.render(chosen, self.size, self.world, self.domain, self.pool, device=device)
        return drawn, ids

    def _file(self, index: int) -> str:
        return f"{self.split}/{index:010d}"

    def _pool(self, device: torch.device) -> dict[int, dict]:
        """What has been drawn of these scenes for this device, whoever asked for it."""
        known = _kept(self.world, self.size, device)
        if not known:
            most = 4 * self.size**2 * len(self) / 1e6  # three colours and a segment
            print(f"a pool of {len(self):,} scenes of {self.size} px, at most {most:,.0f} MB")
        return known

    def _fill(self, pool: dict[int, dict], chosen: list[int], device: torch.device) -> None:
        """Draw what the pool lacks: a sample as ``loader`` has it, on the device."""
        new = [index for index in dict.fromkeys(chosen) if index not in pool]
        if not new:
            return
        drawn, _ = self._draw(new, device)
        images = drawn.images.mul(255).round_().byte()
        segments = torch.stack([_segments(masks) for masks in drawn.masks])  # (N, S, S) int8
        classes = torch.cat(drawn.classes).cpu().split([*map(len, drawn.classes)])
        contents = map(digest, images.cpu(), segments.cpu(), repeat(self.size))
        for row, (index, of, content) in enumerate(zip(new, classes, contents, strict=True)):
            pool[index] = {
                "image": images[row],
                "segments": segments[row],
                "classes": self.ids[of].numpy(),
                "regions": np.arange(len(of)),
                "file": self._file(index),
                "index": index,
                "content": content,
            }


def _segments(masks: torch.Tensor) -> torch.Tensor:
    """Of each pixel, which of the disjoint masks (K, S, S) holds it, -1 for none: (S, S) int8."""
    numbers = torch.arange(1, len(masks) + 1, dtype=torch.int8, device=masks.device)
    return (numbers[:, None, None] * masks).sum(0, dtype=torch.int8) - 1


@lru_cache(maxsize=1)
def _kept(world: int, size: int, device: torch.device) -> dict[int, dict]:
    """A process holds one pool, which the stages of a lab share."""
    return {}


DATASETS = {
    "scenes": Scenes,
    "coco": CocoPanoptic,
    **{key: partial(BenchmarkFiles, key) for key in BENCHMARKS},
    "folder": Folder,
}
