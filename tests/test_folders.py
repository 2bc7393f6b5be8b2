"""What systems and other tools leave in folders, lists and records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_benchmarks import write
from test_data import edit, write_coco, write_folder

from opentrans_lab.cli import main
from opentrans_lab.clip import load_backbone
from opentrans_lab.data import IGNORE, load_dataset
from opentrans_lab.errors import LabError
from opentrans_lab.evaluation import check
from opentrans_lab.experiments.starts import save_weights
from opentrans_lab.files import find_pictures
from opentrans_lab.heads import build

LABEL = np.array([[0, 1], [1, 0]], np.uint8)
LEFT = ["__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints", "._0.png"]


def two(root: Path) -> Path:
    return write_folder(root, "id,name\n0,a\n1,b\n", [LABEL, LABEL])


def files(key: str, root: Path, split: str = "val") -> list[str]:
    data = load_dataset(key, split, root)
    return [name for batch in data.batches(1, train=False) for name in batch["files"]]


# --- names --------------------------------------------------------------------------------------


def test_what_systems_leave_in_folders_is_no_picture_and_no_split(tmp_path):
    root = two(tmp_path)
    for place in ("images/val", "labels/val", "images"):
        for left in LEFT:
            if "." in left[1:]:
                (root / place / left).write_text("left behind")
            else:
                shutil.copytree(root / "labels/val", root / place / left)
    assert files("folder", root) == ["0.png", "1.png"] and check("folder", "val", root).fine
    for left in LEFT:
        with pytest.raises(LabError, match=f"no split {left!r}; valid: val$"):
            load_dataset("folder", left, root)
    found = find_pictures(f"'{root}/images/val/*'")
    assert [path.name for path in found] == ["0.png", "1.png"]


def test_macos_twins_of_ade_folders_hold_no_pictures(tmp_path):
    write("ade847", tmp_path, [[2978, 312]])
    place = tmp_path / "ADE20K_2021_17_01/images/ADE/validation"
    shutil.copytree(place / "urban", place / "__MACOSX/urban")
    assert len(load_dataset("ade847", "val", tmp_path)) == 1


def test_suffixes_may_be_in_capitals(tmp_path):
    root = two(tmp_path)
    for name in ("labels/val/0.PNG", "labels/val/1.Png", "images/val/0.PnG"):
        (root / name.lower()).rename(root / name)
    assert files("folder", root) == ["0.PnG", "1.png"]


@pytest.mark.parametrize("key", ["ade150", "voc20", "cityscapes", "ade847", "pc59"])
def test_suffixes_of_benchmarks_may_be_in_capitals(tmp_path, key):
    write(key, tmp_path, [[7, 8]])
    for path in [p for p in tmp_path.rglob("*.*") if p.is_file() and p.suffix != ".txt"]:
        path.rename(path.with_suffix(path.suffix.upper()))
    assert len(files(key, tmp_path)) == 1


def test_coco_pictures_may_have_suffixes_in_capitals(tmp_path):
    write_coco(tmp_path)
    for path in (tmp_path / "val2017").iterdir():
        path.rename(path.with_suffix(".JPG"))
    assert len(files("coco", tmp_path)) == 3


def test_two_pictures_of_one_name_are_refused(tmp_path):
    root = two(tmp_path)
    for other in ("1.jpg", "1.PNG"):
        Image.new("RGB", (2, 2)).save(root / "images/val" / other)
        with pytest.raises(LabError, match=f"val holds both {other} and 1.png.*remove one"):
            load_dataset("folder", "val", root)
        (root / "images/val" / other).unlink()
    shutil.copy(root / "labels/val/1.png", root / "labels/val/1.PNG")
    with pytest.raises(LabError, match="labels/val holds both 1.PNG and 1.png"):
        load_dataset("folder", "val", root)


def test_a_label_without_a_picture_is_told(tmp_path):
    root = two(tmp_path)
    (root / "images/val/1.png").rename(root / "images/val/1.heic")
    with pytest.raises(LabError, match=r"images/val/1\.\* is missing, but .*labels/val must hold"):
        load_dataset("folder", "val", root)
    found = check("folder", "val", root)
    assert found.missing == 1 and found.images == 1 and not found.fine
    assert len(load_dataset("folder", "val", root, limit=1)) == 1  # the other is not looked at


# --- lists and records --------------------------------------------------------------------------


def test_lists_may_begin_with_a_byte_order_mark(tmp_path):
    write("voc20", tmp_path, [[1, 2]])
    listed = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    listed.write_bytes(b"\xef\xbb\xbf" + listed.read_bytes())
    assert files("voc20", tmp_path) == ["a.jpg"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_coco_indices_may_begin_with_a_byte_order_mark(tmp_path, encoding):
    index = write_coco(tmp_path)
    index.write_text(index.read_text(), encoding=encoding)
    assert len(files("coco", tmp_path)) == 3


def test_coco_with_more_than_is_asked(tmp_path):
    index = write_coco(tmp_path)
    plain = list(load_dataset("coco", "val", tmp_path).batches(3, train=False))

    def more(content: dict) -> None:
        content |= {"licenses": None, "info": [], "scores": {"a": None}}
        for part in ("images", "annotations", "categories"):
            for record in content[part]:
                record |= {"note": None, "score": [0.5]}
        for segment in content["annotations"][0]["segments_info"]:
            segment |= {"bbox": None, "area": "large"}
            segment["iscrowd"] = segment["iscrowd"] or None  # null, as some tools write 0

    edit(index, more)
    found = list(load_dataset("coco", "val", tmp_path).batches(3, train=False))
    assert torch.equal(plain[0]["labels"], found[0]["labels"])
    assert all(map(torch.equal, plain[0]["classes"], found[0]["classes"]))


def into(change):
    """A fault of the first segment of the first annotation."""
    return lambda content: change(content["annotations"][0]["segments_info"][0])


FAULTS = {
    "a list at the top": (lambda c: [c], "no list 'categories'"),
    "null at the top": (lambda c: None, "no list 'categories'"),
    "no images": (lambda c: c.pop("images") and None, "no list 'images'.*get it again"),
    "images null": (lambda c: c.update(images=None), "no list 'images'"),
    "annotations a dict": (lambda c: c.update(annotations={}), "no list 'annotations'"),
    "categories null": (lambda c: c.update(categories=None), "no list 'categories'"),
    "an image null": (lambda c: c["images"].append(None), "'images' has no 'id' .*: None"),
    "an image's name null": (lambda c: c["images"][0].update(file_name=None), "no 'file_name'"),
    "a name a number": (lambda c: c["annotations"][0].update(file_name=7), "no 'file_name'"),
    "segments null": (lambda c: c["annotations"][0].update(segments_info=None), "'segments_info'"),
    "no segments": (lambda c: c["annotations"][0].pop("segments_info") and None, "'segments_info'"),
    "a segment null": (lambda c: c["annotations"][0]["segments_info"].append(None),
                       "000000000000.png: an entry of 'segments_info' has no 'id'"),
    "a category null": (into(lambda s: s.update(category_id=None)), "000000.png.*'category_id'"),
    "a category in a list": (into(lambda s: s.update(category_id=[1])), "'category_id'"),
    "an id as text": (into(lambda s: s.update(id="7")), "no 'id' .int."),
    "an id true": (into(lambda s: s.update(id=True)), "no 'id' .int."),
    "an id that no pixel has": (into(lambda s: s.update(id=2**33)), "segment 8589934592 has an id"),
    "iscrowd as text": (into(lambda s: s.update(iscrowd="no")), "iscrowd that is not 0 or 1"),
    "a segment twice": (lambda c: c["annotations"][0]["segments_info"].append(
        dict(c["annotations"][0]["segments_info"][0], category_id=1)), "has id 70000 twice"),
    "a picture labelled twice": (lambda c: c["annotations"].append(c["annotations"][0]),
                                 "'annotations' has image_id 0 twice"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_coco_index_lacks_is_named(tmp_path, fault):
    index = write_coco(tmp_path)
    change, said = FAULTS[fault]
    content = json.loads(index.read_text())
    changed = change(content)
    index.write_text(json.dumps(changed if fault.endswith("at the top") else content))
    with pytest.raises(LabError, match=f"panoptic_val2017.json.*{said}"):
        load_dataset("coco", "val", tmp_path)


def test_an_empty_split_is_told_whatever_was_left_in_it(tmp_path):
    root = two(tmp_path)
    for split in ("left", "none"):
        (root / "images" / split).mkdir()
    (root / "images/left/Thumbs.db").write_text("")
    said = "holds no images: the split is empty; put some there .*jpeg"
    for split in ("left", "none"):
        with pytest.raises(LabError, match=f"images/{split} {said}"):
            load_dataset("folder", split, root)


# --- nothing labelled ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    network = build("deeplabv3", load_backbone("mini", device="cpu"), "mini")
    save_weights(network, place / "model.safetensors")
    about = {"framework": "deeplabv3", "backbone": "mini", "checkpoint": "", "preset": "mini",
             "size": 32}  # fmt: skip
    (place / "result.json").write_text(json.dumps({"parameters": about, "result": {}}))
    return place


def test_labels_of_no_class_are_a_problem(tmp_path, monkeypatch, capsys, trained):
    monkeypatch.chdir(tmp_path)
    unmarked = np.full((40, 50), 255, np.uint8)
    write_folder(tmp_path / "d", "id,name\n0,a\n1,b\n", [unmarked, unmarked])
    (batch,) = load_dataset("folder", "val", "d").batches(2, train=False)
    assert (batch["labels"] == IGNORE).all()
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", "folder", "--root", "d", "--picture", "seen.png"])
    assert ended.value.code == 1 and "no pixel has a class" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["evaluate", str(trained), "--dataset", "folder", "--root", "d", "--device", "cpu"])
    told = capsys.readouterr().out
    assert "nothing to measure" in told and "Empty DataFrame" not in told


def test_coco_of_unlabelled_pictures_is_a_problem(tmp_path):
    index = write_coco(tmp_path)
    edit(index, lambda c: [a.update(segments_info=[]) for a in c["annotations"]])
    found = check("coco", "val", tmp_path)
    assert found.images == 3 and not found.broken and not found.fine
    assert "no pixel has a class" in str(found)
