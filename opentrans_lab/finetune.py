"""Fine-tune only what is under-trained: choose layers by alpha, and freeze them (Sec. 3.3)."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pandas as pd
from torch import nn

from .errors import LabError
from .tower import locate

SELECTIONS = ("none", "low_alpha", "high_alpha", "random")


def select_layers(
    alphas: pd.DataFrame, select: str = "low_alpha", fraction: float = 0.5, seed: int = 0
) -> list[str]:
    """Names of the layers to freeze, in the table's order.

    ``low_alpha`` freezes the heavy-tailed, well-trained ones (the paper's "alpha"),
    ``high_alpha`` the others ("alpha*"), ``random`` as many at random, ``none`` nothing.
    floor(fraction · layers) are chosen: 27 of RN50's 55, as in the authors' code. Layers whose
    alpha is NaN are never chosen and do not count.

    Args:
        alphas: columns ``name`` and ``alpha``, as ``layer_alphas`` gives them.

    Raises:
        LabError: unknown ``select``, or ``fraction`` outside [0, 1].
    """
    if select not in SELECTIONS:
        raise LabError(f"unknown select={select!r}; use one of {', '.join(SELECTIONS)}")
    if not 0 <= fraction <= 1:
        raise LabError(f"fraction={fraction} must lie between 0 and 1")
    fitted = alphas.dropna(subset="alpha")
    count = int(fraction * len(fitted))
    if select == "none":
        return []
    if select == "random":
        chosen = random.Random(seed).sample(list(fitted["name"]), count)
    else:
        ranked = fitted.sort_values("alpha", ascending=select == "low_alpha", kind="stable")
        chosen = ranked["name"].head(count)
    chosen = set(chosen)
    return [name for name in fitted["name"] if name in chosen]


def freeze(model: nn.Module, names: Iterable[str]) -> int:
    """Stop training the weights of these layers; returns how many weights that freezes.

    The tower is found in any nested module. Gradients are never computed, so AdamW neither moves
    nor decays them: they stay bit-identical. BN stays trainable, as in the authors' code.
    """
    found = locate(model, [f"{name}.weight" for name in names]).tensors
    for weight in found.values():
        weight.requires_grad_(False)
        weight.grad = None
    return sum(weight.numel() for weight in found.values())


def unfreeze(model: nn.Module, names: Iterable[str]) -> None:
    """Undo ``freeze``."""
    for weight in locate(model, [f"{name}.weight" for name in names]).tensors.values():
        weight.requires_grad_(True)
