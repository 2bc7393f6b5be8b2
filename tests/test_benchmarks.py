"""Every benchmark in its official layout, written here by hand, and as prepared for detectron2."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import tv_tensors

from opentrans_lab.cli import main
from opentrans_lab.data import DATASETS, IGNORE, load_dataset
from opentrans_lab.data.benchmarks import BENCHMARKS
from opentrans_lab.data.layouts import read_class_names
from opentrans_lab.data.transforms import floored
from opentrans_lab.errors import LabError
from opentrans_lab.evaluation import check

REAL = Path(os.environ.get("OPENTRANS_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
SIZES = {"cityscapes": 19, "ade150": 150, "ade847": 847, "voc20": 20, "voc21": 21, "pc59": 59,
         "pc459": 459}  # fmt: skip


def photo(path: Path, label: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*label.shape[:2], 3), 99, np.uint8)).save(path)


def png(path: Path, label: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(label, mode="P") if palette else Image.fromarray(label)
    if palette:
        picture.putpalette([5 * i % 256 for i in range(768)])
    picture.save(path)


def write(key: str, root: Path, raw: list[list[int]], name: str = "a", split: str = "val") -> None:
    """One picture whose official label values are ``raw``."""
    values = np.array(raw)
    theirs = {"train": "training", "val": "validation"}[split]
    if key == "cityscapes":
        photo(root / f"cityscapes/leftImg8bit/{split}/ulm/{name}_leftImg8bit.png", values)
        png(root / f"cityscapes/gtFine/{split}/ulm/{name}_gtFine_labelIds.png", u8(values))
    elif key == "ade150":
        photo(root / f"ADEChallengeData2016/images/{theirs}/{name}.jpg", values)
        png(root / f"ADEChallengeData2016/annotations/{theirs}/{name}.png", u8(values))
    elif key == "ade847":
        place = root / f"ADE20K_2021_17_01/images/ADE/{theirs}/urban/street"
        photo(place / f"ADE_{split}_{name}.jpg", values)
        rgb = np.stack([values // 256 * 10, values % 256, values * 0 + 7], -1)
        rgb[..., 0] += 3  # R also counts parts: only its tens belong to the object
        png(place / f"ADE_{split}_{name}_seg.png", u8(rgb))
    elif key.startswith("voc"):
        place = root / "VOCdevkit/VOC2012"
        photo(place / f"JPEGImages/{name}.jpg", values)
        png(place / f"SegmentationClass/{name}.png", u8(values), palette=True)
        listed(place / f"ImageSets/Segmentation/{split}.txt", name)
    else:
        place = root / "VOCdevkit/VOC2010"
        photo(place / f"JPEGImages/{name}.jpg", values)
        (place / "trainval").mkdir(exist_ok=True)
        savemat(place / f"trainval/{name}.mat", {"LabelMap": values.astype(np.uint16)})
        listed(place / f"ImageSets/Main/{split}.txt", name)


def u8(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint8)


def listed(path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + f"{name}\n")


# Official values beside the classes that they are, traps included.
BY_HAND = {
    "cityscapes": ([[7, 8, 0], [33, 255, 9], [26, 29, 24]], [[0, 1, -1], [18, -1, -1],
                                                             [13, -1, 11]]),
    "ade150": ([[0, 1, 150], [2, 0, 77]], [[-1, 0, 149], [1, -1, 76]]),
    "ade847": ([[2978, 312, 0], [3148, 1, 2826]], [[0, 1, -1], [846, -1, 845]]),
    "voc20": ([[0, 1, 20], [255, 15, 0]], [[-1, 0, 19], [-1, 14, -1]]),
    "voc21": ([[0, 1, 20], [255, 15, 0]], [[0, 1, 20], [-1, 15, 0]]),
    "pc59": ([[0, 2, 9], [458, 1, 459], [440, 46, 45]], [[-1, 0, 1], [58, -1, -1], [55, 12, 11]]),
    "pc459": ([[0, 1, 459], [256, 300, 2]], [[-1, 0, 458], [255, 299, 1]]),
}  # fmt: skip


@pytest.mark.parametrize("key", BY_HAND)
def test_official_labels_by_hand(key, tmp_path, monkeypatch):
    raw, expected = BY_HAND[key]
    write(key, tmp_path, raw)
    write(key, tmp_path, raw, "b")
    write(key, tmp_path, [[1]] if key != "cityscapes" else [[7]], "c", "train")
    monkeypatch.delenv("OPENTRANS_DATA", raising=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    data = load_dataset(key, "val")
    assert len(data) == 2 and len(data.names) == SIZES[key] == len(data.seen) == len(data.things)
    batch = next(data.batches(2, train=False))
    assert batch["labels"].tolist() == [expected] * 2
    for labels, classes, masks in zip(
        batch["labels"], batch["classes"], batch["masks"], strict=True
    ):
        assert classes.tolist() == sorted(set(labels.flatten().tolist()) - {IGNORE})
        assert all(torch.equal(m, labels == c) for c, m in zip(classes, masks, strict=True))
    assert len(load_dataset(key, "train", tmp_path)) == 1


PREPARED = {
    "ade150": ("ADEChallengeData2016/images/{}", "ADEChallengeData2016/annotations_detectron2/{}",
               ".png", np.uint8),
    "ade847": ("ADE20K_2021_17_01/images_detectron2/{}",
               "ADE20K_2021_17_01/annotations_detectron2/{}", ".tif", np.uint16),
    "voc20": ("pascal_voc_d2/images/{}", "pascal_voc_d2/annotations_pascal20/{}", ".png", np.uint8),
    "voc21": ("pascal_voc_d2/images/{}", "pascal_voc_d2/annotations_pascal21/{}", ".png", np.uint8),
    "pc59": ("pascal_ctx_d2/images/{}", "pascal_ctx_d2/annotations_ctx59/{}", ".png", np.uint8),
    "pc459": ("pascal_ctx_d2/images/{}", "pascal_ctx_d2/annotations_ctx459/{}", ".tif", np.uint16),
}  # fmt: skip


@pytest.mark.parametrize("key", PREPARED)
def test_prepared_labels_by_hand(key, tmp_path):
    images, labels, suffix, kind = PREPARED[key]
    last, void = SIZES[key] - 1, np.iinfo(kind).max
    values = np.array([[0, 1, last], [void, 7, 0]], kind)
    photo(tmp_path / images.format("validation") / "a.jpg", values)
    png(tmp_path / labels.format("validation") / f"a{suffix}", values)
    (batch,) = load_dataset(key, "val", tmp_path).batches(1, train=False)
    assert batch["labels"][0].tolist() == [[0, 1, last], [-1, 7, 0]]
    if kind is np.uint16:  # 255 is a class like any other
        png(tmp_path / labels.format("validation") / f"a{suffix}", np.full((2, 3), 255, kind))
        (batch,) = load_dataset(key, "val", tmp_path).batches(1, train=False)
        assert (batch["labels"] == 255).all()


def test_the_official_layout_goes_before_the_prepared_one(tmp_path):
    write("ade150", tmp_path, [[1, 0]])
    folder = tmp_path / "ADEChallengeData2016/annotations_detectron2/validation"
    png(folder / "a.png", np.array([[5, 5]], np.uint8))
    (batch,) = load_dataset("ade150", "val", tmp_path / "ADEChallengeData2016").batches(
        1, train=False
    )
    assert batch["labels"][0].tolist() == [[0, -1]]


def test_ade847_is_reduced_to_512_with_its_labels(tmp_path):
    values = np.full((600, 900), 2978)
    values[:, 450:] = 312
    write("ade847", tmp_path, values.tolist())
    write("ade847", tmp_path, [[2978, 312]] * 3, "b")
    large, small = load_dataset("ade847", "val", tmp_path).batches(1, train=False)
    assert large["labels"].shape == (1, 512, 768) and large["images"].shape == (1, 3, 512, 768)
    assert (large["labels"][..., :384] == 0).all() and (large["labels"][..., 384:] == 1).all()
    assert small["labels"].shape == (1, 3, 2)


@pytest.mark.parametrize(("key", "value"), [("ade150", 200), ("voc20", 21), ("cityscapes", 77),
                                            ("pc459", 460), ("pc59", 500)])  # fmt: skip
def test_a_value_of_no_class_names_file_and_value(key, value, tmp_path):
    write(key, tmp_path, [[value, value]], "bad")
    with pytest.raises(LabError, match=rf"bad.* holds the label value {value}"):
        next(load_dataset(key, "val", tmp_path).batches(1, train=False))


@pytest.mark.parametrize("key", BENCHMARKS)
def test_what_is_missing_is_named_with_its_source(key, tmp_path):
    about = BENCHMARKS[key]
    with pytest.raises(LabError, match="missing or empty: .*official source: http") as error:
        load_dataset(key, "val", tmp_path)
    assert about.folders[0] in str(error.value) and about.source in str(error.value)
    for name in ("first", "second", "third"):
        write(key, tmp_path, [[1, 2]] if key != "cityscapes" else [[7, 8]], name)
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".txt")
    files[0].with_name(f"._{files[0].name}").write_text("")  # macOS leaves these
    labels = [p for p in files if "SegmentationClass" in str(p) or "annotations" in str(p)
              or "gtFine" in str(p) or p.suffix == ".mat" or "_seg" in p.name]  # fmt: skip
    (label,) = (p for p in labels if "first" in p.name)
    (image,) = (p for p in files if p not in labels and "second" in p.name)
    for lost in (label, image):
        lost.rename(lost.with_name("elsewhere"))
        with pytest.raises(LabError, match=f"{lost.name} is missing"):
            load_dataset(key, "val", tmp_path)
        data = load_dataset(key, "val", tmp_path, on_error="skip")
        assert len(list(data.batches(1, train=False))) == 2 and len(data) == 3
        assert [reason for _, reason in data.skipped] == [f"{lost} is missing; restore the file"]
        found = check(key, "val", tmp_path)
        assert found.missing == 1 and found.images == 2 and not found.fine
        lost.with_name("elsewhere").rename(lost)
    image.unlink()  # the first alone is looked at
    assert len(load_dataset(key, "val", tmp_path, limit=1)) == 1


def test_a_broken_matlab_file_and_a_grey_ade_label_are_named(tmp_path):
    write("pc59", tmp_path, [[2, 9]])
    (tmp_path / "VOCdevkit/VOC2010/trainval/a.mat").write_bytes(b"no matlab")
    with pytest.raises(LabError, match="a.mat is no Matlab file"):
        next(load_dataset("pc59", "val", tmp_path).batches(1, train=False))
    write("ade847", tmp_path, [[2978, 312]])
    png(next(tmp_path.rglob("*_seg.png")), np.zeros((1, 2), np.uint8))
    with pytest.raises(LabError, match="_seg.png has mode L"):
        next(load_dataset("ade847", "val", tmp_path).batches(1, train=False))


def test_seen_is_computed_from_names_that_coco_has(tmp_path):
    coco = {name for row in read_class_names("coco") for name in row["prompts"].split("|")}
    for key in ("cityscapes", "ade150", "pc459"):
        write(key, tmp_path, [[7]])
        data = load_dataset(key, "val", tmp_path)
        assert data.seen.tolist() == [bool(coco & set(prompts)) for prompts in data.prompts]
    names = dict(zip(data.names, data.seen.tolist(), strict=True))
    assert names["cat"] and not names["accordion"] and 0 < data.seen.sum() < 459


# --- check ----------------------------------------------------------------------------------------


def test_check_counts_what_is_there_and_lists_what_is_broken(tmp_path):
    for name in "abcd":
        write("ade150", tmp_path, [[1, 1, 0], [2, 2, 2]], name)
    root = tmp_path / "ADEChallengeData2016"
    picture = root / "images/validation/b.jpg"
    picture.write_bytes(picture.read_bytes()[:100])
    png(root / "annotations/validation/c.png", np.full((2, 3), 200, np.uint8))
    png(root / "annotations/validation/d.png", np.ones((3, 2), np.uint8))
    found = check("ade150", "val", tmp_path)
    found.save_overlay(tmp_path / "seen.png")
    assert not found.fine and found.images == 1 and (tmp_path / "seen.png").stat().st_size > 1000
    assert [Path(file).name for file, _ in found.broken] == ["b.jpg", "c.jpg", "d.jpg"]
    for (_, reason), words in zip(
        found.broken, ("b.jpg cannot be decoded", "label value 200", "differ in size"), strict=True
    ):
        assert words in reason and reason in str(found)
    seen = found.classes[found.classes["images"] > 0]
    assert seen["id"].tolist() == [0, 1] and seen["share"].tolist() == [0.4, 0.6]
    assert found.ignored == pytest.approx(1 / 6)
    assert "classes never seen 148" in str(found)


def test_skipped_images_do_not_lose_the_others(tmp_path):
    for name in "abc":
        write("voc20", tmp_path, [[1, 2]], name)
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages/b.jpg").write_bytes(b"")
    with pytest.raises(LabError, match="b.jpg"):
        list(load_dataset("voc20", "val", tmp_path).batches(2, train=False))
    data = load_dataset("voc20", "val", tmp_path, on_error="skip")
    for workers in (0, 2):
        files = [f for b in data.batches(2, train=False, workers=workers) for f in b["files"]]
        assert files == ["a.jpg", "c.jpg"] and len(data.skipped) == 1
        assert data.skipped[0][0].endswith("b.jpg") and "cannot be decoded" in data.skipped[0][1]
    with pytest.raises(LabError, match="b.jpg"):  # training never goes on without a word
        for _, _ in zip(data.batches(3), range(2), strict=False):
            pass
    with pytest.raises(LabError, match="on_error='ignore'"):
        load_dataset("voc20", "val", tmp_path, on_error="ignore")


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data sets beside the project")
@pytest.mark.parametrize(("key", "root", "images"), [("coco", REAL, 100), ("voc20", REAL, 160),
                                                    ("folder", REAL / "camvid", 101)])  # fmt: skip
def test_real_subsets_are_whole(key, root, images):
    found = check(key, "val", root)
    assert found.fine and found.images == images
    assert found.classes["share"].sum() == pytest.approx(1)


THINGS = {"coco": 80, "cityscapes": 8, "ade150": 100, "voc": 20}


def test_things_of_every_benchmark():
    for key in ("coco", "cityscapes", "ade150", "ade847", "voc", "pc59", "pc459"):
        rows = read_class_names(key)
        things = {row["name"] for row in rows if row["kind"] == "thing"}
        assert len(things) == THINGS.get(key, len(things)) and 0 < len(things) < len(rows)
        assert not things & {row["name"] for row in rows if row["kind"] == "stuff"}
        if key == "ade847":  # what ADE20K-150 says of the same name holds here
            kinds = {row["name"]: row["kind"] for row in read_class_names("ade150")}
            assert all(row["kind"] == kinds.get(row["name"], row["kind"]) for row in rows)


@pytest.mark.parametrize("fault", [None, "broken", "missing", "root", "scenes"])
def test_data_check_has_an_exit_code(fault, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write("voc20", tmp_path, [[1, 2]], name)
    picture = tmp_path / "VOCdevkit/VOC2012/JPEGImages/b.jpg"
    if fault == "broken":
        picture.write_bytes(b"")
    elif fault == "missing":
        picture.unlink()
    root = tmp_path / "nowhere" if fault == "root" else tmp_path
    key = "scenes" if fault == "scenes" else "voc20"
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", key, "--root", str(root), "--picture", "seen.png"])
    told = "".join(capsys.readouterr())
    codes = {None: 0, "broken": 1, "missing": 1}  # what lies there; 2 for what was asked
    assert ended.value.code == codes.get(fault, 2)
    if fault in ("broken", "missing"):
        assert "b.jpg" in told and f"files missing      {int(fault == 'missing')}" in told
    assert Path("seen.png").exists() == (fault in (None, "broken", "missing"))


def test_labels_are_reduced_as_opencv_does():
    """cv2.INTER_NEAREST takes floor(i · in / out); torch's centred nearest would not."""
    label = torch.arange(7)[:, None].repeat(1, 5)
    assert floored(tv_tensors.Mask(label), [3, 5])[:, 0].tolist() == [0, 2, 4]
    wide = torch.arange(1000)[None].repeat(2, 1)
    reduced = floored(tv_tensors.Mask(wide), [2, 683])[0]
    assert reduced.tolist() == [int(i * 1000 / 683 + 1e-9) for i in range(683)]


def test_an_empty_folder_of_official_labels_gives_way_to_prepared_ones(tmp_path):
    write("ade150", tmp_path, [[1, 0]])
    root = tmp_path / "ADEChallengeData2016"
    (root / "annotations/validation/a.png").unlink()
    png(root / "annotations_detectron2/validation/a.png", np.array([[5, 6]], np.uint8))
    (batch,) = load_dataset("ade150", "val", root).batches(1, train=False)
    assert batch["labels"][0].tolist() == [[5, 6]]


def test_lists_may_have_more_columns(tmp_path):
    write("voc20", tmp_path, [[1, 2]])
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("a -1\n\n")
    assert len(load_dataset("voc20", "val", tmp_path)) == 1


def test_all_keys():
    assert {*SIZES, "coco", "folder", "scenes"} == set(DATASETS)
