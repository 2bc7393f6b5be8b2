"""Layouts: one small class for each way that label files lie on disk."""

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..clip import checked_names
from ..errors import LabError
from ..files import PICTURES, entries, find_root, read_csv, shipped, stems
from .loader import FileDataset, check_split
from .pictures import read_colours, read_label
from .scenes import IGNORE

UNKNOWN = -2  # a label value that no class list explains


class CocoPanoptic(FileDataset):
    """COCO-Panoptic 133 as downloaded (``data_root`` or ``data_root/coco``).

    Crowd segments count as labels but are no regions. Pixels of no segment are ignored.
    """

    instances = True
    PLACES = (
        "annotations/panoptic_{split}2017.json", "annotations/panoptic_{split}2017",
        "panoptic_{split}2017", "{split}2017",
    )  # fmt: skip
    LAYOUT = (
        "COCO-Panoptic needs annotations/panoptic_{split}2017.json, the PNG folder "
        "panoptic_{split}2017/ in annotations/ or beside the images, and {split}2017/*.jpg; "
        "official source: https://cocodataset.org/#download"
    )

    def __init__(self, split: str, data_root: str | Path | None, limit: int | None) -> None:
        check_split(split, ("train", "val"), "coco")
        layout = self.LAYOUT.format(split=split)
        root = find_root("coco", data_root, layout)
        root = root if (root / "annotations").is_dir() else root / "coco"
        folder = f"panoptic_{split}2017"
        index = root / "annotations" / f"{folder}.json"
        places = root / "annotations" / folder, root / folder
        pngs = next((p for p in places if p.is_dir()), places[0])
        for path in (index, pngs, root / f"{split}2017"):
            if not path.exists():
                raise LabError(f"{path} is missing: {layout}")

        classes = read_class_names("coco")
        take_classes(self, classes)
        images, labels, tables = _read_panoptic(index, {int(r["label"]): r for r in classes}, limit)
        self.lists = (str(index),)
        # One array for all images: workers share it, where a list of objects would be copied.
        self.tables = np.concatenate(tables)
        self.ends = np.cumsum([len(t) for t in tables])
        photos = [root / f"{split}2017" / name for name in images]
        pairs = zip(photos, map(pngs.joinpath, labels), strict=True)
        self.take("COCO-Panoptic 133", split, pairs, f"but {index} asks for it")

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Path]:
        path, end = Path(self.labels[index]), self.ends[index]
        table = self.tables[self.ends[index - 1] if index else 0 : end]  # (S, 3), by segment id
        rgb = read_colours(path)  # (H, W, 3)
        found = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        ids = np.append(table[:, 0], 2**24).astype(np.int32)  # the last one is no pixel's
        at = np.searchsorted(ids, found).astype(np.int32)
        return np.where(ids[at] == found, at, -1), table[:, 1], table[:, 2] == 0, path


def _read_panoptic(
    index: Path, classes: dict[int, dict[str, str]], limit: int | None
) -> tuple[list[str], list[str], list[np.ndarray]]:
    """Image names, PNG names and tables (S, 3) of segment id, class id, crowd; sorted by id."""
    try:
        content = json.loads(index.read_bytes())
    except ValueError as error:
        raise LabError(f"{index} is no JSON ({error}); get it again") from error
    key = int | str
    categories = _records(index, content, "categories", "id", {"id": int, "name": str})
    names = {n: category["name"] for n, category in categories.items()}
    labelled = _records(index, content, "annotations", "image_id",
                        {"image_id": key, "file_name": str, "segments_info": list})  # fmt: skip
    pictures = _records(index, content, "images", "id", {"id": key, "file_name": str})
    for key, name in names.items():
        if key not in classes or classes[key]["name"] != name:
            raise LabError(
                f"{index} lists category {key} {name!r}, which is none of COCO-Panoptic's 133; "
                "bring other data sets as dataset='folder'"
            )
    if lonely := sorted(labelled.keys() - pictures.keys(), key=str):
        raise LabError(f"{index} labels image {lonely[0]}, which its list of images lacks")
    if bare := sorted(pictures.keys() - labelled.keys(), key=str):
        bare_name = pictures[bare[0]]["file_name"]
        raise LabError(f"{index} has no annotation for image {bare_name}")
    if not labelled:
        raise LabError(f"{index} lists no image: the split is empty")

    images, labels, tables = [], [], []
    for annotation in list(labelled.values())[:limit]:
        content, where = {"segments_info": annotation["segments_info"]}, annotation["file_name"]
        segments = _records(f"{index}, {where}", content, "segments_info", "id",
                            {"id": int, "category_id": int})  # fmt: skip
        rows = []
        for number, segment in segments.items():
            if segment["category_id"] not in classes:
                raise LabError(
                    f"{index}, {where}: category {segment['category_id']} is none of "
                    "COCO-Panoptic's 133"
                )
            if not 0 <= number < 2**24 or segment.get("iscrowd") not in (None, 0, 1):
                raise LabError(
                    f"{index}, {where}: segment {number} has an id that no pixel can have, or an "
                    f"iscrowd that is not 0 or 1 ({segment.get('iscrowd')!r}); get the index again"
                )
            contiguous = int(classes[segment["category_id"]]["id"])
            rows.append((number, contiguous, bool(segment.get("iscrowd"))))
        images.append(pictures[annotation["image_id"]]["file_name"])
        labels.append(where)
        tables.append(np.array(sorted(rows), dtype=np.int64).reshape(-1, 3))
    return images, labels, tables


