"""Mask2Former's criterion for all prediction layers at once, over the batch's own vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..data import IGNORE
from ..device import full_precision
from ..pruning import region_images
from ..train import Chance, average, shared_mean


class SetLoss(nn.Module):
    """The losses of transformers' ``Mask2FormerLoss``, and whom each layer matched.

    Layers are not gone through one by one: their costs reach the matcher together, which is the
    only wait for the device, and the points of all matched masks are one batch. The class term is
    cross-entropy over the batch's vocabulary and "no object".

    Args:
        preset: of the head (``mask2former.Preset``): points, weights and region dropout.
    """

    def __init__(self, preset) -> None:
        super().__init__()
        self.preset = preset

    def forward(
        self,
        masks: Sequence[Tensor],
        logits: Tensor,
        region_masks: list[Tensor],
        region_classes: list[Tensor],
        chance: Chance | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Weighted terms, summed over layers, and the matches.

        Args:
            masks: of each layer (B, Q, h, w) logits.
            logits: of all layers (L, B, Q, C + 1), the last column for "no object".
            region_masks: of each image (K, H, W) bool, none of them empty; all of one size.
            region_classes: of each image (K,) int64, a column of ``logits``.
            chance: of each image, for the points where masks are compared and the regions dropped.

        Returns:
            ``class``, ``mask`` and ``dice``; and the query that each layer gives to each of the
            batch's R regions, (L, R) int64 on the CPU, -1 where an image has more than queries.
        """
        chance = chance or Chance(None, masks[0].device)
        counts, preset = [len(c) for c in region_classes], self.preset
        with full_precision(masks[0]):
            wanted = torch.cat(region_masks)[:, None].float()  # (R, 1, H, W)
            image = region_images(region_masks)  # (R,)
            costs = self.costs(masks, logits, wanted, region_classes, image, chance)
            matches = assign(costs, counts)
            query = matches.to(logits.device)
            mask, dice = self.loss_masks(masks, wanted, query, image, counts, chance)
            losses = {
                "class": self.loss_classes(logits, region_classes, query, image, chance),
                "mask": mask,
                "dice": dice,
            }
            weights = {name: getattr(preset, f"{name}_weight") for name in losses}
        return {name: weights[name] * loss for name, loss in losses.items()}, matches

    @torch.no_grad()
    def costs(
        self,
        masks: Sequence[Tensor],
        logits: Tensor,
        wanted: Tensor,
        classes: list[Tensor],
        image: Tensor,
        chance: Chance,
    ) -> Tensor:
        """Of giving a region to a query: (L, B, Q, K), K the most regions of an image.

        Predictions are sampled layer by layer: those of all would be the step's largest tensor.
        """
        layers, number, preset = len(masks), self.preset.points, self.preset
        counts = [len(c) for c in classes]
        points = chance.rand([layers] * len(counts), number, 2).unflatten(0, (-1, layers))
        inside = sample(wanted, points[image])[:, 0]  # (R, L, P)
        inside = stacked(inside.split(counts))  # (B, K, L, P)
        column = stacked(classes)[:, None]  # (B, 1, K)
        found = []
        for layer, (mask, logit) in enumerate(zip(masks, logits, strict=True)):
            x = sample(mask.float(), points[:, layer, None])[:, :, 0]  # (B, Q, P)
            y = inside[:, :, layer].transpose(1, 2)  # (B, P, K)
            # softplus(x) - x y is the cross-entropy of the logit x with y.
            cross = (F.softplus(x).sum(-1, keepdim=True) - x @ y) / number
            x = x.sigmoid()
            area = x.sum(-1, keepdim=True) + y.sum(1, keepdim=True)
            dice = 1 - (2 * (x @ y) + 1) / (area + 1)
            named = logit.float().softmax(-1).gather(2, column.expand(-1, x.shape[1], -1))
            found.append(
                preset.mask_weight * cross + preset.dice_weight * dice - preset.class_weight * named
            )
        return torch.stack(found)

    def loss_masks(
        self,
        masks: Sequence[Tensor],
        wanted: Tensor,
        query: Tensor,
        image: Tensor,
        counts: list[int],
        chance: Chance,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and dice of the matched masks, each a mean over a process's regions."""
        layers, number = query.shape
        picked = [mask[image, q.clamp(min=0)] for mask, q in zip(masks, query, strict=True)]
        picked = torch.stack(picked, 1).flatten(0, 1)[:, None].float()  # (R·L, 1, h, w)
        points = self.points(picked.detach(), [layers * count for count in counts], chance)
        y = sample(wanted, points.unflatten(0, (number, layers))).flatten(0, 2)  # (R·L, P)
        x = sample(picked, points[:, None])[:, 0, 0]  # (R·L, P)
        cross = F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1)
        x = x.sigmoid()
        dice = 1 - (2 * (x * y).sum(1) + 1) / (x.sum(1) + y.sum(1) + 1)
        share = (query >= 0).T.flatten() / masks_a_process(counts, x.device)
        return (cross * share).sum(), (dice * share).sum()

    @torch.no_grad()
    def points(self, masks: Tensor, rows: list[int], chance: Chance) -> Tensor:
        """Where masks (N, 1, h, w) are compared: (N, P, 2) in [0, 1], most where they are unsure.

        Args:
            rows: how many of the masks are of each image.
        """
        number, preset = self.preset.points, self.preset
        drawn = chance.rand(rows, int(preset.oversample * number), 2)
        unsure = -sample(masks, drawn[:, None])[:, 0, 0].abs()
        best = unsure.topk(int(preset.importance * number), sorted=False).indices
        unsure = drawn.gather(1, best[..., None].expand(-1, -1, 2))
        return torch.cat([unsure, chance.rand(rows, number - best.shape[1], 2)], dim=1)

    def loss_classes(
        self, logits: Tensor, classes: list[Tensor], query: Tensor, image: Tensor, chance: Chance
    ) -> Tensor:
        """Weighted mean over all queries; an unmatched one should say "no object"."""
        layers, images, queries, columns = logits.shape
        asked = torch.cat(classes).expand(layers, -1)  # (L, R)
        if self.preset.region_dropout:
            lots = chance.rand([len(c) for c in classes], layers).T
            asked = asked.masked_fill(lots < self.preset.region_dropout, IGNORE)
        # A query more, the last one, takes the regions that no other is left for.
        wanted = query.new_full((layers, images, queries + 1), columns - 1)
        wanted[torch.arange(layers, device=query.device)[:, None], image, query] = asked
        wanted = wanted[..., :-1].flatten(1)  # (L, B·Q)
        each = F.cross_entropy(
            logits.float().flatten(0, 2), wanted.flatten(), ignore_index=IGNORE, reduction="none"
        )
        weight = torch.where(wanted == columns - 1, self.preset.no_object, 1.0)
        weight = weight * (wanted != IGNORE)
        return shared_mean(each.view_as(weight).T, weight.T).sum()


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (N, C, h, w) at points (N, …, P, 2) in [0, 1]: (N, C, …, P)."""
    return F.grid_sample(maps, 2 * points - 1, align_corners=False)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (K, …) of different lengths as one (B, longest K, …), filled up with 0."""
    longest = max(map(len, parts))
    return torch.stack([F.pad(x, (0, 0) * (x.ndim - 1) + (0, longest - len(x))) for x in parts])


