"""What 06 shows: any pictures, any names, any frameworks, and where they fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from opentrans_lab import gallery, overlays
from opentrans_lab.batch import run_notebook
from opentrans_lab.data import load_dataset
from opentrans_lab.errors import LabError
from opentrans_lab.frameworks import build
from opentrans_lab.lab import Lab
from opentrans_lab.picture import read_picture, segment
from opentrans_lab.scenes import IGNORE

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "06_qualitative.ipynb"
TINY = dict(
    size=64, density=0.5, p=0.5, prune_steps=1, prune_batch_size=2, steps=2, batch_size=2,
    eval_images=2, device="cpu", rows="dense ours", images=2, search=4,
)  # fmt: skip


@pytest.fixture
def data():
    return load_dataset("scenes", "val", size=64, limit=3)


@pytest.fixture
def photos(tmp_path):
    """One turned by its EXIF, one grey, one that is no picture."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    turned = Image.new("RGB", (96, 64), (200, 60, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "b.jpg", exif=exif)
    Image.new("L", (70, 90), 120).save(folder / "a.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_own_pictures_are_found_and_read_as_segment_reads_them(photos):
    whole = gallery.own_pictures(f"'{photos}'")
    assert [s.name for s in whole] == ["a.png", "b.jpg"] and whole[1].image.shape == (3, 96, 64)
    assert all(torch.equal(s.image, read_picture(photos / s.name)) for s in whole)
    assert all(s.labels is None for s in whole)
    some = gallery.own_pictures(f"'{photos}/*.jpg' '{photos}/a.png'")
    assert [s.name for s in some] == ["b.jpg", "a.png"]
    for text in (f"'{photos}/*.webp'", "none.jpg", f"'{photos.parent}'"):
        with pytest.raises(LabError, match="there is no picture at"):
            gallery.own_pictures(text)
    with pytest.raises(LabError, match="notes.txt"):
        gallery.own_pictures(f"'{photos}/notes.txt'")


def test_a_vocabulary_of_ones_own(data):
    own = gallery.vocabulary(data, "grass, zebra|striped horse , sky")
    assert own.names == ("grass", "zebra", "sky")
    assert own.prompts == ["grass", ("zebra", "striped horse"), "sky"]
    assert gallery.vocabulary(data).names == tuple(data.names)
    for text, match in (("a, , b", "empty name"), ("a, b|a", "'a' is there twice")):
        with pytest.raises(LabError, match=match):
            gallery.vocabulary(data, text)


def test_labels_keep_only_the_names_that_are_asked_for(data):
    every = gallery.pictures(data, gallery.vocabulary(data), "cpu")
    names = list(data.names)
    present = [names[i] for i in every[0].labels.unique() if i != IGNORE]
    own = gallery.vocabulary(data, f"unicorn, {present[0]}")
    some = gallery.pictures(data, own, "cpu")
    kept = every[0].labels == names.index(present[0])
    assert (some[0].labels[kept] == 1).all() and (some[0].labels[~kept] == IGNORE).all()
    assert len(every) == 3 and torch.equal(every[0].image, some[0].image)


def test_maps_are_what_segment_says_and_errors_are_what_accuracy_counts(data):
    model = build("deeplabv3", Lab(checkpoint="random", device="cpu").load())
    words = gallery.vocabulary(data, "grass, red star, sea")
    sample = gallery.pictures(data, gallery.vocabulary(data), "cpu")[0]
    (found,) = gallery.label_maps(model, [sample], words, 48, "cpu")
    same = segment(sample.image, words.prompts, model=model, size=48, device="cpu")
    assert torch.equal(found, same.labels) and found.shape == sample.labels.shape
    labels = torch.randint(0, 3, found.shape)
    labels[:5] = IGNORE
    bad = gallery.wrong(found, labels, 3)
    known = (labels != IGNORE).sum()
    assert (bad == 3).sum() / known == pytest.approx(1 - gallery.accuracy(found, labels))
    assert (bad[:5] == IGNORE).all() and set(bad.unique().tolist()) <= {3, IGNORE}


def test_colours_and_legend_depend_on_names_alone():
    image, labels = torch.zeros(3, 8, 8), torch.zeros(8, 8, dtype=torch.int64)
    labels[:, 4:] = 1
    one = overlays.compare([image], {"a": [labels]}, ("sky", "zebra", "cow"))
    two = overlays.compare([image], {"a": [1 - labels]}, ("zebra", "sky"))
    pixels = [figure.axes[1].images[0].get_array() for figure in (one, two)]
    assert (pixels[0] == pixels[1]).all()
    for figure in (one, two):
        legend = figure.axes[2].get_legend()
        named = {t.get_text(): p.get_facecolor()[:3] for t, p in
                 zip(legend.get_texts(), legend.get_patches(), strict=True)}  # fmt: skip
        assert named == {name: overlays.colour(name) for name in ("sky", "zebra")}


def test_the_notebook_with_two_frameworks_then_own_pictures_and_names(runs, photos):
    done = run_notebook(NOTEBOOK, TINY | {"frameworks": "deeplabv3 fcclip"})
    assert done.status == "ok", done.error
    assert {p.stem for p in done.folder.glob("*.png")} == {
        "overlays_deeplabv3", "overlays_fcclip", "panoptic_fcclip", "failures_deeplabv3",
        "failures_fcclip",
    }  # fmt: skip
    right = json.loads((done.folder / "metrics.json").read_text())["metrics"]["pixels_right"]
    assert right.keys() == {"deeplabv3", "fcclip"} and right["fcclip"].keys() == {"dense", "ours"}
    stages = len(list(runs.glob("stages/segment/*/result.json")))
    own = {"pictures": f"'{photos}'", "vocabulary": "zebra, grass|meadow, sky"}
    done = run_notebook(NOTEBOOK, TINY | own)
    assert done.status == "ok", done.error
    assert {p.stem for p in done.folder.glob("*.png")} == {"overlays_deeplabv3"}
    assert len(list(runs.glob("stages/segment/*/result.json"))) == stages, "models are taken over"
    wrong = run_notebook(NOTEBOOK, TINY | {"frameworks": "deeplabv3 deeplab"})
    assert wrong.users and "unknown framework='deeplab'" in wrong.error
