"""Readers on small fixtures in the official layouts, with labels worked out by hand."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opentrans_lab.data.datasets import DATASETS, IGNORE, load_dataset, scenes
from opentrans_lab.data.layouts import read_class_names
from opentrans_lab.data.loader import Look
from opentrans_lab.errors import LabError
from opentrans_lab.experiments import Lab

REAL = Path(os.environ.get("OPENTRANS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def first(dataset, steps=1, **options):
    return list(islice(dataset.batches(**{"batch_size": 2} | options), steps))


def same(a: dict, b: dict) -> bool:
    pairs = [(a[k], b[k]) for k in ("images", "labels")]
    pairs += [p for k in ("masks", "classes") for p in zip(a[k], b[k], strict=True)]
    return a["files"] == b["files"] and all(torch.equal(x, y) for x, y in pairs)


def consistent(batch: dict) -> bool:
    """Masks lie where the labels say so, and no mask is empty."""
    for label, masks, classes in zip(
        batch["labels"], batch["masks"], batch["classes"], strict=True
    ):
        for mask, c in zip(masks, classes, strict=True):
            if not mask.any() or not (label[mask] == c).all():
                return False
    return True


# --- COCO-Panoptic ------------------------------------------------------------------------------

# id = R + 256 G + 65536 B. The large ids need all three bytes, and 7 and 7 * 256 differ only in
# which byte they sit in.
PERSON, CROWD, RUG, BANNER, LOOSE = 7, 7 * 256, 70_000, 2**24 - 1, 99
SEGMENT_MAP = np.array(
    [
        [0, PERSON, PERSON, RUG, RUG],
        [CROWD, CROWD, PERSON, RUG, RUG],
        [BANNER, BANNER, BANNER, LOOSE, 0],
    ]
)
LABELS = [[-1, 0, 0, 132, 132], [0, 0, 0, 132, 132], [80, 80, 80, -1, -1]]
SEGMENTS = [
    {"id": RUG, "category_id": 200, "iscrowd": 0},
    {"id": CROWD, "category_id": 1, "iscrowd": 1},
    {"id": BANNER, "category_id": 92, "iscrowd": 0},
    {"id": PERSON, "category_id": 1, "iscrowd": 0},
]


def write_coco(root: Path, beside: bool = False, split: str = "val", count: int = 3) -> Path:
    """``count`` images 5 x 3 whose left column gets brighter, in the official layout."""
    pngs = (root if beside else root / "annotations") / f"panoptic_{split}2017"
    for folder in (root / f"{split}2017", root / "annotations", pngs):
        folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        pixels = np.full((3, 5, 3), 40 * i, np.uint8)
        Image.fromarray(pixels).save(root / f"{split}2017" / f"{i:012d}.jpg")
        ids = SEGMENT_MAP
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        Image.fromarray(rgb).save(pngs / f"{i:012d}.png")
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "height": 3, "width": 5})
        annotations.append({"image_id": i, "file_name": f"{i:012d}.png", "segments_info": SEGMENTS})
    categories = [{"id": int(r["label"]), "name": r["name"]} for r in read_class_names("coco")]
    # The official lists of images and annotations are in different orders.
    content = {"images": images[::-1], "annotations": annotations, "categories": categories}
    index = root / "annotations" / f"panoptic_{split}2017.json"
    index.write_text(json.dumps(content))
    return index


@pytest.mark.parametrize("beside", [False, True])
def test_coco_labels_by_hand(tmp_path, beside):
    write_coco(tmp_path, beside)
    dataset = load_dataset("coco", "val", tmp_path)
    (batch,) = dataset.batches(3, train=False)
    assert batch["files"] == [f"{i:012d}.jpg" for i in range(3)]
    assert batch["images"].shape == (3, 3, 3, 5) and batch["images"].dtype == torch.float32
    assert torch.allclose(
        batch["images"].mean((1, 2, 3)) * 255, torch.tensor([0.0, 40, 80]), atol=1
    )
    for row in range(3):
        assert batch["labels"][row].tolist() == LABELS
        found = dict(zip(batch["classes"][row].tolist(), batch["masks"][row], strict=True))
        assert sorted(batch["classes"][row].tolist()) == [0, 80, 132]  # the crowd is no region
        assert torch.equal(found[0], torch.tensor(SEGMENT_MAP == PERSON))
        assert torch.equal(found[132], torch.tensor(SEGMENT_MAP == RUG))
    assert consistent(batch)
    assert len(batch["names"]) == 133 and dataset.seen.all() and "girl" in batch["names"][0]
    assert dataset.things.sum() == 80
    assert [dataset.names[i] for i in (0, 80, 84, 132)] == ["person", "banner", "counter", "rug"]


def test_coco_class_list_is_whole():
    rows = read_class_names("coco")
    assert [int(r["id"]) for r in rows] == list(range(133))
    labels = [int(r["label"]) for r in rows]
    assert labels == sorted(set(labels)) and labels[0] == 1 and labels[-1] == 200
    assert sum(r["kind"] == "thing" for r in rows) == 80
    assert sum(r["kind"] == "stuff" for r in rows) == 53
    assert len({r["prompts"].split("|")[0] for r in rows}) == 133


def test_coco_root_is_found_in_all_usual_ways(tmp_path, monkeypatch):
    write_coco(tmp_path / "coco")
    monkeypatch.delenv("OPENTRANS_DATA", raising=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert len(load_dataset("coco", "val")) == 3
    monkeypatch.setenv("OPENTRANS_DATA", str(tmp_path / "coco"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    assert len(load_dataset("coco", "val", data_root="", size=0, limit=0)) == 3
    assert len(load_dataset("coco", "val", tmp_path, limit=2)) == 2


def test_coco_picture_without_segments_is_all_ignored(tmp_path):
    index = write_coco(tmp_path, count=1)
    content = json.loads(index.read_text())
    content["annotations"][0]["segments_info"] = []
    index.write_text(json.dumps(content))
    (batch,) = load_dataset("coco", "val", tmp_path).batches(1, train=False)
    assert (batch["labels"] == IGNORE).all() and batch["masks"][0].shape == (0, 3, 5)


@pytest.mark.skipif(not (REAL / "coco").is_dir(), reason="no real COCO-Panoptic subset here")
def test_real_coco_agrees_with_a_plain_reading():
    content = json.loads((REAL / "coco/annotations/panoptic_val2017.json").read_text())
    order = sorted(c["id"] for c in content["categories"])
    for annotation, batch in zip(
        content["annotations"][:8],
        load_dataset("coco", "val", REAL, limit=8).batches(1, train=False),
        strict=True,
    ):
        path = REAL / "coco/annotations/panoptic_val2017" / annotation["file_name"]
        ids = np.asarray(Image.open(path)).astype(int) @ [1, 256, 65536]
        label = np.full(ids.shape, -1)
        for segment in annotation["segments_info"]:
            label[ids == segment["id"]] = order.index(segment["category_id"])
        assert np.array_equal(batch["labels"][0].numpy(), label)
        regions = sum(not s["iscrowd"] for s in annotation["segments_info"])
        assert len(batch["classes"][0]) == regions and consistent(batch)


# --- folders ------------------------------------------------------------------------------------


def write_folder(
    root: Path, classes: str, labels: list[np.ndarray], images: list[np.ndarray] | None = None
) -> Path:
    for kind in ("images", "labels"):
        (root / kind / "val").mkdir(parents=True, exist_ok=True)
    (root / "classes.csv").write_text(classes)
    for i, label in enumerate(labels):
        pixels = np.zeros((*label.shape, 3), np.uint8) if images is None else images[i]
        Image.fromarray(pixels).save(root / f"images/val/{i}.png")
        Image.fromarray(label).save(root / f"labels/val/{i}.png")
    return root


def test_folder_8_and_16_bit(tmp_path):
    classes = "\ufeffid,name,ignore\n300,far,0\n7,near,\n255,edge,0\n9,void,1\n"
    eight = np.array([[7, 9, 9], [7, 7, 9]], np.uint8)  # 255 would mean two things
    sixteen = np.array([[7, 9, 255], [300, 65535, 7]], np.uint16)
    dataset = load_dataset(
        "folder", "val", write_folder(tmp_path / "own", classes, [eight, sixteen])
    )
    assert dataset.names == ("near", "edge", "far") and dataset.seen.tolist() == [True] * 3
    (batch,) = dataset.batches(2, train=False)
    assert batch["labels"][0].tolist() == [[0, -1, -1], [0, 0, -1]]
    assert batch["labels"][1].tolist() == [[0, -1, 1], [2, -1, 0]]  # 255 is a class in 16 bit
    assert [c.tolist() for c in batch["classes"]] == [[0], [0, 1, 2]] and consistent(batch)


def test_folder_palette_png_gives_indices(tmp_path):
    write_folder(tmp_path, "id,name\n0,a\n1,b\n", [np.zeros((2, 2), np.uint8)])
    picture = Image.fromarray(np.array([[0, 1], [1, 255]], np.uint8), mode="P")
    picture.putpalette([200, 0, 0, 0, 200, 0] + [9] * 762)
    picture.save(tmp_path / "labels/val/0.png")
    (batch,) = load_dataset("folder", "val", tmp_path).batches(1, train=False)
    assert batch["labels"][0].tolist() == [[0, 1], [1, -1]]


@pytest.mark.skipif(not (REAL / "camvid").is_dir(), reason="no CamVid here")
def test_real_folder():
    dataset = load_dataset("folder", "val", REAL / "camvid", limit=6)
    batches = list(dataset.batches(4, train=False))
    assert [len(b["files"]) for b in batches] == [4, 2] and all(map(consistent, batches))
    values = torch.cat([b["labels"].flatten() for b in batches]).unique()
    assert len(dataset.names) == 11 and values.min() == IGNORE and 5 < values.max() < 11


@pytest.mark.parametrize("taken", ["images", "images/val", "labels/val", "classes.csv"])
def test_a_file_where_a_folder_should_be(tmp_path, taken):
    root = write_folder(tmp_path, "id,name\n0,a\n", [np.zeros((4, 4), np.uint8)])
    (shutil.rmtree if taken != "classes.csv" else os.remove)(root / taken)
    (root / taken).write_text("") if taken != "classes.csv" else (root / taken).mkdir()
    words = "no split 'val'" if taken == "images/val" else taken.split("/")[0]
    for on_error in ("raise", "skip"):
        with pytest.raises(LabError, match=words):
            load_dataset("folder", "val", root, on_error=on_error)


@pytest.mark.parametrize("value", [np.int16(-1), np.int32(70000), np.float32(0.5)])
def test_labels_that_are_no_class_ids_are_refused(tmp_path, value):
    root = write_folder(tmp_path, "id,name\n0,a\n", [np.zeros((4, 4), np.uint8)])
    data = load_dataset("folder", "val", root)
    data.reader = lambda path: np.array([[0] * 4] * 3 + [[value] * 4])
    words = "whole numbers" if value == 0.5 else f"label value {value}"
    with pytest.raises(LabError, match=words):
        next(data.batches(1, train=False))
    data.reader = lambda path: np.zeros((4, 4), np.float64)  # Matlab's zeros
    assert not next(data.batches(1, train=False))["labels"].any()


# --- batches ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory) -> Path:
    """Five pictures of different sizes, white where the label is 2 and black where it is 0."""
    labels = []
    for i in range(5):
        h, w = 150 + 23 * i, 230 - 31 * i
        ys, xs = np.mgrid[:h, :w]
        disc = np.hypot(ys - h * 0.4, xs - w * 0.3) < 45
        labels.append(2 * (disc | (xs > w * 0.8)).astype(np.uint8))
    images = [np.repeat(x[..., None] // 2 * 255, 3, -1) for x in labels]
    root = tmp_path_factory.mktemp("pictures")
    return write_folder(root, "id,name\n0,black\n1,grey\n2,white\n", labels, images)


def test_step_depends_on_seed_and_step_only(picture_folder):
    dataset = load_dataset("folder", "val", picture_folder, size=48)
    state = torch.random.get_rng_state()
    whole = first(dataset, 8, seed=3)
    assert all(map(same, whole[5:], first(dataset, 3, seed=3, start=5)))
    assert all(map(same, whole[2:], first(dataset, 6, seed=3, start=2, workers=2)))
    assert not all(map(same, whole, first(dataset, 8, seed=4)))
    assert torch.equal(state, torch.random.get_rng_state())  # a training run's own numbers
    files = [f for b in whole for f in b["files"]]
    assert sorted(files[:5]) == sorted(files[5:10]) == sorted(set(files))  # epochs
    assert files[:5] != files[5:10]


def test_training_pictures_are_aligned_padded_and_flipped(picture_folder):
    dataset = load_dataset("folder", "val", picture_folder, size=64)
    looks: dict[str, set[bytes]] = {}
    for batch in first(dataset, 12, batch_size=5, seed=1):
        assert batch["images"].shape == (5, 3, 64, 64) and batch["labels"].shape == (5, 64, 64)
        assert consistent(batch)
        for image, label, name in zip(
            batch["images"], batch["labels"], batch["files"], strict=True
        ):
            looks.setdefault(name, set()).add(label.numpy().tobytes())
            inside = label != IGNORE
            h, w = inside.any(1).sum(), inside.any(0).sum()
            i = int(Path(name).stem)
            assert max(h, w) == 64 and inside[:h, :w].all() and not inside[h:].any()
            assert abs(w / h - (230 - 31 * i) / (150 + 23 * i)) < 0.02
            assert set(label[inside].tolist()) == {0, 2}  # never a mixture
            agree = ((image[0] > 0.5) == (label == 2))[inside].float().mean()
            assert agree > 0.99
    assert all(len(seen) == 2 for seen in looks.values())  # as it is, and flipped


def test_jitter_shrinks_grows_and_cuts_picture_and_labels_alike(picture_folder):
    dataset = load_dataset("folder", "val", picture_folder, size=64, jitter=True)
    sides, cut = [], 0
    for batch in first(dataset, 30, batch_size=4, seed=5):
        assert batch["images"].shape == (4, 3, 64, 64) and consistent(batch)
        for image, label in zip(batch["images"], batch["labels"], strict=True):
            inside = label != IGNORE
            sides.append(int(inside.sum(0).max()))
            cut += bool(inside.all())
            assert ((image[0] > 0.5) == (label == 2))[inside].float().mean() > 0.95
            assert (image[:, ~inside] == 128 / 255).all()
    assert min(sides) < 20 and max(sides) == 64 and 0 < cut < len(sides)
    lab = Lab(dataset="folder", data_root=str(picture_folder), size=64, device="cpu")
    with pytest.warns(UserWarning, match="has no train: 'b' is trained on"):
        shutil.copytree(picture_folder / "images/val", picture_folder / "images/b")
        shutil.copytree(picture_folder / "labels/val", picture_folder / "labels/b")
        plain = next(lab.batches(4, 5)(0))["labels"]
        jittered = next(replace(lab, jitter=True).batches(4, 5)(0))["labels"]
    assert not torch.equal(plain, jittered)
    assert "jitter" not in lab.params and replace(lab, jitter=True).params["jitter"]


def test_labels_alone_are_the_same_labels(picture_folder):
    dataset = load_dataset("folder", "val", picture_folder)
    whole, bare = (list(dataset.batches(2, train=False, regions=r)) for r in (True, False))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(whole, bare, strict=True))
    assert not any(b["masks"] or b["classes"] for b in bare) and all(a["masks"] for a in whole)


def test_flip_is_an_exact_mirror(picture_folder):
    dataset = load_dataset("folder", "val", picture_folder, size=64)
    for index in range(len(dataset)):
        plain, flipped = (dataset.load(index, Look(flip), train=True) for flip in (False, True))
        w = int((plain["segments"] >= 0).any(0).sum())
        assert torch.equal(plain["image"][..., :w].flip(-1), flipped["image"][..., :w])
        assert torch.equal(plain["segments"][:, :w].flip(-1), flipped["segments"][:, :w])


def test_evaluation_is_one_ordered_pass_with_labels_as_on_disk(picture_folder):
    plain = load_dataset("folder", "val", picture_folder)
    small = load_dataset("folder", "val", picture_folder, size=40)
    kept, reduced = list(plain.batches(3, train=False)), list(small.batches(3, train=False))
    assert [f for b in kept for f in b["files"]] == [f"{i}.png" for i in range(5)]
    for a, b in zip(kept, reduced, strict=True):
        assert a["images"].shape[-2:] == a["labels"].shape[-2:]
        assert min(b["images"].shape[-2:]) == 40 and torch.equal(a["labels"], b["labels"])
    assert same(kept[3], next(plain.batches(1, start=3, train=False)))


# --- scenes -------------------------------------------------------------------------------------


def test_training_scenes_never_show_an_unseen_class():
    dataset = load_dataset("scenes", "train", size=64)
    unseen = {n for n, seen in zip(scenes.CLASSES, scenes.SEEN, strict=True) if not seen}
    assert unseen and not unseen & set(dataset.names) and len(dataset.names) == sum(scenes.SEEN)
    shown = set()
    for batch in first(dataset, 10, batch_size=32):
        ids = torch.cat([batch["labels"].flatten(), *batch["classes"]]).unique()
        assert ids.min() >= IGNORE
        shown |= {batch["names"][i] for i in ids.tolist() if i != IGNORE}
        assert consistent(batch)
    assert len(shown) > 60 and not unseen & shown
    assert not any(scenes.UNSEEN_COLOUR in n or scenes.UNSEEN_SHAPE in n for n in shown)


def test_scene_labels_keep_their_names():
    for split in ("train", "val"):
        dataset = load_dataset("scenes", split, limit=6)
        for batch in dataset.batches(4, train=False):
            indices = [int(Path(f).name) for f in batch["files"]]
            pool = "seen" if split == "train" else "all"
            drawn = scenes.render(indices, 128, dataset.world, names=pool)
            assert torch.equal(drawn.images, batch["images"])
            for old, new in zip(drawn.classes, batch["classes"], strict=True):
                old, new = old.tolist(), new.tolist()
                assert [scenes.CLASSES[i] for i in old] == [dataset.names[i] for i in new]


def test_scene_splits_differ_and_are_fixed():
    val, shifted = (load_dataset("scenes", s, limit=40) for s in ("val", "shifted"))
    assert val.names == shifted.names == scenes.CLASSES
    assert val.seen.tolist() == list(scenes.SEEN)
    a, b = (next(d.batches(40, train=False)) for d in (val, shifted))
    train = next(load_dataset("scenes", "train", limit=40).batches(40, train=False))
    pictures = [x["images"].flatten(1) for x in (a, b, train)]
    assert torch.cdist(torch.cat(pictures), torch.cat(pictures)).fill_diagonal_(9).min() > 1
    assert same(a, next(load_dataset("scenes", "val", limit=40).batches(40, train=False, seed=5)))
    assert not val.seen[torch.cat(a["classes"])].all()  # unseen names do occur


def test_scene_stream_is_reproducible_and_a_limit_holds():
    endless, few = (load_dataset("scenes", "train", size=64, limit=n) for n in (None, 6))
    for dataset in (endless, few):
        whole = first(dataset, 6, batch_size=4, seed=2)
        assert all(map(same, whole[4:], first(dataset, 2, batch_size=4, seed=2, start=4)))
        assert not same(whole[0], first(dataset, batch_size=4, seed=3)[0])
        files = [f for b in whole for f in b["files"]]
        assert len(set(files)) == (6 if dataset is few else 24)


def test_a_pool_is_drawn_once_and_kept_as_bytes(monkeypatch, capsys):
    drawn, render = [], scenes.render
    monkeypatch.setattr(scenes, "render", lambda i, *a, **k: drawn.extend(i) or render(i, *a, **k))
    datasets = [load_dataset("scenes", "train", size=48, limit=n) for n in (5, 7)]
    shown = [b for data in datasets for seed in (0, 1) for b in first(data, 6, seed=seed)]
    assert sorted(drawn) == list(range(7)), "each once, whoever asks"
    assert capsys.readouterr().out.count("a pool of") == 1
    monkeypatch.undo()
    contents = {}
    for batch in shown:
        assert consistent(batch)
        indices = [int(Path(f).name) for f in batch["files"]]
        want = scenes.render(indices, 48, datasets[0].world)
        assert torch.equal(batch["images"], want.images.mul(255).round() / 255)
        for mine, theirs in zip(batch["masks"], want.masks, strict=True):
            assert torch.equal(mine, theirs)
        contents |= {s.content: i for s, i in zip(batch["samples"], indices, strict=True)}
    assert sorted(contents.values()) == list(range(7))


# --- bad input ----------------------------------------------------------------------------------


def read_all(root: Path, dataset: str = "coco", workers: int = 0) -> None:
    for _ in load_dataset(dataset, "val", root).batches(2, train=False, workers=workers):
        pass


def edit(index: Path, change) -> None:
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def cut(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


COCO_FAULTS = {
    "missing image": (lambda r: (r / "val2017/000000000001.jpg").unlink(), "000000000001.jpg"),
    "truncated image": (lambda r: cut(r / "val2017/000000000001.jpg"), "000000000001.jpg"),
    "empty image": (lambda r: cut(r / "val2017/000000000001.jpg", 0), "000000000001.jpg"),
    "missing label": (
        lambda r: (r / "annotations/panoptic_val2017/000000000002.png").unlink(),
        "000000000002.png",
    ),
    "truncated label": (
        lambda r: cut(r / "annotations/panoptic_val2017/000000000002.png"),
        "000000000002.png",
    ),
    "grey label": (
        lambda r: Image.new("L", (5, 3)).save(r / "annotations/panoptic_val2017/000000000002.png"),
        "000000000002.png has mode L",
    ),
    "other size": (
        lambda r: Image.new("RGB", (3, 5)).save(r / "val2017/000000000000.jpg"),
        r"000000000000.jpg differ in size \(5x3 and 3x5\)",
    ),
    "no index": (lambda r: (r / "annotations/panoptic_val2017.json").unlink(), "cocodataset.org"),
    "broken index": (
        lambda r: cut(r / "annotations/panoptic_val2017.json"),
        "panoptic_val2017.json",
    ),
    "index without image": (
        lambda r: edit(r / "annotations/panoptic_val2017.json", lambda c: c["images"].pop()),
        "labels image 0",
    ),
    "index without annotation": (
        lambda r: edit(r / "annotations/panoptic_val2017.json", lambda c: c["annotations"].pop()),
        "no annotation for image 000000000002.jpg",
    ),
    "empty split": (
        lambda r: edit(
            r / "annotations/panoptic_val2017.json", lambda c: c.update(images=[], annotations=[])
        ),
        "panoptic_val2017.json lists no image",
    ),
    "foreign category": (
        lambda r: edit(
            r / "annotations/panoptic_val2017.json",
            lambda c: c["annotations"][0]["segments_info"][0].update(category_id=12),
        ),
        "000000000000.png: category 12",
    ),
    "foreign class list": (
        lambda r: edit(
            r / "annotations/panoptic_val2017.json",
            lambda c: c["categories"][3].update(name="moped"),
        ),
        "category 4 'moped'",
    ),
}


@pytest.mark.parametrize("fault", COCO_FAULTS)
def test_broken_coco_names_the_file(tmp_path, fault):
    write_coco(tmp_path)
    read_all(tmp_path)
    break_it, sentence = COCO_FAULTS[fault]
    break_it(tmp_path)
    with pytest.raises(LabError, match=sentence):
        read_all(tmp_path)


def test_a_worker_reports_one_sentence_too(tmp_path):
    write_coco(tmp_path)
    cut(tmp_path / "val2017/000000000001.jpg")
    with pytest.raises(LabError) as caught:
        read_all(tmp_path, workers=1)
    assert "\n" not in str(caught.value) and "000000000001.jpg" in str(caught.value)


def white_square(path: Path) -> None:
    Image.new("RGB", (2, 2)).save(path)


FOLDER_FAULTS = {
    "label absent": (lambda r: (r / "labels/val/1.png").unlink(), "labels/val/1.png is missing"),
    "value outside": (
        lambda r: Image.fromarray(np.full((2, 2), 200, np.uint8)).save(r / "labels/val/1.png"),
        "1.png holds the label value 200",
    ),
    "colour label": (lambda r: white_square(r / "labels/val/1.png"), "1.png is a colour picture"),
    "no classes": (lambda r: (r / "classes.csv").unlink(), "classes.csv is missing"),
    "no column": (lambda r: (r / "classes.csv").write_text("id;name\n0;a\n"), "no column 'id'"),
    "id twice": (
        lambda r: (r / "classes.csv").write_text("id,name\n0,a\n0,b\n"),
        "0 is there twice",
    ),
    "no number": (lambda r: (r / "classes.csv").write_text("id,name\nx,a\n"), "line 2"),
    "no class": (lambda r: (r / "classes.csv").write_text("id,name,ignore\n0,a,1\n"), "no class"),
    "not text": (lambda r: (r / "classes.csv").write_bytes(b"id,name\n0,\xe9t\xe9\n"), "UTF-8"),
    "empty split": (
        lambda r: [p.unlink() for p in (r / "images/val").iterdir()],
        "images/val holds no images",
    ),
    "no such split": (lambda r: (r / "images/val").rename(r / "images/test"), "valid: test"),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_broken_folder_names_the_file(tmp_path, fault):
    write_folder(tmp_path, "id,name\n0,a\n1,b\n", [np.zeros((2, 2), np.uint8)] * 2)
    read_all(tmp_path, "folder")
    break_it, sentence = FOLDER_FAULTS[fault]
    break_it(tmp_path)
    with pytest.raises(LabError, match=sentence):
        read_all(tmp_path, "folder")


def test_unknown_keys_and_roots(tmp_path, monkeypatch):
    for variable in ("OPENTRANS_DATA", "DETECTRON2_DATASETS"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(LabError, match=", ".join(DATASETS)):
        load_dataset("cocoa", "val")
    with pytest.raises(LabError, match="valid: train, val, shifted"):
        load_dataset("scenes", "test")
    with pytest.raises(LabError, match="valid: train, val"):
        load_dataset("coco", "shifted", tmp_path)
    with pytest.raises(LabError, match="data_root .or the variable OPENTRANS_DATA or DETECTRON2"):
        load_dataset("coco", "val")
    with pytest.raises(LabError, match="data_root=.*nowhere.*panoptic_val2017.json.*cocodataset"):
        load_dataset("coco", "val", tmp_path / "nowhere")
    with pytest.raises(LabError, match="limit=-1"):
        load_dataset("scenes", "val", limit=-1)
    monkeypatch.setenv("OPENTRANS_DATA", str(tmp_path / "gone"))
    with pytest.raises(LabError, match="OPENTRANS_DATA=.*gone is not a folder"):
        load_dataset("folder", "val")


def test_class_lists_are_plain_tables():
    for path in sorted((Path(__file__).parents[1] / "data" / "class_names").glob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["id", "name", "prompts", "kind", "label"]
        assert [r[0] for r in rows[1:]] == [str(i) for i in range(len(rows) - 1)]
        assert all(len(r) == 5 and r[1] and r[2] and r[4].isdecimal() for r in rows[1:])
        assert {r[3] for r in rows[1:]} == {"thing", "stuff"}
        for row in rows[1:]:
            prompts = row[2].split("|")
            assert len(set(prompts)) == len(prompts) and all(p == p.strip() for p in prompts)


def test_things_and_grounds_of_every_split():
    for split in ("train", "val", "shifted"):
        data = load_dataset("scenes", split, limit=2)
        assert [n for n, t in zip(data.names, data.things, strict=True) if not t] == list(
            scenes.STUFF
        )
