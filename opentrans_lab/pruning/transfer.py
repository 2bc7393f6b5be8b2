"""The rows of the transfer table: which weights and which mask a framework starts from.

Algorithm 1 returns mask and trained weights, the paper's text speaks of masks, and its *Random*
starts from CLIP's weights. So mask, weights, layer densities and budget are taken apart here, and
all rows stand side by side under fixed keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from ..checks import choose
from ..clip import Backbone
from ..masks import Mask

ROWS = {
    "dense": "CLIP's weights, no mask",
    "ours": "mask and weights of Algorithm 1",
    "ours_kd": "the same, after as many L_KD steps again",
    "ours_mask_only": "our mask on CLIP's weights",
    "ours_mask_kd": "the same, after as many L_KD steps as ours had",
    "oneshot": "largest magnitudes of CLIP's weights, one shot",
    "random_layerwise": "random, with our density in each layer",
    "random_layerwise_kd": "the same, after as many L_KD steps as ours had",
    "random_global": "random over the whole tower",
    "wanda": "weight times norm of its input, with our density in each layer",
}
# Rows whose weights have seen L_KD.
TRAINED = ("ours", "ours_kd", "ours_mask_kd", "random_layerwise_kd")


def row_mask(
    row: str,
    backbone: Backbone,
    ours: Mask | None,
    seed: int = 0,
    scores: Mapping[str, Tensor] | None = None,
) -> Mask | None:
    """The mask of a row for a *dense* CLIP ``backbone``; every one keeps exactly as many as ours.

    ``scores`` are what ``wanda`` goes by.

    Raises:
        LabError: unknown row.
    """
    choose("row", row, ROWS)
    makers: dict[str, Callable[[], Mask | None]] = {
        "dense": lambda: None,
        "oneshot": lambda: Mask.by_magnitude(backbone.visual, ours.kept),
        "random_layerwise": lambda: Mask.random_layerwise(ours, seed),
        "random_layerwise_kd": lambda: Mask.random_layerwise(ours, seed),
        "random_global": lambda: Mask.random_global(backbone.visual, ours.kept, seed),
        "wanda": lambda: Mask.by_score(scores or {}, ours),
    }
    return makers.get(row, lambda: ours)()


def recalibrate(
    backbone: Backbone, mask: Mask | None, batches: Iterator[dict], count: int = 16
) -> None:
    """Re-estimate the tower's batch normalisation under ``mask`` from the next ``count`` batches.

    A pruning leaves the running statistics of the network before it. Where the tower trains on they
    follow within some steps; where it stays frozen they are wrong for good, and a row would be
    judged by them and not by its mask. No weight is trained.
    """
    if mask is not None:
        mask.apply(backbone)
    with torch.no_grad():
        update_bn((batch["images"] for batch in islice(batches, count)), backbone)
