"""Names of all kinds: a class table gives them as they are, or says which one cannot be."""

from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from opentrans_lab.clip import load_backbone
from opentrans_lab.clip.text import LEAST, checked_names, readings
from opentrans_lab.data import load_dataset
from opentrans_lab.data.layouts import read_class_names, take_classes
from opentrans_lab.errors import LabError
from opentrans_lab.experiments.gallery import vocabulary
from opentrans_lab.experiments.rows import Segmented
from opentrans_lab.figures import charts, explorer, overlays, plots
from opentrans_lab.figures.letters import brief
from opentrans_lab.files import shipped
from opentrans_lab.records import Run, read_table, save_table
from opentrans_lab.report import build_report
from opentrans_lab.report.tables import literal, styled

matplotlib.use("Agg")
EACH = settings(  # pytest's folder serves all examples of a test; each writes its file anew
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LETTERS = st.characters(exclude_categories=["Cs"])  # all that UTF-8 can write
NAMES = st.text(LETTERS, min_size=1, max_size=12).map(str.strip)
PRINTED = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=12)
MISREAD = ["NA", "None", "null", "nan", "007", "1e5", "True", "-inf"]


def write_classes(root: Path, raw: bytes | list[str]) -> Path:
    """A folder data set of one picture; ``raw`` is its table, or the names to put in one."""
    for part, pixels in (("images", np.zeros((8, 8, 3))), ("labels", np.zeros((8, 8)))):
        (root / part / "val").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / part / "val/a.png")
    if isinstance(raw, list):
        with (root / "classes.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "name"), *enumerate(raw)])
    else:
        (root / "classes.csv").write_bytes(raw)
    return root


def names_of(root: Path) -> tuple[str, ...]:
    return load_dataset("folder", "val", root).names


# --- class tables -------------------------------------------------------------------------------


@EACH
@given(names=st.lists(NAMES, min_size=1, max_size=6))
def test_a_quoted_table_gives_its_names_back_or_says_which_cannot_be(tmp_path, names):
    read = readings(names)
    write_classes(tmp_path, names)
    if len(set(read)) == len(names) and readings([""])[0] not in read:
        assert names_of(tmp_path) == tuple(names)
    else:
        with pytest.raises(LabError, match="classes.csv.*(is there twice|empty|a name, and)"):
            names_of(tmp_path)


@pytest.mark.parametrize(
    "raw",
    [b"\xef\xbb\xbf ID ,NAME\r\n0,road\r\n1,sky\r\n",
     b'\n"Id", "Name",\n\n0, "road",\n,,\n 1 ,sky,\n\n',
     b"Note,Name,ID\r,road,0\rof the day,sky,1\r"],
)  # fmt: skip
def test_what_spreadsheets_add_does_not_count(tmp_path, raw):
    assert names_of(write_classes(tmp_path, raw)) == ("road", "sky")


@pytest.mark.parametrize(
    ("raw", "said"),
    [(b"id,name,ignore\n0,road,\n1,sky, blue,0\n", r"line 3: '1,sky,blue,0' has more .* quotes"),
     (b"id,name\n\n0,road\n1,sky,1\n", "line 4: .* has more"),
     (b'id,name\n0,"road\n1,sky\n', "unexpected end of data.*quotes"),
     (b"id\tname\n0\troad\n", r"no column 'id'.*commas.*'id\\tname'"),
     ("id,name\n0,road\n".encode("utf-16"), "not a UTF-8 comma-separated table .*save it as one"),
     (b"id,name,Name\n0,road,street\n", "more than one column 'name'"),
     (b"0,road\n1,sky\n", "no column 'id'.* but is '0,road'"), (b"\n,\n", "no column .* is ''"),
     (b"id,name\n0,road\n\n00,sky\n", "line 4: the id 00 is there twice"),
     (b"id,name\n0,road\n1,&nbsp;\n", "classes.csv: an empty name")],
)  # fmt: skip
def test_a_wrong_table_is_told_with_its_line_and_the_remedy(tmp_path, raw, said):
    with pytest.raises(LabError, match=said):
        names_of(write_classes(tmp_path, raw))


# --- what CLIP reads alike ----------------------------------------------------------------------

ALIKE = [
    ("fire", "ﬁre"), ("car", "ｃａｒ"), ("“bus”", '"bus"'), ("<b>", "&lt;B&gt;"), ("12", "1 2"),
    ("ice cream", "ice\u00a0cream"), ("Ångström", "A\u030angstro\u0308m"), ("a-b", "a - b"),
    ("very " * LEAST + "old", "very " * LEAST + "new"), ("sky", "SKY\n"),
]  # fmt: skip


@pytest.mark.parametrize("pair", ALIKE)
def test_names_that_clip_reads_alike_are_refused_everywhere(tmp_path, pair):
    with pytest.raises(LabError, match="is there twice: CLIP reads .* alike"):
        checked_names(["grass", *pair])
    with pytest.raises(LabError, match="is there twice"):
        checked_names([("grass", pair[0]), pair[1]])  # another name of a class is enough
    with pytest.raises(LabError, match="classes.csv: the name .* is there twice"):
        names_of(write_classes(tmp_path, list(pair)))


def test_names_that_clip_tells_apart_stay():
    names = ["cat", "cats", "cat.", "wall brick", "wallbrick", "ß", "路", "道", "🚗", "{}"]
    assert checked_names(names) == tuple(names)
    with pytest.raises(LabError, match="not in UTF-8"):
        checked_names(["caf\udce9"])


def test_a_word_is_a_class_when_clip_reads_it_so():
    class Cafes:
        names = prompts = ("café", "tea room")
        things = torch.tensor([True, False])

    assert vocabulary("bar, Cafe\u0301, tea  room", Cafes).ids.tolist() == [1, 2, -1]


def test_published_names_stay_and_a_class_without_one_of_its_own_is_told():
    for path in shipped("data/class_names").glob("*.csv"):
        rows = read_class_names(path.stem)
        names = {name for row in rows for name in row["prompts"].split("|")}
        assert len(set(readings(sorted(names)))) == len(names)  # alike only where written alike
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            take_classes(SimpleNamespace(), rows)
        told = [str(warning.message) for warning in told]
        if path.stem in ("ade847", "pc459"):
            assert len(told) == 1 and "no name of their own" in told[0], path
        else:
            assert not told, path


def test_the_text_tower_warns_of_what_its_own_context_cuts():
    backbone = load_backbone("mini", device="cpu")
    with pytest.warns(UserWarning, match="reads 'x x.* alike"):
        backbone.text(["x " * 40 + "a", "x " * 40 + "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.text(["cat", "cats", "cat"])


# --- tables that are read again -----------------------------------------------------------------


@EACH
@given(names=st.lists(PRINTED | st.sampled_from(MISREAD), min_size=1, unique=True))
def test_names_survive_being_saved(tmp_path, names):
    save_table(pd.DataFrame({"name": names, "iou": 0.5}), tmp_path / "per_class.csv")
    found = Segmented(tmp_path, {}).per_class
    assert found["name"].tolist() == names and (found["iou"] == 0.5).all()


@pytest.mark.parametrize("name", MISREAD)
def test_a_lone_name_is_no_number_and_no_gap(tmp_path, name):
    table = pd.DataFrame({"picture": [name], "largest": [name], "right": [np.nan], "n": [1]})
    save_table(table, tmp_path / "t.csv")
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.csv"), table)


# --- figures, pages -----------------------------------------------------------------------------

ODD = ["a ${b$", "_hid", r"$\frac{$", "two\nlines", "caf\udce9", "漢字 😀", "<b>&%s{}", "x" * 9999]
pytestmark = pytest.mark.filterwarnings("ignore:Glyph")  # no font has every letter


def drawn(figure) -> list[str]:
    """All texts of a figure that can be saved."""
    figure.savefig(io.BytesIO())
    matplotlib.pyplot.close(figure)
    return [text.get_text() for text in figure.findobj(Text)]


FORMULA = st.sampled_from("$$$^_{}")
LINES = st.text(FORMULA | st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=30)


@settings(EACH, max_examples=15)
@given(names=st.lists(LINES, min_size=1, max_size=9, unique=True))
def test_any_name_is_drawn_as_it_is_written(names):
    labels = torch.arange(len(names))[None]
    figure = overlays.compare([torch.rand(3, 1, 9)], {names[0]: [labels]}, names, names[:1])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    assert not any(text.get_parse_math() for text in legend.get_texts())
    assert figure.axes[1].get_title() == names[0]
    assert names[0] in drawn(figure)


@pytest.mark.parametrize("odd", ODD)
def test_every_figure_takes_every_name(odd):
    word, label = brief(odd), torch.zeros(4, 4, dtype=torch.long)
    assert "\n" not in word and len(word) <= 48
    sheet = overlays.compare([torch.rand(3, 8, 8)], {(odd, odd): [label]}, ["x"], [odd])
    assert drawn(sheet).count(word) >= 2
    points = pd.DataFrame({"framework": [odd], "row": odd, "GMACs": 1, "params_M": 1, "mIoU": 1})
    assert drawn(charts.cost_bubbles({odd: points})).count(word) == 3
    lines = pd.MultiIndex.from_tuples([(odd, "dense")], names=["parameters.pictures", "row"])
    bars = charts.transfer(pd.DataFrame({"n": 1, "seen": 1.0}, lines), ["seen"])
    assert f"pictures {word}"[:30] in " ".join(drawn(bars))
    lines = pd.MultiIndex.from_tuples([(odd, "alpha")], names=["dataset", "select"])
    judged = pd.DataFrame({"gain": 1.0, "half": 0.5, "verdict": "wins"}, lines)
    assert {word, brief(odd, 100)} <= set(drawn(charts.regime_map(judged, odd)))
    alphas = pd.DataFrame({"name": [odd], "alpha": 2.0, "sigma": 0.1, "status": "ok",
                           "freeze_probability": 0.5, "control_alpha": 3.0})  # fmt: skip
    for draw in (plots.alpha_depth, plots.freeze_bars, plots.control_gap):
        assert word in drawn(draw(alphas))
    assert word in drawn(plots.alpha_flow({odd: alphas, "b": alphas}))
    layers = torch.nn.Sequential()
    layers.add_module("$c_$", torch.nn.Conv2d(32, 32, 3))
    assert "$c_$" in drawn(explorer.compare(layers, "$c_$"))


def test_a_class_called_right_keeps_its_colour_and_long_legends_end():
    label = torch.arange(2)[None]
    errors = overlays.error_map(label, label)
    columns = {"a": [label], "b": [errors]}
    figure = overlays.compare([torch.rand(3, 1, 2)], columns, ["right", "wrong"])
    faces = [patch.get_facecolor()[:3] for patch in figure.legends[0].get_patches()]
    wanted = [overlays.colour("right"), overlays.colour("wrong"), *overlays.VERDICTS.values()]
    assert np.allclose(faces, wanted)
    many = torch.arange(5000).view(50, 100)
    names = [f"{i} " * 99 for i in range(5000)]
    figure = overlays.compare([torch.rand(3, 50, 100)], {"a": [many]}, names)
    assert max(figure.get_size_inches()) < 60  # at 150 a inch far below what a picture can be
    assert drawn(figure)[-1] == "and 4800 more"


def test_names_are_no_html():
    name = "<b onclick='x'>&amp;"
    table = pd.DataFrame({name: [name], "mIoU": [1.0]}, index=[name])
    for look in (literal(table, name), styled(table[["mIoU"]].rename_axis(name).set_index(
            pd.Index([name], name=name)), name)):  # fmt: skip
        text = look.to_html()
        assert "<b" not in text and text.count("&lt;b") >= 3 and "&amp;amp;" in text


def test_a_run_with_an_odd_name_is_linked_and_its_classes_are_named(runs):
    run = Run("50% <i> #1?", {"dataset": "<i>"})
    run.figure(matplotlib.pyplot.figure(), "a & #1?")
    run.save({"<i>": "<i>"}, classes=pd.DataFrame({"name": ["NA", "007", "<i>"], "iou": 0.5}))
    page = build_report().read_text(encoding="utf-8")
    assert "<i>" not in page and all(f"<td>{name}</td>" in page for name in ("NA", "007"))
    (figure,) = (p for p in build_report().parent.rglob("*.png"))
    assert "50%25%20%3Ci%3E%20%231%3F/" in page and "/a%20%26%20%231%3F.png" in page
    assert figure.name == "a & #1?.png"
