"""One look for all figures, and the pictures of spectra and alphas.

Every function returns the figure, and draws only what it is given: nothing is computed here but
bins.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from ..alpha import Spectrum
from ..errors import LabError
from .letters import brief, to_the_letter

TRAINED, FROZEN, RANDOM, FIT = "#3b6ea5", "#2a9d8f", "#b8b8b8", "#d1495b"


def theme() -> None:
    """Set the one seaborn theme of all notebooks."""
    sns.set_theme(context="notebook", style="ticks", palette="deep", rc={
        "figure.dpi": 100, "savefig.dpi": 150, "figure.constrained_layout.use": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11,
        "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
        "legend.frameon": False, "image.cmap": "viridis",
    })


def _plain_log(axis: Axis, ticks: Sequence[float] = (1, 2, 5)) -> None:
    """Plain numbers (0.5, 2, 10) at these multiples of the powers of ten, no minor ticks."""
    axis.set_major_locator(LogLocator(subs=ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def esd_panel(axis: Axes, spectrum: Spectrum, row: Mapping) -> None:
    """One layer's ESD on log-log axes: density, control, power-law fit, xmin and the random edge.

    Args:
        row: the layer's line of ``layer_alphas``; a layer without a fit shows its status instead.
    """
    own = spectrum.eigs[spectrum.eigs > 0]
    random = spectrum.control[spectrum.control > 0]
    low = max(np.quantile(own, 0.02), own[-1] * 1e-5) * 0.999
    bins = int(np.clip(2.5 * math.sqrt(len(own)), 14, 40))
    edges = np.geomspace(low, max(own[-1], random.max(initial=0)) * 1.05, bins)

    def density(values: np.ndarray) -> np.ndarray:
        return np.histogram(values, edges)[0] / len(values) / np.diff(edges)

    axis.stairs(density(own), edges, fill=True, color=TRAINED, alpha=0.55, lw=0)
    if len(random):
        axis.stairs(density(random), edges, color="0.35", lw=1)
    if row["alpha"] > 1:
        x = np.geomspace(row["xmin"], own[-1], 50)
        share = row["n_tail"] / len(own)
        y = share * (row["alpha"] - 1) / row["xmin"] * (x / row["xmin"]) ** -row["alpha"]
        axis.plot(x, y, color=FIT, lw=2)
        axis.axvline(row["xmin"], color=FIT, lw=1, ls="--")
        note = (f"α = {row['alpha']:.2f} ± {row['sigma']:.2f}\nD = {row['D']:.2f}   "
                f"n = {row['n_tail']}/{len(own)}")
    else:
        note = str(row["status"])
    axis.axvline(spectrum.edge, color="k", lw=1, ls=":")
    axis.set_xscale("log")
    axis.set_yscale("log")
    top = max(density(own).max(), density(random).max() if len(random) else 0)
    lowest = 0.5 / len(own) / np.diff(edges)[-1]
    axis.set_ylim(lowest, top * (top / lowest) ** 0.45)  # headroom for the note
    axis.text(0.98, 0.99, note, transform=axis.transAxes, ha="right", va="top", fontsize=8.5,
              bbox=dict(facecolor="white", alpha=0.85, lw=0, pad=1.5))
    if edges[-1] / edges[0] < 60:
        _plain_log(axis.xaxis)
    else:
        axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_title(brief(row["name"]), fontsize=10, parse_math=False)


def esd_grid(spectra: Mapping[str, Spectrum], alphas: pd.DataFrame, title: str = "",
             columns: int = 4) -> Figure:
    """A panel a layer (see :func:`esd_panel`) for the layers of `alphas` that have a spectrum.

    Raises:
        LabError: none of them has one.
    """
    rows = [row for row in alphas.to_dict("records") if row["name"] in spectra]
    if not rows:
        raise LabError("none of these layers has a spectrum to draw; see their status")
    columns = min(columns, len(rows))
    height = math.ceil(len(rows) / columns)
    fig, axes = plt.subplots(height, columns, figsize=(3.2 * columns, 2.7 * height + 0.8),
                             squeeze=False)
    for axis, row in zip(axes.flat, rows, strict=False):
        esd_panel(axis, spectra[row["name"]], row)
    for axis in axes.flat[len(rows) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("density")
    for column in range(columns):
        last = max(r for r in range(height) if axes[r, column].get_visible())
        axes[last, column].set_xlabel("eigenvalue λ")
    handles = [Patch(color=TRAINED, alpha=0.55, label="this layer"),
               Line2D([], [], color="0.35", lw=1, label="same weights, shuffled or random"),
               Line2D([], [], color=FIT, lw=2, label="power-law fit from xmin (dashed)"),
               Line2D([], [], color="k", lw=1, ls=":", label="edge of pure noise")]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(4, 2 * columns))
    if title:
        fig.suptitle(brief(title, 100), parse_math=False)
    return fig


def _by_depth(count: int, height: float = 4.2) -> tuple[Figure, Axes]:
    return plt.subplots(figsize=(max(7.0, 0.24 * count + 1.5), height))


def _name_ticks(axis: Axes, names: pd.Series) -> None:
    axis.set_xticks(range(len(names)), map(brief, names), rotation=90, fontsize=8)
    axis.set_xlim(-0.7, len(names) - 0.3)


@to_the_letter
def alpha_depth(alphas: pd.DataFrame, frozen: Collection[str] = (), title: str = "") -> Figure:
    """Alpha of each layer from input to output with one standard error (the paper's Figure 4).

    Layers flagged for a small tail are hollow.
    """
    table = alphas.dropna(subset="alpha").reset_index(drop=True)
    fig, axis = _by_depth(len(table))
    for k, row in enumerate(table.itertuples()):
        color = FROZEN if row.name in frozen else FIT
        axis.errorbar(k, row.alpha, row.sigma, fmt="o", color=color, ms=6, lw=1.2, capsize=2,
                      mfc=color if row.status == "ok" else "white")
    median = table.alpha.median()
    axis.axhline(median, color="0.4", lw=1, ls="--", zorder=0)
    axis.set_yscale("log")
    _plain_log(axis.yaxis, (1, 1.5, 2, 3, 5, 7))
    _name_ticks(axis, table.name)
    axis.set(ylabel="α", title=title)
    handles = [Line2D([], [], color=FROZEN, marker="o", ls="", label="small α: frozen"),
               Line2D([], [], color=FIT, marker="o", ls="", label="large α: trained further"),
               Line2D([], [], color="0.3", marker="o", mfc="white", ls="", label="small tail"),
               Line2D([], [], color="0.4", ls="--", label=f"median {median:.2f}")]
    fig.legend(handles=handles, loc="outside upper center", ncols=4)
    return fig


@to_the_letter
def sensitivity_maps(table: pd.DataFrame) -> Figure:
    """Three maps over all pairs of (reshape, rule): rank correlation, layers, parameters moved."""
    order = list(dict.fromkeys(table.a))
    share = table.assign(moved=table.params / 1e6)
    fig, axes = plt.subplots(1, 3, figsize=(17, 5.6))
    for axis, (column, label, fmt, cmap) in zip(axes, (
            ("spearman", "rank correlation of α (Spearman)", ".2f", "viridis"),
            ("layers", "layers that change sides", ".0f", "rocket_r"),
            ("moved", "parameters that change sides (millions)", ".2f", "rocket_r")), strict=True):
        grid = share.pivot(index="a", columns="b", values=column).loc[order, order]
        sns.heatmap(grid, ax=axis, annot=True, fmt=fmt, cmap=cmap, cbar=False, square=True,
                    annot_kws={"fontsize": 7}, yticklabels=axis is axes[0])
        axis.set(title=label, xlabel="", ylabel="")
        axis.tick_params(axis="x", rotation=90)
    return fig


@to_the_letter
def freeze_bars(alphas: pd.DataFrame, frozen: Collection[str] = ()) -> Figure:
    """How often each layer falls into the frozen half when its eigenvalues are resampled."""
    table = alphas.dropna(subset="freeze_probability").reset_index(drop=True)
    fig, axis = _by_depth(len(table), 3.4)
    colors = [FROZEN if name in frozen else FIT for name in table.name]
    axis.bar(range(len(table)), table.freeze_probability, color=colors, width=0.8)
    axis.axhspan(0.1, 0.9, color="0.5", alpha=0.12, lw=0)
    axis.set(ylabel="freeze probability", ylim=(0, 1.02))
    axis.set_title("in the grey band, chance decides as much as the layer")
    _name_ticks(axis, table.name)
    return fig


@to_the_letter
def control_gap(alphas: pd.DataFrame, untrained: pd.DataFrame | None = None,
                title: str = "below zero: a heavier tail than the control's") -> Figure:
    """Alpha minus the alpha of each layer's randomised control; circles: of an untrained tower.

    About half of the circles lie below zero, and how far tells how little a single bar means.

    Args:
        untrained: alphas of the same layers with random weights, or None.
    """
    table = alphas.dropna(subset=["alpha", "control_alpha"]).reset_index(drop=True)
    gap = table.alpha - table.control_alpha
    fig, axis = _by_depth(len(table), 3.4)
    axis.bar(range(len(table)), gap, color=np.where(gap < 0, FROZEN, RANDOM), width=0.8)
    low, high = gap.min(), gap.max()
    if untrained is not None:
        null = untrained.set_index("name").reindex(table.name)
        circles = (null.alpha - null.control_alpha).to_numpy()
        axis.plot(circles, "o", ms=4, color="0.2", mfc="white", label="the same layer untrained")
        fig.legend(loc="outside upper right")
        low, high = np.nanmin([low, *circles]), np.nanmax([high, *circles])
    axis.axhline(0, color="0.3", lw=1)
    axis.set_yscale("symlog", linthresh=1)
    axis.yaxis.set_major_locator(FixedLocator([-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100]))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_ylim(min(-1.2, 1.3 * low), max(1.2, 1.3 * high))
    axis.set(ylabel="α − α of the control", title=title)
    _name_ticks(axis, table.name)
    return fig


@to_the_letter
def alpha_flow(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Alpha of every layer through several states of one model, a line a layer, median in bold."""
    states = {brief(k): table.set_index("name").alpha for k, table in tables.items()}
    merged = pd.concat(states, axis=1).dropna()
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1, 1.4))
    places = range(merged.shape[1])
    colors = sns.color_palette("viridis", len(merged))
    for color, (_, values) in zip(colors, merged.iterrows(), strict=True):
        axes[0].plot(places, values, color=color, lw=1, alpha=0.8)
    axes[0].plot(places, merged.median(), color="k", lw=3, marker="o")
    axes[0].set_xticks(places, merged.columns)
    axes[0].set(ylabel="α", yscale="log", title="each layer (dark: input), and the median",
                xlim=(-0.2, len(places) - 0.8))
    _plain_log(axes[0].yaxis, (1, 1.5, 2, 3, 5, 7))
    long = merged.melt(var_name="state", value_name="alpha")
    sns.ecdfplot(long, x="alpha", hue="state", ax=axes[1])
    axes[1].set(xscale="log", xlabel="α", ylabel="share of layers", title="distribution of α")
    _plain_log(axes[1].xaxis, (1, 1.5, 2, 3, 5, 7))
    axes[1].get_legend().set_title("")
    return fig