def assign(costs: Tensor, counts: list[int]) -> Tensor:
    """The query of each region in the cheapest matching, layer by layer.

    Args:
        costs: (L, B, Q, K); one that is no number is only taken where nothing else is left.
        counts: regions of each image; its further columns are not read.

    Returns:
        (L, R) int64 on the CPU, -1 where an image has more regions than queries.
    """
    worst = torch.finfo(costs.dtype).max
    costs = costs.nan_to_num(worst, worst, worst).cpu().numpy()  # waits for the device
    found = np.full((len(costs), sum(counts)), -1)
    for layer, of_layer in enumerate(costs):
        first = 0
        for cost, count in zip(of_layer, counts, strict=True):
            queries, regions = linear_sum_assignment(cost[:, :count])
            found[layer, first + regions] = queries
            first += count
    return torch.from_numpy(found)


def masks_a_process(counts: list[int], device: torch.device) -> Tensor:
    """How many regions a process has on average, at least 1.

    Differs from transformers, which divides the mean by the number of processes once more.
    """
    return average(torch.tensor(float(sum(counts)), device=device)).clamp(min=1)


def regions(targets: dict) -> tuple[list[Tensor], list[Tensor]]:
    """A batch's masks (K, H, W) bool and classes (K,), image by image, without empty masks.

    Which are empty is asked once for the whole batch: a wait for the device.
    """
    masks, classes = targets["masks"], targets["classes"]
    seen = torch.cat([mask.flatten(1).any(1) for mask in masks]).cpu()
    if seen.all():
        return masks, classes
    kept = seen.split([len(mask) for mask in masks])
    masks = [mask[k] for mask, k in zip(masks, kept, strict=True)]
    return masks, [c[k] for c, k in zip(classes, kept, strict=True)]
