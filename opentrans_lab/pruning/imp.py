"""Algorithm 1: iterative magnitude pruning of CLIP's image encoder under L_KD alone.

Repeat: train t steps with L_KD only; prune p of the remaining weights, those globally smallest;
until the density is reached. One folder a round; a run killed at any moment goes on from there.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import Count, Part, Positive, Rate, Seed, check
from ..clip import Backbone, first_names
from ..errors import LabError
from ..files import atomic_path, writable_folder
from ..masks import Mask, prunable
from ..records import OfParameters, read_table, revision, save_table
from ..train import Chance, TrainConfig, fit
from .losses import KD_TERMS, MEANS, cap_regions, class_loss, kd_loss, pool_regions, region_images
from .teacher import Teacher

TERMS = (*KD_TERMS, "class")


@dataclass(frozen=True)
class PruneConfig(OfParameters):
    """Algorithm 1's parameters; the defaults are the paper's."""

    PREFIX: ClassVar = "prune_"
    NEEDS: ClassVar = ("density", "p", "prune_steps", "prune_batch_size", "prune_lr", "seed")

    density: Part = 0.1
    """Fraction of weights to keep in the end (the paper's s)."""
    p: Part = 0.1
    """Fraction of the remaining weights that a round prunes."""
    steps: Positive = 5000
    """t, the L_KD steps before each pruning."""
    batch_size: Positive = 28
    lr: Rate = 1e-4
    """Constant."""
    terms: Annotated[str, TERMS] = "both"
    """Terms of L_KD: ``"both"``, ``"plain"``, ``"text"``. ``"class"`` is no distillation but
    supervision by class labels, which the paper argues against: the ablation's peer."""
    mean: Annotated[str, MEANS] = "joint"
    """How the terms are averaged, see ``kd_loss``."""
    dense_steps: Count = 0
    """Steps of the same loss before the first round, on the unpruned tower (Algorithm 1's
    pre-training; a pretrained CLIP can do without)."""
    rewind: bool = False
    """Put the surviving weights (and BN statistics) back to where round 1 started from after each
    pruning, as lottery tickets do, the last one included; by default training goes on from where
    it is, as in the authors' code."""
    checkpoint_every: Positive = 200
    """Steps between checkpoints within a round."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        check(self)

    @property
    def rounds(self) -> int:
        """Rounds until at most ``density`` is left: 22 for 0.1 (0.0985; 21 would leave 0.109)."""
        return math.ceil(math.log(self.density) / math.log(1 - self.p) - 1e-9)

    @property
    def params(self) -> dict:
        """What the result depends on: all but how often it is saved."""
        return {k: v for k, v in asdict(self).items() if k != "checkpoint_every"}

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


def distillation(student: Student, teacher: Teacher | Backbone, config: PruneConfig) -> Callable:
    """The objective of Algorithm 1 for ``fit``: L_KD on the batch's regions and nothing else.

    With ``terms="class"`` it is the ablation's supervised peer instead.
    """
    teacher = Teacher.of(teacher)

    def objective(model: nn.Module, batch: dict) -> dict[str, Tensor]:
        chance = Chance(batch.get("seeds"), batch["images"].device)
        places = [torch.arange(len(mask)) for mask in batch["masks"]]
        masks, places = cap_regions(batch["masks"], places, chance=chance)
        classes = [c[p.to(c.device)] for c, p in zip(batch["classes"], places, strict=True)]
        embedded = model(batch["images"], masks)  # (R, D)
        names = teacher.clip.text(first_names(batch["names"]))  # (C, D)
        if config.terms == "class":
            return class_loss(embedded, names, torch.cat(classes))
        words = names[torch.cat(classes)]  # (R, D): all that is left of a label
        return kd_loss(
            embedded, teacher(batch, masks, places), words, region_images(masks), student.scale,
            config.terms, config.mean,
        )  # fmt: skip

    return objective


def distill(
    backbone: Backbone,
    batches: Callable[[int], Iterator[dict]],
    config: PruneConfig,
    steps: int,
    mask: Mask | None,
    out: Path | None = None,
    device: str | torch.device = "auto",
    teacher: Teacher | Backbone | None = None,
) -> pd.DataFrame:
    """``steps`` of L_KD under a fixed mask (the KD budget of a control); returns the history.

    Without a ``teacher``, the backbone as it comes.
    """
    teacher = Teacher.of(teacher or backbone)
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
    teacher: Teacher | None = None,
) -> tuple[Mask, pd.DataFrame]:
    """Algorithm 1 in place on ``backbone``: returns its mask and a table of the rounds.

    Step s of round k sees the batch ``dense_steps + (k-1)·t + s``. Weights continue from round to
    round, or are rewound; each round starts a fresh AdamW, so that no momentum of pruned weights
    survives. Folder ``out`` gets ``round_KK/`` with mask and history a round, and the last round's
    weights; round 0 is the dense stage. A process killed at any moment goes on from there.
    Without a ``teacher``, the backbone as it comes.
    """
    out = writable_folder(out)
    teacher = Teacher.of(teacher or backbone)
    student = Student(backbone)
    objective = distillation(student, teacher, config)
    mask = Mask.dense(backbone.visual)
    total, rows, begin = mask.total, [], {}
    _same_run(out, config, backbone)

    def stage(folder: Path, first: int, steps: int, seed: int, title: str) -> pd.DataFrame:
        training = TrainConfig(
            steps, config.batch_size, config.lr, seed=seed,
            checkpoint_every=config.checkpoint_every,
        )  # fmt: skip
        return fit(
            student, objective, lambda start: batches(first + start), training,
            folder / "checkpoints", mask, device=device, title=title,
        ).history  # fmt: skip

    for k in tqdm(range(config.rounds + 1), desc="Algorithm 1", unit="round"):
        folder = out / f"round_{k:02d}"
        steps = config.steps if k else config.dense_steps
        if (folder / "history.csv").exists():  # written last: this round is whole
            if k:
                mask = Mask.load(folder / "mask.safetensors")
                rows.append(_row(k, mask, read_table(folder / "history.csv")))
            if (folder / "student.safetensors").exists():
                student.load_state_dict(load_file(folder / "student.safetensors"))
        elif steps:
            first = config.dense_steps + (k - 1) * config.steps if k else 0
            title = f"round {k}/{config.rounds}, density {mask.density:.3f}" if k else "dense stage"
            history = stage(folder, first, steps, config.seed + k, title)
            if k:
                mask = Mask.by_magnitude(backbone.visual, config.kept(total, k), within=mask)
                mask = Mask(
                    mask, round=k, p=config.p, loss=_loss_name(config), seed=config.seed,
                    backbone=backbone.name, revision=revision(),
                )  # fmt: skip
                if config.rewind:
                    _restore(backbone.visual.state_dict(), begin)  # BN statistics, too
                mask.apply(student)
                mask.save(folder / "mask.safetensors")
                rows.append(_row(k, mask, history))
            _save(student, folder / "student.safetensors")
            save_table(history, folder / "history.csv")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if k > 1:
            (out / f"round_{k - 1:02d}" / "student.safetensors").unlink(missing_ok=True)
        if k == 0 and config.rewind:
            begin = {k: v.clone() for k, v in backbone.visual.state_dict().items()}
    return mask, pd.DataFrame(rows)


def _loss_name(config: PruneConfig) -> str:
    return "class labels" if config.terms == "class" else f"L_KD {config.terms}"


@torch.no_grad()
def _restore(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def _same_run(out: Path, config: PruneConfig, backbone: Backbone) -> None:
    """Refuse a folder that holds rounds of other parameters; write down those of this run."""
    about = config.params | {"backbone": backbone.name, "channels": list(backbone.channels)}
    path = out / "config.json"
    if path.exists() and (was := json.loads(path.read_bytes())) != about:
        other = next(key for key in about if was.get(key) != about[key])
        raise LabError(
            f"{out} holds a run with {other}={was.get(other)!r}, not {about[other]!r}; name "
            "another folder, or remove this one"
        )
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(about, indent=2), encoding="utf-8")


def _save(student: Student, path: Path) -> None:
    with atomic_path(path) as partial:
        save_file({n: t.contiguous() for n, t in student.state_dict().items()}, partial)


def _row(k: int, mask: Mask, history: pd.DataFrame) -> dict:
    """The table's line of round k: losses are means over the round, before its pruning."""
    losses = history.drop(columns=["step", "lr"]).mean()
    return {"round": k, "density": mask.density, "kept": mask.kept, **losses}


@torch.no_grad()
def wanda_scores(backbone: Backbone, batches: Iterator[dict], count: int = 8) -> dict[str, Tensor]:
    """|w| times the norm of what its input channel carries, by parameter name (for ``by_score``).

    Wanda (Sun et al., 2023) on convolutions: the norm is over images and places of ``count``
    batches. No label is looked at, and nothing is trained.
    """
    weights, squares, hooks = prunable(backbone.visual), {}, []

    def watch(name: str) -> Callable:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares[name] = squares.get(name, 0) + inputs[0].float().square().sum((0, 2, 3))

        return hook

    for name in weights:
        module = backbone.visual.get_submodule(name.removesuffix(".weight"))
        hooks.append(module.register_forward_pre_hook(watch(name)))
    training = backbone.training
    backbone.eval()
    for batch in itertools.islice(batches, count):
        backbone(batch["images"].to(next(iter(weights.values())).device))
    backbone.train(training)
    for hook in hooks:
        hook.remove()
    return {name: w.abs() * squares[name].sqrt()[:, None, None] for name, w in weights.items()}
