"""A run is what it was made from: any change of its files makes another key, and nothing else."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_benchmarks import BY_HAND, write
from test_data import write_coco

from opentrans_lab.clip.backbone import RESNETS, load_backbone
from opentrans_lab.data import load_dataset
from opentrans_lab.experiments import Lab, Recipe, segment_params, stage_folder
from opentrans_lab.experiments.starts import save_weights
from opentrans_lab.files import fingerprint, looking_once, mini_folder
from opentrans_lab.pruning import PruneConfig
from opentrans_lab.records import PROJECT, Run, described, run_dir, run_key
from opentrans_lab.records.sources import TAGS, data_files, identity, weights
from opentrans_lab.report.tables import experiment, lines
from opentrans_lab.runs import run_notebook
from opentrans_lab.runs.grids import Job

NOTEBOOK = PROJECT / "notebooks" / "03_transfer.ipynb"
SETUP = (
    "from opentrans_lab.records import Run\n"
    'run = Run("{stem}", dict(data_root=data_root, dataset=dataset, pictures=pictures))'
)


def keys(**parameters) -> tuple[str, str]:
    """Of a run and of a stage."""
    named = {k: v for k, v in parameters.items() if k != "pictures"}
    stage = stage_folder("segment", segment_params(Lab(**named), Recipe(), PruneConfig()))
    return Job(NOTEBOOK, parameters).folder.name, stage.name


@pytest.fixture
def data(tmp_path):
    """A folder data set of two pictures."""
    root = tmp_path / "data"
    for part in ("images", "labels"):
        (root / part / "val").mkdir(parents=True)
        for name in "ab":
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / part / "val" / f"{name}.png")
    (root / "classes.csv").write_text("id,name\n0,grass\n1,star\n")
    return root


def later(path: Path) -> None:
    """As if it had been written a moment later: a file system's clock ticks in milliseconds."""
    at = path.stat().st_mtime_ns + 10**7
    os.utime(path, ns=(at, at))


def relabel(root):
    path = root / "labels" / "val" / "a.png"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    later(path)


def add(root):
    shutil.copy(root / "images/val/a.png", root / "images/val/c.png")


def rename(root):
    os.rename(root / "labels/val/a.png", root / "labels/val/z.png")


def rename_class(root):
    table = root / "classes.csv"
    about = table.stat()
    table.write_text("id,name\n0,grass\n1,moon\n")
    os.utime(table, ns=(about.st_atime_ns, about.st_mtime_ns))  # its bytes count


def new_split(root):
    (root / "images" / "train").mkdir()


def behind_a_link(root):
    outside = root.parent / "elsewhere"
    shutil.move(root / "labels" / "val", outside)
    (root / "labels" / "val").symlink_to(outside)
    before = keys(dataset="folder", data_root=str(root))
    later(outside / "b.png")
    after = keys(dataset="folder", data_root=str(root))
    assert all(a != b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("change", [relabel, add, rename, rename_class, new_split, behind_a_link])
def test_other_files_are_another_run_and_stage(data, change):
    before = keys(dataset="folder", data_root=str(data))
    assert keys(dataset="folder", data_root=str(data)) == before
    (data / "notes").mkdir()
    (data / "images/val/.DS_Store").touch()
    (data / "notes" / "a.txt").write_text("what the data set does not read changes nothing")
    assert keys(dataset="folder", data_root=str(data)) == before
    change(data)
    after = keys(dataset="folder", data_root=str(data))
    assert all(a != b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("key", ["coco", *BY_HAND])
def test_every_file_that_a_data_set_reads_counts(tmp_path, key):
    for split in ("train", "val"):
        if key == "coco":
            write_coco(tmp_path / "coco", beside=split == "val", split=split, count=2)
        else:
            write(key, tmp_path, BY_HAND[key][0], split=split, name=split)
    splits = [load_dataset(key, split, tmp_path) for split in ("train", "val")]
    for path in {p for data in splits for p in (*data.lists, *data.images, *data.labels)}:
        before = data_files(key, tmp_path)
        assert before == data_files(key, tmp_path)
        if path.endswith(".json"):
            Path(path).write_text("{}")  # small: its time says nothing
        else:
            later(Path(path))
        assert data_files(key, tmp_path) != before, path


def test_an_evaluation_goes_on_with_the_same_files_only(data):
    dataset = load_dataset("folder", "val", data)
    before = dataset.fingerprint()
    rename_class(data)
    renamed = dataset.fingerprint()
    relabel(data)
    assert len({before, renamed, dataset.fingerprint()}) == 3


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "touch", "remove", "rename", "link"]),
            st.text("ab\n\udc80ü ", min_size=1, max_size=3),
            st.text("ab\n\udc80ü ", min_size=1, max_size=3),
        ),
        max_size=12,
    )
)
@settings(max_examples=40, deadline=None)
def test_a_folder_has_another_fingerprint_exactly_when_it_has_changed(tmp_path_factory, steps):
    root = tmp_path_factory.mktemp("tree")
    for kind, name, other in steps:
        path, before, old = root / name, fingerprint([root]), listing(root)
        if kind == "write" and not path.is_dir():
            with path.open("ab") as file:
                file.write(other.encode(errors="surrogateescape"))
        elif kind == "link" and not path.exists():
            path.symlink_to(root)  # a circle
        elif path.is_file() and kind == "touch":
            later(path)
        elif path.is_file() and kind == "remove":
            path.unlink()
        elif path.is_file() and kind == "rename" and not (root / other).is_symlink():
            path.rename(root / other)
        assert (fingerprint([root]) == before) == (listing(root) == old)


