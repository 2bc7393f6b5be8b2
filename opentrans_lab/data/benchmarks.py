"""The benchmarks of Table 1 whose labels are one picture an image: where their files lie.

A benchmark is an entry of ``BENCHMARKS``: its class table and the layouts in which people have it,
the official one first, then as prepared for detectron2. No preparation is asked of anybody.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from ..errors import LabError
from ..files import entries, find_root, lines, stems, there, wanted
from .layouts import UNKNOWN, LabelFiles, read_class_names, take_classes
from .loader import check_split
from .pictures import read_colours
from .scenes import IGNORE

Pairs = list[tuple[Path, Path]]  # image and label files
TRAINING = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class Layout:
    """One way in which a benchmark's files lie under its root."""

    needs: tuple[str, ...]
    """Folders and lists that must exist, with ``{split}``."""
    pairs: Callable[[Path, str], Pairs]
    """(root, split) -> files, in order."""
    contiguous: bool = False
    """Labels hold our class ids and 255 or 65535, instead of the official values."""
    read: Callable[[Path], np.ndarray] | None = None
    """Label file -> values (H, W); default: ``pictures.read_label``."""
    splits: Mapping[str, str] = field(default_factory=dict)
    """Our words for the splits -> the layout's, where they differ."""
    shorter_side: int = 0
    """Larger pictures are reduced to it, labels too: what the literature evaluates on."""


@dataclass(frozen=True)
class Benchmark:
    """A data set and its class list."""

    title: str
    classes: str  # table in data/class_names
    folders: tuple[str, ...]  # under the data root, where it may be
    layouts: tuple[Layout, ...]
    source: str  # where the official files are
    ignored: tuple[int, ...] = ()  # official label values of no class
    skip: tuple[int, ...] = ()  # classes of the table that do not count


class BenchmarkFiles(LabelFiles):
    """One split of a benchmark, by its key in ``BENCHMARKS``."""

    def __init__(
        self, key: str, split: str, data_root: str | Path | None, limit: int | None
    ) -> None:
        about = BENCHMARKS[key]
        check_split(split, ("train", "val"), key)
        wanted = " or ".join(", ".join(_needs(x, split)) for x in about.layouts)
        told = f"{about.title} needs {wanted}; official source: {about.source}"
        root = find_root(key, data_root, told)
        root, layout = _find(root, about, split, told)
        pairs = layout.pairs(root, layout.splits.get(split, split))
        if not pairs:
            raise LabError(f"{root} holds no picture of {split!r}: the split is empty; {told}")
        rows = [r for r in read_class_names(about.classes) if int(r["id"]) not in about.skip]
        take_classes(self, rows)
        self.table = np.full(65536, UNKNOWN, dtype=np.int32)
        if layout.contiguous:
            self.table[: len(rows)] = np.arange(len(rows))
            self.always_ignored = True
        else:
            self.table[list(about.ignored)] = IGNORE
            self.table[[int(row["label"]) for row in rows]] = np.arange(len(rows))
        self.listing = f"{about.title} does not know; restore the official file"
        self.reader = layout.read
        self.shorter_side = layout.shorter_side
        self.take(about.title, split, pairs[:limit], told)


def benchmark_places(key: str) -> list[str]:
    """Where under its root a benchmark's files may lie: of all layouts and splits."""
    return [
        os.path.join(folder, need)
        for folder in ("", *BENCHMARKS[key].folders)
        for layout in BENCHMARKS[key].layouts
        for split in ("train", "val")
        for need in _needs(layout, split)
    ]


def _needs(layout: Layout, split: str) -> list[str]:
    return [need.format(split=layout.splits.get(split, split)) for need in layout.needs]


def _find(root: Path, about: Benchmark, split: str, told: str) -> tuple[Path, Layout]:
    """The folder and the layout of which everything is there.

    Raises:
        LabError: none; names what is missing where most is there.
    """
    places = [
        (root / folder, layout) for folder in ("", *about.folders) for layout in about.layouts
    ]
    lost = [[p for n in _needs(x, split) if not there(p := f / n)] for f, x in places]
    for place, missing in zip(places, lost, strict=True):
        if not missing:
            return place
    # The one that lacks least of those where something is; else the official one.
    begun = [m for m, (_, x) in zip(lost, places, strict=True) if len(m) < len(x.needs)]
    official = lost[len(about.layouts)]
    lacking = ", ".join(map(str, min(begun, key=len, default=official)))
    raise LabError(f"missing or empty: {lacking}; {told}")


# --- files of each layout -----------------------------------------------------------------------


def _in_folders(root: Path, split: str, images: str, labels: str, suffix: str) -> Pairs:
    """Pictures of a folder, with labels of the same stem in another; neither may lack."""
    images, labels = root / images.format(split=split), root / labels.format(split=split)
    names = sorted(stems(images, ".jpg") | stems(labels, suffix))
    return [(images / f"{name}.jpg", labels / f"{name}{suffix}") for name in names]


def _listed(root: Path, split: str, lists: str, labels: str, suffix: str) -> Pairs:
    """Names in a text file, pictures in JPEGImages."""
    names = lines(root / lists.format(split=split))
    return [(root / "JPEGImages" / f"{n}.jpg", root / labels / f"{n}{suffix}") for n in names]


