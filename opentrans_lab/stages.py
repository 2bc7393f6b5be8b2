"""The lab's experiments as cached stages: prune once, then fine-tune and evaluate, many times.

A stage is a function of its parameters. Its folder ``runs/stages/<stage>/<key>`` is written once;
notebooks that ask again, or another notebook that needs the same, read it. Notebooks call these
and hold no logic of their own.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import nn

from .alpha import RESHAPES, RULES, layer_alphas
from .backbone import Backbone
from .cost import cost
from .errors import LabError
from .evaluate import evaluate
from .finetune import SELECTIONS, freeze, select_layers
from .frameworks import FRAMEWORKS, PRESETS, build
from .lab import Lab, cached
from .masks import Mask
from .prune import PruneConfig, distill, prune, wanda_scores
from .results import atomic_path
from .train import TrainConfig, fit
from .transfer import ROWS, TRAINED, row_mask


@dataclass(frozen=True)
class Recipe:
    """One fine-tuning of one framework."""

    framework: str = "deeplabv3"
    preset: str = "mini"
    row: str = "dense"
    """Which weights and mask to start from, see ``transfer.ROWS``."""
    select: str = "none"
    """Layers to freeze after the warm-up, see ``finetune.SELECTIONS``."""
    reshape: str = "slices"
    rule: str = "csn"
    warmup: float = 0.2
    """Share of the steps before alpha is measured and layers are frozen (the paper: 10^4 of
    5·10^4)."""
    steps: int = 100
    batch_size: int = 16
    lr: float = 1e-3
    backbone_lr: float = 0.1
    """Multiplier of ``lr`` for the backbone; 0 leaves FC-CLIP's frozen, BN included, as its authors
    do."""
    images: int = 0
    """Fixed training images; 0: all of the data set, for scenes without end."""
    eval_images: int = 128
    """Images of each evaluation split; 0: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a mistyped word or an impossible number now, and not after the training."""
        if not 0 <= self.warmup < 1 or self.steps < 1 or self.batch_size < 2:
            raise LabError(
                f"warmup={self.warmup} must lie in [0, 1), steps={self.steps} be 1 or more, and "
                f"batch_size={self.batch_size} 2 or more (batch normalisation needs two images)"
            )
        words = {
            "framework": FRAMEWORKS,
            "preset": PRESETS,
            "row": ROWS,
            "select": SELECTIONS,
            "reshape": RESHAPES,
            "rule": RULES,
        }
        for name, valid in words.items():
            if getattr(self, name) not in valid:
                raise LabError(
                    f"unknown {name}={getattr(self, name)!r}; use one of {', '.join(valid)}"
                )


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
        return pd.read_csv(self.folder / "rounds.csv")

    def masks(self) -> list[Mask]:
        """The mask after each round."""
        return [Mask.load(p) for p in sorted(self.folder.glob("round_*/mask.safetensors"))]

    def backbone(self, lab: Lab) -> Backbone:
        """f(x; m⊙θ): the dense CLIP with the pruned tower's weights."""
        backbone = lab.load()
        backbone.visual.load_state_dict(load_file(self.folder / "visual.safetensors"))
        return backbone


def prune_stage(lab: Lab, config: PruneConfig) -> Pruned:
    """Algorithm 1 on ``lab``'s CLIP and training data, once for these parameters."""

    def work(folder: Path) -> dict:
        began = time.perf_counter()
        backbone = lab.load()
        mask, rounds = prune(
            backbone, lab.batches(config.batch_size, config.seed), config, folder, lab.device
        )
        _save_tower(backbone, folder / "visual.safetensors")
        rounds.to_csv(folder / "rounds.csv", index=False)
        mask.save(folder / "mask.safetensors")
        return {"seconds": time.perf_counter() - began}

    folder, result = cached("prune", lab.params | config.params, work)
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
                folder / "checkpoints", lab.device, teacher=lab.load(),
            )  # fmt: skip
            shutil.rmtree(folder / "checkpoints")
            _save_tower(backbone, folder / "visual.safetensors")
            return {"steps": budget}

        folder, _ = cached("distill", lab.params | config.params | {"row": row}, work)
        backbone.visual.load_state_dict(load_file(folder / "visual.safetensors"))
    return backbone, mask


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
        return pd.read_csv(self.folder / "history.csv")

    @property
    def per_class(self) -> pd.DataFrame:
        """IoU a class on the evaluation split."""
        return pd.read_csv(self.folder / "per_class.csv")

    @property
    def frozen(self) -> list[str]:
        """Names of the frozen layers."""
        path = self.folder / "frozen.json"
        return json.loads(path.read_text()) if path.exists() else []

    def model(self, lab: Lab, recipe: Recipe) -> nn.Module:
        """The trained model, in eval mode."""
        model = build(recipe.framework, lab.load(), recipe.preset)
        model.load_state_dict(load_file(self.folder / "model.safetensors"))
        return model.to(next(model.backbone.parameters()).device).eval()


