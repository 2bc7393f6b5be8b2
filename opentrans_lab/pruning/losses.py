"""L_KD: what distillation alone keeps of CLIP (Sec. 3.1; Han et al., "GKC").

For the regions of an image: v_i, the student's embedding of region i; c_i, the frozen dense CLIP's
embedding of its crop; t_i, the text embedding of its name. All are L2-normalised.
No class label enters: a name reaches the loss only as a text embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import masks_to_boxes, roi_align

from ..checks import choose
from ..train import Chance, gathered, shared_mean

GREY = 0.5  # around a region
ROOM = 1.1  # side of a crop in longer sides of its region
SAMPLES = 2  # taken for each pixel of a crop, down and across
KD_TERMS, MEANS = ("both", "plain", "text"), ("joint", "two")  # of L_KD, see ``kd_loss``


def crop_rule(size: int) -> str:
    """What ``crop_regions`` does, in words: other words, other crops."""
    return f"{size} px, grey {GREY}, room {ROOM}, {SAMPLES} x {SAMPLES} samples"


def region_images(masks: list[Tensor]) -> Tensor:
    """Which image each region belongs to: (R,) int64, ascending."""
    counts = torch.tensor([len(m) for m in masks])
    return torch.repeat_interleave(torch.arange(len(masks)), counts).to(masks[0].device)


def cap_regions(
    masks: list[Tensor], classes: list[Tensor], most: int = 200, chance: Chance | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """A random subset of at most ``most`` regions a batch (of all processes), each still with its
    image.

    Differs from the authors' code, whose shuffle above the cap mixes pairs of different images.
    """
    counts = [len(m) for m in masks]
    lots = (chance or Chance(None, masks[0].device)).rand(counts).cpu()
    drawn = gathered(lots)
    if len(drawn) <= most:
        return masks, classes
    parts = (lots <= drawn.kthvalue(most).values).split(counts)
    chosen = [
        (m[k.to(m.device)], c[k.to(c.device)])
        for m, c, k in zip(masks, classes, parts, strict=True)
    ]
    return [m for m, _ in chosen], [c for _, c in chosen]


def pool_regions(features: Tensor, masks: list[Tensor]) -> Tensor:
    """Mean of ``features`` (B, C, h, w) under each mask (K, H, W): (R, C) float32.

    Masks are reduced to the feature grid by area, so that a small region keeps a weight.
    """
    pooled = []
    for feature, mask in zip(features.float(), masks, strict=True):
        if len(mask):
            weight = F.adaptive_avg_pool2d(mask.float(), feature.shape[-2:]).flatten(1)  # (K, hw)
            weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-12)
            pooled.append(weight @ feature.flatten(1).T)
    return torch.cat(pooled) if pooled else features.new_zeros(0, features.shape[1])


def crop_regions(images: Tensor, masks: list[Tensor], size: int) -> Tensor:
    """Square crops around each region with all else grey: (R, 3, size, size) in [0, 1].

    images (B, 3, H, W) in [0, 1]; masks a list of (K, H, W) bool, none of them empty.
    """
    regions = torch.cat(masks)  # (R, H, W)
    if not len(regions):
        return images.new_zeros(0, 3, size, size)
    boxes = masks_to_boxes(regions)  # (R, 4) x1 y1 x2 y2, inclusive
    centre, half = (boxes[:, :2] + boxes[:, 2:] + 1) / 2, (boxes[:, 2:] - boxes[:, :2] + 1) / 2
    half = ROOM * half.amax(1, keepdim=True)  # square, with a little room
    index = torch.arange(len(regions), device=images.device)[:, None]
    boxes = torch.cat([index, centre - half, centre + half], dim=1).float()
    # Relative to grey, what lies outside of the mask or of the picture is 0.
    shown = (images.float()[region_images(masks)] - GREY) * regions[:, None]
    return roi_align(shown, boxes, size, sampling_ratio=SAMPLES, aligned=True) + GREY


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    text: Tensor,
    image: Tensor,
    scale: Tensor | float = 1.0,
    terms: str = "both",
    mean: str = "joint",
) -> dict[str, Tensor]:
    """L_KD over R regions: a scalar ``loss`` and its parts.

    plain: ||v_i - c_i||^2; text-guided, over all ordered pairs (i, j) of one image:
    (s^2 t_i·t_j - v_i·c_j)^2 with the learned scalar s.

    Means are over the regions of all processes; a batch without any teaches nothing (0).

    Args:
        student, teacher, text: v, c, t (R, D), L2-normalised.
        image: (R,) the image of each region; pairs never leave it.
        scale: s.
        terms: ``"both"``, ``"plain"``, or ``"text"``.
        mean: ``"joint"``, one mean over all terms as in the authors' code; ``"two"``, the sum
            of a mean over regions and a mean over pairs.

    Raises:
        LabError: unknown ``terms`` or ``mean``.
    """
    choose("terms", terms, KD_TERMS)
    choose("mean", mean, MEANS)
    with torch.autocast(student.device.type, enabled=False):  # differences of near-equal numbers
        student, teacher, text = student.float(), teacher.float(), text.float()
        plain = (student - teacher).square().sum(1)  # (R,)
        pairs = (scale**2 * (text @ text.T) - student @ teacher.T).square().flatten()  # (R * R,)
        same = (image[:, None] == image[None]).float().flatten()  # to pick them out would wait
        each, one = (plain, torch.ones_like(plain)), (pairs, same)
        used = {"both": [each, one], "plain": [each], "text": [one]}[terms]
        if mean == "joint":
            used = [tuple(map(torch.cat, zip(*used, strict=True)))]
        loss = sum(shared_mean(*term) for term in used)
    return {"loss": loss, "plain": shared_mean(*each), "text": shared_mean(*one)}


def class_loss(
    student: Tensor, text: Tensor, classes: Tensor, temperature: float = 0.07
) -> dict[str, Tensor]:
    """Not L_KD, but what the paper argues against: regions classified by their labels.

    Cross-entropy of cosine / temperature, over the vocabulary of the batch. It gives the ablation
    its supervised peer; no other stage uses it.

    Args:
        student: v (R, D), text: (C, D), both L2-normalised. classes: (R,) int64.
    """
    with torch.autocast(student.device.type, enabled=False):
        logits = student.float() @ text.float().T / temperature
        loss = shared_mean(F.cross_entropy(logits, classes, reduction="none"))
    return {"loss": loss, "class": loss}
