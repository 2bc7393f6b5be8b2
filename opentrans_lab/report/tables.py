"""Tables over many runs, reduced over seeds, and the paper's beside them (``data/paper``)."""

from collections.abc import Collection
from html import escape

import pandas as pd
from pandas.io.formats.style import Styler
from scipy.stats import t as student_t

from ..records import described, identity, paper, read_table, records, run_key

APART = ("seed", "device", "devices")  # parameters that make no experiment another one
ADDED = {
    "devices": 1, "jitter": False, "norm": "train", "precision": "auto", "reselect": 0, "pool": 0,
    "targets": "fresh",
}  # fmt: skip
"""Parameters that the first published runs did not have yet, with the values that they ran with."""
BESIDE = ("parameters.rows", "parameters.selects", "parameters.regimes")
"""What else a run looked at: it changes nothing in a line."""
WHICH = ("row", "regime", "select", "has", "part", "names")
"""Columns that tell the lines of a notebook's table apart."""
HEADS_LEFT = [{"selector": "th", "props": "text-align: left"}]  # a Styler's, above words
POINTS = ("dense", "ours", "random_layerwise")  # the paper's three


def experiment(params: dict, seedless: bool = False) -> str:
    """A key of what makes these parameters, with what they are made from, an experiment;
    ``seedless``, of all its seeds.

    Older runs count with the values of ``ADDED``.
    """
    apart = APART if seedless else APART[1:]
    return run_key({k: v for k, v in (ADDED | params).items() if k not in apart})


def lines(
    notebook: str, table: str, mine: tuple[dict, pd.DataFrame] | None = None, **parameters
) -> pd.DataFrame:
    """All lines of ``<table>.csv`` of a notebook's finished runs, each once: where several runs
    made the same one (they may differ in ``BESIDE``), of each column the newest value.

    Args:
        mine: parameters and table of a run that is not saved yet, to count as well.
        parameters: only runs with these values. An older run counts with the values of ``ADDED``.

    Returns:
        the table's columns, ``seed``, ``folder`` (of the run) and ``parameters.<name>`` of all
        parameters that make an experiment. Empty where nothing has run.
    """
    made = [
        (described(record), read_table(folder / f"{table}.csv"), str(folder))
        for folder, record in records(notebook)
        if (folder / f"{table}.csv").exists()
    ]
    found = {}
    if mine:
        made.append((identity(mine[0]), mine[1], ""))
    for given, part, folder in made:
        found.pop(experiment(given), None)  # and comes back as the newest
        found[experiment(given)] = (ADDED | given, part, folder)
    parts = []
    for own, part, folder in found.values():
        if all(own.get(k) == v for k, v in parameters.items()):
            about = {f"parameters.{k}": v for k, v in own.items() if k not in APART}
            parts.append(part.assign(**about, seed=own.get("seed"), folder=folder))
    if not parts:
        return pd.DataFrame()
    every = pd.concat(parts, ignore_index=True)
    same = [c for c in every if c.startswith("parameters.") and c not in BESIDE]
    same += ["seed", *(c for c in WHICH if c in every)]
    return every.groupby(same, sort=False, dropna=False, as_index=False).last()


def differing(found: pd.DataFrame) -> list[str]:
    """The ``parameters.<name>`` columns in which these lines differ, but for ``BESIDE``."""
    names = (c for c in found if c.startswith("parameters.") and c not in BESIDE)
    return [c for c in names if found[c].nunique() > 1]


def main_setting(found: pd.DataFrame, which: str, wanted: Collection[str]) -> pd.DataFrame:
    """Of :func:`lines`, those of the setting with most of the ``wanted`` lines, by column
    ``which``; of several, with most seeds; of several, the one that was begun last."""
    if found.empty or not (by := differing(found)):
        return found

    def rank(part: pd.DataFrame) -> tuple[int, int]:
        there = part[part[which].isin(wanted)]
        return there[which].nunique(), there["seed"].nunique()

    groups = [part for _, part in found.groupby(by, dropna=False, sort=False)]
    return max(reversed(groups), key=rank)


