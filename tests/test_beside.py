"""Cells of the paper's tables say what the runs say, and lead to them."""

from __future__ import annotations

import math
import re
from html import unescape
from urllib.parse import urlsplit

import pandas as pd
import pytest

from opentrans_lab.costs import printed_cells
from opentrans_lab.records import PROJECT, Run, load, paper
from opentrans_lab.report import as_csv, build_report, cells, side_by_side
from opentrans_lab.report.claims import UNTESTED
from opentrans_lab.report.tables import lines, main_setting
from opentrans_lab.runs import run_notebook

ROWS = ("dense", "ours", "random_layerwise")
NONE = pd.DataFrame()


@pytest.fixture(scope="module")
def costs():
    return printed_cells()


def transfer(framework="han", seeds=(0, 1), dataset="scenes", level=40.0, **more):
    """Runs of 03 whose row k has ``level`` - 10 k + seed."""
    for seed in seeds:
        params = dict(dataset=dataset, framework=framework, terms="both", seed=seed, **more)
        scores = [level - 10 * k + seed for k in range(len(ROWS))]
        table = pd.DataFrame({"row": ROWS, "seen": scores, "all": [s / 2 for s in scores]})
        table = table.assign(params=[3e6, 1e6, 1e6], macs=[3e9, 1e9, 1e9])
        Run("03_transfer", params).save({"miou": level}, transfer=table)


def test_ours_the_papers_difference_seeds_and_interval(runs, costs):
    transfer()
    table = cells("table1", lines("03_transfer", "transfer"), costs)
    cell = table.set_index(["line", "column"]).loc["han, ours"]
    printed = paper("table1").query("framework == 'han' and dataset == 'coco'")
    printed = printed.set_index("row")["value"]
    miou, gap = cell.loc["mIoU, %"], cell.loc["points to dense"]
    assert (miou.ours, miou.n, miou.paper) == (30.5, 2, printed["ours"])
    assert miou.difference == pytest.approx(30.5 - printed["ours"])
    assert miou.half == pytest.approx(12.706 * 0.5, rel=1e-3)  # t of one degree, std / sqrt(2)
    assert gap.ours == -10 and gap.half == 0
    assert gap.paper == pytest.approx(printed["ours"] - printed["dense"])
    assert list(miou.runs) == [0, 1] and len(set(miou.runs.values())) == 2
    counted = cell.loc["GMACs"]
    assert counted.n == 0 and counted.ours == pytest.approx(counted.paper, rel=0.01)
    other = table[table["line"] == "fcclip, ours"].set_index("column").loc["mIoU, %"]
    assert math.isnan(other.ours) and other.paper > 0
    html = side_by_side(table, "Table 1").to_html()
    assert "<b>30.5</b> ± 6.4, seeds" in html and "not run<br>paper" in html
    assert "counted<br>paper" in html


def test_one_seed_has_no_interval_and_most_seeds_are_shown(runs, costs):
    transfer(seeds=(0, 1), steps=600)
    transfer(seeds=(0,), steps=50, level=99.0)
    found = lines("03_transfer", "transfer")
    assert set(main_setting(found, "row", ROWS)["parameters.steps"]) == {600}
    transfer(seeds=(3,), framework="fcclip")
    found = lines("03_transfer", "transfer")
    table = cells("table1", found, costs).set_index(["line", "column"])
    assert table.loc[("fcclip, dense", "mIoU, %"), "n"] == 1
    assert math.isnan(table.loc[("fcclip, dense", "mIoU, %"), "half"])
    assert table.loc[("han, dense", "mIoU, %"), "ours"] == 40.5


def test_a_data_set_of_the_papers_stands_beside_its_own_column(runs, costs):
    transfer(dataset="voc20")
    table = cells("table1", lines("03_transfer", "transfer"), costs, "voc20")
    cell = table.set_index(["line", "column"]).loc[("han, dense", "mIoU, %")]
    printed = paper("table1").query("framework == 'han' and dataset == 'pas20' and row == 'dense'")
    assert cell.ours == 20.25  # over all classes
    assert cell.paper == printed["value"].iloc[0]


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table4"])
def test_without_runs_the_paper_and_the_counts_remain(costs, name):
    table = cells(name, NONE, costs)
    assert table["paper"].notna().all() and (table["n"] == 0).all()
    known = table["ours"].notna()
    assert known.any() != (name == "table3")
    off = (table["ours"] / table["paper"] - 1)[known].abs()
    assert (off < 0.015).all()
    assert len(as_csv({name: table})) == len(table)


