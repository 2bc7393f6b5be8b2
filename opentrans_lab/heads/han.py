"""Han et al. ("GKC"): Mask2Former whose queries are compared with CLIP's words, and taught by CLIP.

Left out: grounding in captions, which takes data of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import choose
from ..clip import Backbone, ClassNames, first_names
from ..pruning import Teacher, cap_regions, kd_loss, region_images
from ..train import Chance
from .criterion import regions
from .mask2former import MaskFramework, Preset

KD_WEIGHT = 2.0

PRESETS = {
    "paper": Preset(queries=100, region_dropout=0.5),
    "mini": Preset(
        queries=24, dim=64, heads=4, encoder_layers=1, encoder_ffn=128, decoder_layers=3,
        decoder_ffn=128, points=512, regions=16,
    ),
}  # fmt: skip
"""``mini``: a training step on the mini CLIP (16 pictures of 128 pixels, AdamW) takes 0.22 s on two
cores, 0.29 s with a teacher (0.37 and 0.45 s on one)."""


class Han(MaskFramework):
    """Query embedding x text embedding / learned temperature, and L_KD on the matched queries.

    A query passes a linear layer and a projection to CLIP's D dimensions; that embedding is
    classified, and pulled towards the teacher's. Differs from the authors' code, which has a
    projection of its own for each auxiliary layer, in sharing it. No grounding in captions.

    Args:
        backbone: kept as ``self.backbone`` and trained with the head, but for its attention pool,
            which is not on the path.
        preset: ``"paper"`` or ``"mini"``, the same classes, narrower and shallower.
        teacher: the dense CLIP, or one that remembers. A frozen copy is held outside of parameters
            and state; without one there is no L_KD.
        pixel_decoder: ``"msda"`` or ``"fpn"``, see ``MaskFramework``.
    """

    def __init__(
        self,
        backbone: Backbone,
        preset: str = "paper",
        teacher: Teacher | Backbone | None = None,
        pixel_decoder: str = "msda",
    ) -> None:
        choose("preset", preset, PRESETS)
        super().__init__(backbone, PRESETS[preset], pixel_decoder)
        self.class_embed = nn.Linear(self.preset.dim, self.preset.dim)
        self.project = nn.Linear(self.preset.dim, backbone.embed_dim)
        taught = teacher is not None
        self.kd_scale = nn.Parameter(torch.ones(()), requires_grad=taught)  # s of L_KD
        self._teacher = Teacher.of(teacher) if taught else None

    def forward(self, images: Tensor) -> dict:
        """``masks``, a list of (B, Q, h, w), logits at stride 4, and ``queries`` (L, B, Q, dim).

        images (B, 3, H, W) in [0, 1] with sides that are multiples of 32. In training mode all
        layers, which are all supervised, the final one last; else only that.
        """
        decoded = self.decode(images)
        first = 0 if self.training else len(decoded.hidden) - 1
        queries = self.class_embed(decoded.hidden[first:])
        return {"masks": decoded.masks[first:], "queries": queries}

    def embed(self, queries: Tensor) -> Tensor:
        """Queries (…, dim) -> embeddings beside CLIP's (…, D), float32, unit length."""
        return F.normalize(self.project(queries).float(), dim=-1)

    def probabilities(self, outputs: dict, class_names: ClassNames) -> Tensor:
        """Of each query's class, the last for "no object": (B, Q, C + 1)."""
        embedded = self.embed(outputs["queries"][-1])
        return self.logits(embedded * self.scale, class_names).softmax(-1)

    def loss(self, outputs: dict, targets: dict) -> dict[str, Tensor]:
        """``loss`` and its weighted parts ``class``, ``mask``, ``dice`` and, if taught, ``kd``."""
        masks, classes = regions(targets)
        embedded = self.embed(outputs["queries"])  # (L, B, Q, D)
        logits = self.logits(embedded * self.scale, targets["names"])
        chance = Chance(targets.get("seeds"), targets["images"].device)
        losses, matches = self.criterion(outputs["masks"], logits, masks, classes, chance)
        if self._teacher:
            losses["kd"] = KD_WEIGHT * self._kd(embedded, matches, masks, classes, targets)
        return {"loss": sum(losses.values()), **losses}

    def _kd(
        self,
        embedded: Tensor,
        matches: Tensor,
        masks: list[Tensor],
        classes: list[Tensor],
        targets: dict,
    ) -> Tensor:
        """L_KD of each layer's matched queries, summed over layers."""
        images, counts = targets["images"], [len(mask) for mask in masks]
        places = [torch.arange(count) for count in counts]
        chance = Chance(targets.get("seeds"), torch.device("cpu"))  # where the lots are read
        kept, places = cap_regions(masks, places, self.preset.regions, chance)
        offsets = torch.tensor([0, *counts]).cumsum(0).tolist()
        numbers = torch.cat([o + p for o, p in zip(offsets, places, strict=False)])  # (R,)
        image = region_images(kept)  # (R,)
        words = self.backbone.text(first_names(targets["names"]))  # (C, D)
        text = words[torch.cat(classes)[numbers.to(images.device)]]  # (R, D)
        target = self._teacher(targets, kept, places)  # (R, D)
        losses = []
        for layer, query in zip(embedded, matches[:, numbers], strict=True):
            one = (query >= 0).nonzero().flatten()  # the rest: more regions than queries
            query, one = query[one].to(images.device), one.to(images.device)
            losses.append(
                kd_loss(layer[image[one], query], target[one], text[one], image[one],
                        self.kd_scale)["loss"]
            )  # fmt: skip
        return sum(losses)
