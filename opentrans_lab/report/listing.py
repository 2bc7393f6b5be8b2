"""The page beside the published runs: which run is where, and what it says, a table a grid."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import pandas as pd

from ..files import href
from ..records import published, quoted, run_name
from .page import is_mini_lab, number
from .tables import ADDED, differing

HEAD = """# Published runs

One folder a run, `<table>/<framework>/seed-<n>[-<setting>]`: its numbers, tables and figures. All \
parameters, the revision of the code and the device are in its `metrics.json`. `opentrans-lab \
campaign` writes these folders and this page. Accuracies are mIoU in % on seen / unseen names; \
*mini lab* is procedural scenes and says nothing about real photographs.
"""
UNQUOTED = "not quoted: made from uncommitted code"


def published_page() -> str:
    """Markdown that lists every published run, with links as seen from ``results``."""
    runs = [(run_name(folder), record) for folder, record in published()]
    parts = [HEAD]
    for table, group in groupby(runs, key=lambda run: run[0].partition("/")[0]):
        parts.append(f"## {table}\n\n" + "\n".join(_table(list(group))) + "\n")
    return "\n".join(parts)


def _table(runs: list[tuple[str, dict]]) -> list[str]:
    """The lines of one table, in Markdown."""
    params = pd.DataFrame([ADDED | record["parameters"] for _, record in runs])
    own = {"parameters.seed", "parameters.framework", "parameters.steps"}  # columns of their own
    varying = [c for c in differing(params.add_prefix("parameters.")) if c not in own]
    names = [name.removeprefix("parameters.") for name in varying]
    lines: list[str] = []
    for (place, record), values in zip(runs, params.to_dict("records"), strict=True):
        lab = is_mini_lab(record["parameters"])
        cells = {
            "run": f"[{place.rpartition('/')[2]}]({href(place)}/)",
            "framework": place.split("/")[1],
            "seed": record["seed"],
            "what it varies": ", ".join(f"{name} {number(values[name])}" for name in names),
            "steps": _length(record["parameters"]),
            "data": "mini lab" if lab else values.get("dataset", ""),
            "revision": record["revision"],
            "what it says": _says(record["metrics"]) if quoted(record) else UNQUOTED,
        }
        lines += [] if lines else [_line(cells), _line(["---"] * len(cells))]
        lines.append(_line(cells.values()))
    return lines


def _length(params: dict) -> str:
    """How many steps; where nothing is fine-tuned, those of a round of pruning."""
    if "steps" not in params and "prune_steps" in params:
        return f"{number(params['prune_steps'])} a round"
    return number(params.get("steps"))


def _says(metrics: dict) -> str:
    """Accuracy of every row; where there is none, the numbers that are no times."""
    scores = metrics.get("miou")
    if isinstance(scores, dict) and all(isinstance(of, dict) for of in scores.values()):
        return "; ".join(f"{row} {_score(of)}" for row, of in scores.items())
    numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
    return "; ".join(f"{k} {number(v)}" for k, v in numbers.items() if not k.endswith("seconds"))


def _score(of: dict) -> str:
    points = (of.get("seen"), of.get("unseen"))
    return " / ".join("–" if value is None else f"{value:.1f}" for value in points)


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"
