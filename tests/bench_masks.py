"""Time thresholding and masked training on a full-size CLIP RN50 tower, as ratios in one run.

    python tests/bench_masks.py            (or: make bench)

The yardstick is torch.nn.utils.prune, on the same random weights in the same process. The masks of
both ways are compared, too. Times drift with the machine; the ratios are what counts.
"""

from __future__ import annotations

import copy
import time

import open_clip
import torch
from bench_alpha import extra_memory, line, timed
from torch import nn
from torch.nn.utils import prune

from opentrans_lab.costs.payoff import Trunk
from opentrans_lab.masks import Mask, prunable
from opentrans_lab.pruning import PruneConfig

STEPS, SIZE, BATCH = 6, 224, 4


def ours(visual: nn.Module) -> Mask:
    config, mask = PruneConfig(), Mask.dense(visual)
    total = mask.total
    for k in range(1, config.rounds + 1):
        mask = Mask.by_magnitude(visual, config.kept(total, k), within=mask)
    return mask


def theirs(visual: nn.Module) -> dict[str, torch.Tensor]:
    config, total = PruneConfig(), Mask.dense(visual).total
    layers = [(visual.get_submodule(n.removesuffix(".weight")), "weight") for n in prunable(visual)]
    names, gone = list(prunable(visual)), 0
    for k in range(1, config.rounds + 1):
        more = total - config.kept(total, k) - gone
        prune.global_unstructured(layers, prune.L1Unstructured, amount=more)
        gone += more
    return {n: m.weight_mask.bool() for n, (m, _) in zip(names, layers, strict=True)}


def thresholding(visual: nn.Module) -> None:
    weights = sum(w.numel() * 4 for w in prunable(visual).values()) / 1e6
    extra = extra_memory(lambda: ours(visual))
    own, mask = timed(lambda: ours(visual), repeats=2)
    other = copy.deepcopy(visual)
    began = time.perf_counter()
    reference = theirs(other)
    took = time.perf_counter() - began
    same = all(torch.equal(mask[name], reference[name]) for name in mask)
    print(f"22 rounds over {mask.total:,} weights ({weights:.0f} MB)")
    line("ours", own)
    line("torch.nn.utils.prune.global_unstructured", took, own, "(goal: 2)")
    print(f"extra peak memory: {extra:.0f} MB, {extra / weights:.1f} x the weights (goal: under 3)")
    print(f"the same mask: {same}\n")


def training(visual: nn.Module) -> None:
    """The three ways take turns, so that drift hits all of them."""
    mask = Mask.random_global(visual, Mask.dense(visual).total // 10)
    models = {kind: Trunk(copy.deepcopy(visual)).train() for kind in ("plain", "ours", "torch")}
    for name, tensor in mask.items():
        layer = models["torch"].visual.get_submodule(name.removesuffix(".weight"))
        prune.custom_from_mask(layer, "weight", tensor)
    steps = {}
    for kind, model in models.items():
        model.visual.attnpool.requires_grad_(False)
        wanted = [p for p in model.parameters() if p.requires_grad]
        steps[kind] = torch.optim.AdamW(wanted, 1e-4, fused=True)
    mask.apply(models["ours"])
    mask.keep(models["ours"], steps["ours"])
    images = torch.rand(BATCH, 3, SIZE, SIZE)
    times = {kind: [] for kind in models}
    for turn in range(STEPS + 1):
        for kind, model in models.items():
            began = time.perf_counter()
            steps[kind].zero_grad()
            model(images).square().mean().backward()
            steps[kind].step()
            if turn:
                times[kind].append(time.perf_counter() - began)
    best = {kind: min(values) for kind, values in times.items()}
    print(f"training step of the trunk, {BATCH} x {SIZE} px, AdamW, density 0.1")
    for kind, name in (("plain", "no mask"), ("ours", "mask.keep"), ("torch", "torch prune")):
        print(f"  {name:12s}{best[kind]:8.3f} s {best[kind] / best['plain']:6.2f} x no mask")
    print(f"  pruned weights are 0: {mask.verify(models['ours'])}")


def main() -> None:
    torch.manual_seed(0)
    visual = open_clip.create_model("RN50", pretrained=None).visual
    print(f"{torch.get_num_threads()} threads\n")
    thresholding(visual)
    training(visual)


if __name__ == "__main__":
    main()
