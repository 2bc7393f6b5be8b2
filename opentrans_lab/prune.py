"""Algorithm 1: iterative magnitude pruning of CLIP's image encoder under L_KD alone.

Repeat: train t steps with L_KD only; prune p of the remaining weights, those globally smallest;
until the density is reached. One folder a round; a run killed at any moment goes on from there.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .backbone import Backbone, frozen_copy
from .errors import LabError
from .losses import cap_regions, crop_regions, kd_loss, pool_regions, region_images
from .masks import Mask
from .results import atomic_path
from .train import TrainConfig, fit


@dataclass(frozen=True)
class PruneConfig:
    """Algorithm 1's parameters; the defaults are the paper's."""

    density: float = 0.1
    """Fraction of weights to keep in the end (the paper's s)."""
    p: float = 0.1
    """Fraction of the remaining weights that a round prunes."""
    steps: int = 5000
    """t, the L_KD steps before each pruning."""
    batch_size: int = 28
    lr: float = 1e-4
    """Constant."""
    terms: str = "both"
    """Terms of L_KD: ``"both"``, ``"plain"``, ``"text"``."""
    mean: str = "joint"
    """How the terms are averaged, see ``kd_loss``."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.density < 1 and 0 < self.p < 1):
            raise LabError(f"density={self.density} and p={self.p} must lie between 0 and 1")
        if self.steps < 1 or self.batch_size < 1:
            raise LabError(f"steps={self.steps} and batch_size={self.batch_size} must be 1 or more")

    @property
    def rounds(self) -> int:
        """Rounds until at most ``density`` is left: 22 for 0.1 (0.0985; 21 would leave 0.109)."""
        return math.ceil(math.log(self.density) / math.log(1 - self.p) - 1e-9)

    def kept(self, total: int, k: int) -> int:
        """Weights kept after k rounds: round(total·(1-p)^k)."""
        return round(total * (1 - self.p) ** k)


class Student(nn.Module):
    """The CLIP tower that is pruned, a projection of pooled regions, and the scalar s.

    The projection starts as the attention pool's value and output maps, which is what CLIP itself
    does to a single position. Differs from the authors' code: a fresh linear layer on a query.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        pool = backbone.visual.attnpool
        self.project = nn.Linear(pool.v_proj.in_features, pool.c_proj.out_features)
        with torch.no_grad():
            self.project.weight.copy_(pool.c_proj.weight @ pool.v_proj.weight)
            self.project.bias.copy_(pool.c_proj.weight @ pool.v_proj.bias + pool.c_proj.bias)
        pool.requires_grad_(False)  # not on this path
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor, masks: list[Tensor]) -> Tensor:
        """images (B, 3, H, W), masks list of (K, H, W) -> region embeddings (R, D), unit length."""
        return F.normalize(self.project(pool_regions(self.backbone(images)[-1], masks)), dim=-1)


def distillation(student: Student, teacher: Backbone, config: PruneConfig) -> Callable:
    """The objective of Algorithm 1 for ``fit``: L_KD on the batch's regions and nothing else."""

    def objective(model: nn.Module, batch: dict) -> dict[str, Tensor]:
        masks, classes = cap_regions(batch["masks"], batch["classes"])
        with torch.no_grad():
            crops = crop_regions(batch["images"], masks, teacher.image_size)
            target = teacher.embed(crops)  # (R, D)
            words = teacher.text(batch["names"])[torch.cat(classes)]  # (R, D)
        embedded = model(batch["images"], masks)
        return kd_loss(
            embedded, target, words, region_images(masks), student.scale, config.terms, config.mean
        )

    return objective


def distill(
    backbone: Backbone,
    batches: Callable[[int], Iterator[dict]],
    config: PruneConfig,
    steps: int,
    mask: Mask | None,
    out: Path | None = None,
    device: str | torch.device = "auto",
    teacher: Backbone | None = None,
) -> pd.DataFrame:
    """``steps`` of L_KD under a fixed mask (the KD budget of a control); returns the history."""
    teacher = teacher or frozen_copy(backbone)
    student = Student(backbone)
    return fit(
        student, distillation(student, teacher, config), batches,
        TrainConfig(steps, config.batch_size, config.lr, seed=config.seed), out, mask,
        device=device, title="distil",
    ).history  # fmt: skip


def prune(
    backbone: Backbone,
    batches: Callable[[int], Iterator[dict]],
    config: PruneConfig,
    out: Path,
    device: str | torch.device = "auto",
) -> tuple[Mask, pd.DataFrame]:
    """Algorithm 1 in place on ``backbone``: returns its mask and a table of the rounds.

    Step s of round k sees the batch ``(k-1)·t + s``. Weights continue from round to round; each
    round starts a fresh AdamW, so that no momentum of pruned weights survives. Folder ``out`` gets
    ``round_KK/mask.safetensors`` a round and the last round's weights.
    """
    out = Path(out)
    teacher = frozen_copy(backbone)
    student = Student(backbone)
    objective = distillation(student, teacher, config)
    mask = Mask.dense(backbone.visual)
    total, rows = mask.total, []
    for k in tqdm(range(1, config.rounds + 1), desc="Algorithm 1", unit="round"):
        folder = out / f"round_{k:02d}"
        if (folder / "history.csv").exists():  # written last: this round is whole
            mask = Mask.load(folder / "mask.safetensors")
            rows.append(_row(k, mask, pd.read_csv(folder / "history.csv")))
            if (folder / "student.safetensors").exists():
                student.load_state_dict(load_file(folder / "student.safetensors"))
            continue
        first = (k - 1) * config.steps
        history = fit(
            student, objective, lambda start, first=first: batches(first + start),
            TrainConfig(config.steps, config.batch_size, config.lr, seed=config.seed + k),
            folder / "checkpoints", mask, device=device,
            title=f"round {k}/{config.rounds}, density {mask.density:.3f}",
        ).history  # fmt: skip
        mask = Mask.by_magnitude(backbone.visual, config.kept(total, k), within=mask)
        mask = Mask(mask, round=k, p=config.p, loss=f"L_KD {config.terms}", seed=config.seed,
                    backbone=backbone.name)  # fmt: skip
        mask.apply(student)
        mask.save(folder / "mask.safetensors")
        with atomic_path(folder / "student.safetensors") as path:
            save_file({n: t.contiguous() for n, t in student.state_dict().items()}, path)
        with atomic_path(folder / "history.csv") as path:
            history.to_csv(path, index=False)
        shutil.rmtree(folder / "checkpoints")
        (out / f"round_{k - 1:02d}" / "student.safetensors").unlink(missing_ok=True)
        rows.append(_row(k, mask, history))
    return mask, pd.DataFrame(rows)


def _row(k: int, mask: Mask, history: pd.DataFrame) -> dict:
    """The table's line of round k: L_KD is the mean over the round, before its pruning."""
    losses = history[["loss", "plain", "text"]].mean()
    return {"round": k, "density": mask.density, "kept": mask.kept, **losses}