def listing(root: Path) -> list:
    about = [(p.name, p.stat(), p.is_dir()) for p in sorted(root.iterdir())]
    return [(n, "folder" if folder else (s.st_size, s.st_mtime_ns)) for n, s, folder in about]


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)


@given(PLAIN, PLAIN)
@settings(max_examples=300, deadline=None)
def test_two_values_are_two_keys(a, b):
    def same(a, b):
        if isinstance(a, bool) or isinstance(b, bool) or None in (a, b):
            return a is b
        return a == b or a != a and b != b

    assert (run_key({"x": a}) == run_key({"x": b})) == same(a, b)


def test_nan_and_the_infinities_are_four_with_none(runs):
    odd = (math.nan, math.inf, -math.inf, None, "nan", 0.0)
    assert len({run_key({"lr": value}) for value in odd}) == len(odd)
    assert len({run_key({"deep": [{"lr": value}]}) for value in odd}) == len(odd)
    Run("03_transfer", {"lr": -math.inf}).save({"loss": math.nan})
    record = json.loads((run_dir("03_transfer", {"lr": -math.inf}) / "metrics.json").read_text())
    assert record["parameters"] == {"lr": "-inf"} and record["metrics"] == {"loss": None}


def test_a_relative_place_is_meant_from_where_it_was_said(tmp_path, data, monkeypatch):
    shutil.copytree(data, tmp_path / "other" / "data")
    found = []
    for cwd in (tmp_path, tmp_path / "other"):
        monkeypatch.chdir(cwd)
        there = {"dataset": "folder", "data_root": "data"}
        lab, here = Lab(**there), keys(**there)
        assert here == keys(dataset="folder", data_root=str(cwd / "data"))
        monkeypatch.setenv("HOME", str(cwd))
        assert here == keys(dataset="folder", data_root="~/data")
        monkeypatch.setenv("OPENTRANS_DATA", "data")
        assert here == keys(dataset="folder")
        monkeypatch.delenv("OPENTRANS_DATA")
        params = lab.params
        monkeypatch.chdir("/")
        assert lab.params == params and len(lab.data("val")) == 2
        found.append(here)
    assert not set(found[0]) & set(found[1])


def test_a_link_to_other_data_is_other_data(tmp_path, data):
    shutil.copytree(data, tmp_path / "new")
    now, found = tmp_path / "now", set()
    for target in (data, tmp_path / "new"):
        now.unlink(missing_ok=True)
        now.symlink_to(target)
        found |= {*keys(dataset="folder", data_root=str(now))}
    assert len(found) == 4


