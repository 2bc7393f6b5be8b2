"""Colours, overlays and sheets of them, and which pictures and words they show."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from opentrans_lab.clip import load_backbone
from opentrans_lab.data import load_dataset, scenes
from opentrans_lab.errors import LabError
from opentrans_lab.evaluation.segment import segment
from opentrans_lab.experiments import Recipe, gallery
from opentrans_lab.figures import overlays
from opentrans_lab.files import find_pictures
from opentrans_lab.heads import build
from opentrans_lab.records import load
from opentrans_lab.runs import run_notebook

NAMES = ("grass", "striped red star")
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "06_qualitative.ipynb"


def test_ignored_pixels_keep_the_picture_and_segments_are_parted():
    image = torch.full((3, 6, 8), 0.25)
    labels = torch.zeros(6, 8, dtype=torch.int64)
    labels[:, 6:] = scenes.IGNORE
    segments = labels.clone()
    segments[:, 3:6] = 1  # two segments of one class
    plain = overlays.overlay(image, labels, NAMES)
    assert np.allclose(plain[:, 6:], 0.25) and np.allclose(plain[:, :6], plain[0, 0])
    parted = overlays.overlay(image, labels, NAMES, segments=segments)
    line = overlays.borders(segments.numpy())
    assert line.sum() == 12 and line[:, [2, 5]].all()
    assert (parted[line] == 1).all() and np.array_equal(parted[~line], plain[~line])


def test_a_figure_has_a_column_a_map_and_lines_where_asked():
    drawn = scenes.render(range(2), 32)
    maps, parts = list(drawn.labels), [torch.zeros_like(x) for x in drawn.labels]
    parts[0][:, 16:] = 1
    figure = overlays.compare(
        list(drawn.images), {"a": maps, "b": maps}, scenes.CLASSES, segments={"b": parts}
    )
    a, b = (axis.images[0].get_array() for axis in figure.axes[1:3])
    assert len(figure.axes) == 6 and (b[:, 15] == 1).all() and not np.array_equal(a, b)
    assert np.array_equal(a[:, :15], b[:, :15])


def test_a_colour_is_of_the_name_alone_here_and_in_another_process():
    image, first, second = torch.rand(3, 4, 4), torch.zeros(4, 4).long(), torch.ones(4, 4).long()
    here = overlays.overlay(image, first, ("grass", "sky"))
    assert np.array_equal(here, overlays.overlay(image, second, ("zebra", "grass", "moon")))
    assert overlays.colour("Striped  red star ") == overlays.colour(NAMES[1])
    code = "from opentrans_lab.figures.overlays import colour; print(colour('grass'))"
    seeded = os.environ | {"PYTHONHASHSEED": "7"}
    told = subprocess.run([sys.executable, "-c", code], env=seeded, capture_output=True, text=True)
    assert told.stdout.strip() == str(overlays.colour("grass")), told.stderr


def test_colours_can_be_told_apart():
    colours = np.array([overlays.colour(name) for name in scenes.CLASSES])
    assert (colours >= 0).all() and (colours <= 1).all()
    assert len(np.unique((255 * colours).round(), axis=0)) == len(colours)
    assert (np.ptp(colours, axis=1) > 0.08).all()  # none is grey
    near = np.abs(colours[:, None] - colours[None]).max(-1) < 0.05  # of one channel's range
    assert near[~np.eye(len(near), dtype=bool)].mean() < 0.01


def test_the_legend_names_exactly_the_classes_that_occur():
    labels = torch.tensor([[5, 5, 5, 2], [5, 5, scenes.IGNORE, 2]])
    image, names = torch.rand(3, 2, 4), [f"class {i}" for i in range(40)]
    columns = {"truth": [labels], ("A", "x"): [labels * 0 + 7], ("A", "y"): [labels]}
    figure = overlays.compare([image], columns, names)
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["class 5", "class 7", "class 2"]
    faces = [patch.get_facecolor()[:3] for patch in legend.get_patches()]
    assert np.allclose(faces, [overlays.colour(f"class {i}") for i in (5, 7, 2)])
    assert [axis.get_title() for axis in figure.axes] == ["image", "truth", "x", "y"]
    assert [text.get_text() for text in figure.texts] == ["A"]
    columns = {"truth": [labels], "errors": [overlays.error_map(labels, labels)]}
    (legend,) = overlays.compare([image], columns, names).legends
    told = [t.get_text() for t in legend.get_texts()]
    assert told == ["class 5", "class 2", *overlays.VERDICTS]


def test_an_error_map_counts_what_is_right():
    torch.manual_seed(0)
    truth, labels = torch.randint(-1, 3, (9, 7)), torch.randint(0, 3, (9, 7))
    share = (labels == truth)[truth >= 0].float().mean().item()
    assert gallery.right(labels, truth) == pytest.approx(share)
    drawn = overlays.error_map(labels, truth)
    found = {k: (drawn == c).all(-1).sum() for k, c in overlays.VERDICTS.items()}
    assert found["right"] / (found["right"] + found["wrong"]) == pytest.approx(share)
    assert found["no label"] == (truth == scenes.IGNORE).sum() and sum(found.values()) == 63
    assert np.isnan(gallery.right(labels, torch.full_like(truth, scenes.IGNORE)))
    assert np.isnan(gallery.right(labels, None))


# --- which pictures, in which words -------------------------------------------------------------


@pytest.fixture(scope="module")
def data():
    return load_dataset("scenes", "val", size=64, limit=12)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("deeplabv3", load_backbone("mini", device="cpu"), "mini").eval()


def save_photo(path: Path, **options) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (255 * scenes.render([3], 96).images[0].permute(1, 2, 0)).byte().numpy()[:64]
    Image.fromarray(pixels).save(path, **options)
    return pixels


def test_without_words_of_its_own_it_has_the_data_sets(data):
    words = gallery.vocabulary(" ", data)
    assert words.names == data.names == tuple(words.known)
    (batch,) = data.batches(12, train=False)
    views = list(gallery.data_views(data, words))
    assert torch.equal(torch.stack([v.truth for v in views]), batch["labels"])
    assert [v.title for v in views] == batch["files"]


def test_of_own_words_those_that_are_the_data_sets_keep_their_truth(data):
    words = gallery.vocabulary("hovercraft, Brick, lawn | grass", data)
    assert words.names == ("hovercraft", "Brick", "lawn") and words.known == ["Brick", "lawn"]
    assert words.things.tolist() == [True, False, False]
    whole = gallery.data_views(data, gallery.vocabulary("", data))
    for view, other in zip(gallery.data_views(data, words), whole, strict=True):
        for name, k in (("brick", 1), ("grass", 2)):
            assert torch.equal(view.truth == k, other.truth == data.names.index(name))
        assert not (view.truth == 0).any()
    unknown = gallery.vocabulary("hovercraft, eel", data)
    assert not unknown.known and next(gallery.data_views(data, unknown)).truth is None


def test_a_name_goes_before_another_name_of_a_class(data):
    class Named:
        names, things = ("building", "wall"), torch.tensor([False, False])
        prompts = (("building", "house"), ("wall", "house wall"))

    assert gallery.vocabulary("house, building", Named).ids.tolist() == [1, -1, -1]
    assert gallery.vocabulary("sky, house wall, house", Named).ids.tolist() == [2, 1, -1]


@pytest.mark.parametrize(
    ("text", "said"),
    [("grass, Grass", "'grass' is there twice"), ("grass,,sky", "an empty name"), (",", "an empty"),
     ("sky, moon|sky", "'sky' is there twice")],
)  # fmt: skip
def test_wrong_vocabularies_are_refused(data, text, said):
    with pytest.raises(LabError, match=f"vocabulary=.*{said}"):
        gallery.vocabulary(text, data)


def test_own_pictures_are_read_and_labelled_as_segment_does(data, model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    pixels = save_photo(tmp_path / "a turned.png", exif=exif)
    Image.fromarray(pixels).convert("L").save(tmp_path / "b grey.png")
    words = gallery.vocabulary("grass|lawn, brick, hovercraft", data)
    turned, grey = gallery.own_views(str(tmp_path), 48)
    assert turned.size == (96, 64) and grey.size == (64, 96) and turned.truth is None
    assert torch.equal(*grey.picture[:2]) and turned.image.shape == (3, 72, 48)
    for view, name in ((turned, "a turned.png"), (grey, "b grey.png")):
        done = segment(tmp_path / name, words.prompts, model=model, size=48, device="cpu")
        assert view.title == name and torch.equal(view.picture, done.image)
        assert torch.equal(gallery.label(model, view, words), done.labels)


def test_large_pictures_are_shown_smaller(tmp_path):
    Image.new("RGB", (3000, 1000)).save(tmp_path / "wide.png")
    (view,) = gallery.own_views(str(tmp_path / "wide.png"), 64)
    assert view.size == (341, 1024) and view.image.shape == (3, 64, 192)


def test_pictures_are_found_by_file_folder_and_pattern(tmp_path):
    for name in ("my pictures/b.png", "my pictures/a.JPG", "one.png"):
        save_photo(tmp_path / name)
    (tmp_path / "my pictures/notes.txt").write_text("of the holidays")
    folder, one = tmp_path / "my pictures", tmp_path / "one.png"
    assert find_pictures(str(folder)) == [folder / "a.JPG", folder / "b.png"]
    assert find_pictures(f"{one} '{folder}/*.png' {one}") == [one, folder / "b.png"]
    assert find_pictures(f"'{folder}/*'")[-1].name == "notes.txt"  # named, so it must be one
    with pytest.raises(LabError, match="notes.txt cannot be decoded"):
        gallery.own_views(f"'{folder}/*'", 48)
    assert len(gallery.own_views(f"'{folder}/*'", 48, most=2)) == 2
    (tmp_path / "none").mkdir()
    for wrong, said in (
        ("none", "none holds no picture"),
        ("none/*.png", "no picture .*png"),
        ("no.png", "there is no picture .*no.png"),
        ("'", "quote what has"),
    ):
        text = wrong if wrong == "'" else str(tmp_path / wrong)
        with pytest.raises(LabError, match=said):
            find_pictures(text)


def test_the_worst_come_first(data, model):
    words = gallery.vocabulary("", data)
    views = list(gallery.data_views(data, words))
    shares = [gallery.right(gallery.label(model, view, words), view.truth) for view in views]
    found = gallery.worst(model, views, words, 3)
    assert [share for share, *_ in found] == sorted(s for s in shares if s == s)[:3]
    assert all(gallery.right(labels, view.truth) == share for share, view, labels in found)
    nothing = [replace(view, truth=torch.full_like(view.truth, scenes.IGNORE)) for view in views]
    assert gallery.worst(model, nothing, words, 3) == []


def test_frameworks_and_rows_are_checked_together():
    found = gallery.recipes(Recipe(), "han  deeplabv3", "dense ours")
    assert list(found) == [(f, r) for f in ("han", "deeplabv3") for r in ("dense", "ours")]
    assert all((r.framework, r.row) == key for key, r in found.items())
    with pytest.raises(LabError, match="unknown framework='unet'; use one of deeplabv3, han"):
        gallery.recipes(Recipe(), "deeplabv3 unet", "dense")
    for frameworks, rows in ((" ", "dense"), ("han", "")):
        with pytest.raises(LabError, match="names none; give one or more"):
            gallery.recipes(Recipe(), frameworks, rows)


TINY = dict(
    frameworks="deeplabv3 fcclip", rows="dense ours", size=64, density=0.5, p=0.5, prune_steps=1,
    prune_batch_size=2, steps=1, batch_size=2, eval_images=4, device="cpu",
)  # fmt: skip


def test_two_frameworks_own_pictures_and_own_words_through_the_notebook(runs, tmp_path):
    save_photo(tmp_path / "mine/photo.png")
    own = {"pictures": str(tmp_path / "mine"), "vocabulary": "brick, hovercraft"}
    done = run_notebook(NOTEBOOK, TINY | own)
    assert done.status == "ok", done.error
    table = pd.read_csv(done.folder / "pictures.csv")
    assert table["framework"].tolist() == ["deeplabv3"] * 2 + ["fcclip"] * 2
    assert set(table["picture"]) == {"photo.png"} and table["right"].isna().all()
    assert set(table["largest"]) <= {"brick", "hovercraft"}
    files = {path.name for path in done.folder.iterdir()}
    assert {"overlays.png", "panoptic.png"} <= files and not {"failures.png", "classes.csv"} & files

    done = run_notebook(NOTEBOOK, TINY | {"shown": 2})  # the models are there by now
    assert done.status == "ok", done.error
    right = load(done.folder)["metrics"]["pixels_right"]
    assert set(right) == {"deeplabv3", "fcclip"} and set(right["fcclip"]) == {"dense", "ours"}
    table = pd.read_csv(done.folder / "pictures.csv").set_index(["framework", "row"])
    assert table.loc[("fcclip", "ours"), "right"].mean() == pytest.approx(right["fcclip"]["ours"])
    assert (done.folder / "failures.png").exists() and (done.folder / "classes.csv").exists()

    wrong = run_notebook(NOTEBOOK, TINY | {"pictures": str(tmp_path / "nowhere.png")})
    assert wrong.users and "nowhere.png" in wrong.error
