"""Words for numbers: what an interval over seeds says, so that no verdict is written by hand.

``claim_table`` judges the paper's five claims from whatever runs there are.
"""

import math
from collections.abc import Sequence

import pandas as pd

from .tables import differing, half_width

ONE_SEED = "one seed"
UNTESTED = "not tested here"
SCORE = "seen"  # column that decides: mIoU in percent over seen classes
CLOSE = 0.01  # of the printed number: a cost that is reproduced
KEPT = 3.7  # mIoU points: the most that the paper's own "Ours" loses on COCO (Table 3, Han et al.)
UNTRAINED = ("random_layerwise", "random_global")  # random masks on CLIP's weights, as the paper's
RANDOM = (*UNTRAINED, "random_layerwise_kd")  # and the control that had as much L_KD as ours
CLAIMS = {
    "C1": "The pruned weights beat random ones in every framework",
    "C2": "One mask serves every framework without pruning again",
    "C3": "Freezing small alpha beats full fine-tuning, random and large alpha",
    "C4": "Mask and selection together keep accuracy at lower cost in every framework",
    "C5": "The paper's costs follow from a count",
}


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


def gains(table: pd.DataFrame, scores: Sequence[str]) -> pd.DataFrame:
    """``table`` with ``<score>_gain``: points more than the regime's full fine-tuning has."""
    base = table[table["select"] == "none"].set_index("regime")
    return table.assign(
        **{f"{score}_gain": table[score] - table["regime"].map(base[score]) for score in scores}
    )


def judged(found: pd.DataFrame) -> pd.DataFrame:
    """The lines of ``tables.summary`` but full fine-tuning's, each with its verdict.

    Returns:
        indexed as ``found``: n, gain, half (NaN with one seed), verdict.
    """
    found = found.drop("none", level="select", errors="ignore")
    half = found.get(f"{SCORE}_gain ±", pd.Series(math.nan, found.index))
    table = pd.DataFrame({"n": found["n"], "gain": found[f"{SCORE}_gain"], "half": half})
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


