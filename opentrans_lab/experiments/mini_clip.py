"""Training the mini CLIP: the lab's own small CLIP, contrastively, on captioned scenes.

Two stages of one run: small crops of the world first, where objects are as many pixels wide as
later but a picture costs a quarter, then whole scenes at the segmentation resolution. All names
appear in captions, as real CLIP has seen far more than any segmentation data set labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checks import Positive, Rate, Seed, Share, check
from ..clip import MINI, TEMPLATES, Backbone, build_mini, embed, load_backbone, mini_tokenizer
from ..data import scenes
from ..device import pick
from ..files import atomic_path, writable_folder
from ..records import runs_root
from ..train import TrainConfig, fit

SEED_WORLD = 7_000_000  # pretraining scenes share no index space with segmentation data


@dataclass(frozen=True)
class MiniConfig:
    """How the shipped weights were trained."""

    steps: Positive = 1000
    """Updates in all."""
    crops: Share = 0.7
    """Share of the steps on 64 px crops; the rest sees 128 px scenes."""
    batch_size: Positive = 256
    """Image-caption pairs an update."""
    lr: Rate = 1e-3
    seed: Seed = 0

    def __post_init__(self) -> None:
        check(self)


class Contrast(nn.Module):
    """Both towers; ``forward(images, tokens)`` gives L2-normalised embeddings (B, D) each."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        text = self.clip.encode_text(tokens, normalize=True)
        return embed(self.clip.visual, images), text, self.clip.logit_scale.exp().clamp(max=100)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, tokens: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy, where pairs with equal captions are all positives.

    Differs from CLIP's own: a batch holds the same caption several times, which is no mistake.
    """
    logits = scale * image.float() @ text.float().T  # (B, B)
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def caption_batches(config: MiniConfig, tokenizer, device: torch.device):
    """``batches(start)`` for ``fit``: scenes of step s are the indices s·B to (s+1)·B."""

    def batches(start: int) -> Iterator[dict]:
        for step in range(start, config.steps):
            first, n = step * config.batch_size, config.batch_size
            bare, most = n // 16, n - n // 16
            world = {"names": "all", "seed": SEED_WORLD + config.seed, "device": device}
            if step < config.crops * config.steps:
                kinds = [(most, {"size": 64, "objects": (1, 1), "radius": (14, 30), "plain": 0.15})]
            else:
                half = most // 2
                kinds = [
                    (half, {"size": 128, "objects": (1, 1), "radius": (16, 56), "plain": 0.15}),
                    (most - half, {"size": 128, "objects": (1, 3)}),
                ]
            kinds.append((bare, {"size": kinds[0][1]["size"], "objects": (0, 0)}))
            images, captions = [], []
            for count, how in kinds:
                for low in range(0, count, 64):  # modest pieces: less memory, and faster
                    piece = range(first + low, first + min(low + 64, count))
                    drawn = scenes.render(piece, **world, **how)
                    images.append(drawn.images)
                    captions += drawn.captions
                first += count
            yield {"images": torch.cat(images), "tokens": tokenizer(_vary(captions)).to(device)}

    return batches


def _vary(captions: list[str]) -> list[str]:
    """Some captions without the background, some as "a photo of": as people write them."""
    bare = [c.split(" on ")[0] if i % 4 == 0 else c for i, c in enumerate(captions)]
    return [f"a photo of {c}" if i % 8 in (1, 4) else c for i, c in enumerate(bare)]


def train_mini(
    config: MiniConfig | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    clip_config: dict = MINI,
) -> Path:
    """Train from scratch (or go on from the last checkpoint in ``out``) and export.

    ``out`` is ``mini_clip`` in the folder of runs by default.

    Returns the folder with ``model.safetensors`` (fp16), ``config.json`` and ``card.md``; copy
    it to ``data/mini_clip`` to ship it.
    """
    config, out, where = config or MiniConfig(), out or runs_root() / "mini_clip", pick(device)
    out = writable_folder(out, "--out")
    torch.manual_seed(config.seed)
    clip = build_mini(clip_config).to(memory_format=torch.channels_last)
    batches = caption_batches(config, mini_tokenizer(clip_config), where)
    schedule = TrainConfig(
        steps=config.steps, batch_size=config.batch_size, lr=config.lr, weight_decay=0.05,
        schedule="cosine", warmup=100, seed=config.seed, checkpoint_every=100,
    )  # fmt: skip

    def objective(model: nn.Module, batch: dict) -> dict[str, Tensor]:
        image, text, scale = model(batch["images"], batch["tokens"])
        loss = contrastive_loss(image, text, scale, batch["tokens"])
        hit = (image @ text.T).argmax(1) == torch.arange(len(image), device=image.device)
        return {"loss": loss, "in_batch": hit.float().mean()}

    result = fit(
        Contrast(clip), objective, batches, schedule, out=out / "checkpoints", device=where,
        title="mini CLIP",
    )  # fmt: skip
    return export(clip, clip_config, config, out / "export", result.history, where)


def export(clip, clip_config: dict, config: MiniConfig, folder: Path, history, device) -> Path:
    """Write weights (fp16), configuration and card; the accuracy is that of the fp16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in clip.state_dict().items()}
    state = {k: v.contiguous().cpu() for k, v in state.items() if k != "attn_mask"}
    with atomic_path(folder / "model.safetensors") as path:
        save_file(state, path)
    with atomic_path(folder / "config.json") as path:
        path.write_text(json.dumps(clip_config, indent=2) + "\n", encoding="utf-8")
    backbone = load_backbone("mini", checkpoint=folder, device=device)
    accuracy = {name: zero_shot(backbone, TEMPLATES[name]) for name in ("scenes", "photo", "bare")}
    size = (folder / "model.safetensors").stat().st_size / 1e6
    last = history.tail(50).mean()
    lines = [
        "# The mini CLIP",
        "",
        "A small CLIP of open_clip's own class, trained from scratch on procedural scenes, so that",
        "every step of the lab runs without a download. It knows the mini lab's world and nothing",
        "else: it is a laboratory and no stand-in for real CLIP.",
        "",
        "| | |",
        "|---|---|",
        f"| command | `opentrans-lab mini-clip --steps {config.steps}` |",
        *(f"| {key} | {value} |" for key, value in asdict(config).items()),
        f"| pairs seen | {config.steps * config.batch_size:,} |",
        f"| last 50 steps | loss {last['loss']:.3f}, in-batch accuracy {last['in_batch']:.3f} |",
        f"| zero-shot top-1 over {len(scenes.THINGS)} names, 128 px, templates `scenes` "
        f"| {accuracy['scenes']:.3f} |",
        f"| the same, templates `photo` | {accuracy['photo']:.3f} |",
        f"| the same, bare name | {accuracy['bare']:.3f} |",
        f"| chance | {1 / len(scenes.THINGS):.4f} |",
        f"| size | {size:.1f} MB (fp16) |",
        f"| torch | {torch.__version__} on {device.type} |",
        "",
        "Zero-shot: one object a scene, sizes as in segmentation, with the exported weights.",
        "Configuration of both towers: `config.json`.",
        "",
    ]
    with atomic_path(folder / "card.md") as path:
        path.write_text("\n".join(lines), encoding="utf-8")
    return folder


@torch.no_grad()
def zero_shot(
    backbone: Backbone, templates: list[str], n: int = 1536, size: int = 128, seed: int = 99
) -> float:
    """Top-1 accuracy (fraction) over all composed names on single-object scenes."""
    device = next(backbone.parameters()).device
    backbone.eval()
    text, hits = backbone.text(scenes.THINGS, templates), 0
    for low in range(0, n, 128):
        drawn = scenes.render(
            range(low, min(low + 128, n)), size, seed, names="all", objects=(1, 1), device=device
        )
        truth = torch.stack([c[0] for c in drawn.classes])
        hits += int(((backbone.embed(drawn.images) @ text.T).argmax(1) == truth).sum())
    return hits / n
