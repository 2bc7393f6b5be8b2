"""What a grid of notebooks will cost, before anything is paid: hours, memory and disk, run by run.

A plan lists the very stages that the notebooks will ask for. So one that several runs share is
counted once, in the run that comes first, and one that has finished counts nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch.autograd.graph import saved_tensors_hooks

from .cost import training_cost
from .counter import meta_backbone, meta_framework, trace
from .errors import LabError
from .experiment import segment_params
from .frameworks import build
from .grids import Job
from .lab import Lab, stage_folder
from .prune import PruneConfig
from .results import load, runs_root
from .speed import step_costs
from .stages import distill_params, prune_params
from .transfer import TRAINED
from .tuning import Recipe, framework_options

REGIONS = 200  # most crops of a batch that the teacher of L_KD sees
VALIDATION = {
    "coco": 5000, "cityscapes": 500, "ade150": 2000, "ade847": 2000, "voc20": 1449, "voc21": 1449,
    "pc59": 5105, "pc459": 5105, "scenes": 512,
}  # fmt: skip
"""Pictures of the evaluation split (their papers and official lists)."""
RUN_BYTES = 2e6  # of a run's notebook, page and figures; measured on the demo
ADAMW = 16  # bytes of a weight in training: itself, its gradient, two moments
ASSUMPTIONS = (
    "Only training and evaluation count: not reading pictures from disk, alpha, figures, start-up,",
    "  nor the second evaluation in which FC-CLIP's two classifiers are taken apart.",
    "MACs are dense and of all layers: plain torch multiplies zeros, and frozen layers may save.",
    f"Algorithm 1's teacher sees {REGIONS} crops a batch, the most there can be.",
    "Evaluation pictures are 4:3 with the parameter size as their shorter side.",
    "Memory is float32, without the libraries' own; bf16 takes about half of what grows with size.",
    "Disk is what stays; while a model trains, its checkpoint takes three times its size more.",
)


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
        """Bytes at the peak: weights, gradients, moments, and what forward keeps for backward."""
        size, backbone = self.lab.size, self.lab.backbone
        if self.recipe is None:
            weights, kept = _kept(None, size, backbone, "")
            return (ADAMW + 4) * weights + self.config.batch_size * kept  # 4: the teacher's
        recipe = self.recipe
        tuned = bool(recipe.backbone_lr) or recipe.framework != "fcclip"
        weights, kept = _kept(recipe.framework, size, backbone, recipe.preset, tuned)
        held = ADAMW + 4 * (recipe.framework == "han")
        return held * weights + recipe.batch_size * kept

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
    params = job.full
    lab = _made(Lab, params)
    own = {"steps": "prune_steps", "batch_size": "prune_batch_size", "lr": "prune_lr"}
    config = _made(PruneConfig, params | {k: params.get(v) for k, v in own.items()})
    found = []
    if job.notebook.stem == "02_prune_imp":
        found.append(_prune(lab, config))
        if params["other_seed"] >= 0:
            found.append(_prune(lab, replace(config, seed=params["other_seed"])))
    for recipe in _recipes(job.notebook.stem, params):
        if recipe.row != "dense":
            found.append(_prune(lab, config))
        if recipe.row in TRAINED and recipe.row != "ours":
            key = distill_params(lab, recipe.row, config)
            found.append(Work("distill", stage_folder("distill", key), lab, config))
        key = segment_params(lab, recipe, config)
        found.append(Work("segment", stage_folder("segment", key), lab, config, recipe))
    return found


def _made(kind: type, params: dict):
    """``kind`` from the parameters that are named as its fields."""
    names = {f.name for f in fields(kind)} & params.keys()
    return kind(**{name: params[name] for name in names if params[name] is not None})


def _prune(lab: Lab, config: PruneConfig) -> Work:
    return Work("prune", stage_folder("prune", prune_params(lab, config)), lab, config)


def _recipes(notebook: str, params: dict) -> Iterator[Recipe]:
    """The fine-tunings of a notebook, in its order."""
    if "rows" in params:  # 03 and 06
        for framework in (params.get("frameworks") or params["framework"]).split():
            for row in params["rows"].split():
                yield replace(_made(Recipe, params | {"framework": framework}), row=row)
    elif "regimes" in params:  # 04
        changes = {"plenty": {}, "few": {"images": params["few"]}, "pruned": {"row": "ours"}}
        for regime in params["regimes"].split():
            for select in params["selects"].split():
                yield replace(_made(Recipe, params), select=select, **changes[regime])


def plan(jobs: Sequence[Job], macs_per_second: float) -> pd.DataFrame:
    """What is left to do of ``jobs`` and what it takes: one line a job, in order.

    Args:
        macs_per_second: multiply-accumulates that one device does in training.

    Returns:
        notebook, parameters (the given ones), stages (left), pictures (trained on), macs, hours (of
        one device), memory and disk (bytes; memory of the largest stage).

    Raises:
        LabError: as :func:`work_of`.
    """
    seen, rows = set(), []
    for job in jobs:
        about = {"notebook": job.notebook.stem, "parameters": dict(job.parameters)}
        done = load(job.folder)
        new = {} if done else {w.folder: w for w in work_of(job) if not w.finished}
        left = [work for folder, work in new.items() if folder not in seen]
        seen |= new.keys()
        macs = sum(work.macs for work in left)
        rows.append(
            about
            | {"stages": len(left), "pictures": sum(work.pictures for work in left), "macs": macs}
            | {"hours": macs / macs_per_second / 3600}
            | {"memory": max((work.memory for work in left), default=0)}
            | {"disk": sum(work.disk for work in left) + (0 if done else RUN_BYTES)}
        )
    return pd.DataFrame(rows)


def reference(jobs: Sequence[Job]) -> Work:
    """The first stage of ``jobs`` that fine-tunes: what a throughput in pictures speaks of.

    Where they only prune, a fine-tuning of DeepLabV3 with the same CLIP.

    Raises:
        LabError: they train nothing.
    """
    works = [work for job in jobs for work in work_of(job)]
    if not works:
        raise LabError("no notebook of this grid trains anything, so there is nothing to plan")
    tuned = next((work for work in works if work.recipe), None)
    preset = "mini" if works[0].lab.backbone == "mini" else "paper"
    return tuned or replace(works[0], kind="segment", recipe=Recipe(preset=preset))


def step_macs(work: Work) -> float:
    """Multiply-accumulates of one training picture of a fine-tuning."""
    recipe = work.recipe
    return _training(recipe.framework, work.lab.size, work.lab.backbone, recipe.preset)


def measured(work: Work) -> tuple[float, str]:
    """Training pictures a second of ``work``'s framework on this device, and what was measured.

    Real steps with random weights on scenes of the real size: on a GPU with the real batch, on a
    CPU with two pictures.
    """
    recipe, size = work.recipe, work.lab.size
    lab = replace(work.lab, checkpoint="random", dataset="scenes", data_root="", jitter=False)
    backbone = lab.load()
    device = next(backbone.parameters()).device
    batch_size = recipe.batch_size if device.type == "cuda" else 2
    model = build(recipe.framework, backbone, recipe.preset, **framework_options(lab, recipe))
    batch = next(lab.batches(batch_size, recipe.seed)(0))
    found = step_costs(
        model, lambda b: model.loss(model(b["images"]), b), batch, {"none": []}, 3, device,
        recipe.precision,
    )  # fmt: skip
    told = f"measured here ({device.type}, {batch_size} pictures of {size} px a step, 3 steps)"
    return float(found["images_per_second"].iloc[0]), told


def past_speed(jobs: Sequence[Job]) -> float:
    """MACs a second of the finished fine-tunings of ``jobs`` (their median); NaN without any."""
    speeds = []
    for work in {w.folder: w for job in jobs for w in work_of(job) if w.finished}.values():
        if work.recipe:
            result = json.loads((work.folder / "result.json").read_text())["result"]
            speeds.append((result.get("images_per_second") or math.nan) * step_macs(work))
    speeds = [speed for speed in speeds if speed == speed]
    return median(speeds) if speeds else math.nan


def describe_plan(table: pd.DataFrame) -> str:
    """The plan as text: a line a job, the totals, and where it all will lie."""
    shown = pd.DataFrame({"run": table["notebook"]})
    differ = pd.DataFrame(list(table["parameters"]))
    for name in differ.columns[differ.astype(str).nunique() > 1]:
        shown[name] = differ[name].where(differ[name].notna(), "")
    shown["stages"] = table["stages"]
    shown["pictures"] = table["pictures"].map("{:,}".format)
    shown["PMACs"] = (table["macs"] / 1e15).map(_number)
    shown["hours"] = table["hours"].map("{:,.2f}".format)
    shown["peak GB"] = (table["memory"] / 1e9).map("{:.1f}".format)
    shown["disk GB"] = (table["disk"] / 1e9).map("{:.2f}".format)
    hours, macs = table["hours"], table["macs"].sum() / 1e15
    total = (
        f"in all: {hours.sum():,.1f} hours of one device ({_number(macs)} PMACs, "
        f"{table['pictures'].sum():,} training pictures), the longest run {hours.max():,.1f} h; "
        f"at most {table['memory'].max() / 1e9:.1f} GB of memory; "
        f"{table['disk'].sum() / 1e9:.2f} GB under {runs_root()}"
    )
    return f"{shown.to_string(index=False)}\n{total}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


# --- the cost model -------------------------------------------------------------------------------


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
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other storage takes its place
        return tensor.detach()

    model.training = True  # the pass of a training step; what drops out would ask for values
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.device("meta"):
        model(torch.empty(1, 3, size, size, device="meta"))
    held = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), held


@cache
def _weights(backbone: str, framework: str = "", preset: str = "") -> int:
    """Numbers in the state dict of a framework, or of the tower alone."""
    model = _model(framework, backbone, preset) if framework else meta_backbone(backbone).visual
    return sum(t.numel() for t in model.state_dict().values())
