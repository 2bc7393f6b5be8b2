"""What both mask frameworks share: transformers' Mask2Former between a CLIP tower and its words.

Pixel decoder and masked transformer decoder are transformers' own. Ours is what they cannot do: a
vocabulary that changes with the batch, a criterion of all layers at once whose matches are handed
on, and pictures of any size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from ..checks import choose
from ..clip import Backbone, ClassNames, best_name, flat_names
from ..device import full_precision
from ..errors import LabError
from .criterion import SetLoss
from .inference import STRIDE, cut, merge, pad
from .pixel_decoder import FPN, PIXEL_DECODERS, DeformableAttention


@dataclass(frozen=True)
class Preset:
    """Sizes of the head, and its losses."""

    queries: int
    dim: int = 256
    """Of features, queries and masks; a multiple of 32."""
    heads: int = 8
    encoder_layers: int = 6
    """Of the pixel decoder (deformable attention over strides 8, 16 and 32)."""
    encoder_ffn: int = 1024
    decoder_layers: int = 9
    """Each is supervised, and so are the queries before the first."""
    decoder_ffn: int = 2048
    points: int = 12_544
    """Where masks are compared, in matching and in the loss."""
    regions: int = 200
    """Most regions of a batch in L_KD."""
    region_dropout: float = 0.0
    """Share of the matched queries whose class is not asked for."""
    oversample: float = 3.0
    importance: float = 0.75
    no_object: float = 0.1
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0

    def config(self, channels: Sequence[int]) -> Mask2FormerConfig:
        """The same for transformers, for a backbone of four maps with ``channels``.

        Its own backbone is a Swin without blocks: only its channels, c, 2c, 4c and 8c as every CLIP
        ResNet has them, are of use.
        """
        dummy = SwinConfig(
            embed_dim=channels[0], depths=[0] * 4, num_heads=[1] * 4, image_size=STRIDE,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        return Mask2FormerConfig(
            backbone_config=dummy,
            feature_size=self.dim, mask_feature_size=self.dim, hidden_dim=self.dim,
            num_attention_heads=self.heads, num_queries=self.queries,
            encoder_layers=self.encoder_layers, encoder_feedforward_dim=self.encoder_ffn,
            decoder_layers=self.decoder_layers + 1, dim_feedforward=self.decoder_ffn,
            train_num_points=self.points, oversample_ratio=self.oversample,
            importance_sample_ratio=self.importance, no_object_weight=self.no_object,
            class_weight=self.class_weight, mask_weight=self.mask_weight,
            dice_weight=self.dice_weight,
        )  # fmt: skip


class Decoded(NamedTuple):
    """Of the queries before the first layer and after each: L + 1 entries, the last one counts."""

    hidden: Tensor  # (L + 1, B, Q, dim), normalised
    masks: list[Tensor]  # (B, Q, h, w) logits at stride 4
    pixels: Tensor  # (B, dim, h, w), which the masks are products with
    clip: Tensor  # the tower's last map (B, C, H / 32, W / 32)


class MaskFramework(nn.Module):
    """A backbone, Mask2Former's two decoders and its criterion; a subclass adds the classifier.

    A subclass has ``forward(images) -> outputs`` with a list ``outputs["masks"]``, the final one
    last, and ``probabilities(outputs, class_names) -> (B, Q, C + 1)``.

    Args:
        pixel_decoder: ``"msda"``, Mask2Former's deformable attention, or ``"fpn"``, MaskFormer's
            pyramid of convolutions.
    """

    def __init__(self, backbone: Backbone, preset: Preset, pixel_decoder: str = "msda") -> None:
        super().__init__()
        choose("pixel_decoder", pixel_decoder, PIXEL_DECODERS)
        self.preset = preset
        self.backbone = backbone
        backbone.visual.attnpool.requires_grad_(False)  # no loss goes through it
        # Built whole, for only then does transformers initialise every module of it.
        config = preset.config(backbone.channels)
        whole = Mask2FormerForUniversalSegmentation(config)
        if pixel_decoder == "fpn":
            self.pixel_decoder = FPN(backbone.channels, preset.dim)
        else:
            self.pixel_decoder = whole.model.pixel_level_module.decoder
            DeformableAttention.instead(self.pixel_decoder)
        self.transformer = whole.model.transformer_module
        self.criterion = SetLoss(preset)
        self.void = nn.Parameter(torch.randn(backbone.embed_dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def train(self, mode: bool = True) -> MaskFramework:
        super().train(mode)
        self.pixel_decoder.eval()  # nothing in it drops out; in training it waits for the device
        return self

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied with: learned, at most 100."""
        return self.log_scale.exp().clamp(max=100)

    def decode(self, images: Tensor) -> Decoded:
        """images (B, 3, H, W) in [0, 1], sides multiples of 32."""
        maps = self.backbone(images)
        # Sampling locations of deformable attention need more digits than bfloat16 has.
        with full_precision(images):
            pixels = self.pixel_decoder([x.float() for x in maps])
        decoded = self.transformer(list(pixels.multi_scale_features), pixels.mask_features)
        hidden = torch.stack(decoded.intermediate_hidden_states).transpose(1, 2)
        return Decoded(hidden, list(decoded.masks_queries_logits), pixels.mask_features, maps[-1])

    def logits(self, scaled: Tensor, class_names: ClassNames) -> Tensor:
        """Unit embeddings times ``scale`` (…, D) -> (…, C + 1), the last column for no object."""
        names, sizes = flat_names(class_names)
        with full_precision(scaled):  # a scale of 100 needs digits
            text = self.backbone.text(names).to(scaled.device)  # (N, D)
            text = torch.cat([text, F.normalize(self.void.float(), dim=0)[None]])
            return best_name(scaled.float() @ text.T, [*sizes, 1], dim=-1)

    def scores(self, images: Tensor, class_names: ClassNames) -> Tensor:
        """Class scores (B, C, h, w) for any vocabulary, one a 4 x 4 pixels, of the whole picture.

        Sum over queries of class probability x mask probability, without "no object": between 0
        and the number of queries.
        """
        classes, masks = self._predict(images, class_names)
        with full_precision(images):
            return torch.einsum("bqc,bqhw->bchw", classes[..., :-1], masks.sigmoid())

    def panoptic(
        self, images: Tensor, class_names: ClassNames, things: Sequence[bool]
    ) -> list[tuple[Tensor, list[dict]]]:
        """For each picture its segments, see :func:`merge`, at its own size.

        Args:
            things: (C,) bool, which classes are countable; segments of the others are joined.
        """
        classes, masks = self._predict(images, class_names)
        size, things = tuple(images.shape[-2:]), [bool(thing) for thing in things]
        if len(things) != len(class_names):
            raise LabError(f"{len(class_names)} classes, but things is of {len(things)}")
        return [merge(c, m, things, size) for c, m in zip(classes, masks, strict=True)]

    def _predict(self, images: Tensor, class_names: ClassNames) -> tuple[Tensor, Tensor]:
        """Probabilities (B, Q, C + 1) and mask logits (B, Q, h, w), cut to the true extent."""
        padded = pad(images)
        outputs = self(padded)
        masks = cut(outputs["masks"][-1].float(), images.shape[-2:], padded.shape[-2:])
        return self.probabilities(outputs, class_names), masks

    def load_mask2former(self, state: Mapping[str, Tensor]) -> None:
        """Take both decoders from transformers' ``Mask2FormerForUniversalSegmentation``.

        ``state`` is its state dict. Its backbone and its closed-vocabulary class predictor stay
        behind.

        Raises:
            LabError: other sizes than this preset's, not such a state dict, or a head whose pixel
                decoder is the pyramid.
        """
        if isinstance(self.pixel_decoder, FPN):
            raise LabError(
                "Mask2Former's weights are of deformable attention, and this head has "
                "pixel_decoder='fpn'; build it with pixel_decoder='msda'"
            )
        parts = {
            "model.pixel_level_module.decoder.": self.pixel_decoder,
            "model.transformer_module.": self.transformer,
        }
        for prefix, module in parts.items():
            part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            try:
                module.load_state_dict(part)
            except RuntimeError as error:
                raise LabError(
                    f"these weights do not fit {prefix[:-1]} of {self.preset}: {error}"
                ) from error