def _records(where: object, content: object, key: str, by: str, kinds: dict) -> dict:
    """The list ``key`` of an index by its entries' field ``by``; each has fields of these kinds.

    Other tools leave out lists, or write null, text or a number where something else belongs.
    """
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise LabError(f"{where} has no list {key!r}: that is no COCO-Panoptic index; get it again")
    found = {}
    for row in rows:
        for field, kind in kinds.items():
            value = row.get(field) if isinstance(row, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                named = getattr(kind, "__name__", kind)
                raise LabError(f"{where}: an entry of {key!r} has no {field!r} ({named}): "
                               f"{str(row):.80}; get the index again")  # fmt: skip
        if row[by] in found:
            raise LabError(f"{where}: {key!r} has {by} {row[by]!r} twice; get the index again")
        found[row[by]] = row
    return found


class LabelFiles(FileDataset):
    """Labels that are one picture an image, whose values a table turns into classes."""

    table: np.ndarray  # (65536,) int32: label value -> class id, IGNORE or UNKNOWN
    listing: object  # what lists the values, for errors
    always_ignored = False  # 255 in 8 bit and 65535 in 16 bit, which no class may claim then
    reader: Callable[[Path], np.ndarray] | None = None  # default: a picture of one channel

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Path]:
        """Each class that is present is one region."""
        path = Path(self.labels[index])
        raw = (self.reader or read_label)(path)
        table = self.table
        if self.always_ignored:
            last, table = 255 if raw.dtype.itemsize == 1 else 65535, table.copy()
            if table[last] >= 0 and (raw == last).any():
                bits = 8 * raw.dtype.itemsize
                raise LabError(
                    f"{path} holds {last}, which means 'ignored' in {bits} bit, but classes.csv "
                    f"lists it as {self.names[table[last]]!r}; give the class another id, in both"
                )
            table[last] = IGNORE
        if raw.dtype.kind == "f" and (raw == raw.round()).all():
            raw = raw.astype(np.int64)  # Matlab's numbers
        if raw.dtype.kind not in "iu":
            raise LabError(f"{path} holds values of type {raw.dtype}; labels are whole numbers")
        found = np.where((raw >= 0) & (raw < len(table)), table[raw.clip(0, 65535)], UNKNOWN)
        if (found == UNKNOWN).any():
            value = int(raw[found == UNKNOWN][0])
            raise LabError(f"{path} holds the label value {value}, which {self.listing}")
        return found, np.arange(len(self.names)), np.ones(len(self.names), dtype=bool), path