def test_a_checkpoint_is_its_bytes(tmp_path, monkeypatch):
    path = tmp_path / "clip.safetensors"
    save_weights(load_backbone("mini", device="cpu").visual, path)
    monkeypatch.chdir(tmp_path)
    first = keys(backbone="RN50", checkpoint=path.name)
    assert first == keys(backbone="RN50", checkpoint=str(path))
    about = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"!")  # in place, with its old size and time
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    second = keys(backbone="RN50", checkpoint=path.name)
    assert all(a != b for a, b in zip(first, second, strict=True))
    (tmp_path / "openai").write_text("a tag is a tag")
    here = keys(backbone="RN50", checkpoint="openai")
    monkeypatch.chdir("/")
    assert keys(backbone="RN50", checkpoint="openai") == here


def test_the_mini_clip_is_the_one_that_is_loaded(tmp_path, monkeypatch):
    usual = keys()
    other = tmp_path / "mini"
    shutil.copytree(mini_folder(), other)
    monkeypatch.setenv("OPENTRANS_MINI_CLIP", str(other))
    assert keys() == usual
    about = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(about | {"templates": "photo"}))
    photo = keys()
    with (other / "model.safetensors").open("ab") as file:
        file.write(b"!")
    both = keys()
    assert len({*usual, *photo, *both}) == 6
    monkeypatch.delenv("OPENTRANS_MINI_CLIP")
    assert keys() == usual and weights("mini", "random") == "random"


def test_tags_are_open_clips():
    import open_clip

    assert {*TAGS} == {tag for name, tag in open_clip.list_pretrained() if name in RESNETS}


def test_published_runs_keep_their_keys():
    found = list((PROJECT / "results").glob("*/*/*/metrics.json"))
    assert len(found) > 40
    for path in found:
        record = json.loads(path.read_text())
        params = record["parameters"]
        assert record["key"] == run_key(identity(params)), path
        assert described(record) == identity(params)


def test_run_and_kernel_agree_and_corrected_data_run_again(
    tmp_path, data, runs, monkeypatch, write_notebook
):
    named = "data_root = ''\ndataset = 'folder'\npictures = ''"
    body = "import pandas as pd\nrun.save({}, t=pd.DataFrame({'x': [1]}))"
    path = write_notebook(tmp_path / "01_data.ipynb", body, parameters=named, setup=SETUP)
    monkeypatch.chdir(tmp_path)
    given = {"data_root": "data", "pictures": "data/images/val/a.png"}
    first = run_notebook(path, given)
    assert first.status == "ok", first.error
    record = json.loads((first.folder / "metrics.json").read_text())
    assert record["parameters"]["data_root"] == str(data)
    assert record["made_from"].keys() == {"data files", "picture files"}
    assert experiment(described(record)) == experiment(identity(Job(path, given).full))
    assert run_notebook(path, given).status == "finished before"
    relabel(data)
    second = run_notebook(path, given)
    assert second.status == "ok" and second.folder != first.folder
    assert len(lines("01_data", "t")) == 2  # two experiments, not a newer one
    later(data / "images/val/a.png")
    assert Job(path, given).folder != second.folder


def test_what_changes_while_it_runs_is_no_finished_run(tmp_path, data, runs, write_notebook):
    """The second attempt finds the data at rest."""
    named = f"data_root = {str(data)!r}\ndataset = 'folder'\npictures = ''"
    body = (
        "from pathlib import Path\nadded = Path(data_root, 'images/val/c.png')\n"
        "if not added.exists(): added.touch()\nrun.save({})"
    )
    path = write_notebook(tmp_path / "01_data.ipynb", body, parameters=named, setup=SETUP)
    before = Job(path, {}).folder
    done = run_notebook(path)
    assert done.status == "ok" and done.folder == Job(path, {}).folder != before
    assert not (before / "metrics.json").exists()


def test_a_plan_looks_at_a_data_set_once(data, monkeypatch):
    walks = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: walks.append(path) or scan(path))
    with looking_once():
        first = keys(dataset="folder", data_root=str(data))
        once = len(walks)
        relabel(data)
        assert keys(dataset="folder", data_root=str(data)) == first and len(walks) == once
    assert keys(dataset="folder", data_root=str(data)) != first
