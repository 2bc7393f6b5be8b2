"""Where results go is asked before the work, and names may hold whatever a file system takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from html import unescape
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opentrans_lab.cli import main
from opentrans_lab.data import load_dataset
from opentrans_lab.errors import LabError, shown
from opentrans_lab.evaluation import segment
from opentrans_lab.experiments import Lab
from opentrans_lab.experiments.lab import cached
from opentrans_lab.files import find_pictures, href, linked, read_state_dict
from opentrans_lab.files.outputs import DRAWN, atomic_path, keep, writable
from opentrans_lab.masks import Mask
from opentrans_lab.records import Run, load, records, save_table
from opentrans_lab.report import build_report
from opentrans_lab.report.page import heading, run_page
from opentrans_lab.runs import run_grid, run_notebook
from opentrans_lab.runs.kernel import Files

ODD = b"{0} {a} 100% [b]*? $x$ #1 & <i>'\"\n\xe9"  # a name of a folder that Linux takes
NAMES = (
    st.binary(min_size=1, max_size=255)
    | st.text("{}[]%*?$#&<>'\"\\~ \n\té–x.", min_size=1, max_size=60).map(os.fsencode)
).filter(lambda name: not set(name) & {0, ord("/")} and name not in (b".", b".."))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """``command(*args)``: (exit code, what it printed, what it complained of), in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(args))
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    return run


# --- asked before the work ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("file/a.png", "Not a directory"),
        ("file/deep/er/a.png", "Not a directory"),
        ("folder.png", "is a folder"),
        ("/proc/a.png", "cannot be written"),
        ("/dev/full", "no file that can be replaced"),
        ("a" * 252 + ".png", "too long"),
        ("b" * 300 + "/a.png", "too long"),
        ("~nobody-of-this-name/a.png", "whose home"),
        ("a", "must end in .png or"),
        ("a.PNG.bak", "must end in .png or"),
    ],
)
def test_a_place_that_takes_no_file_is_told_and_left_as_it_is(tmp_path, place, words):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    path = place if place[0] in "/~" else tmp_path / place
    with pytest.raises(LabError, match=words):
        writable(path, "--picture", DRAWN)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]
    if "must end" not in words:
        with pytest.raises(LabError, match=words), atomic_path(path):
            raise AssertionError("written to")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("alpha", "mini", "--out", "t.xlsx"), "--out t.xlsx must end in .csv"),
        (("alpha", "mini", "--out", "t"), "--out t must end in .csv"),
        (("cost", "--out", "file/t.csv"), "--out file cannot be written (Not a directory)"),
        (("evaluate", "none", "--out", "/proc/t.csv"), "--out /proc cannot be written"),
        (("data", "check", "folder", "--picture", "a.docx"), "--picture a.docx must end in .png"),
        (("mask", "convert", "none.safetensors", "m.csv"), "--out m.csv must end in .safetensors"),
        (("mask", "apply", "n", "n", "--out", "file/m.safetensors"), "--out file cannot be"),
        (("plan", "none.yaml", "--out", "file/t.csv"), "--out file cannot be written"),
        (("report", "--out", "file/site"), "--out file cannot be written (Not a directory)"),
        (("mini-clip", "--steps", "1", "--out", "file/m"), "--out file/m cannot be written"),
    ],
)
def test_commands_ask_before_they_work(command, tmp_path, args, words):
    """What they would work on is not even there."""
    (tmp_path / "file").touch()
    code, out, told = command(*args)
    assert code == 2 and words in told and out == "" and len(told.splitlines()) == 1, told
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_home_is_meant_in_every_spelling(command, tmp_path, monkeypatch, runs):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert command("cost", "--out=~/a/c.csv")[0] == 0
    assert command("cost", "--out", "~/c.csv")[0] == 0
    monkeypatch.setenv("OPENTRANS_RUNS", "~/runs")
    monkeypatch.setenv("OPENTRANS_RESULTS", "~/results")
    assert "Nothing has run yet" in build_report("~/site").read_text(encoding="utf-8")
    save_table(pd.DataFrame({"a": [1]}), "~/t.csv")
    Run("01", {}).save({})
    found = {p.relative_to(tmp_path).parts[1] for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"a", "c.csv", "site", "t.csv", "runs"} and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "read",
    [
        read_state_dict,
        Mask.load,
        find_pictures,
        lambda path: load_dataset("folder", "val", path),
        lambda path: Lab(backbone="RN50", checkpoint=path).load(),
        lambda path: segment(path, ["a"]),
    ],
)
def test_a_home_that_is_not_there_is_no_riddle(read):
    with pytest.raises(LabError, match="whose home is meant is not known here"):
        read("~nobody-of-this-name/x")


