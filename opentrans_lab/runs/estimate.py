"""The cached stages that a notebook will ask for, and what each takes: arithmetic, memory, disk.

Nothing runs: networks have shapes only (``counter``).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from ..costs import kept_for_backward, meta_backbone, meta_framework, trace, training_cost
from ..experiments import (
    Lab,
    Recipe,
    check_shares,
    distill_params,
    prune_params,
    segment_params,
    stage_folder,
)
from ..pruning import TRAINED, PruneConfig
from .grids import Job

REGIONS = 200  # most crops of a batch that the teacher of L_KD sees
VALIDATION = {
    "coco": 5000, "cityscapes": 500, "ade150": 2000, "ade847": 2000, "voc20": 1449, "voc21": 1449,
    "pc59": 5105, "pc459": 5105, "scenes": 512,
}  # fmt: skip
"""Pictures of the evaluation split (their papers and official lists)."""
ADAMW = 16  # bytes of a weight in training: itself, its gradient, two moments


@dataclass(frozen=True)
class Work:
    """One cached stage that a notebook will ask for."""

    kind: str
    """``"prune"``, ``"distill"`` or ``"segment"``."""
    folder: Path
    lab: Lab
    config: PruneConfig
    recipe: Recipe | None = None

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").is_file()

    @property
    def pictures(self) -> int:
        """Training pictures, over all steps."""
        if self.recipe:
            return self.recipe.steps * self.recipe.batch_size
        steps = self.config.dense_steps + self.config.rounds * self.config.steps
        return steps * self.config.batch_size

    @property
    def macs(self) -> float:
        """Multiply-accumulates of training and evaluation."""
        size, backbone = self.lab.size, self.lab.backbone
        if self.recipe is None:
            crops = REGIONS / self.config.batch_size * _tower(backbone, None)
            return self.pictures * (3 * _tower(backbone, size) + crops)
        recipe = self.recipe
        step = _training(recipe.framework, size, backbone, recipe.preset)
        if recipe.framework == "han":
            regions = _model(recipe.framework, backbone, recipe.preset).preset.regions
            step += regions / recipe.batch_size * _tower(backbone, None)
        area = 1 if self.lab.dataset == "scenes" else 4 / 3
        return self.pictures * step + self._evaluated() * area * step / 3

    def _evaluated(self) -> int:
        """Pictures that are evaluated: those of the mini lab twice, as they are and shifted."""
        dataset, limit = self.lab.dataset, self.recipe.eval_images
        there = VALIDATION.get(dataset, math.inf)
        if not limit and math.isinf(there):
            there = len(self.lab.data("val"))
        return (limit or there) * (2 if dataset == "scenes" else 1)

    @property
    def memory(self) -> float:
        """Bytes of a device at the peak: weights, gradients, moments, what forward keeps."""
        size, backbone = self.lab.size, self.lab.backbone
        if self.recipe is None:
            weights, kept = _kept(None, size, backbone, "")
            return (ADAMW + 4) * weights + self.config.batch_size * kept  # 4: the teacher's
        recipe = self.recipe
        tuned = bool(recipe.backbone_lr) or recipe.framework != "fcclip"
        weights, kept = _kept(recipe.framework, size, backbone, recipe.preset, tuned)
        held = ADAMW + 4 * (recipe.framework == "han")
        return held * weights + recipe.batch_size // self.lab.devices * kept

    @property
    def disk(self) -> float:
        """Bytes that stay."""
        tower = _weights(self.lab.backbone)
        if self.kind == "prune":  # a mask a round and the last, the tower, the last round's student
            return (self.config.rounds + 1) * tower / 8 + 2 * 4 * tower
        if self.kind == "distill":
            return 4 * tower
        return 4 * _weights(self.lab.backbone, self.recipe.framework, self.recipe.preset)


def work_of(job: Job) -> list[Work]:
    """The stages that a job asks for, in order; none for a notebook that trains nothing.

    Raises:
        LabError: unknown parameter or impossible value, as the notebook itself would say.
    """
    params, prunes = job.full, job.notebook.stem == "02_prune_imp"
    recipes = list(_recipes(job.notebook.stem, params))
    if not recipes and not prunes:
        return []
    lab, config = Lab.of(params), PruneConfig.of(params)
    found = []
    if prunes:
        found.append(_prune(lab, config))
        if params["other_seed"] >= 0:
            found.append(_prune(lab, replace(config, seed=params["other_seed"])))
    for recipe in recipes:
        if recipe.row != "dense":
            found.append(_prune(lab, config))
        if recipe.row in TRAINED and recipe.row != "ours":
            key = distill_params(lab, recipe.row, config)
            found.append(Work("distill", stage_folder("distill", key), lab, config))
        check_shares(lab, recipe)
        key = segment_params(lab, recipe, config)
        found.append(Work("segment", stage_folder("segment", key), lab, config, recipe))
    return found


def _prune(lab: Lab, config: PruneConfig) -> Work:
    return Work("prune", stage_folder("prune", prune_params(lab, config)), lab, config)


def _recipes(notebook: str, params: dict) -> Iterator[Recipe]:
    """The fine-tunings of a notebook, in its order."""
    if "rows" in params:  # 03 and 06
        for framework in (params.get("frameworks") or params["framework"]).split():
            for row in params["rows"].split():
                yield Recipe.of(params, framework=framework, row=row)
    elif "regimes" in params:  # 04
        changes = {"plenty": {}, "few": {"images": params["few"]}, "pruned": {"row": "ours"}}
        for regime in params["regimes"].split():
            for select in params["selects"].split():
                yield Recipe.of(params, select=select, **changes[regime])


def step_macs(work: Work) -> float:
    """Multiply-accumulates of one training picture of a fine-tuning."""
    recipe = work.recipe
    return _training(recipe.framework, work.lab.size, work.lab.backbone, recipe.preset)


@cache
def _model(framework: str, backbone: str, preset: str) -> torch.nn.Module:
    return meta_framework(framework, backbone, preset)


@cache
def _training(framework: str, size: int, backbone: str, preset: str) -> float:
    """MACs of a picture's training step: forward and both backward passes."""
    about = {"backbone": backbone, "preset": preset, "images": 1, "warmup": 0}
    table = training_cost(framework, (size,) * 2, frozen={"none": []}, **about)
    return 1e15 * float(table["full"].iloc[0])


