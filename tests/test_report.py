"""The site stands alone: every link resolves inside it and nothing is fetched from outside."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import matplotlib
import pandas as pd
import pytest

import opentrans_lab
from opentrans_lab.errors import LabError
from opentrans_lab.records import PROJECT, Run, load, run_dir
from opentrans_lab.report import build_report, side_by_side
from opentrans_lab.report.page import MINI_LAB, duration, number, run_page
from opentrans_lab.report.tables import styled
from opentrans_lab.runs import run_grid
from opentrans_lab.runs.grids import Job

matplotlib.use("Agg")
PLOT = """import pandas as pd
import matplotlib.pyplot as plt
figure, axes = plt.subplots()
axes.plot([0, seed])
run.figure(figure, "mask_overlay")
table = pd.DataFrame({"row": ["ours"], "miou": [0.123456]})
table"""
SAVE = 'run.save({"miou": {"ours": 0.123456}, "gap": float("nan")}, transfer=table)'


class Links(HTMLParser):
    """All addresses and ids of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [v for k, v in attrs if k in ("href", "src")]
        self.ids |= {v for k, v in attrs if k == "id"}


@pytest.fixture(scope="module")
def site(tmp_path_factory, write_notebook):
    """A report of two runs in real kernels, one failed and one by hand."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENTRANS_RUNS", str(folder / "runs"))
        good = write_notebook(folder / "03_transfer.ipynb", PLOT, SAVE)
        bad = write_notebook(folder / "04_bad.ipynb", "assert seed < 0, 'not <negative>'")
        run_grid([Job(good, {}), Job(good, {"seed": 1}), Job(bad, {})])
        Run("05_hand", {"seed": 0, "dataset": "coco"}).save({"x": 1}, empty=pd.DataFrame())
        yield build_report()


def test_every_link_resolves_inside_the_site(site):
    pages = [site, *site.parent.glob("*/*/index.html")]
    assert len(pages) == 3
    for page in pages:
        found = Links(page.read_text())
        assert found.links and "iframe" not in found.tags
        for link in found.links:
            assert not re.match(r"(https?:)?//", link), link
            if link.startswith("#"):
                assert link[1:] in found.ids
            elif not link.startswith("data:"):
                target = (page.parent / unquote(link)).resolve()
                assert target.is_file() and target.is_relative_to(site.parent), link


CELLS = ["2026-03-01", "1,000", "5144ce", "–", "2", "1e4", "-3.5 ± 1.0", "2026-01-02"]
PATIENCE = 300_000  # milliseconds: a busy machine is no failure
SORT = Path(opentrans_lab.__file__).parent / "report" / "site" / "sort.js"


def on_a_phone(browser, *paths):
    """From the disk, as one opens it: no error in the console, no picture missing, no request."""
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.set_default_timeout(PATIENCE)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    for path in paths:
        page.goto(path.as_uri())
        page.wait_for_load_state("load")
        widths = page.evaluate(
            "Promise.all([...document.images].map(async (i) => { i.loading = 'eager';"
            " await i.decode(); return i.naturalWidth }))"
        )
        assert all(width > 0 for width in widths)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not said and all(url.startswith(("file:", "data:")) for url in asked)
    return page


def test_the_published_tables_read_well_on_a_phone(runs, browser, monkeypatch):
    """05 as it is, over all that is published: the widest page there is."""
    monkeypatch.setenv("OPENTRANS_RESULTS", str(PROJECT / "results"))
    run_grid([Job(PROJECT / "notebooks" / "05_paper_tables.ipynb", {})])
    index = build_report(runs.parent / "site")
    (path,) = index.parent.glob("05_paper_tables/*/index.html")
    page = on_a_phone(browser, index, path)
    assert page.locator("table").count() > 5 and page.locator("img").count() > 0
    page.close()


def test_it_reads_well_in_a_browser_and_its_tables_sort(site, browser):
    page = on_a_phone(browser, site, *site.parent.glob("*/*/index.html"))
    page.goto(site.as_uri())
    head = page.locator("table thead th", has_text="seed").first
    read = "t => [...t.closest('table').tBodies[0].rows].map(r => r.cells[t.cellIndex].textContent)"
    assert head.evaluate(read) == ["0", "1"]
    head.click()
    assert head.evaluate(read) == ["0", "1"] and head.get_attribute("aria-sort") == "ascending"
    head.press("Enter")
    assert head.evaluate(read) == ["1", "0"] and head.get_attribute("aria-sort") == "descending"
    rows = "".join(f"<tr><td>{cell}</td></tr>" for cell in CELLS)
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.set_content(f"<table><thead><tr><th>x</th></tr></thead><tbody>{rows}</tbody></table>")
    page.add_script_tag(path=SORT)
    page.locator("th").click()
    numbers, words = ["-3.5 ± 1.0", "2", "1,000", "1e4"], ["2026-01-02", "2026-03-01", "5144ce"]
    assert page.locator("td").all_inner_texts() == [*numbers, *words, "–"]
    page.close()


def test_the_tables_of_05_sort_whole_lines(browser):
    """A summary over settings, and cells that hold more than a number."""
    about = pd.MultiIndex.from_product([["han", "fcclip"], ["dense", "ours"]])
    about.names = ["parameters.framework", "row"]
    values = pd.DataFrame({"n": 1, "seen": [9.5, 105.5, 44.1, 268.2]}, about)
    parts = pd.DataFrame({"line": ["a", "b", "c"], "column": "GMACs", "ours": [268.2, 44.1, 105.5],
                          "half": float("nan"), "n": 0, "paper": [268.0, float("nan"), 105.0],
                          "difference": [0.2, float("nan"), 0.5], "runs": [{}] * 3})  # fmt: skip
    for table, head, lines in (
        (styled(values, "x"), "seen", ["han dense 1 9.5", "fcclip dense 1 44.1",
                                       "han ours 1 105.5", "fcclip ours 1 268.2"]),
        (side_by_side(parts, "x"), "GMACs", ["b 44.1, countedpaper –, difference –",
                                             "c 105.5, countedpaper 105.0, difference +0.5",
                                             "a 268.2, countedpaper 268.0, difference +0.2"]),
    ):  # fmt: skip
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.set_content(table.to_html())
        page.add_script_tag(path=SORT)
        page.locator("thead th", has_text=head).click()
        rows = page.evaluate("[...document.querySelectorAll('tbody tr')].map(r => r.textContent)")
        assert [" ".join(row.split()) for row in rows] == lines
        page.close()


def test_index_shows_numbers_tables_figures_and_failures(site):
    text = site.read_text()
    assert 'name="viewport"' in text
    assert text.count("mask_overlay.png") >= 4 and "0.1235" in text and "<td>ours</td>" in text
    assert "<math" in text  # the notebook's question, its formula drawn without a script
    assert "AssertionError: not &lt;negative&gt;" in text and "04_bad/" in text
    assert "<span>seed <b>1</b></span>" in text and "default parameters" in text
    assert len(list(site.parent.rglob("transfer.csv"))) == 2


def test_the_notebooks_own_links_resolve_too(runs, tmp_path):
    """Of all committed notebooks, as they are: to each other's sections, or nowhere."""
    notebooks = sorted((PROJECT / "notebooks").glob("*.ipynb"))
    for path in notebooks:
        run = Run(path.stem, {"seed": 0, "dataset": "scenes"})
        run.save({})
        shutil.copy(path, run.dir / "executed.ipynb")
        page = run_page(run.dir, load(run.dir))
        (run.dir / "report.html").write_text(page)
        left = [x for x in Links(page).links if not re.match(r"#|data:|https?:", x)]
        assert not left, left
    index = build_report(tmp_path / "site")
    said = set()
    for page in (index, *index.parent.glob("*/*/index.html")):
        for link in Links(page.read_text()).links:
            if re.match(r"data:|https?:", link):
                continue
            target, _, fragment = unquote(link).partition("#")
            target = (page.parent / target).resolve() if target else page
            assert target.is_file(), link
            assert not fragment or f'id="{fragment}"' in target.read_text(), link
            said.add(fragment)
    assert {path.stem for path in notebooks if path.stem[:2] in ("01", "03", "05")} <= said