def _cityscapes(root: Path, split: str) -> Pairs:
    images, labels, pairs = root / "leftImg8bit" / split, root / "gtFine" / split, []
    photo, label = "_leftImg8bit.png", "_gtFine_labelIds.png"
    for city in sorted({*entries(images), *entries(labels)}):
        names = [stems(f / city, end) for f, end in ((images, photo), (labels, label))
                 if (f / city).is_dir()]  # fmt: skip
        pairs += [
            (images / city / f"{name}{photo}", labels / city / f"{name}{label}")
            for name in sorted(set().union(*names))
        ]
    return pairs


def _ade_full(root: Path, split: str) -> Pairs:
    """Found by their names: the index is a pickle and is not opened."""
    pairs = []
    for folder, folders, _ in os.walk(root / "images/ADE" / split):
        folders[:] = sorted(filter(wanted, folders))
        names = stems(folder, ".jpg") | stems(folder, "_seg.png")
        place = Path(folder)
        pairs += [
            (place / f"{name}.jpg", place / f"{name}_seg.png")
            for name in sorted(names)
            if name.startswith("ADE_")
        ]
    return pairs


def _ade_values(path: Path) -> np.ndarray:
    """ADE20K's object ids (H, W): (R // 10) · 256 + G."""
    red, green, _ = np.moveaxis(read_colours(path), -1, 0)
    return red // 10 * 256 + green


def _matlab(path: Path) -> np.ndarray:
    """``LabelMap`` (H, W) of a Matlab file."""
    if not path.exists():
        raise LabError(f"{path} is missing; restore the file")
    try:
        return np.asarray(loadmat(path)["LabelMap"])
    except Exception as error:  # scipy raises many kinds on a broken file
        raise LabError(f"{path} is no Matlab file with a LabelMap ({error}); restore it") from error


def _folders(images: str, labels: str, suffix: str = ".png", contiguous: bool = False) -> Layout:
    pairs = partial(_in_folders, images=images, labels=labels, suffix=suffix)
    return Layout((images, labels), pairs, contiguous, splits=TRAINING)


def _lists(lists: str, labels: str, suffix: str = ".png", read: Callable | None = None) -> Layout:
    pairs = partial(_listed, lists=lists, labels=labels, suffix=suffix)
    return Layout(("JPEGImages", labels, lists), pairs, read=read)


# --- the benchmarks -----------------------------------------------------------------------------

_VOC = _lists("ImageSets/Segmentation/{split}.txt", "SegmentationClass")
_VOC_PLACES = ("VOC2012", "VOCdevkit/VOC2012", "pascal_voc_d2")
_VOC20, _VOC21 = (
    _folders("images/{split}", f"annotations_pascal{n}/{{split}}", contiguous=True)
    for n in (20, 21)
)
_VOC_SOURCE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
_CONTEXT = _lists("ImageSets/Main/{split}.txt", "trainval", ".mat", _matlab)
_CONTEXT_PLACES = ("VOC2010", "VOCdevkit/VOC2010", "pascal_ctx_d2")
_CONTEXT_SOURCE = "https://cs.stanford.edu/~roozbeh/pascal-context/ (labels), VOC 2010 (pictures)"
_ADE_FULL = Layout(
    ("images/ADE/{split}",), _ade_full, read=_ade_values, splits=TRAINING, shorter_side=512
)

BENCHMARKS = {
    "cityscapes": Benchmark(
        "Cityscapes 19", "cityscapes", ("cityscapes",),
        (Layout(("leftImg8bit/{split}", "gtFine/{split}"), _cityscapes),),
        "https://www.cityscapes-dataset.com/downloads/ (leftImg8bit, gtFine)",
        ignored=(*range(34), 255),
    ),
    "ade150": Benchmark(
        "ADE20K-150", "ade150", ("ADEChallengeData2016",),
        (
            _folders("images/{split}", "annotations/{split}"),
            _folders("images/{split}", "annotations_detectron2/{split}", contiguous=True),
        ),
        "http://sceneparsing.csail.mit.edu (ADEChallengeData2016)", ignored=(0,),
    ),
    "ade847": Benchmark(
        "ADE20K-847", "ade847", ("ADE20K_2021_17_01", "ade/ADE20K_2021_17_01"),
        (
            _ADE_FULL,
            _folders("images_detectron2/{split}", "annotations_detectron2/{split}", ".tif", True),
        ),
        "https://ade20k.csail.mit.edu (ADE20K_2021_17_01)", ignored=(*range(26 * 256),),
    ),
    "voc20": Benchmark(
        "PASCAL VOC 2012, 20 classes", "voc", _VOC_PLACES, (_VOC, _VOC20),
        _VOC_SOURCE, ignored=(0, 255), skip=(0,),
    ),
    "voc21": Benchmark(
        "PASCAL VOC 2012, 20 classes and background", "voc", _VOC_PLACES,
        (_VOC, _VOC21), _VOC_SOURCE, ignored=(255,),
    ),
    "pc59": Benchmark(
        "Pascal-Context 59", "pc59", _CONTEXT_PLACES,
        (_CONTEXT, _folders("images/{split}", "annotations_ctx59/{split}", contiguous=True)),
        _CONTEXT_SOURCE, ignored=(*range(460),),
    ),
    "pc459": Benchmark(
        "Pascal-Context 459", "pc459", _CONTEXT_PLACES,
        (_CONTEXT, _folders("images/{split}", "annotations_ctx459/{split}", ".tif", True)),
        _CONTEXT_SOURCE, ignored=(0,),
    ),
}  # fmt: skip
"""Where ``ignored`` names a range, a class of the table within it counts: all other official
values are no class of this benchmark (an object of ADE20K has a number below 26 · 256)."""
