"""What many runs say, drawn: the transfer table, accuracy against cost, the map of freezing.

Every function returns the figure; ``plots`` sets their look and draws what is seen of one model.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .letters import brief, to_the_letter


@to_the_letter
def transfer(found: pd.DataFrame, scores: Sequence[str]) -> Figure:
    """Bars of mIoU (%) a row of the transfer table, a panel a setting, with 95 % intervals.

    Args:
        found: what ``tables.summary`` gives by ``row``; intervals where it has ``<score> ±``.
    """
    settings = [name for name in found.index.names if name != "row"]
    panels = list(found.groupby(level=settings, sort=False)) if settings else [((), found)]
    fig, axes = plt.subplots(
        len(panels), 1, figsize=(11, 2.9 * len(panels)), squeeze=False, sharex=False
    )
    for axis, (values, lines) in zip(axes[:, 0], panels, strict=True):
        lines, wide = lines.droplevel(settings), 0.8 / len(scores)
        for k, score in enumerate(scores):
            place = np.arange(len(lines)) + (k - (len(scores) - 1) / 2) * wide
            doubt = lines[f"{score} ±"] if f"{score} ±" in lines else None
            axis.bar(place, lines[score], wide, yerr=doubt, label=score, error_kw={"lw": 1})
        axis.set_xticks(range(len(lines)), map(brief, lines.index), rotation=12)
        named = zip(settings, np.atleast_1d(values), strict=True) if settings else ()
        words = [brief(f"{name.removeprefix('parameters.')} {value}") for name, value in named]
        seeds = f"{lines['n'].min()} to {lines['n'].max()} seeds"
        axis.set(title=", ".join([*words, seeds]), ylabel="mIoU (%)")
    axes[0, 0].legend()
    return fig


@to_the_letter
def cost_bubbles(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """mIoU against MACs, one bubble a row, its area the parameters (the paper's Figure 1).

    Args:
        panels: by title, tables of ``framework, row, GMACs, params_M, mIoU`` (%); may be empty.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.6), squeeze=False)
    kinds = pd.concat([table["framework"] for table in panels.values()]).unique()
    colours = dict(zip(kinds, sns.color_palette(n_colors=len(kinds)), strict=True))
    for axis, (title, table) in zip(axes[0], panels.items(), strict=True):
        area = 60 + 900 * table["params_M"] / table["params_M"].max()
        axis.scatter(table["GMACs"], table["mIoU"], area, table["framework"].map(colours),
                     alpha=0.55, edgecolors="w")  # fmt: skip
        for line in table.itertuples():
            place = line.GMACs, line.mIoU
            axis.annotate(brief(line.row), place, fontsize=7, ha="center", va="center")
        axis.set(title=brief(title), xlabel="GMACs of a picture", ylabel="mIoU (%)")
        axis.margins(0.15)
    handles = [Patch(color=colours[kind], alpha=0.55, label=brief(kind)) for kind in kinds]
    axes[0, 0].legend(handles=handles, title="area: parameters")
    return fig


@to_the_letter
def regime_map(table: pd.DataFrame, title: str = "") -> Figure:
    """Where freezing wins (green), ties (grey) or loses (red) against full fine-tuning.

    Args:
        table: what ``claims.judged`` gives; a line a setting, a column a selection.
    """
    settings = [name for name in table.index.names if name != "select"]
    wide = table.reset_index()
    wide["setting"] = wide[settings].astype(str).agg(", ".join, axis=1)
    wide["text"] = wide["gain"].map("{:+.1f}".format)
    wide["text"] += wide["half"].map(lambda h: "" if np.isnan(h) else f" ± {h:.1f}")
    wide["sign"] = wide["verdict"].map({"wins": 1.0, "loses": -1.0}).fillna(0.0)
    rows, columns = (list(dict.fromkeys(wide[name])) for name in ("setting", "select"))
    sign, text = (
        wide.pivot(index="setting", columns="select", values=value).loc[rows, columns]
        for value in ("sign", "text")
    )
    fig, axis = plt.subplots(figsize=(2 + 1.9 * len(columns), 1.2 + 0.5 * len(rows)))
    sns.heatmap(sign.fillna(0), annot=text.fillna("–"), fmt="", vmin=-1, vmax=1, linewidths=1,
                cmap=["#e59a8c", "#e8e8e8", "#9ccc9c"], cbar=False, ax=axis,
                xticklabels=[*map(brief, columns)], yticklabels=[*map(brief, rows)])  # fmt: skip
    named = ", ".join(name.removeprefix("parameters.") for name in settings)
    axis.set(title=brief(title, 100), xlabel="frozen", ylabel=named)
    axis.tick_params(axis="y", rotation=0)
    return fig