def half_width(std: pd.Series, n: pd.Series, level: float = 0.95) -> pd.Series:
    """Half of the interval of a mean over ``n`` seeds (Student's t), of 95 %; NaN for one."""
    return student_t.ppf((1 + level) / 2, (n - 1).where(n > 1)) * std / n**0.5


def summary(
    notebook: str,
    table: str,
    by: list[str],
    values: list[str],
    mine: tuple[dict, pd.DataFrame] | None = None,
    **parameters,
) -> pd.DataFrame:
    """:func:`lines`, reduced over their seeds.

    Args:
        by: columns of the table that tell lines apart.
        values: columns to average; those that no run has are left out.
        mine, parameters: as for :func:`lines`.

    Returns:
        indexed by ``by`` and by every parameter (but seed and devices) in which the runs differ, so
        that different experiments are never averaged: n (seeds), the mean of each value over the
        seeds and, from two seeds on, ``<value> ±``, the half-width of a 95 % interval. Empty where
        nothing has run.
    """
    every = lines(notebook, table, mine, **parameters)
    if every.empty:
        return pd.DataFrame(columns=["n", *values])
    by = [*differing(every), *by]
    values = [v for v in values if v in every and every[v].notna().any()]
    once = every.groupby([*by, "seed"], sort=False, dropna=False)[values].mean()  # a line a seed
    groups = once.groupby(level=by, sort=False, dropna=False)
    found = groups.size().to_frame("n")
    for value in values:
        found[value] = groups[value].mean()
        if (found["n"] > 1).any():
            found[f"{value} ±"] = half_width(groups[value].std(), found["n"])
    return found


def literal(table: pd.DataFrame, caption: str = "") -> Styler:
    """``table.style`` whose words are what they say: names with ``<`` or ``&`` are no HTML."""
    look = table.style.format(escape="html").set_caption(escape(caption))
    return look.format_index(escape="html").format_index(escape="html", axis="columns")


def styled(found: pd.DataFrame, caption: str) -> Styler:
    """:func:`summary` or :func:`paper_wide` to look at: plain names of parameters, one digit, a
    dash for nothing, and each line whole, so that it can be sorted."""
    plain = found.reset_index() if found.index.names != [None] else found.copy()
    plain.columns = [str(name).removeprefix("parameters.") for name in plain]
    numbers = [str(name) for name in found]
    look = literal(plain, caption).hide(axis="index")
    look = look.format(
        lambda value: f"{value:g}" if isinstance(value, float) else value, escape="html"
    )
    return look.format(precision=1, na_rep="–", subset=numbers)


def cost_points(found: pd.DataFrame) -> pd.DataFrame:
    """The paper's three rows of the transfer table with what they cost: framework, row, GMACs,
    params_M, mIoU over seen classes (%).

    Args:
        found: :func:`lines` of 03's transfer; of each framework its :func:`main_setting`, mean
            over seeds.
    """
    columns = ["framework", "row", "GMACs", "params_M", "mIoU"]
    if found.empty:
        return pd.DataFrame(columns=columns).astype(dict.fromkeys(columns[2:], float))
    parts = [part for _, part in found.groupby("parameters.framework", sort=False)]
    table = pd.concat([main_setting(part, "row", POINTS) for part in parts])
    table = table[table["row"].isin(POINTS)].rename(
        columns={"parameters.framework": "framework", "seen": "mIoU"}
    )
    table = table.assign(GMACs=table["macs"] / 1e9, params_M=table["params"] / 1e6)
    return table.groupby(columns[:2], sort=False)[columns[2:]].mean().reset_index()


def paper_points() -> pd.DataFrame:
    """:func:`cost_points` of the paper's Table 1, on COCO; its FLOPs are MACs."""
    table = paper("table1")
    table = table[table["dataset"].isna() | (table["dataset"] == "coco")]
    wide = table.pivot_table("value", ["framework", "row"], "metric", sort=False).reset_index()
    return wide.rename(columns={"flops": "GMACs", "params": "params_M", "miou": "mIoU"})