def test_selection_and_both_fill_tables_2_to_4(runs, costs):
    params = dict(dataset="scenes", framework="han", seed=0)
    selection = pd.DataFrame(
        {"regime": "plenty", "select": ["none", "low_alpha"], "seen": [10.0, 12.0]}
    )
    both = pd.DataFrame({"has": ["neither", "selection", "both"], "seen": [10.0, 12.0, 9.0],
                         "training": [100.0, 90.0, 50.0]})  # fmt: skip
    Run("04_selective_finetuning", params).save({}, selection=selection, both=both)
    found = lines("04_selective_finetuning", "selection")
    table = cells("table2", found, costs).set_index(["line", "column"])
    assert table.loc[("han, freeze low_alpha", "points to full"), "ours"] == 2
    found = lines("04_selective_finetuning", "both")
    table = cells("table3", found, costs).set_index(["line", "column"])
    assert table.loc[("han, ours", "points to dense"), "ours"] == -1
    table = cells("table4", found, costs).set_index(["line", "column"])
    cell = table.loc[("han, both", "training, % of dense")]
    assert cell.ours == 50 and cell.paper == pytest.approx(100 * 122.2 / 181.4)


def test_a_setting_that_fills_the_table_goes_before_one_with_more_seeds(runs, costs):
    """Half a table with three seeds must not hide, as "not run", what a whole one says."""
    params = dict(dataset="scenes", framework="han")
    levels = {"none": 45.0, "random": 46.0, "high_alpha": 48.0, "low_alpha": 43.0}
    for steps, seeds, selects in ((300, 3, ["none", "low_alpha"]), (600, 2, list(levels))):
        for seed in range(seeds):
            scores = [levels[name] + seed + steps / 1000 for name in selects]
            table = pd.DataFrame({"regime": "plenty", "select": selects, "seen": scores})
            about = params | dict(steps=steps, selects=" ".join(selects), seed=seed)
            Run("04_selective_finetuning", about).save({}, selection=table)
    found = lines("04_selective_finetuning", "selection")
    table = cells("table2", found, costs).set_index(["line", "column"])
    for select in ("random", "high_alpha", "low_alpha"):
        cell = table.loc[(f"han, freeze {select}", "points to full")]
        assert cell.n == 2 and cell.ours == levels[select] - levels["none"]


def test_05_says_what_it_can_before_anything_has_run(runs):
    """As for a CLIP of one's own, of which nothing is published."""
    result = run_notebook(PROJECT / "notebooks" / "05_paper_tables.ipynb", {"backbone": "RN50"})
    assert result.status == "ok", result.error
    verdicts = load(result.folder)["metrics"]["verdicts"]
    assert [verdicts[f"C{i}"] for i in range(1, 5)] == [UNTESTED] * 4
    assert verdicts["C5"] != UNTESTED


def test_every_link_leads_to_its_run_on_the_page_and_in_the_report(runs):
    """05 over two runs, one with a page of its own and one without."""
    transfer(seeds=(0, 1), backbone="mini")
    first = next(runs.glob("03_transfer/*"))
    (first / "report.html").write_text("<p>executed</p>")
    result = run_notebook(PROJECT / "notebooks" / "05_paper_tables.ipynb")
    assert result.status == "ok", result.error
    page = result.folder / "report.html"
    linked = re.findall(r'data-run="([^"]+)" href="([^"]+)"', page.read_text())
    assert {run for run, _ in linked} == {f"03_transfer/{p.name}" for p in first.parent.iterdir()}
    for run, href in linked:
        target = (page.parent / unescape(href)).resolve()
        assert target.is_file() and target.parent == (runs / run).resolve()
    site = build_report().parent
    copied = site / "05_paper_tables" / result.folder.name / "index.html"
    hrefs = set(re.findall(r'href="(\.\./\.\./[^"]+)"', copied.read_text()))
    assert len(hrefs) == 3  # both runs, and back to all of them
    for href in hrefs:
        parts = urlsplit(href)
        target = (copied.parent / parts.path).resolve()
        assert target.is_file()
        assert not parts.fragment or f'id="{parts.fragment}"' in target.read_text()
    assert "data-run" not in copied.read_text()
