"""DeepLabV3 with CLIP text embeddings as classifier: the paper's traditional CNN framework."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation

from ..checks import choose
from ..clip import Backbone, ClassNames, best_name, flat_names
from ..data import IGNORE
from ..errors import LabError
from ..train import shared_mean
from .inference import cut, pad


@dataclass(frozen=True)
class Preset:
    """Sizes of the head."""

    channels: int
    """Of each ASPP branch and of its output."""
    rates: tuple[int, ...]
    """Dilations of ASPP's 3x3 branches, in cells of the output stride."""
    low_channels: int
    """To which DeepLabV3+ reduces the map at stride 4."""
    loss_stride: int
    """The loss reads every n-th pixel in both directions (1: all)."""


PRESETS = {
    "paper": Preset(channels=256, rates=(6, 12, 18), low_channels=48, loss_stride=1),
    "mini": Preset(channels=128, rates=(1, 2, 3), low_channels=24, loss_stride=4),
}
DECODERS = ("none", "plus")


class DeepLabV3(nn.Module):
    """ASPP over the trunk, then pixel embedding x text embedding / learned temperature (Eq. 1).

    Args:
        backbone: kept as ``self.backbone`` and trained with the head. Its attention pool is not
            on the path and is frozen.
        preset: ``"paper"`` or ``"mini"``, the same classes at another width.
        output_stride: 16 (layer 4 dilated) or 32 (CLIP's own).
        decoder: ``"plus"`` is DeepLabV3+'s, which joins ASPP's output with the map at stride 4 (the
            authors' code); ``"none"`` is DeepLabV3 (the paper's name for it).
    """

    def __init__(
        self,
        backbone: Backbone,
        preset: str = "paper",
        output_stride: int = 16,
        decoder: str = "none",
    ) -> None:
        super().__init__()
        choose("preset", preset, PRESETS)
        choose("decoder", decoder, DECODERS)
        self.preset = PRESETS[preset]
        self.backbone = backbone
        set_output_stride(backbone.visual, output_stride)
        backbone.visual.attnpool.requires_grad_(False)
        width, low = self.preset.channels, self.preset.low_channels
        self.aspp = ASPP(backbone.channels[-1], list(self.preset.rates), width)
        self.low = self.refine = None
        if decoder == "plus":
            self.low = Conv2dNormActivation(backbone.channels[0], low, 1)
            self.refine = nn.Sequential(
                Conv2dNormActivation(width + low, width), Conv2dNormActivation(width, width)
            )
        self.project = nn.Conv2d(width, backbone.embed_dim, 1)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> unit pixel embeddings (B, D, h, w), float32.

        One a output stride, or with DeepLabV3+'s decoder one a 4 x 4 pixels.
        """
        maps = self.backbone(images)
        x = self.aspp(maps[-1])
        if self.refine is not None:
            low = self.low(maps[0])
            x = F.interpolate(x, low.shape[-2:], mode="bilinear", align_corners=False)
            x = self.refine(torch.cat([x, low], dim=1))
        return F.normalize(self.project(x).float(), dim=1)

    def logits(self, embeddings: Tensor, class_names: ClassNames) -> Tensor:
        """(B, D, h, w) x (C, D) -> (B, C, h, w), scaled cosines (of a class's best name)."""
        with torch.autocast(embeddings.device.type, enabled=False):  # a scale of 100 needs digits
            names, sizes = flat_names(class_names)
            text = self.backbone.text(names).to(embeddings.device)  # (N, D)
            cosine = torch.einsum("bdhw,nd->bnhw", embeddings.float(), text)
            return best_name(cosine, sizes, dim=1) * self.log_scale.exp().clamp(max=100)

    def loss(self, outputs: Tensor, targets: dict) -> dict[str, Tensor]:
        """Cross-entropy over the batch's vocabulary; ignored pixels do not count.

        Logits are upsampled to the pixels that the loss reads; labels are never interpolated.
        """
        stride = self.preset.loss_stride
        labels = targets["labels"][:, stride // 2 :: stride, stride // 2 :: stride]  # (B, H, W)
        logits = self.logits(outputs, targets["names"])
        logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        each = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
        return {"loss": shared_mean(each.flatten(), (labels != IGNORE).float().flatten())}

    def scores(self, images: Tensor, class_names: ClassNames) -> Tensor:
        """Class scores (B, C, h, w) for any vocabulary, as dense as ``forward``'s embeddings.

        They cover the whole picture: sides that are no multiple of 32, which the trunk would cut
        short, are padded with grey, and the scores are read off the true extent.
        """
        padded = pad(images)
        scores = self.logits(self(padded), class_names)
        return cut(scores, images.shape[-2:], padded.shape[-2:])


def set_output_stride(visual: nn.Module, output_stride: int) -> None:
    """Make a CLIP ResNet's last stage keep the resolution of the third (16) or halve it (32).

    CLIP downsamples by average pooling, so stride 16 drops those pools and dilates the 3x3
    convolutions behind them. No parameter changes its name or shape.

    Raises:
        LabError: another output stride.
    """
    if output_stride not in (16, 32):
        raise LabError(f"output_stride={output_stride} is not 16 or 32")
    if output_stride == 16:
        first, *rest = visual.layer4
        first.avgpool = nn.Identity()
        first.downsample[0] = nn.Identity()
        for block in rest:
            block.conv2.dilation = block.conv2.padding = (2, 2)