def segment_stage(lab: Lab, recipe: Recipe, config: PruneConfig) -> Segmented:
    """Start from a row, fine-tune a framework (freezing what ``select`` says), and evaluate it."""

    def work(folder: Path) -> dict:
        backbone, mask = row_start(lab, recipe.row, config)
        model = build(recipe.framework, backbone, recipe.preset, **_options(lab, recipe))
        at = {} if recipe.select == "none" else {
            int(recipe.warmup * recipe.steps): lambda m: _freeze_by_alpha(m, recipe, folder)
        }  # fmt: skip
        training = TrainConfig(
            recipe.steps, recipe.batch_size, recipe.lr, recipe.backbone_lr, schedule="cosine",
            warmup=recipe.steps // 20, seed=recipe.seed,
        )  # fmt: skip

        def objective(wrapped: nn.Module, batch: dict) -> dict:
            return model.loss(wrapped(batch["images"]), batch)

        done = fit(
            model, objective, lab.batches(recipe.batch_size, recipe.seed, recipe.images or None),
            training, folder / "checkpoints", mask, at, lab.device,
            title=f"{recipe.framework}, {recipe.row}, freeze {recipe.select}",
        )  # fmt: skip
        metrics = _evaluate(model, lab, recipe, folder)
        _save_weights(model, folder / "model.safetensors")
        done.history.to_csv(folder / "history.csv", index=False)
        shutil.rmtree(folder / "checkpoints")
        frozen = sum(p.numel() for p in backbone.visual.parameters() if not p.requires_grad)
        table = cost(recipe.framework, (lab.size,) * 2, mask, lab.backbone, recipe.preset)
        total = table.query("convention == 'uniform' and component == 'total'").iloc[0]
        return metrics | {
            "params": int(total["sparse_params"]),
            "macs": int(total["sparse_macs"]),
            "density": 1.0 if mask is None else mask.density,
            "frozen_weights": frozen
            - sum(p.numel() for p in backbone.visual.attnpool.parameters()),
            "loss": float(done.history["loss"].tail(10).mean()),
            "images_per_second": done.images_per_second,
        }

    params = lab.params | asdict(recipe)
    if recipe.select == "none":  # then alpha is never measured
        params = {k: v for k, v in params.items() if k not in ("reshape", "rule", "warmup")}
    if recipe.row != "dense":
        params |= {f"prune_{key}": value for key, value in config.params.items()}
    folder, metrics = cached("segment", params, work)
    return Segmented(folder, metrics)


def transfer_table(lab: Lab, recipe: Recipe, config: PruneConfig, rows: str) -> pd.DataFrame:
    """``segment_stage`` for each of the space-separated ``rows``: one line a row, mIoU in %."""
    recipes = [replace(recipe, row=row) for row in rows.split()]  # a typo shows before any work
    found = [(r.row, segment_stage(lab, r, config)) for r in recipes]
    return pd.DataFrame({"row": r, "starts_from": ROWS[r], **done.metrics} for r, done in found)


def selection_table(
    lab: Lab, recipe: Recipe, config: PruneConfig, selects: str, regimes: dict[str, dict]
) -> pd.DataFrame:
    """``segment_stage`` for each selection in each regime (changes to ``recipe``)."""
    recipes = [
        (regime, replace(recipe, select=select, **changes))
        for regime, changes in regimes.items()
        for select in selects.split()
    ]
    lines = []
    for regime, changed in recipes:
        done = segment_stage(lab, changed, config)
        line = {"regime": regime, "select": changed.select, "layers_frozen": len(done.frozen)}
        lines.append(line | done.metrics)
    return pd.DataFrame(lines)


def _options(lab: Lab, recipe: Recipe) -> dict:
    """What a framework needs beside its backbone: Han et al. the dense CLIP, as a teacher."""
    if recipe.framework == "han":
        return {"teacher": lab.load()}
    if recipe.framework == "fcclip":
        return {"clip": "tuned" if recipe.backbone_lr else "frozen"}
    return {}


def _freeze_by_alpha(model: nn.Module, recipe: Recipe, folder: Path) -> None:
    """Measure alpha and freeze; the choice is written down, so that a resumed run repeats it."""
    choice = folder / "frozen.json"
    if not choice.exists():
        trunk = {
            name: module.weight for name, module in model.backbone.visual.named_modules()
            if isinstance(module, nn.Conv2d)
        }  # fmt: skip
        state = {f"{name}.weight": weight.detach() for name, weight in trunk.items()}
        alphas = layer_alphas(state, reshape=recipe.reshape, rule=recipe.rule)
        names = select_layers(alphas, recipe.select, seed=recipe.seed)
        alphas.to_csv(folder / "alphas.csv", index=False)
        with atomic_path(choice) as path:
            path.write_text(json.dumps(names))
    freeze(model, json.loads(choice.read_text()))


def _evaluate(model: nn.Module, lab: Lab, recipe: Recipe, folder: Path) -> dict[str, float]:
    """mIoU in percent on the evaluation split, and on the shifted domain where there is one."""
    metrics = {}
    for split, prefix in (("val", ""), ("shifted", "shifted_")):
        if split == "shifted" and lab.dataset != "scenes":
            continue
        data = lab.data(split, limit=recipe.eval_images or None)
        progress = folder / "checkpoints" / split
        found = evaluate(model, data, recipe.batch_size, device=lab.device, out=progress)
        metrics |= {
            f"{prefix}all": 100 * found.miou,
            f"{prefix}seen": 100 * found.miou_seen,
            f"{prefix}unseen": 100 * found.miou_unseen,
        }
        if not prefix:
            found.per_class.to_csv(folder / "per_class.csv", index=False)
    return metrics


def _save_tower(backbone: Backbone, path: Path) -> None:
    _save_weights(backbone.visual, path)


def _save_weights(model: nn.Module, path: Path) -> None:
    with atomic_path(path) as partial:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial)
