"""One fine-tuning of a framework, as a ``Recipe`` says: start, freeze on the way, train, evaluate.

``experiment`` caches it, ``devices`` spreads it over several processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from torch import nn

from ..alpha import RESHAPES, RULES, layer_alphas
from ..checks import Count, Factor, Must, Positive, Rate, Seed, Share, check
from ..costs import cost
from ..device import PRECISIONS, seed_everything
from ..errors import LabError
from ..evaluation import evaluate
from ..files import atomic_path
from ..finetuning import SELECTIONS, STAGES, freeze, hold_norms, select_layers, unfreeze
from ..heads import FRAMEWORKS, PRESETS, build
from ..pruning import ROWS, PruneConfig, recalibrate
from ..records import OfParameters, save_table
from ..train import TrainConfig, fit, together, wait
from .lab import Lab
from .starts import row_start, save_weights

NORMS = ("train", "eval", "recalibrated")


@dataclass(frozen=True)
class Recipe(OfParameters):
    """One fine-tuning of one framework."""

    NEEDS: ClassVar = ("preset", "steps", "batch_size", "lr", "backbone_lr", "eval_images", "seed")

    framework: Annotated[str, FRAMEWORKS] = "deeplabv3"
    preset: Annotated[str, PRESETS] = "mini"
    row: Annotated[str, ROWS] = "dense"
    """Which weights and mask to start from, see ``transfer.ROWS``."""
    select: Annotated[str, SELECTIONS] = "none"
    """Layers to freeze after the warm-up, see ``finetune.SELECTIONS``."""
    fraction: Share = 0.5
    """Share of the layers to freeze."""
    prefix: str = ""
    """Stages that select="prefix" freezes, such as "stem layer1"; empty: as far as alpha allows."""
    reshape: Annotated[str, RESHAPES] = "slices"
    rule: Annotated[str, RULES] = "csn"
    warmup: Annotated[float, Must("0 or more and less than 1", lambda x: 0 <= x < 1)] = 0.2
    """Share of the steps before alpha is measured and layers are frozen (the paper: 10^4 of
    5·10^4)."""
    reselect: Count = 0
    """Steps after which alpha is measured and layers are chosen again; 0: once for all."""
    norm: Annotated[str, NORMS] = "train"
    """``"eval"`` leaves all batch normalisation on its running statistics; ``"recalibrated"``
    estimates those of the tower anew under the row's mask and then trains as ``"train"`` does: for
    a frozen CLIP, whose statistics would otherwise be those of before the last pruning."""
    precision: Annotated[str, PRECISIONS] = "auto"
    """See ``train.TrainConfig``."""
    steps: Positive = 100
    batch_size: Annotated[int, Must("2 or more", lambda n: n >= 2)] = 16
    """Batch normalisation needs two images."""
    lr: Rate = 1e-3
    backbone_lr: Factor = 0.1
    """Multiplier of ``lr`` for the backbone; 0 leaves FC-CLIP's frozen, BN included, as its authors
    do."""
    images: Count = 0
    """Fixed training images; 0: all of the data set, of scenes the lab's pool."""
    eval_images: Count = 128
    """Images of each evaluation split; 0: all."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Refuse a mistyped word or an impossible number now, and not after the training."""
        check(self)
        if unknown := set(self.prefix.split()).difference(STAGES):
            raise LabError(f"unknown prefix={unknown.pop()!r}; use some of {', '.join(STAGES)}")


