"""Power-law fits: where the tail of a spectrum begins, and how steep it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..checks import choose

RULES = ("csn", "mid", "peak", "peak_official")
ROUNDING = 1e-5  # a tail whose logarithms differ less is one value, computed in float32
SMALL_TAIL = 20  # below it sigma is rough and the layer is flagged, but still ranked


@dataclass(frozen=True, slots=True)
class Fit:
    """A power-law fit. Not fitted: alpha, sigma, xmin and D are NaN and `status` says why."""

    alpha: float = math.nan
    sigma: float = math.nan  # standard error of alpha, (alpha - 1) / sqrt(n_tail)
    xmin: float = math.nan  # where the tail begins, in units of eigenvalues
    D: float = math.nan  # Kolmogorov-Smirnov distance of tail and fit, 0 (perfect) to 1
    n_tail: int = 0  # eigenvalues in the tail
    status: str = "ok"
    evaluations: int = 0  # full KS evaluations that the search for xmin needed


def fit_alpha(eigs: Tensor | np.ndarray | Sequence[float], rule: str = "csn",
              xmin: float | None = None) -> Fit:
    """Maximum-likelihood alpha (Hill's estimator) of the tail that `rule` chooses.

    alpha = 1 + n / sum(log(x / xmin)) over the n values x >= xmin. D compares the fitted CDF with
    i/n on one side, as powerlaw and WeightWatcher do; tied values count once, as in powerlaw.

    Args:
        eigs: any order; values that are not positive are the null space and are left out.
        rule: ``"csn"``: the xmin with the smallest D over all of them (Clauset, Shalizi, Newman
            2009), exact; ``"mid"``: xmin at the median, the upper one of an even number, as in
            TempBalance's code (which leaves out values tied with xmin that come before it);
            ``"peak"``: the smallest D for xmin within
            0.95 to 1.5 times the mode of the log10 histogram (100 bins); ``"peak_official"``: as
            in the authors' code, whose lower bound is the *logarithm* of 0.95 times the mode
            (so usually no bound, and alpha depends on the scale of the weights) and which drops
            eigenvalues <= 1e-5.
        xmin: fixes the beginning of the tail; `rule` is then not used.

    Raises:
        LabError: unknown rule. Spectra that cannot be fitted raise nothing: see `Fit.status`.
    """
    choose("rule", rule, RULES)
    x = np.asarray(eigs.detach().cpu() if isinstance(eigs, Tensor) else eigs, dtype=np.float64)
    x = x.ravel()
    if not np.isfinite(x).all():
        return Fit(status="NaN or Inf among the eigenvalues")
    x = np.sort(x[x > 0])
    if rule == "peak_official" and (x > 1e-5).any():
        x = x[x > 1e-5]
    if xmin is not None:
        return _fit_above(x[x >= xmin], float(xmin))
    first = np.flatnonzero(np.diff(x, prepend=-1.0))  # (m,) where each distinct value begins
    if len(first) < 3:
        return Fit(status=f"{len(first)} distinct positive eigenvalues, at least 3 are needed")
    log, n = np.log(x), np.arange(len(x), 0, -1)  # (N,) both; n is the tail size from each rank
    if log[-1] - log[0] < ROUNDING:
        return Fit(status="all eigenvalues are equal up to rounding")
    # Sum over the tail of log(x / x[i]) as suffix sums of gaps: cancels nothing.
    excess = np.cumsum((np.diff(log, append=log[-1]) * (n - 1))[::-1])[::-1]
    usable = first[:-1]  # the largest value has no tail
    if rule == "mid":
        usable = np.searchsorted(x, x[len(x) // 2 : len(x) // 2 + 1])
    elif rule != "csn":
        counts, edges = np.histogram(np.log10(x), bins=100)
        mode = 10.0 ** edges[counts.argmax()]
        low = 0.95 * mode if rule == "peak" else math.log10(0.95 * mode)
        usable = usable[(x[usable] >= low) & (x[usable] <= 1.5 * mode)]
    usable = usable[excess[usable] > ROUNDING * n[usable]]
    if not len(usable):
        return Fit(status=f"no eigenvalue can be xmin under the rule {rule}")
    slope = n[usable] / excess[usable]  # (c,) alpha - 1
    best, distance, evaluations = _scan(log, first, usable, slope)
    at = usable[best]
    return _fit(float(slope[best]), float(x[at]), distance, int(n[at]), evaluations)


def _fit(slope: float, xmin: float, distance: float, tail: int, evaluations: int = 1) -> Fit:
    status = "ok" if tail >= SMALL_TAIL else f"small tail ({tail} < {SMALL_TAIL})"
    sigma = slope / math.sqrt(tail)
    return Fit(1 + slope, sigma, xmin, distance, tail, status, evaluations)


def _fit_above(x: np.ndarray, xmin: float) -> Fit:
    """The fit to all of the ascending values x, none of them below the given xmin."""
    z = np.log(x / xmin)
    if xmin <= 0 or len(x) < 2 or z[-1] <= 0:
        return Fit(status=f"fewer than 2 eigenvalues above xmin = {xmin:g}")
    slope = len(x) / float(z.sum())
    first = np.flatnonzero(np.diff(x, prepend=-1.0))
    distance = np.abs(1 - np.exp(-slope * z[first]) - first / len(x)).max()
    return _fit(slope, xmin, float(distance), len(x))


def _scan(log: np.ndarray, first: np.ndarray, usable: np.ndarray,
          slope: np.ndarray) -> tuple[int, float, int]:
    """The candidate with the smallest KS distance: (its position, the distance, evaluations).

    Exact, and cheap by pruning: the distance at a few ranks of a tail bounds the distance at all
    its ranks from below, so a candidate whose bound exceeds the best full distance cannot win.
    The rank where a full evaluation found its maximum tightens the bounds of all the others.

    Args:
        log: (N,) log of the ascending values. first: (m,) ranks where distinct values begin.
        usable: (c,) ranks of the candidates. slope: (c,) alpha - 1 of each.
    """
    total, last = len(log), len(first) - 1
    begin = np.searchsorted(first, usable)  # (c,) the candidates among the distinct values

    def distances(i: np.ndarray, slope: np.ndarray, j: np.ndarray) -> np.ndarray:
        return np.abs(1 - np.exp(-slope * (log[j] - log[i])) - (j - i) / (total - i))

    share = np.linspace(0, 1, 9)[1:]
    probes = first[begin[:, None] + ((last - begin[:, None]) * share).astype(np.intp)]  # (c, 8)
    bound = distances(usable[:, None], slope[:, None], probes).max(axis=1)
    alive = np.arange(len(usable))
    best, distance, evaluations = -1, math.inf, 0
    while len(alive):
        k = bound.argmin()
        c = alive[k]
        tail = first[begin[c] :]
        found = distances(usable[c], slope[c], tail)
        worst = found.argmax()
        evaluations += 1
        if (found[worst], c) < (distance, best):
            best, distance = int(c), float(found[worst])
        reach = usable[alive] <= tail[worst]  # tails that contain this rank
        i = alive[reach]
        cut = distances(usable[i], slope[i], tail[worst])
        bound[reach] = np.maximum(bound[reach], cut)
        keep = bound <= distance + 1e-14  # the margin is for rounding: ties are evaluated
        keep[k] = False
        alive, bound = alive[keep], bound[keep]
    return best, distance, evaluations
