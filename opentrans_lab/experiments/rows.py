"""Fine-tune a framework from a row of the transfer table, and evaluate it: a cached stage.

The tables of the notebooks are many of these, side by side (notebook 04's: see ``selection``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file
from torch import nn

from ..heads import build
from ..pruning import ROWS, PruneConfig
from ..records import read_table
from .devices import spread
from .lab import Lab, cached
from .recipe import Recipe, fine_tune


@dataclass(frozen=True)
class Segmented:
    """A fine-tuned and evaluated model on disk."""

    folder: Path
    metrics: dict
    """mIoU in percent: ``seen``, ``unseen``, ``all`` (and ``shifted_...``); parameters and MACs of
    a picture that survive in the mask (``cost``, uniform), density, frozen weights, loss,
    images/s."""

    @property
    def history(self) -> pd.DataFrame:
        return read_table(self.folder / "history.csv")

    @property
    def per_class(self) -> pd.DataFrame:
        """IoU a class on the evaluation split."""
        return read_table(self.folder / "per_class.csv")

    @property
    def frozen(self) -> list[str]:
        """Names of the layers (or stages) that are frozen in the end."""
        chosen = sorted(self.folder.glob("frozen-*.json"))
        return json.loads(chosen[-1].read_bytes()) if chosen else []

    @property
    def alphas(self) -> pd.DataFrame:
        """What the first choice was made by, see ``alpha.layer_alphas``."""
        return read_table(self.folder / "alphas.csv")

    def model(self, lab: Lab, recipe: Recipe) -> nn.Module:
        """The trained model, in eval mode."""
        model = build(recipe.framework, lab.load(), recipe.preset)
        model.load_state_dict(load_file(self.folder / "model.safetensors"))
        return model.to(next(model.backbone.parameters()).device).eval()


def segment_params(lab: Lab, recipe: Recipe, config: PruneConfig) -> dict:
    """What a fine-tuning's result depends on; a parameter that does nothing here is left out."""
    params = lab.params | asdict(recipe)
    usual = {"norm": "train", "precision": "auto"}
    unused = {name for name, value in usual.items() if params[name] == value}
    if recipe.select == "none":  # then alpha is never measured
        unused |= {"fraction", "prefix", "reshape", "rule", "warmup", "reselect"}
    params = {key: value for key, value in params.items() if key not in unused}
    if recipe.row != "dense":
        params |= {f"prune_{key}": value for key, value in config.params.items()}
    return params


def segment_stage(lab: Lab, recipe: Recipe, config: PruneConfig) -> Segmented:
    """Start from a row, fine-tune a framework (freezing what ``select`` says), and evaluate it."""

    def work(folder: Path) -> dict:
        run = fine_tune if lab.devices == 1 else spread
        return run(lab, recipe, config, folder)

    folder, metrics = cached("segment", segment_params(lab, recipe, config), work)
    return Segmented(folder, metrics)


def transfer_table(lab: Lab, recipe: Recipe, config: PruneConfig, rows: str) -> pd.DataFrame:
    """``segment_stage`` for each of the space-separated ``rows``: one line a row, mIoU in %."""
    recipes = [replace(recipe, row=row) for row in rows.split()]  # a typo shows before any work
    found = [(r.row, segment_stage(lab, r, config)) for r in recipes]
    return pd.DataFrame({"row": r, "starts_from": ROWS[r], **done.metrics} for r, done in found)