def test_it_begins_with_the_newest_verdicts(runs, tmp_path):
    for seed, verdict in enumerate(("not tested here", "mixed")):
        claims = pd.DataFrame({"claim": ["C1"], "verdict": [verdict]})
        Run("05_paper_tables", {"seed": seed, "dataset": "scenes"}).save({}, claims=claims)
        time.sleep(1.1)  # records are ordered by the second
    text = build_report(tmp_path / "site").read_text()
    head, rest = text.split('<section id="05_paper_tables">')
    assert "<td>mixed</td>" in head and "not tested" not in head and head.count(MINI_LAB) == 2
    assert "<td>mixed</td>" in rest and "<td>not tested here</td>" in rest


def test_many_metrics_of_a_run_are_folded(runs, tmp_path):
    for seed, count in enumerate((3, 40)):
        Run("03_transfer", {"seed": seed}).save({f"m{i}": i for i in range(count)})
    text = build_report(tmp_path / "site").read_text()
    found = re.findall(r"<details( open)?><summary>metrics(.*?)</details>", text, re.S)
    opened = {inside.count("<dt>"): open for open, inside in found}
    assert opened == {3: " open", 40: ""}


def test_page_holds_results_with_code_folded_and_figures_inside(site):
    page = next(
        p for p in site.parent.glob("03_transfer/*/index.html") if "<b>1</b>" in p.read_text()
    )
    text = page.read_text()
    assert "data:image/png;base64," in text and "0.123456" in text and "<math" in text
    assert 'type="checkbox"' in text and re.search(r"\.input \{ display: none", text)
    assert "All runs" in text and "plt" in text