@pytest.mark.parametrize("place", ["file/runs", "/proc/runs", "/dev/full"])
def test_runs_that_cannot_be_written_name_the_variable(
    tmp_path, monkeypatch, write_notebook, place
):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENTRANS_RUNS", place)
    notebook = write_notebook(tmp_path / "01_tiny.ipynb", "run.save({})")
    for work in (
        lambda: run_grid([(notebook, {})]),
        lambda: Run("01_tiny", {}).save({}),
        lambda: cached("stage", {}, lambda folder: {}),
        build_report,
    ):
        with pytest.raises(LabError, match="cannot be written .* OPENTRANS_RUNS to a folder"):
            work()
    done = run_notebook(notebook)
    assert done.users and "OPENTRANS_RUNS" in done.error and "tried" not in done.error


def test_a_notebook_cannot_take_the_reports_folder(runs, tmp_path, write_notebook):
    done = run_notebook(write_notebook(tmp_path / "report.ipynb", "run.save({})"))
    assert done.users and "rename it" in done.error and not list(runs.rglob("*"))


# --- kept after it ------------------------------------------------------------------------------


def test_what_cannot_be_written_any_more_is_kept(tmp_path, monkeypatch):
    """The folder was there before the work and is a file after it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    out = tmp_path / "gone" / "t.csv"
    writable(out)
    out.parent.touch()
    with pytest.raises(LabError, match="t.csv is not written") as told:
        keep(out, partial(save_table, pd.DataFrame({"a": [1]})))
    (kept,) = (tmp_path / "tmp").glob("*/t.csv")
    assert str(kept) in str(told.value) and pd.read_csv(kept)["a"].tolist() == [1]
    (tmp_path / "full").mkdir()

    def write(path: Path) -> None:  # the disk is full
        with atomic_path(path) as place, place.open("wb") as file, open("/dev/full", "wb") as full:
            file.write(b"half")
            full.write(b"half")

    with pytest.raises(LabError, match="No space left on device.*, nor is a copy of it"):
        keep(tmp_path / "full" / "t.csv", write)
    assert not list((tmp_path / "full").iterdir())


def test_a_run_that_cannot_be_published_is_kept_and_not_run_twice(
    runs, tmp_path, monkeypatch, write_notebook
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    block = "run.save({'value': 7})\n(run.dir / 'report.html').mkdir()"
    done = run_notebook(write_notebook(tmp_path / "01_tiny.ipynb", block))
    kept = Path(re.search(r"\S+/opentrans-lab-\S+/\w+", done.error)[0])
    assert done.status == "failed" and done.users and load(kept)["metrics"] == {"value": 7}
    assert not list(runs.rglob("*.json"))


# --- text is text -------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(NAMES)
def test_any_name_is_written_linked_shown_and_found(tmp_path_factory, raw):
    folder, name = tmp_path_factory.mktemp("names"), os.fsdecode(raw)
    folder = folder / name
    path = folder / f"{name[:60]}.png"
    with atomic_path(path) as place:
        Image.new("RGB", (1, 1)).save(place, "PNG")
    assert list(folder.iterdir()) == [path]
    assert linked(href(path)) == str(path) and re.fullmatch(r"[\w/.~%-]+", href(path), re.A)
    assert str(LabError(path)) == shown(path) == shown(path).encode().decode()
    if not name.startswith("."):
        assert find_pictures(str(path)) == [path]
        assert find_pictures(str(folder)) == [path]
    Files().write(f'"{name}"', path.as_uri())
    assert path.as_uri().startswith("file://") and os.path.getsize(path) > 0


def test_a_run_in_the_oddest_folder_is_run_recorded_and_linked(
    tmp_path, monkeypatch, write_notebook
):
    home = tmp_path / os.fsdecode(ODD)
    monkeypatch.setenv("OPENTRANS_RUNS", str(home / "runs"))
    monkeypatch.setenv("OPENTRANS_RESULTS", str(home / "results"))
    body = (
        "from opentrans_lab.report.side_by_side import _link\nfrom IPython.display import HTML",
        "print(run.dir)\nHTML(_link(str(run.dir.with_name(run.key)), 'here'))",
        "run.save({'value': seed}, **{'50% #1': __import__('pandas').DataFrame({'a': [1]})})",
    )
    path = write_notebook(home / "a #1? {0} 50%.ipynb", *body)
    done = run_notebook(path, {"seed": 3, "name": os.fsdecode(b"caf\xe9")})
    assert done.status == "ok", done.error
    assert [folder for folder, _ in records(path.stem)] == [done.folder]
    assert load(done.folder)["parameters"]["name"] == os.fsdecode(b"caf\xe9")
    site = build_report()
    for page in (site, *site.parent.glob("*/*/index.html")):
        text = page.read_text(encoding="utf-8")
        links = [unescape(link) for link in re.findall(r'<a [^>]*href="([^"]*)"', text)]
        for file, _, fragment in (link.partition("#") for link in links):
            target = page.parent / linked(file) if file else page
            assert target.is_file(), file
            assert not fragment or f'id="{fragment}"' in target.read_text(encoding="utf-8")
    assert len(list(site.parent.glob("*/*/index.html"))) == 1


@pytest.mark.parametrize(
    "formula",
    [r"$\right)$", r"$x^{2$", r"$\frac{1}$", "$$\\begin{pmatrix} a & b$$", r"$\left< a \& <b>$"],
)
def test_a_formula_that_is_none_stays_as_it_is_written(tmp_path, formula):
    text = f"# Title\n\nSomething {formula} said\n\nand $x_1$"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    nbformat.write(notebook, tmp_path / "executed.ipynb")
    record = {"notebook": "01", "key": "0", "parameters": {}, "wall_s": 1, "device": "cpu",
              "created": "2025-01-01", "revision": "a"}  # fmt: skip
    page = run_page(tmp_path, record)
    assert "said" in page and "said" in heading(notebook, "")[1] and "<math" in page
    source = formula.strip("$").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert source in page or "<math" in page.partition("said")[0]


def test_a_locale_without_the_letters_ends_nothing(tmp_path, runs):
    root = tmp_path / "straße"
    for kind in ("images", "labels"):
        (root / kind / "val").mkdir(parents=True)
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(root / kind / "val" / "grün.png")
    (root / "classes.csv").write_text("id,name\n0,Wiese\n1,Brücke\n", encoding="utf-8")
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}
    start = [sys.executable, "-m", "opentrans_lab.cli"]
    for args, words in (
        (("data", "check", "folder", "--root", str(root)), "classes never seen 1: Br\\xfccke"),
        (("report", "--out", str(tmp_path / "Übersicht")), "report: "),
        (("run", "Größe.ipynb"), "no notebook"),
    ):
        told = subprocess.run(
            [*start, *args], cwd=tmp_path, env=os.environ | plain, capture_output=True
        )
        out = (told.stdout + told.stderr).decode()
        assert words in out and "Traceback" not in out, out


def test_pictures_are_found_by_long_lists_and_below_folders_with_brackets(tmp_path):
    folder = tmp_path / "set [1]*"
    folder.mkdir()
    paths = [folder / f"{i:03}.png" for i in range(60)]
    for path in paths:
        path.touch()
    assert find_pictures(f"'{folder}/*.png'") == paths
    assert find_pictures(" ".join(f"'{path}'" for path in paths)) == paths


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "here.csv").symlink_to(tmp_path / "disk" / "there.csv")
    with atomic_path(tmp_path / "here.csv") as path:
        path.write_text("new", encoding="utf-8")
    assert (tmp_path / "here.csv").is_symlink()
    assert (tmp_path / "disk" / "there.csv").read_text(encoding="utf-8") == "new"


def test_a_result_that_its_writer_does_not_take_is_kept_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def save(path):
        if path.parent == tmp_path / "out":
            raise ValueError("no such encoder")
        path.write_text("kept", encoding="utf-8")

    with pytest.raises(LabError, match="no such encoder.*copy that"):
        keep(tmp_path / "out" / "a.csv", save)
    assert [p.read_text(encoding="utf-8") for p in tmp_path.glob("*/a.csv")] == ["kept"]
