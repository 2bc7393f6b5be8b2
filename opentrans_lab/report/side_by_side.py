"""The paper's tables cell by cell: ours, the paper's, the difference, and the runs behind a cell.

Accuracies on the mini lab stand beside the paper's on COCO only for their order. What can be
compared is how far a row lies from the one that it is held against, so that is a cell, too; and
costs, which are counted for the paper's own sizes.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from pandas.io.formats.style import Styler

from ..files import href
from ..records import paper, run_name
from .tables import HEADS_LEFT, half_width, main_setting

OURS = {"dense": "dense", "random": "random_layerwise", "ours": "ours"}  # Table 1's rows as ours
HAS = {  # Table 4's lines as ours
    ("none", "dense"): "neither",
    ("low_alpha", "dense"): "selection",
    ("low_alpha", "ours"): "both",
}
COUNTED = "counted"
COLUMNS = ("line", "column", "ours", "half", "n", "paper", "difference", "runs")


class Cell(NamedTuple):
    """A cell with a mean over seeds, and the folders of the runs that it comes from."""

    ours: float
    half: float
    folders: dict[int, str]


def _cell(part: pd.DataFrame, score: str, base: pd.DataFrame | None = None) -> Cell:
    """Mean of ``score`` over the seeds, or of its distance from ``base`` seed by seed."""
    if part.empty:
        return Cell(float("nan"), float("nan"), {})
    values = part.groupby("seed")[score].last()
    if base is not None:
        values = (values - base.groupby("seed")[score].last()).dropna()
    half = half_width(pd.Series([values.std()]), pd.Series([len(values)])).iloc[0]
    folders = part.groupby("seed")["folder"].last()
    return Cell(values.mean(), half, {int(seed): folders[seed] for seed in values.index})


def cells(
    table: str, found: pd.DataFrame, costs: pd.DataFrame, dataset: str = "scenes"
) -> pd.DataFrame:
    """A table of the paper, a line a cell.

    Args:
        table: ``"table1"`` to ``"table4"``.
        found: ``tables.lines``: of 03's transfer for Table 1, of 04's selection for Table 2, of
            04's both for Tables 3 and 4.
        costs: ``cost.printed_cells``.
        dataset: that the runs are of. Their mIoU in percent over all classes stands beside the
            paper's on it; of the mini lab, and where the paper has no such column, the mIoU over
            seen classes beside the paper's on COCO, which it was trained on.

    Returns:
        line, column, ours, half (of the 95 % interval over seeds, NaN with one), n (seeds), paper,
        difference, runs (folder by seed; empty for what is counted).
    """
    kind = {"table1": _table1, "table2": _table2, "table3": _table3, "table4": _table4}[table]
    rows, printed = [], {"voc20": "pas20"}.get(dataset, dataset)
    known = printed in set(paper(table).get("dataset", ()))
    score, dataset = ("all", printed) if known else ("seen", "coco")
    for line, column, cell, printed in kind(found, costs, score, dataset):
        difference = cell.ours - printed
        about = (cell.ours, cell.half, len(cell.folders), printed, difference, cell.folders)
        rows.append((line, column, *about))
    return pd.DataFrame(rows, columns=COLUMNS)


Cells = Iterator[tuple[str, str, Cell, float]]


def _table1(found: pd.DataFrame, costs: pd.DataFrame, score: str, dataset: str) -> Cells:
    table = paper("table1")
    table["what"] = table["dataset"].fillna(table["metric"])
    printed = table.set_index(["framework", "row", "what"])["value"]
    for framework in dict.fromkeys(table["framework"]):
        own = _main(found, framework, "row", OURS.values())
        mine = {row: _of(own, "row", name) for row, name in OURS.items()}
        for row, part in mine.items():
            value, dense = printed[framework, row, dataset], printed[framework, "dense", dataset]
            line, sparse = f"{framework}, {row}", "" if row == "dense" else "sparse_"
            yield line, "mIoU, %", _cell(part, score), value
            if row != "dense":
                yield line, "points to dense", _cell(part, score, mine["dense"]), value - dense
            params = _counted(costs, framework, f"{sparse}params", 1e6)
            yield line, "Params, M", params, printed[framework, row, "params"]
            macs = _counted(costs, framework, f"{sparse}macs", 1e9)
            yield line, "GMACs", macs, printed[framework, row, "flops"]


def _table2(found: pd.DataFrame, costs: pd.DataFrame, score: str, dataset: str) -> Cells:
    printed = paper("table2")
    selects = list(dict.fromkeys(printed["select"]))
    own = _main(_of(found, "regime", "plenty"), "han", "select", selects)
    mine = {select: _of(own, "select", select) for select in selects}
    for select, part in mine.items():
        values = printed[printed["select"] == select].set_index("dataset")["value"]
        full = printed[printed["select"] == "none"].set_index("dataset")["value"]
        line = f"han, freeze {select}"
        yield line, "mIoU, %", _cell(part, score), values[dataset]
        if select != "none":
            gain = _cell(part, score, mine["none"])
            yield line, "points to full", gain, values[dataset] - full[dataset]
        flops = printed[(printed["select"] == select) & (printed["metric"] == "training_flops")]
        counted = _counted(costs, "han", f"training, {select}, dense", 1)
        yield line, "training, PMACs", counted, flops["value"].iloc[0]


def _table3(found: pd.DataFrame, costs: pd.DataFrame, score: str, dataset: str) -> Cells:
    """Dense frameworks and the paper's "Ours", which is mask and selection together."""
    printed = paper("table3").dropna(subset="framework")
    printed = printed[printed["dataset"] == dataset].set_index(["framework", "row"])["value"]
    for framework in dict.fromkeys(printed.index.get_level_values("framework")):
        own = _main(found, framework, "has", HAS.values())
        neither, both = _of(own, "has", "neither"), _of(own, "has", "both")
        dense, ours = printed[framework, "dense"], printed[framework, "ours"]
        yield f"{framework}, dense", "mIoU, %", _cell(neither, score), dense
        yield f"{framework}, ours", "mIoU, %", _cell(both, score), ours
        yield f"{framework}, ours", "points to dense", _cell(both, score, neither), ours - dense


