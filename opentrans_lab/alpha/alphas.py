"""Heavy-tail exponents: how well is each layer trained, judged from its weights alone?

The eigenvalues of W^T W of a trained layer often end in a power law, p(x) ~ x^-alpha for
x >= xmin (paper, Eq. 2). A small alpha, a heavy tail, tends to mean a well-trained layer.

    from opentrans_lab.alpha import layer_alphas
    layer_alphas(model).sort_values("alpha")
    layer_alphas(read_state_dict("clip.pt", prefix="visual."))  # a file, no model built

Four published procedures disagree on which layers that are, so `reshape` (which matrices) and
`rule` (where the tail begins) are explicit and stand in every row. Stands on torch, numpy and
pandas alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor, nn

from ..checks import Count, Seed, checked, choices
from ..errors import LabError
from ..files import read_state_dict
from .esd import CONTROLS, RESHAPES, esd, mp_edge, randomise, spectra
from .layers import Layer, layers
from .tailfit import RULES, Fit, fit_alpha

__all__ = [
    "AUTHORS_FROZEN", "CONTROLS", "RESHAPES", "RULES", "AuthorsComparison", "Fit", "Spectrum",
    "compare_authors", "esd", "fit_alpha", "layer_alphas", "layer_spectra", "mp_edge",
    "randomise", "read_state_dict", "sensitivity",
]

# The authors' own selection on CLIP RN50 (27 of 55 convolutions), read from their public code.
AUTHORS_FROZEN = tuple(
    """conv1 conv2 conv3 layer1.0.conv1 layer1.0.conv2 layer1.1.conv2 layer1.1.conv3 layer1.2.conv2
    layer1.2.conv3 layer2.0.conv1 layer2.0.conv2 layer2.0.downsample.0 layer2.1.conv1
    layer2.1.conv2 layer2.2.conv2 layer2.2.conv3 layer2.3.conv2 layer2.3.conv3 layer3.0.conv1
    layer3.0.conv2 layer3.1.conv2 layer3.2.conv2 layer3.3.conv2 layer3.4.conv2 layer3.5.conv2
    layer4.0.conv2 layer4.2.conv2""".split()
)


@checked
def layer_alphas(
    model: nn.Module | Mapping[str, Tensor],
    reshape: Annotated[str, RESHAPES] = "slices",
    rule: Annotated[str, RULES] = "csn",
    control: Annotated[str, CONTROLS] | None = None,
    bootstrap: Count = 0,
    seed: Seed = 0,
    exclude: Sequence[str] = (),
    progress: Callable = iter,
) -> pd.DataFrame:
    """Alpha of every layer of a module or bare state dict, one row a layer, in model order.

    Args:
        reshape: see :func:`esd`. rule: see :func:`fit_alpha`.
        control: fit also a randomised weight of the same shape, ``"permute"`` (same entries,
            shuffled) or ``"gaussian"``. Alpha depends on shape alone too (a Gaussian matrix has a
            `mid` alpha from 2.05 if square to 3.5 if 1:4), so a claim about quality needs it.
        bootstrap: replicates (100 is plenty) that resample the eigenvalues of each layer with
            replacement; gives `freeze_probability`.
        exclude: names or prefixes of names to leave out, such as ``"attnpool"``.
        progress: wraps the iteration over layers, e.g. ``tqdm.auto.tqdm``.

    Returns:
        name, type, shape ("64x64x3x3"), params, n_evals, alpha, sigma, xmin, D, n_tail,
        stable_rank (sum / maximum of the eigenvalues), log_norm (log10 of their sum),
        control_alpha, freeze_probability (share of fitted replicates with alpha below the
        median of the fitted layers, the authors' freezing criterion), status, reshape, rule.
        A layer that cannot be fitted has NaN alpha and a status that says why. A status of
        "small tail" marks a fit on fewer than 20 values: it counts, but look at its sigma.
    Raises:
        LabError: unknown reshape, rule or control; a bootstrap or seed that is no whole number
            from 0 up; an `exclude` that is no list, or names no layer; nothing to analyse.
    """
    found = _included(model, exclude)
    eigs = spectra(found, reshape, progress=progress)
    noise = spectra(found, reshape, control, seed, progress) if control else [None] * len(found)
    rows = []
    for layer, own, random in zip(found, eigs, noise, strict=True):
        fitted = isinstance(own, np.ndarray)
        fit = fit_alpha(own, rule) if fitted else Fit(status=own)
        rows.append(dict(
            name=layer.name,
            type=layer.type,
            shape="x".join(map(str, layer.tensor.shape)),
            params=layer.tensor.numel(),
            n_evals=len(own) if fitted else 0,
            alpha=fit.alpha, sigma=fit.sigma, xmin=fit.xmin, D=fit.D, n_tail=fit.n_tail,
            stable_rank=own.sum() / own[-1] if fitted else math.nan,
            log_norm=math.log10(own.sum()) if fitted else math.nan,
            control_alpha=fit_alpha(random, rule).alpha if isinstance(random, np.ndarray)
            else math.nan,
            freeze_probability=math.nan,
            status=fit.status, reshape=reshape, rule=rule,
        ))
    table = pd.DataFrame(rows)
    if bootstrap:
        usable = [own if np.isfinite(a) else None for own, a in zip(eigs, table.alpha, strict=True)]
        table["freeze_probability"] = _freeze_probability(usable, rule, bootstrap, seed, progress)
    return table


def _freeze_probability(eigs: Sequence[np.ndarray | None], rule: str, replicates: int, seed: int,
                        progress: Callable) -> np.ndarray:
    """Share of bootstrap replicates in which each layer lies strictly below the median alpha."""
    generator = np.random.default_rng(seed)
    alphas = np.full((replicates, len(eigs)), np.nan)
    for k in progress(range(len(eigs))):
        if eigs[k] is not None:
            for r in range(replicates):
                alphas[r, k] = fit_alpha(generator.choice(eigs[k], len(eigs[k])), rule).alpha
    table = pd.DataFrame(alphas)  # a replicate that cannot be fitted counts on no side
    below = table.lt(table.median(axis=1), axis=0)
    return (below.sum() / table.notna().sum()).to_numpy()


class Spectrum(NamedTuple):
    """What a picture of a layer needs."""

    eigs: np.ndarray  # (n_evals,) float64, ascending
    control: np.ndarray  # (n_evals,) of the same weight at random, or empty without a control
    edge: float  # upper Marchenko-Pastur edge


@checked
def layer_spectra(model: nn.Module | Mapping[str, Tensor],
                  reshape: Annotated[str, RESHAPES] = "slices",
                  control: Annotated[str, CONTROLS] | None = "permute", seed: Seed = 0,
                  exclude: Sequence[str] = ()) -> dict[str, Spectrum]:
    """The spectra behind :func:`layer_alphas`, by layer name; layers without one are left out."""
    found = _included(model, exclude)
    eigs = spectra(found, reshape)
    noise = spectra(found, reshape, control, seed) if control else [np.empty(0)] * len(found)
    return {
        layer.name: Spectrum(own, random, mp_edge(layer.weight, reshape, layer.groups))
        for layer, own, random in zip(found, eigs, noise, strict=True)
        if isinstance(own, np.ndarray) and isinstance(random, np.ndarray)
    }


def _included(model: nn.Module | Mapping[str, Tensor], exclude: Sequence[str]) -> list[Layer]:
    found, parts = layers(model), {}  # by name, and by all that a name is below
    for layer in found:
        for name in itertools.accumulate(layer.name.split("."), "{}.{}".format):
            parts.setdefault(name, []).append(layer)
    for name in exclude:
        if name.removesuffix(".") not in parts:
            top = dict.fromkeys(layer.name.split(".")[0] for layer in found)
            raise LabError(f"exclude={name!r} is no layer and no part{choices(name, parts, top)}")
    left_out = {layer.name for name in exclude for layer in parts[name.removesuffix(".")]}
    found = [layer for layer in found if layer.name not in left_out]
    if not found:
        raise LabError("no weight with two or more axes in this model; nothing to analyse")
    return found


@checked
def sensitivity(model: nn.Module | Mapping[str, Tensor], reshapes: Sequence[str] = RESHAPES,
                rules: Sequence[str] = RULES, exclude: Sequence[str] = ()) -> pd.DataFrame:
    """How much the choice of reshape and rule moves the ranking: every ordered pair of choices.

    Returns:
        one row a pair: a, b ("slices+csn"), spearman (rank correlation of alpha), layers and
        params that change sides when the half with alpha strictly below the median is frozen,
        frozen (size of that half under a). Only layers that both could fit are compared.
    """
    tables = {f"{reshape}+{rule}": layer_alphas(model, reshape, rule, exclude=exclude)
              for reshape in reshapes for rule in rules}
    rows = []
    for (a, left), (b, right) in itertools.product(tables.items(), repeat=2):
        both = left.alpha.notna() & right.alpha.notna()
        x, y = left.alpha[both], right.alpha[both]
        changed = (x < x.median()) != (y < y.median())
        rows.append(dict(
            a=a, b=b, spearman=x.rank().corr(y.rank()), layers=int(changed.sum()),
            params=int(left.params[both][changed].sum()), frozen=int((x < x.median()).sum()),
        ))
    return pd.DataFrame(rows)


class AuthorsComparison(NamedTuple):
    """Our frozen half of CLIP RN50 beside the authors' published one."""

    shared: int  # layers that both freeze
    frozen: int  # layers that the authors freeze: 27
    chance: float  # shared by a random half, on average
    p_value: float  # chance of sharing at least as many
    table: pd.DataFrame  # name, alpha, frozen, authors_frozen

    def __str__(self) -> str:
        return (f"{self.shared} of the authors' {self.frozen} frozen layers are in our frozen half "
                f"({self.chance:.1f} expected by chance, p = {self.p_value:.1e}); "
                "this means something for OpenAI's own weights only")


def compare_authors(table: pd.DataFrame) -> AuthorsComparison:
    """Compare alphas of CLIP RN50 with the authors' list of 27 frozen layers (of 55).

    The authors' own choice is ``reshape="slices", rule="peak_official"``, frozen strictly below
    the median. The list says something about OpenAI's real weights only.

    Args:
        table: of :func:`layer_alphas`; names may carry a ``visual.`` prefix.
    Raises:
        LabError: the table lacks layers of RN50, or some of them could not be fitted.
    """
    rows = table[table.type == "conv2d"][["name", "alpha"]].copy()
    rows["name"] = rows.name.str.replace(r"^.*visual\.", "", regex=True)
    missing = sorted(set(AUTHORS_FROZEN) - set(rows.name[rows.alpha.notna()]))
    if missing or len(rows) != 55:
        what = f"no alpha for {missing[0]}" if missing else f"{len(rows)} convolutions, not 55"
        raise LabError(f"not the visual tower of CLIP RN50: {what}; use the alphas of RN50")
    rows["frozen"] = rows.alpha < rows.alpha.median()
    rows["authors_frozen"] = rows.name.isin(AUTHORS_FROZEN)
    ours, theirs = int(rows.frozen.sum()), len(AUTHORS_FROZEN)
    shared = int((rows.frozen & rows.authors_frozen).sum())
    ways = [math.comb(theirs, k) * math.comb(55 - theirs, ours - k) for k in range(ours + 1)]
    p_value = sum(ways[shared:]) / sum(ways)
    rows = rows.reset_index(drop=True)
    return AuthorsComparison(shared, theirs, ours * theirs / 55, p_value, rows)
