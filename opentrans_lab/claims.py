"""Words for numbers: what an interval over seeds says, so that no verdict is written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

ONE_SEED = "one seed"


def verdict(difference: float, half: float) -> str:
    """``wins``, ``loses`` or ``ties`` (the interval holds 0); ``one seed`` where there is none.

    Args:
        difference: mean over the seeds, in mIoU points. half: half-width of its 95 % interval.
    """
    if math.isnan(half):
        return ONE_SEED
    if abs(difference) <= half:
        return "ties"
    return "wins" if difference > 0 else "loses"


def gains(table: pd.DataFrame, scores: Sequence[str], against: str = "none") -> pd.DataFrame:
    """``table`` with ``<score>_gain``: points more than the regime's ``against`` selection has."""
    base = table[table["select"] == against].set_index("regime")
    return table.assign(
        **{f"{score}_gain": table[score] - table["regime"].map(base[score]) for score in scores}
    )


def judged(found: pd.DataFrame, score: str = "seen") -> pd.DataFrame:
    """The lines of ``results.summary`` but full fine-tuning's, each with its verdict.

    Returns:
        indexed as ``found``: n, gain, half (NaN with one seed), verdict.
    """
    found = found.drop("none", level="select", errors="ignore")
    half = found.get(f"{score}_gain ±", pd.Series(math.nan, found.index))
    table = pd.DataFrame({"n": found["n"], "gain": found[f"{score}_gain"], "half": half})
    words = [verdict(g, h) for g, h in zip(table["gain"], table["half"], strict=True)]
    return table.assign(verdict=words)


def freezing_verdict(table: pd.DataFrame, select: str = "low_alpha") -> str:
    """Does freezing heavy-tailed layers help, and when? In words, from ``judged`` lines.

    "Helps" is: more than full fine-tuning in every interval, and in no setting less.
    """
    what = {"low_alpha": "small alpha", "prefix": "the leading stages"}.get(select, select)
    low = table.xs(select, level="select")
    words = low["verdict"].value_counts()
    count = {word: int(words.get(word, 0)) for word in ("wins", "ties", "loses", ONE_SEED)}
    told = len(low) - count[ONE_SEED]
    if not told:
        more = int((low["gain"] > 0).sum())
        return (
            f"One seed decides nothing: freezing {what} is above full fine-tuning in {more} "
            f"of {len(low)} settings, by {low['gain'].mean():+.1f} points on average."
        )
    if count["wins"] and not count["loses"]:
        answer = "helps" if count["wins"] == told else "helps in some settings and costs in none"
    elif count["loses"] and not count["wins"]:
        answer = "costs" if count["loses"] == told else "costs in some settings and helps in none"
    else:
        answer = "depends on the setting" if count["wins"] else "makes no difference that shows"
    where = ", ".join(f"{word} in {count[word]}" for word in ("wins", "ties", "loses"))
    return f"Freezing {what} {answer}: against full fine-tuning it {where} of {told} settings."
