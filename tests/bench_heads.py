"""Time steps of the mask frameworks against transformers' own parts, as ratios in one run.

    python tests/bench_heads.py            (or: make bench)

Beside each model stands a copy of it with the same weights whose deformable attention and loss are
transformers' own, layer by layer: a step of its ``Mask2FormerForUniversalSegmentation`` on the same
tower. Both take turns, in the layout that is best for both; tests hold that they say the same.
Times are the processor's on a CPU, where others may work beside, and the clock's on a GPU. Weights
of the paper's size are random.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch import nn
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
)

from opentrans_lab.clip import load_backbone
from opentrans_lab.data import scenes
from opentrans_lab.device import memory_format, pick
from opentrans_lab.files import atomic_path
from opentrans_lab.heads import build
from opentrans_lab.train import to_device

AIM = 1.5  # times faster at the paper's size
SIZES = {"mini": (128, 16, "mini", None), "paper": (512, 2, "RN50", "random")}
SEEN = range(20)


class LayerByLayer(nn.Module):
    """transformers' loss in place of ``SetLoss``, for a vocabulary of ``columns`` - 1 names."""

    def __init__(self, model: nn.Module, columns: int) -> None:
        super().__init__()
        config = model.preset.config(model.backbone.channels)
        config.num_labels = columns - 1
        weights = {name: getattr(config, f"{name}_weight") for name in ("class", "mask", "dice")}
        self.weights = {"loss_cross_entropy": weights.pop("class")}
        self.weights |= {f"loss_{name}": weight for name, weight in weights.items()}
        self.theirs = Mask2FormerLoss(config, self.weights)

    def forward(self, masks, logits, region_masks, region_classes, chance):
        *early, last = [
            {"masks_queries_logits": mask, "class_queries_logits": logit}
            for mask, logit in zip(masks, logits, strict=True)
        ]
        wanted = [m.float() for m in region_masks], region_classes
        found = self.theirs(*last.values(), *wanted, early)
        return {k: self.weights[k.rstrip("_0123456789")] * v for k, v in found.items()}, None


def with_their_parts(model: nn.Module, columns: int) -> nn.Module:
    """A copy of ``model`` that computes the same by transformers' own modules."""
    twin = copy.deepcopy(model)
    for layer in twin.pixel_decoder.encoder.layers:
        layer.self_attn.__class__ = Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention
    twin.criterion = LayerByLayer(twin, columns)
    return twin


def batch(size: int, count: int) -> dict:
    """Drawn scenes of 128 pixels, enlarged to ``size``."""
    drawn, times = scenes.render(range(count), names=SEEN, seed=4), size // 128
    first = len(scenes.THINGS)

    def enlarge(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(times, -1).repeat_interleave(times, -2)

    return {
        "images": enlarge(drawn.images),
        "masks": [enlarge(mask) for mask in drawn.masks],
        "classes": [torch.where(c < first, c, c - first + len(SEEN)) for c in drawn.classes],
        "names": tuple(scenes.THINGS[i] for i in SEEN) + scenes.STUFF,
    }


def compare(framework: str, preset: str, repeats: int) -> dict:
    """Seconds of a step in both ways, and how many times faster ours is."""
    size, count, *backbone = SIZES[preset]
    device = pick("auto")
    data = to_device(batch(size, count), device)
    torch.manual_seed(0)
    options = {"clip": "tuned"} if framework == "fcclip" else {}
    model = build(framework, load_backbone(*backbone, "cpu"), preset, **options)
    models = {"theirs": with_their_parts(model, len(data["names"]) + 1), "ours": model}
    optimizers, taken = {}, {key: [] for key in models}
    for key, one in models.items():
        one.to(device, memory_format=memory_format(device, size)).train()
        free = [p for p in one.parameters() if p.requires_grad]
        optimizers[key] = torch.optim.AdamW(free, 1e-5, fused=device.type != "mps")
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for turn in range(repeats + 1):  # the first one warms up
        for key, one in models.items():
            began = clock()
            loss = one.loss(one(data["images"]), data)["loss"]
            loss.backward()
            optimizers[key].step()
            optimizers[key].zero_grad()
            loss.item()  # a GPU has then done it
            if turn:
                taken[key].append(clock() - began)
    found = {f"{key}_s": median(seconds) for key, seconds in taken.items()}
    ratio = median(a / b for a, b in zip(*taken.values(), strict=True))
    about = {"framework": framework, "preset": preset, "size": size, "batch_size": count}
    return about | found | {"times_faster": ratio, "device": str(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--frameworks", nargs="+", default=["han", "fcclip"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the table there, as CSV")
    asked = parser.parse_args()
    table = pd.DataFrame(
        compare(key, preset, asked.repeats)
        for preset in asked.presets
        for key in asked.frameworks
    )
    print(f"\na fine-tuning step against transformers' own parts (aim at paper size: {AIM} times)")
    print(table.to_string(index=False, float_format="%.3g"))
    if asked.out:
        with atomic_path(asked.out) as path:
            table.to_csv(path, index=False)


if __name__ == "__main__":
    main()