@cache
def _tower(backbone: str, size: int | None) -> int:
    """MACs of the tower's forward pass; without a size, of CLIP's own with its attention pool."""
    model = meta_backbone(backbone)
    side = size or model.image_size
    images = torch.empty(1, 3, side, side, device="meta")
    return int(trace(model if size else model.visual, images).rows["macs"].sum())


@cache
def _kept(
    framework: str | None, size: int, backbone: str, preset: str, tuned: bool = True
) -> tuple[int, int]:
    """Weights that train, and bytes that forward keeps for backward of one picture, in float32."""
    if framework is None:
        model = meta_backbone(backbone)
    else:
        options = {"clip": "tuned" if tuned else "frozen"} if framework == "fcclip" else {}
        model = meta_framework(framework, backbone, preset, **options)
    model.training = True  # the pass of a training step; what drops out would ask for values
    with kept_for_backward(model) as kept, torch.device("meta"):
        model(torch.empty(1, 3, size, size, device="meta"))
    return sum(p.numel() for p in model.parameters() if p.requires_grad), kept[0]


@cache
def _weights(backbone: str, framework: str = "", preset: str = "") -> int:
    """Numbers in the state dict of a framework, or of the tower alone."""
    model = _model(framework, backbone, preset) if framework else meta_backbone(backbone).visual
    return sum(t.numel() for t in model.state_dict().values())
