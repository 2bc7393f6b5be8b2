"""FC-CLIP: Mask2Former on a CLIP that also classifies the masks itself."""

from __future__ import annotations

import json
import math

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn

from ..checks import choose
from ..clip import Backbone, ClassNames, best_name, flat_names
from ..device import full_precision
from ..train import Chance
from .criterion import regions
from .mask2former import MaskFramework, Preset

PRESETS = {
    "paper": Preset(queries=250),
    "mini": Preset(
        queries=32, dim=64, heads=4, encoder_layers=1, encoder_ffn=128, decoder_layers=3,
        decoder_ffn=128, points=512,
    ),
}  # fmt: skip
"""``mini``: a training step on the mini CLIP (16 pictures of 128 pixels, AdamW) takes 0.18 s on two
cores, 0.26 s with a tuned CLIP (0.30 and 0.40 s on one)."""
CLIP = ("frozen", "tuned")


class FCCLIP(MaskFramework):
    """Two classifiers of one set of masks, in a geometric mean.

    *In vocabulary*: the pixel decoder's features pooled under the mask, plus the query, through an
    MLP, x text. *Out of vocabulary*: CLIP's own attention pool, looking under the mask only, x
    text. Of class c the probability is in^(1-a) out^a with a = ``seen_exponent`` if c was seen in
    segmentation training, else ``unseen_exponent``, renormalised to 1 - p_void; p_void is the
    head's. Where a mask has nothing at stride 32, the head decides alone.

    Args:
        backbone: kept as ``self.backbone``. Its attention pool is never trained.
        preset: ``"paper"`` or ``"mini"``, the same classes, narrower and shallower.
        clip: ``"frozen"`` (the authors' way; in eval mode whatever ``train`` says) or ``"tuned"``.
        seen_names: names seen in segmentation training. Default: those of the batches that
            ``loss`` sees in training mode; they are saved with the weights.
        pixel_decoder: ``"msda"`` or ``"fpn"``, see ``MaskFramework``.
    """

    PARTS = {
        "head": {"seen_exponent": 0.0, "unseen_exponent": 0.0},
        "CLIP": {"seen_exponent": 1.0, "unseen_exponent": 1.0},
    }
    """Which exponents leave one classifier alone."""

    def __init__(
        self,
        backbone: Backbone,
        preset: str = "paper",
        clip: str = "frozen",
        seen_names: ClassNames | None = None,
        pixel_decoder: str = "msda",
    ) -> None:
        choose("preset", preset, PRESETS)
        choose("clip", clip, CLIP)
        super().__init__(backbone, PRESETS[preset], pixel_decoder)
        dim = self.preset.dim
        self.pooled = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.class_embed = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(),
            nn.Linear(dim, backbone.embed_dim),
        )  # fmt: skip
        self.seen_exponent, self.unseen_exponent = 0.4, 0.8
        self.clip = clip
        if clip == "frozen":
            backbone.requires_grad_(False).eval()
        self._learns_names = seen_names is None
        self.seen_names = frozenset(flat_names(seen_names)[0] if seen_names else ())

    def train(self, mode: bool = True) -> FCCLIP:
        super().train(mode)
        if self.clip == "frozen":
            self.backbone.eval()
        return self

    def get_extra_state(self) -> Tensor:
        """The seen names as the bytes of a JSON list: a tensor, so that safetensors can hold it."""
        return torch.tensor(list(json.dumps(sorted(self.seen_names)).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.seen_names = frozenset(json.loads(bytes(state.tolist())))

    def forward(self, images: Tensor) -> dict:
        """``masks``, a list of (B, Q, h, w), logits at stride 4, and ``embeddings`` (L, B, Q, D).

        Embeddings are of unit length times the learned scale. ``clip`` is the tower's last map.
        images (B, 3, H, W) in [0, 1] with sides that are multiples of 32. All layers also in
        evaluation, as in the authors' code, whose published FLOPs hold them.
        """
        decoded = self.decode(images)
        embeddings = self._embed(decoded.hidden, decoded.masks, decoded.pixels)
        return {"masks": decoded.masks, "embeddings": embeddings, "clip": decoded.clip}

    def _embed(self, hidden: Tensor, masks: list[Tensor], pixels: Tensor) -> Tensor:
        means = []
        for mask in masks:
            inside = (mask.detach() > 0).to(pixels.dtype)  # (B, Q, h, w)
            total = torch.einsum("bchw,bqhw->bqc", pixels, inside)
            area = inside.float().sum((2, 3))[..., None]
            means.append(total / area.clamp_min(1e-8))
        embedded = self.class_embed(self.pooled(torch.stack(means)) + hidden)
        return F.normalize(embedded.float(), dim=-1) * self.scale

    def loss(self, outputs: dict, targets: dict) -> dict[str, Tensor]:
        """``loss`` and its weighted parts ``class``, ``mask`` and ``dice``, over all layers.

        Only the in-vocabulary head is trained; the ensemble is made in evaluation.
        """
        if self.training and self._learns_names:
            self.seen_names |= frozenset(flat_names(targets["names"])[0])
        logits = self.logits(outputs["embeddings"], targets["names"])
        chance = Chance(targets.get("seeds"), targets["masks"][0].device)
        losses, _ = self.criterion(outputs["masks"], logits, *regions(targets), chance)
        return {"loss": sum(losses.values()), **losses}

    def probabilities(self, outputs: dict, class_names: ClassNames) -> Tensor:
        """Of each query's class by both classifiers, the last for void: (B, Q, C + 1)."""
        logits = self.logits(outputs["embeddings"][-1], class_names)
        void = logits.softmax(-1)[..., -1:]
        inner = logits[..., :-1].log_softmax(-1)  # (B, Q, C)
        outer, looked = self.outer_logits(outputs, class_names)
        exponent = self.exponents(class_names).to(inner.device) * looked[..., None]
        both = (inner * (1 - exponent) + outer.log_softmax(-1) * exponent).softmax(-1)
        return torch.cat([both * (1 - void), void], dim=-1)

    def exponents(self, class_names: ClassNames) -> Tensor:
        """a (C,): a class was seen if any of its names was."""
        groups = [(c,) if isinstance(c, str) else c for c in class_names]
        seen = torch.tensor([not self.seen_names.isdisjoint(names) for names in groups])
        return torch.where(seen, self.seen_exponent, self.unseen_exponent)

    def outer_logits(self, outputs: dict, class_names: ClassNames) -> tuple[Tensor, Tensor]:
        """CLIP's own (B, Q, C), and which masks it could look under (B, Q) bool."""
        names, sizes = flat_names(class_names)
        x = outputs["clip"].float()
        with full_precision(x):
            masks = outputs["masks"][-1].float()
            masks = F.interpolate(masks, x.shape[-2:], mode="bilinear", align_corners=False) > 0
            pooled = F.normalize(attention_pool(self.backbone.visual.attnpool, x, masks), dim=-1)
            scale = self.backbone.logit_scale.to(x.device)
            cosine = pooled @ self.backbone.text(names).to(x.device).T  # (B, Q, N)
        return best_name(cosine * scale, sizes, dim=-1), masks.flatten(2).any(-1)


def attention_pool(pool: AttentionPool2d, x: Tensor, masks: Tensor) -> Tensor:
    """CLIP's attention pool under each of many masks: (B, Q, D), not normalised.

    The query is the mean over the whole map plus the first position; keys and values are the cells
    under the mask plus theirs, interpolated (bilinear, as in the authors' code) where the map is
    not of CLIP's size. An empty mask looks everywhere.

    Args:
        x: the last map (B, C, h, w). masks: (B, Q, h, w) bool.
    """
    side = math.isqrt(len(pool.positional_embedding) - 1)
    first, grid = pool.positional_embedding.split([1, side * side])
    grid = grid.T.reshape(1, -1, side, side)  # (1, C, side, side)
    grid = F.interpolate(grid, x.shape[-2:], mode="bilinear", align_corners=False)
    query = x.mean((2, 3))[:, None] + first  # (B, 1, C)
    cells = (x + grid).flatten(2).transpose(1, 2)  # (B, hw, C)
    allowed = masks.flatten(2)
    allowed = allowed | ~allowed.any(-1, keepdim=True)  # (B, Q, hw)
    q, k, v = (
        project(tokens).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)  # (B, heads, …, d)
        for project, tokens in ((pool.q_proj, query), (pool.k_proj, cells), (pool.v_proj, cells))
    )
    q = q.expand(-1, -1, masks.shape[1], -1)
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
    return pool.c_proj(seen.transpose(1, 2).flatten(2))
