"""Batches: what every data set yields, and how files become it.

A batch is a dict::

    images   (B, 3, h, w) float32 in [0, 1]
    labels   (B, H, W) int64 class ids 0..C-1, IGNORE for pixels of no class
    masks    list of B (K, H, W) bool, one a region, none of them empty
    classes  list of B (K,) int64, the class id of each region
    names    the vocabulary: for each of C classes its name, or all its names (``prompts``)
    files    list of B strings
    samples  list of B ``Sample``: who the pictures are, where training may see them again
    length   pictures in the data set, beside ``samples``

In training h = H and w = W. In evaluation the labels keep the resolution of the file, because the
benchmarks count there, while the image may be reduced.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import count, groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..clip import ClassNames
from ..device import pick
from ..errors import LabError, shown
from ..files import fingerprint, located
from .pictures import aligned, read_picture
from .samples import annotate, collate, digest
from .transforms import Look, fit_square, floored, look, scaled

TRAIN_SIZE = 512  # the paper's

Batch = dict
Keys = list[tuple[int, int]]  # (sample, its position in the stream, which seeds its augmentation)


class Dataset:
    """What every data set offers. Subclasses set the attributes and implement ``_batches``."""

    title: str  # for tables: which data, which split, how many images
    names: tuple[str, ...]  # one name a class
    prompts: ClassNames  # all names of each class, of which the best counts
    seen: Tensor  # (C,) bool: may this class appear in segmentation training?
    things: Tensor  # (C,) bool: countable? All False where nothing tells things from stuff
    length: int
    size: int | None = None  # as asked for; see ``load_dataset``
    instances = False  # are things told apart, so that two of a class are two regions?
    missing: Sequence[str] = ()  # files that the data set asks for, see ``complete``
    on_error = "raise"  # or "skip", in evaluation: an unreadable sample is listed in ``skipped``
    skipped: list[tuple[str, str]] = []  # file and reason, of the last evaluation

    def __len__(self) -> int:
        return self.length

    def complete(self) -> None:
        """Refuse a data set that lacks files.

        Raises:
            LabError: names the first of them.
        """
        if self.missing:
            more = f" (and {len(self.missing) - 1} more)" if len(self.missing) > 1 else ""
            raise LabError(f"{self.missing[0]} is missing{more}, {self.asked}")

    def fingerprint(self) -> str:
        """What the samples are; changes with their files."""
        return self.title

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        train: bool = True,
        device: str | torch.device = "cpu",
        share: tuple[int, int] = (0, 1),
        regions: bool = True,
        workers: int | None = None,
    ) -> Iterator[Batch]:
        """Batches from step ``start`` on.

        ``train=True`` never ends: shuffled anew each epoch and augmented, and the batch of step s
        depends on (seed, s) and the batch size alone. ``train=False`` is one pass in order, not
        augmented or padded; a batch may be smaller, as it holds images of one size only. Of that
        pass ``share`` = (rank, processes) takes every n-th step, and counts its own steps. Without
        ``regions``, masks and classes may be left out: hundreds of large masks are memory.
        ``workers`` processes decode files (default: some if there is a GPU).

        Raises:
            LabError: an image or label file is missing, corrupt or does not fit (names the file).
        """
        keys = self._keys(batch_size, seed, start, train, share)
        return self._batches(keys, seed, train, pick(device), regions, workers)

    def _batches(
        self, keys: Iterator[Keys], seed: int, train: bool, device: torch.device, regions: bool,
        workers: int | None,
    ) -> Iterator[Batch]:  # fmt: skip
        """A batch for each step's keys."""
        raise NotImplementedError

    def _keys(
        self, batch_size: int, seed: int, start: int, train: bool, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Keys]:
        if not train:
            rank, processes = share
            stride = processes * batch_size
            for first in range(start * stride + rank * batch_size, len(self), stride):
                yield [(i, i) for i in range(first, min(first + batch_size, len(self)))]
            return
        epoch, order = -1, np.empty(0)
        for step in count(start):
            keys = []
            for position in range(step * batch_size, (step + 1) * batch_size):
                if position // len(self) != epoch:
                    epoch = position // len(self)
                    order = np.random.default_rng([seed, 0, epoch]).permutation(len(self))
                keys.append((int(order[position % len(self)]), position))
            yield keys