def fine_tune(lab: Lab, recipe: Recipe, config: PruneConfig, folder: Path) -> dict:
    """The work of ``experiment.segment_stage``: fills ``folder``, returns the metrics."""
    backbone, mask = row_start(lab, recipe.row, config)
    if recipe.norm == "recalibrated":
        recalibrate(backbone, mask, lab.batches(recipe.batch_size, recipe.seed)(0))
    seed_everything(recipe.seed)  # the head begins alike, whatever has run before in this process
    model = build(recipe.framework, backbone, recipe.preset, **framework_options(lab, recipe))
    if recipe.norm == "eval":
        hold_norms(model)
    training = TrainConfig(
        recipe.steps, recipe.batch_size, recipe.lr, recipe.backbone_lr, schedule="cosine",
        warmup=recipe.steps // 20, precision=recipe.precision, seed=recipe.seed,
    )  # fmt: skip

    def objective(wrapped: nn.Module, batch: dict) -> dict:
        return model.loss(wrapped(batch["images"]), batch)

    done = fit(
        model, objective, lab.batches(recipe.batch_size, recipe.seed, recipe.images or None),
        training, folder / "checkpoints", mask, _freezing(recipe, folder), lab.device,
        title=f"{recipe.framework}, {recipe.row}, freeze {recipe.select}", side=lab.size,
    )  # fmt: skip
    metrics = _evaluate(model, lab, recipe, folder)
    wait()
    if together()[0] == 0:
        save_weights(model, folder / "model.safetensors")
        done.history.to_csv(folder / "history.csv", index=False)
    trunk = [p for n, p in backbone.visual.named_parameters() if not n.startswith("attnpool.")]
    table = cost(recipe.framework, (lab.size,) * 2, mask, lab.backbone, recipe.preset)
    total = table.query("convention == 'uniform' and component == 'total'").iloc[0]
    return metrics | {
        "params": int(total["sparse_params"]),
        "macs": int(total["sparse_macs"]),
        "density": 1.0 if mask is None else mask.density,
        "frozen_weights": sum(p.numel() for p in trunk if not p.requires_grad),
        "loss": float(done.history["loss"].tail(10).mean()),
        "images_per_second": done.images_per_second,
    }


def framework_options(lab: Lab, recipe: Recipe) -> dict:
    """What a framework needs beside its backbone: Han et al. the dense CLIP, as a teacher."""
    if recipe.framework == "han":
        return {"teacher": lab.teacher(lab.load())}
    if recipe.framework == "fcclip":
        return {"clip": "tuned" if recipe.backbone_lr else "frozen"}
    return {}


def _freezing(recipe: Recipe, folder: Path) -> dict[int, Callable[[nn.Module], None]]:
    """What to do to the model before which step."""
    if recipe.select == "none":
        return {}
    first = int(recipe.warmup * recipe.steps)
    steps = range(first, recipe.steps, recipe.reselect) if recipe.reselect else [first]
    return {step: partial(_freeze_by_alpha, recipe, folder, step) for step in steps}


def _freeze_by_alpha(recipe: Recipe, folder: Path, step: int, model: nn.Module) -> None:
    """Measure alpha and freeze; the choice is written down, so that a resumed run repeats it.

    One process decides for all: two that froze different layers would wait for each other.
    """
    choice = folder / f"frozen-{step:06d}.json"
    if together()[0] == 0 and not choice.exists():
        trunk = {
            f"{name}.weight": module.weight.detach()
            for name, module in model.backbone.visual.named_modules()
            if isinstance(module, nn.Conv2d)
        }
        alphas = layer_alphas(trunk, reshape=recipe.reshape, rule=recipe.rule)
        names = select_layers(alphas, recipe.select, recipe.fraction, recipe.seed + step)
        if recipe.select == "prefix" and recipe.prefix:
            names = recipe.prefix.split()
        if not (folder / "alphas.csv").exists():
            save_table(alphas, folder / "alphas.csv")
        with atomic_path(choice) as path:
            path.write_text(json.dumps(names), encoding="utf-8")
    wait()
    unfreeze(model)
    if recipe.norm == "eval":
        hold_norms(model)
    freeze(model, json.loads(choice.read_bytes()))


def _evaluate(model: nn.Module, lab: Lab, recipe: Recipe, folder: Path) -> dict[str, float]:
    """mIoU in percent on the evaluation split, and on the shifted domain where there is one."""
    metrics = {}
    for split, prefix in (("val", ""), ("shifted", "shifted_")):
        if split == "shifted" and lab.dataset != "scenes":
            continue
        data = lab.data(split, limit=recipe.eval_images or None)
        progress = folder / "checkpoints" / split / str(together()[1])  # shares differ
        found = evaluate(model, data, recipe.batch_size, device=lab.device, out=progress)
        metrics |= {
            f"{prefix}all": 100 * found.miou,
            f"{prefix}seen": 100 * found.miou_seen,
            f"{prefix}unseen": 100 * found.miou_unseen,
        }
        if not prefix:
            save_table(found.per_class, folder / "per_class.csv")
    return metrics