class Folder(LabelFiles):
    """Anyone's own data: ``images/{split}/``, ``labels/{split}/*.png`` and ``classes.csv``.

    Labels are pictures of one channel, 1 to 16 bit (``pictures.read_label``), that hold the ids of
    ``classes.csv`` (id, name, and optionally ignore = 0 or 1); 255 in 8 bit and 65535 in 16 bit
    are always ignored, so that no class may have them there. Each picture has the label of its
    name and each label its picture. Each class that is present is one region.
    """

    PLACES = ("images", "labels", "classes.csv")
    LAYOUT = "a folder data set has images/{split}/, labels/{split}/*.png and classes.csv"

    def __init__(self, split: str, data_root: str | Path | None, limit: int | None) -> None:
        root = find_root("folder", data_root, self.LAYOUT)
        if not (root / "images").is_dir():
            raise LabError(f"{root / 'images'} is missing: {self.LAYOUT}")
        folders = entries(root / "images")
        check_split(split, [name for name in folders if (root / "images" / name).is_dir()], root)
        self.names, self.table = _read_classes(root / "classes.csv")
        self.lists = (str(root / "classes.csv"),)
        self.prompts, self.always_ignored = self.names, True
        remedy = "add it there (with ignore = 1 if it is no class)"
        self.listing = f"{root / 'classes.csv'} does not list; {remedy}"
        self.seen = torch.ones(len(self.names), dtype=torch.bool)
        self.things = torch.zeros(len(self.names), dtype=torch.bool)
        images, labels = root / "images" / split, root / "labels" / split
        found = stems(images, *PICTURES)
        if not found:
            raise LabError(
                f"{images} holds no images: the split is empty; put some there "
                f"({', '.join(PICTURES)})"
            )
        if not labels.is_dir():
            raise LabError(f"{labels} is missing: {self.LAYOUT}")
        drawn = stems(labels, ".png")
        pairs = found | {stem: f"{stem}.*" for stem in drawn if stem not in found}
        files = [(images / name, labels / f"{stem}.png") for stem, name in pairs.items()][:limit]
        asked = f"but {images} and {labels} must hold a picture and a label of each name"
        self.take(root.resolve().name, split, files, asked)


def _read_classes(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Names in the order of their ids, and a table (65536,) int32 from label value to class id."""
    rows = read_csv(path, ("id", "name"))
    flags = {"": False, "0": False, "false": False, "1": True, "true": True}
    entries: dict[int, tuple[str, bool]] = {}
    for line, row in rows.items():
        number, name = row["id"], row["name"]
        ignore = flags.get(row.get("ignore", "").lower())
        if not number.isdecimal() or int(number) > 65535 or not name or ignore is None:
            raise LabError(
                f"{path}, line {line}: expected an id of 0 to 65535, a name, and ignore empty, 0 "
                f"or 1, but found {','.join(row.values())!r}"
            )
        if int(number) in entries:
            raise LabError(f"{path}, line {line}: the id {number} is there twice")
        entries[int(number)] = name, ignore
    table, names = np.full(65536, UNKNOWN, dtype=np.int32), []
    for number, (name, ignore) in sorted(entries.items()):
        table[number] = IGNORE if ignore else len(names)
        names += [] if ignore else [name]
    if not names:
        raise LabError(f"{path} lists no class that is not ignored")
    try:
        return checked_names(names), table
    except LabError as error:
        raise LabError(f"{path}: {error}") from None


# --- class tables -------------------------------------------------------------------------------


def read_class_names(benchmark: str) -> list[dict[str, str]]:
    """Rows of ``data/class_names/<benchmark>.csv``: id, name, prompts, kind, label.

    ``prompts`` are separated by ``|``, ``kind`` is thing or stuff, and ``label`` is the value in
    the official label files.
    """
    table = shipped(f"data/class_names/{benchmark}.csv")
    return list(read_csv(table, ("id", "name", "prompts", "kind", "label")).values())


def take_classes(dataset: FileDataset, rows: list[dict[str, str]]) -> None:
    """Give a data set the names of a class table, and what follows from them.

    A class is seen if any of its names is a name of COCO's, on which segmentation is trained.
    Names that the literature gives to two classes (of ADE20K-847 and Pascal-Context 459) stay, and
    a warning says so.
    """
    coco = {name for row in read_class_names("coco") for name in row["prompts"].split("|")}
    dataset.prompts = tuple(tuple(row["prompts"].split("|")) for row in rows)
    dataset.names = tuple(prompts[0] for prompts in dataset.prompts)
    often = Counter(name for prompts in dataset.prompts for name in prompts)
    lost = [p[0] for p in dataset.prompts if all(often[name] > 1 for name in p)]
    if lost:
        warnings.warn(
            f"{len(lost)} of the {len(rows)} classes have no name of their own in the published "
            f"list, such as {lost[0]!r}: pixels can go to another class of that name",
            stacklevel=2,
        )
    dataset.seen = torch.tensor([not coco.isdisjoint(prompts) for prompts in dataset.prompts])
    dataset.things = torch.tensor([row["kind"] == "thing" for row in rows])