class FileDataset(Dataset):
    """Images and labels on disk. A subclass lists the samples and reads one sample's segments.

    The segment map of an image is (H, W) int32: an index into the image's table of segments, -1
    for none. Labels and masks both follow from it, so it is the only map that is resized.
    """

    images: list[str]  # paths
    labels: list[str]
    lists: tuple[str, ...] = ()  # what else is read: the class table or index
    shorter_side = 0  # larger pictures are reduced to it on reading, labels too
    jitter = False  # large-scale jitter in training: scales of 0.1 to 2

    def take(self, title: str, split: str, pairs: Iterable[tuple[Path, Path]], asked: str) -> None:
        """Pictures and labels as the samples; ``asked`` says who wants them.

        Looks which files are not there, and which have a suffix in capitals.
        """
        images, labels = zip(*((str(image), str(label)) for image, label in pairs), strict=True)
        (self.images, lost), (self.labels, more) = located(images), located(labels)
        self.missing, self.asked, self.length = lost + more, asked, len(images)
        self.title = f"{title} ({split}, {self.length} images)"

    def fingerprint(self) -> str:
        return fingerprint([*self.lists, *self.images, *self.labels])

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Path]:
        """Segment map (H, W) int32, class ids (S,), which are regions (S,) bool, the label file.

        The map is as the label file has it, see ``pictures.aligned``.
        """
        raise NotImplementedError

    def _batches(
        self, keys: Iterator[Keys], seed: int, train: bool, device: torch.device, regions: bool,
        workers: int | None,
    ) -> Iterator[Batch]:  # fmt: skip
        if workers is None:
            workers = 0 if pick().type == "cpu" else min(8, max(1, (os.cpu_count() or 2) - 1))
        loader = DataLoader(
            _Reader(self, seed, train),  # type: ignore[arg-type]
            sampler=keys,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=_as_is,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else a loader would advance the global random state
        )
        self.skipped = []
        for parts, errors in loader:
            if errors and (train or self.on_error == "raise"):
                raise LabError(errors[0][1])
            self.skipped += errors
            for part in parts:
                yield annotate(part, device, self.prompts, len(self), self.whole, regions)

    def load(self, index: int, look: Look, train: bool) -> dict:
        """One sample: image (3, h, w) uint8, segments (H, W) int32, classes, regions, file."""
        path = Path(self.images[index])
        picture = read_picture(path)
        found, classes, is_region, label = self.segments(index)
        found = aligned(found, label, picture, path)
        image = tv_tensors.Image(torch.from_numpy(picture.pixels).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(found))
        if self.shorter_side and min(found.shape) > self.shorter_side:
            size = scaled(*found.shape, self.shorter_side / min(found.shape))
            image, mask = F.resize(image, size, antialias=True), floored(mask, size)
        content = ""
        if train:
            size = self.size or TRAIN_SIZE
            content = digest(image, mask, size)
            image, mask = fit_square(image, mask, size, look)
        elif self.size:
            h, w = image.shape[-2:]
            image = F.resize(image, scaled(h, w, self.size / min(h, w)), antialias=True)
        here = np.bincount(mask.numpy().ravel() + 1, minlength=len(classes) + 1)[1:] > 0
        return {
            "image": image.as_subclass(Tensor),
            "segments": mask.as_subclass(Tensor),
            "classes": classes,
            "regions": np.flatnonzero(here & is_region),
            "file": shown(path.name),
            "index": index,
            "content": content,
        }

    def whole(self, index: int) -> dict:
        """A training sample as it is without augmentation."""
        return self.load(index, Look(), train=True)


class _Reader:
    """What a worker runs: keys of one step -> batches of equal size, and what could not be read."""

    def __init__(self, dataset: FileDataset, seed: int, train: bool) -> None:
        self.dataset, self.seed, self.train = dataset, seed, train

    def __getitem__(self, keys: Keys) -> tuple[list[dict], list[tuple[str, str]]]:
        samples, errors = [], []
        for index, position in keys:
            shown = look(self.seed, position, self.dataset.jitter)
            try:
                samples.append(self.dataset.load(index, shown, self.train))
            except LabError as error:  # as words: a worker would bury them in a traceback
                errors.append((self.dataset.images[index], str(error)))
        groups = groupby(samples, lambda s: (s["image"].shape, s["segments"].shape))
        return [collate(list(group)) for _, group in groups], errors


def _as_is(loaded: object) -> object:
    return loaded


def check_split(split: str, valid: Collection[str], where: object) -> None:
    if split not in valid:
        raise LabError(f"{where} has no split {split!r}; valid: {', '.join(valid) or 'none'}")