def test_mini_lab_is_labelled_wherever_its_numbers_are(site):
    assert site.read_text().count(MINI_LAB) == 1 + 2  # the head and its two runs, not coco's
    assert all(MINI_LAB in p.read_text() for p in site.parent.glob("03_transfer/*/index.html"))


def test_new_report_replaces_the_old_and_spares_what_is_none(runs, tmp_path):
    assert "Nothing has run yet" in build_report(tmp_path / "site").read_text()
    Run("03_transfer", {"seed": 1, "dataset": "coco"}).save({"miou": 0.5})
    text = build_report(tmp_path / "site").read_text()
    assert "Nothing has run" not in text and "0.5" in text and MINI_LAB not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "site"]
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("precious")
    with pytest.raises(LabError, match="is no report"):
        build_report(own)
    assert (own / "thesis.txt").read_text() == "precious"


def test_report_that_cannot_be_made_leaves_the_old_one(runs, tmp_path):
    index = build_report(tmp_path / "site")
    before = index.read_text()
    Run("03_transfer", {"seed": 1}).save({})
    (run_dir("03_transfer", {"seed": 1}) / "metrics.json").write_text("{")
    with pytest.raises(LabError, match="damaged"):
        build_report(tmp_path / "site")
    assert index.read_text() == before and len(list(Path(tmp_path).iterdir())) == 2


def test_two_reports_at_a_time_and_one_that_is_interrupted_leave_a_whole_one(runs, tmp_path):
    """At its second rename another report is there already; or it is interrupted then."""
    index = build_report(tmp_path / "site")
    rename = os.rename

    def faster(path, target):
        if target == tmp_path / "site" and not index.exists():
            shutil.copytree(path, target)
            index.write_text(index.read_text() + "<!-- the other's -->")
        rename(path, target)

    def stopped(path, target):
        if target == tmp_path / "site" and not path.name.endswith("-old"):
            raise KeyboardInterrupt
        rename(path, target)

    def full(path, target):
        if target == tmp_path / "new":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", faster)
        assert build_report(tmp_path / "site") == index
        assert "the other's" in index.read_text()
        patch.setattr(os, "rename", stopped)
        with pytest.raises(KeyboardInterrupt):
            build_report(tmp_path / "site")
        patch.setattr(os, "rename", full)
        with pytest.raises(OSError, match="No space left"):
            build_report(tmp_path / "new")
    assert "the other's" in index.read_text()
    assert [p.name for p in tmp_path.iterdir() if p.name != "runs"] == ["site"]


def test_numbers_and_times_read_well():
    shown = [number(x) for x in (0.123456, 12345, 123456.7, 2.0, float("nan"), None, "a", True)]
    assert shown == ["0.1235", "12,345", "123,457", "2", "–", "–", "a", "True"]
    assert [duration(s) for s in (3.2, 185, 7800)] == ["3 s", "3 min 05 s", "2 h 10 min"]