def compared(
    found: pd.DataFrame, which: str, ours: str, rivals: Sequence[str], by: Sequence[str],
    score: str, every: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """How far ``ours`` is ahead of the nearest of its ``rivals``, seed by seed, in each setting.

    Ahead of all is ahead of each, in a 95 % interval of its own; behind is behind one of them, in
    an interval that allows for their number (Bonferroni). The best rival of each seed would be
    another thing: chance alone favours the best of several.

    Args:
        found: ``tables.lines``. which: the column that names the competitors.
        by: columns that tell settings apart, beside the parameters in which the runs differ.
        score: mIoU in percent. every: leave out what lacks one of the rivals.

    Returns:
        one line a setting that has ``ours`` and a rival: ``by``, rival (the nearest by the mean, of
        those with several seeds where there are any), n (its seeds), gain (points), half (of the
        95 % interval, NaN with one seed), verdict.
    """
    by = [*dict.fromkeys([*by, *differing(found)])]
    if found.empty or score not in found:
        return pd.DataFrame(columns=[*by, "rival", "n", "gain", "half", "verdict"])
    # Not pivot_table, which with dropna=False makes a line of every combination of parameters.
    means = found.groupby([*by, "seed", which], dropna=False, observed=True)[score].mean()
    wide = means.unstack(which)
    settings = []
    for setting, part in wide.reindex(columns=[ours, *rivals]).groupby(level=by, dropna=False):
        gaps = part[list(rivals)].rsub(part[ours], axis=0)
        gaps = gaps.dropna() if every else gaps.dropna(axis=1, how="all")
        if gaps.size:
            names = setting if isinstance(setting, tuple) else (setting,)
            settings.append(dict(zip(by, names, strict=True)) | _nearest(gaps))
    return pd.DataFrame(settings, columns=[*by, "rival", "n", "gain", "half", "verdict"])


def _nearest(gaps: pd.DataFrame) -> dict:
    """Of the distances to each rival (columns), a line a seed: the least, and all in one word."""
    n = gaps.count()
    gaps = gaps.loc[:, n > 1] if (n > 1).any() else gaps  # beside these, one seed decides nothing
    mean, std, n = gaps.mean(), gaps.std(), gaps.count()
    half, wide = half_width(std, n), half_width(std, n, 1 - 0.05 / len(mean))
    if (n == 1).all():
        word = ONE_SEED
    elif (mean > half).all():
        word = "wins"
    else:
        word = "loses" if (mean < -wide).any() else "ties"
    rival = mean.idxmin()
    known = {"rival": rival, "n": n[rival], "gain": mean[rival], "half": half[rival]}
    return known | {"verdict": word}


def _judge(good: pd.Series, bad: pd.Series, seeds: pd.Series) -> str:
    """One counterexample refutes what is said of every framework, unless others bear it out."""
    refuted = bad.any() and not good.any()
    word = "holds" if good.all() else "does not hold" if refuted else "mixed"
    alone = (seeds == 1).mean()
    return word + (f", {ONE_SEED}" if alone == 1 else f", partly {ONE_SEED}" if alone else "")


def _split(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Settings that decide, and the others: those with one seed, of a framework that has better."""
    several = table["n"] > 1
    known = set(table.loc[several, "parameters.framework"])
    decides = several | ~table["parameters.framework"].isin(known)
    return table[decides], table[~decides]


def _superior(table: pd.DataFrame, rivals: str, frameworks: Sequence[str] = ()) -> tuple[str, str]:
    """Verdict and evidence for "ours is ahead of its rivals in each setting": in an interval, with
    one seed by the sign alone."""
    if table.empty:
        return UNTESTED, "no finished run"
    deciding, others = _split(table)
    alone = deciding["n"] == 1
    good = (deciding["verdict"] == "wins") | (alone & (deciding["gain"] > 0))
    bad = (deciding["verdict"] == "loses") | (alone & (deciding["gain"] <= 0))
    told = f"{_ahead(deciding, rivals)}, {_spread(deciding)}"
    if len(others):
        told += f"; with one seed, which decides nothing, in {_count(others['gain'] > 0)}"
    return _where(_judge(good, bad, deciding["n"]), told, table, frameworks)


def _ahead(table: pd.DataFrame, rivals: str) -> str:
    words = table["verdict"].value_counts()
    counts = ", ".join(f"{w} {words[w]}" for w in ("wins", "ties", "loses", ONE_SEED) if w in words)
    return f"ahead of {rivals} in {_count(table['gain'] > 0)} settings ({counts})"


def _count(true: pd.Series) -> str:
    return f"{int(true.sum())} of {len(true)}"


def _spread(table: pd.DataFrame) -> str:
    return f"{table['gain'].min():+.1f} to {table['gain'].max():+.1f} points"


def _where(word: str, told: str, table: pd.DataFrame, frameworks: Sequence[str]) -> tuple[str, str]:
    """With what was not run."""
    if not (missing := sorted(set(frameworks).difference(table["parameters.framework"]))):
        return word, told
    return f"{word} where tested", f"{told}; not tested in {', '.join(missing)}"


def claim_table(
    transfer: pd.DataFrame,
    selection: pd.DataFrame,
    both: pd.DataFrame,
    costs: pd.DataFrame,
    frameworks: Sequence[str],
) -> pd.DataFrame:
    """The paper's claims C1 to C5 before the runs there are.

    A verdict is "holds" (in every setting), "does not hold" (in some it is refuted, and in none
    borne out), "mixed" or "not tested here"; where a framework lacks it says so. Settings with one
    seed decide, by their sign and in so many words, only for a framework that has no others.

    Args:
        transfer, selection, both: ``tables.lines`` of 03's transfer, 04's selection and 04's both.
        costs: columns ``counted`` and ``printed``, of the cells of the paper that have a count.
        frameworks: all that the claims speak of.

    Returns:
        claim, says, verdict, evidence.
    """
    by = ["parameters.framework"]
    first = compared(transfer, "row", "ours", UNTRAINED, by, SCORE)
    trained = compared(transfer, "row", "ours", RANDOM, by, SCORE)
    second = compared(transfer, "row", "ours_mask_only", UNTRAINED, by, SCORE)
    rivals = ("none", "random", "high_alpha")
    third = compared(selection, "select", "low_alpha", rivals, [*by, "regime"], SCORE, True)
    found = {
        "C1": _superior(first, "random masks", frameworks),
        "C2": _superior(second, "random masks on the same weights", frameworks),
        "C3": _superior(third, "all three", frameworks),
        "C4": _kept(both, frameworks),
        "C5": _reproduced(costs),
    }
    if len(trained):  # a control that the paper lacks
        word, told = found["C1"]
        also = _ahead(_split(trained)[0], "all, those with as much L_KD as ours included,")
        found["C1"] = word, f"{told}; {also}"
    return pd.DataFrame(
        {"claim": key, "says": CLAIMS[key], "verdict": word, "evidence": evidence}
        for key, (word, evidence) in found.items()
    )


def _kept(both: pd.DataFrame, frameworks: Sequence[str]) -> tuple[str, str]:
    """Kept: the whole interval (with one seed, the value) lies above ``-KEPT``, at a lower cost;
    lost: all of it lies below, or the cost is no lower. What is between decides nothing."""
    table = compared(both, "has", "both", ["neither"], ["parameters.framework"], SCORE)
    by = [name for name in table if name.startswith("parameters.")]
    if len(table):
        cost = both[both["has"] == "both"].groupby(by, dropna=False)["training"].max()
        table = table.merge(cost.reset_index(), on=by, how="left").dropna(subset="training")
    if table.empty:
        return UNTESTED, "no finished run"
    half, cheaper = table["half"].fillna(0), table["training"] < 100
    near, far = table["gain"] - half >= -KEPT, table["gain"] + half < -KEPT
    table = table.assign(near=near, far=far, kept=near & cheaper, lost=far | ~cheaper)
    deciding, others = _split(table)
    word = _judge(deciding["kept"], deciding["lost"], deciding["n"])
    told = f"within {KEPT:g} points in {_count(deciding['near'])} and further off in "
    told += f"{_count(deciding['far'])} settings, {_spread(deciding)}, at "
    told += f"{deciding['training'].min():.0f} to {deciding['training'].max():.0f} % of the cost of"
    told += " training"
    if len(others):
        told += f"; with one seed, which decides nothing, further off in {_count(others['far'])}"
    return _where(word, told, table, frameworks)


def _reproduced(costs: pd.DataFrame) -> tuple[str, str]:
    costs = costs.dropna()
    if costs.empty:
        return UNTESTED, "nothing counted"
    off = (costs["counted"] / costs["printed"] - 1).abs()
    good = off <= CLOSE
    told = f"{int(good.sum())} of {len(good)} cells within {CLOSE:.0%}, the worst {off.max():.1%}"
    return _judge(good, ~good, pd.Series([2])), f"{told} off"