def _table4(found: pd.DataFrame, costs: pd.DataFrame, score: str, dataset: str) -> Cells:
    printed = paper("table4").set_index(["select", "row"])["value"]
    own = _main(found, "han", "has", HAS.values())
    for (select, row), name in HAS.items():
        line, value = f"han, {name}", printed[select, row]
        counted = _counted(costs, "han", f"training, {select}, {row}", 1)
        yield line, "training, PMACs", counted, value
        share = _cell(_of(own, "has", name), "training")
        yield line, "training, % of dense", share, 100 * value / printed["none", "dense"]


def _of(found: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    return found if found.empty else found[found[column] == value]


def _main(found: pd.DataFrame, framework: str, which: str, wanted: Collection[str]) -> pd.DataFrame:
    """The framework's lines of the setting that fills most of the table."""
    return main_setting(_of(found, "parameters.framework", framework), which, wanted)


def _counted(costs: pd.DataFrame, framework: str, cell: str, unit: float) -> Cell:
    value = costs[(costs["framework"] == framework) & (costs["cell"] == cell)]["counted"]
    return Cell(value.iloc[0] / unit if len(value) else float("nan"), float("nan"), {})


def side_by_side(table: pd.DataFrame, caption: str) -> Styler:
    """:func:`cells` as the paper prints them, each linked to the runs behind it, seed by seed."""
    text = table.assign(text=[_html(cell) for cell in table.itertuples()])
    wide = text.pivot_table("text", "line", "column", aggfunc="first", sort=False).fillna("")
    wide = wide.rename_axis(index=None, columns=None)
    look = {"text-align": "left", "white-space": "nowrap"}
    return wide.style.set_caption(caption).set_properties(**look).set_table_styles(HEADS_LEFT)


def _html(cell) -> str:
    if pd.isna(cell.ours):
        return f"not run<br>paper {_number(cell.paper)}"
    half = "" if pd.isna(cell.half) else f" ± {_number(cell.half)}"
    seeds = " ".join(_link(folder, str(seed)) for seed, folder in cell.runs.items())
    word = "seed" if cell.n == 1 else "seeds"
    behind = f"{word} {seeds}" if cell.n else COUNTED
    difference = "0" if abs(cell.difference) < 0.05 else f"{cell.difference:+.1f}"
    difference = _number(cell.difference) if pd.isna(cell.difference) else difference
    return (
        f"<b>{_number(cell.ours)}</b>{half}, {behind}<br>"
        f"paper {_number(cell.paper)}, difference {difference}"
    )


def _number(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.1f}"


def _link(folder: str, text: str) -> str:
    """To a run as this notebook sees it; pages that lie elsewhere go by ``data-run``."""
    if not folder:
        return text
    path = Path(folder)
    page = path / ("report.html" if (path / "report.html").is_file() else "metrics.json")
    run = href(run_name(path))
    return f'<a data-run="{run}" href="{href(os.path.relpath(page))}">{escape(text)}</a>'


def as_csv(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Several :func:`cells` under each other, with runs as names instead of folders."""
    parts: Sequence[pd.DataFrame] = [
        part.assign(runs=[_names(runs) for runs in part["runs"]]).assign(table=name)
        for name, part in tables.items()
    ]
    return pd.concat(parts, ignore_index=True)[["table", *COLUMNS]]


def _names(runs: dict[int, str]) -> str:
    return " ".join(run_name(Path(folder)) for folder in runs.values() if folder)
