"""Where every fine-tuning starts: Algorithm 1, once, and the rows of the transfer table.

A stage is a function of its parameters. Its folder ``runs/stages/<stage>/<key>`` is written once;
notebooks that ask again, or another notebook that needs the same, read it. Notebooks call these
and ``experiment``'s, and hold no logic of their own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import nn

from ..clip import Backbone
from ..files import atomic_path
from ..masks import Mask
from ..pruning import TRAINED, PruneConfig, distill, prune, row_mask, wanda_scores
from ..records import read_table
from .lab import Lab, cached


@dataclass(frozen=True)
class Pruned:
    """Algorithm 1's result on disk."""

    folder: Path
    seconds: float
    """Wall time of the run that made it."""

    @property
    def mask(self) -> Mask:
        return Mask.load(self.folder / "mask.safetensors")

    @property
    def rounds(self) -> pd.DataFrame:
        """One row a round: round, density, kept, loss, plain, text."""
        return read_table(self.folder / "rounds.csv")

    def masks(self) -> list[Mask]:
        """The mask after each round."""
        return [Mask.load(p) for p in sorted(self.folder.glob("round_*/mask.safetensors"))]

    def backbone(self, lab: Lab) -> Backbone:
        """f(x; m⊙θ): the dense CLIP with the pruned tower's weights."""
        backbone = lab.load()
        backbone.visual.load_state_dict(load_file(self.folder / "visual.safetensors"))
        return backbone


def prune_params(lab: Lab, config: PruneConfig) -> dict:
    """What Algorithm 1's result depends on."""
    return lab.params | config.params


def distill_params(lab: Lab, row: str, config: PruneConfig) -> dict:
    """What a control's L_KD budget depends on."""
    return prune_params(lab, config) | {"row": row}


def prune_stage(lab: Lab, config: PruneConfig) -> Pruned:
    """Algorithm 1 on ``lab``'s CLIP and training data, once for these parameters."""

    def work(folder: Path) -> dict:
        began = time.perf_counter()
        backbone = lab.load()
        mask, rounds = prune(
            backbone, lab.batches(config.batch_size, config.seed), config, folder, lab.device,
            lab.teacher(backbone),
        )  # fmt: skip
        save_weights(backbone.visual, folder / "visual.safetensors")
        rounds.to_csv(folder / "rounds.csv", index=False)
        mask.save(folder / "mask.safetensors")
        return {"seconds": time.perf_counter() - began}

    folder, result = cached("prune", prune_params(lab, config), work)
    return Pruned(folder, result["seconds"])


def row_start(lab: Lab, row: str, config: PruneConfig) -> tuple[Backbone, Mask | None]:
    """The backbone and the mask that ``row`` of the transfer table starts from."""
    backbone = lab.load()
    ours = prune_stage(lab, config) if row != "dense" else None
    scores = {}
    if row == "wanda":
        scores = wanda_scores(backbone, lab.batches(config.batch_size, config.seed)(0))
    mask = row_mask(row, backbone, ours.mask if ours else None, config.seed, scores)
    if row in ("ours", "ours_kd"):
        backbone = ours.backbone(lab)
    if row in TRAINED and row != "ours":
        budget = config.dense_steps + config.rounds * config.steps

        def work(folder: Path) -> dict:
            distill(
                backbone, lab.batches(config.batch_size, config.seed), config, budget, mask,
                folder / "checkpoints", lab.device, lab.teacher(lab.load()),
            )  # fmt: skip
            save_weights(backbone.visual, folder / "visual.safetensors")
            return {"steps": budget}

        folder, _ = cached("distill", distill_params(lab, row, config), work)
        backbone.visual.load_state_dict(load_file(folder / "visual.safetensors"))
    return backbone, mask


def save_weights(model: nn.Module, path: Path) -> None:
    """A model's state dict as safetensors."""
    with atomic_path(path) as partial:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial)
