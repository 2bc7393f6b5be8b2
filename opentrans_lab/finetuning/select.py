"""Which layers to freeze, from the table of their alphas (Sec. 3.3).

Layers are the smallest part that can be chosen: one output channel is one row of a layer's matrix
(of a k x k convolution, a matrix with at most k^2 eigenvalues), too little to fit a power law to.
"""

from __future__ import annotations

import random
import warnings
from typing import Annotated

import numpy as np
import pandas as pd

from ..checks import Seed, Share, checked

SELECTIONS = ("none", "low_alpha", "high_alpha", "random", "prefix")
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


@checked
def select_layers(
    alphas: pd.DataFrame,
    select: Annotated[str, SELECTIONS] = "low_alpha",
    fraction: Share = 0.5,
    seed: Seed = 0,
) -> list[str]:
    """Names of the layers to freeze, in the table's order.

    ``low_alpha`` freezes the heavy-tailed, well-trained ones (the paper's "alpha"),
    ``high_alpha`` the others ("alpha*"), ``random`` as many at random, ``none`` nothing.
    floor(fraction · layers) are chosen: 27 of RN50's 55, as in the authors' code. Layers whose
    alpha is not finite are never chosen and do not count; a warning names them. Of equal alphas the
    earlier layer counts as smaller, so that small and large never overlap up to a half.

    ``prefix`` is not the paper's: names of whole leading stages, as far as at least half of the
    layers of each are those of ``low_alpha``. Only behind those does backward really stop. A
    stage is frozen with all that it holds, layers without an alpha included.

    Args:
        alphas: columns ``name`` and ``alpha``, as ``layer_alphas`` gives them.

    Raises:
        LabError: unknown ``select``, or ``fraction`` outside [0, 1].
    """
    if select == "none":
        return []
    alphas = alphas.assign(alpha=alphas["alpha"].where(np.isfinite(alphas["alpha"])))
    lost = list(alphas.loc[alphas["alpha"].isna(), "name"])
    if lost:
        warnings.warn(
            f"{len(lost)} layers have no alpha and stay trainable: {', '.join(lost[:5])}"
            + (", …" if len(lost) > 5 else ""),
            stacklevel=2,
        )
    fitted = alphas[alphas["alpha"].notna()]
    count = int(fraction * len(fitted) + 1e-9)  # 0.29 x 100 is 28.999… in floating point
    if select == "random":
        chosen = random.Random(seed).sample(list(fitted["name"]), count)
    else:
        ranked = fitted.sort_values("alpha", kind="stable")["name"]  # one order, ties and all
        chosen = ranked.tail(count) if select == "high_alpha" else ranked.head(count)
    chosen = set(chosen)
    if select == "prefix":
        return _leading_stages(alphas, chosen)
    return [name for name in fitted["name"] if name in chosen]


def _leading_stages(alphas: pd.DataFrame, frozen: set[str]) -> list[str]:
    found: list[str] = []
    for stage in STAGES:
        layers = [name for name in alphas["name"] if stage_of(name) == stage]
        if not layers or 2 * len(frozen.intersection(layers)) < len(layers):
            break
        found.append(stage)
    return found


def stage_of(name: str) -> str:
    """The stage of a CLIP ResNet that a layer belongs to, one of ``STAGES`` (or "attnpool")."""
    first = name.split(".")[0]
    if first in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"):
        return "stem"
    return first
