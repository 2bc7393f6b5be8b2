"""One loader for every CLIP ResNet: four feature maps, the image embedding and the text side.

``load_backbone("mini")``, ``load_backbone("RN50", "openai")``, ``load_backbone("RN50", path)``. The
tower itself is open_clip's, unchanged, so its parameter names are the keys of a mask.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN as MEAN
from open_clip.constants import OPENAI_DATASET_STD as STD
from open_clip.model import CLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.pretrained import get_pretrained_cfg
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from ..device import float32, pick
from ..errors import LabError
from ..files import at_home, mini_folder
from .text import TextEncoder, find_templates
from .weights import RESNETS, fetch, fill, read

MINI = {
    "embed_dim": 256,
    "vision_cfg": {"layers": [2, 2, 2, 2], "width": 24, "image_size": 128},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    "templates": "scenes",
}
"""open_clip model config of the mini CLIP, and its default templates."""

QUICK = "-quickgelu"


class Backbone(nn.Module):
    """A CLIP ResNet as segmentation uses it. Images are (B, 3, H, W) floats in [0, 1].

    Attributes:
        visual: open_clip's ``ModifiedResNet``; its parameters are the only ones of this module.
        channels: of the four maps, (256, 512, 1024, 2048) for RN50.
        strides: (4, 8, 16, 32) pixels.
        embed_dim: D of image and text embeddings.
        image_size: the side in pixels at which CLIP was trained.
        templates: what ``text`` uses when told nothing else.
    """

    strides = (4, 8, 16, 32)

    def __init__(
        self, clip: CLIP, tokenizer, name: str, templates: str | Sequence[str] = "photo"
    ) -> None:
        """Takes ``clip`` apart: its image tower becomes ``visual``, the rest the text encoder."""
        super().__init__()
        self.visual: ModifiedResNet = clip.visual
        clip.visual = None
        self.name = name
        self.templates = find_templates(templates)
        self.embed_dim = self.visual.output_dim
        self.image_size = self.visual.image_size
        self.channels = tuple(layer[-1].conv3.out_channels for layer in _layers(self.visual))
        self._text = TextEncoder(clip, tokenizer)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps ``(B, channels[i], H / strides[i], W / strides[i])``, i = 0 … 3."""
        return trunk(self.visual, images)

    def embed(self, images: Tensor) -> Tensor:
        """Image embeddings (B, D), float32, unit length. See ``embed`` below."""
        return embed(self.visual, images)

    def text(self, names: Sequence[str], templates: str | Sequence[str] | None = None) -> Tensor:
        """Text embeddings (C, D), float32, unit length, where the image tower is.

        Args:
            names: C class names.
            templates: a name in ``text.TEMPLATES`` or a list of templates; their normalised
                embeddings are averaged and normalised again.
        """
        device = self.visual.conv1.weight.device
        return self._text(names, self.templates if templates is None else templates, device)

    @property
    def logit_scale(self) -> Tensor:
        """What CLIP multiplies cosines of pictures and texts with: a scalar, at most 100."""
        return self._text.clip.logit_scale.detach().exp().clamp(max=100)


def trunk(visual: ModifiedResNet, images: Tensor) -> list[Tensor]:
    """The four feature maps of ``images`` (B, 3, H, W) in [0, 1], CLIP's normalisation included.

    Any H and W of at least 32. If one is no multiple of 32, the first convolution rounds up to
    ceil(H / 2) and every average pool after it rounds down, so the last rows or columns are missing
    from the coarse maps: 100 pixels give maps of 25, 12, 6 and 3.

    Raises:
        LabError: not a batch of RGB images of floats, or smaller than 32 pixels.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise LabError(
            f"images must be (B, 3, H, W) floats in [0, 1], got {tuple(images.shape)} "
            f"{images.dtype}; divide bytes by 255"
        )
    if min(images.shape[2:]) < 32:
        raise LabError(f"images are {tuple(images.shape[2:])} pixels; 32 x 32 is the least")
    mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    x, maps = visual.stem((images - mean) / std), []
    for layer in _layers(visual):
        x = layer(x)
        maps.append(x)
    return maps


def embed(visual: ModifiedResNet, images: Tensor) -> Tensor:
    """CLIP's image embedding (B, D), float32, unit length: the global attention pool.

    At CLIP's own size this is open_clip's ``encode_image(normalize=True)``. For a map of another
    size the pool's positions are interpolated (bicubic) for this call; the parameter stays.
    """
    x, pool = trunk(visual, images)[-1], visual.attnpool
    side = math.isqrt(len(pool.positional_embedding) - 1)
    if x.shape[2:] == (side, side):
        return F.normalize(pool(x).float(), dim=-1)
    first, grid = pool.positional_embedding.split([1, side * side])
    grid = grid.T.reshape(1, -1, side, side)  # (1, C, side, side)
    grid = F.interpolate(grid, x.shape[2:], mode="bicubic", align_corners=False)
    positions = torch.cat([first, grid.flatten(2)[0].T])  # (1 + h·w, C)
    pooled = torch.func.functional_call(pool, {"positional_embedding": positions}, (x,))
    return F.normalize(pooled.float(), dim=-1)


def frozen_copy(backbone: Backbone) -> Backbone:
    """A teacher: a deep copy in eval mode that needs no gradient; the text side is shared."""
    return copy.deepcopy(backbone).eval().requires_grad_(False)


def build_mini(config: dict = MINI) -> CLIP:
    """open_clip's own CLIP, randomly initialised, from an open_clip model config."""
    return CLIP(
        config["embed_dim"],
        config["vision_cfg"],
        config["text_cfg"],
        quick_gelu=bool(config.get("quick_gelu", False)),
    )


def mini_tokenizer(config: dict = MINI) -> SimpleTokenizer:
    """CLIP's tokenizer, texts -> (N, context_length) int64. Its vocabulary is in open_clip."""
    return SimpleTokenizer(context_length=config["text_cfg"]["context_length"])


@float32()
def load_backbone(
    backbone: str = "mini",
    checkpoint: str | Path | None = None,
    device: str | torch.device = "auto",
) -> Backbone:
    """The one loader: a CLIP ResNet in float32 and eval mode on ``device``.

    Args:
        backbone: ``"mini"``, or an open_clip name of a CLIP ResNet (``RESNETS``): "RN50", "RN101",
            "RN50x4", "RN50x16", "RN50x64", each also with "-quickgelu".
        checkpoint: ``"random"`` for fresh weights from torch's seed, or

            - for the mini: a folder with ``model.safetensors`` and ``config.json``. Default:
              ``$OPENTRANS_MINI_CLIP``, else the project's ``data/mini_clip``;
            - else a tag of open_clip ("openai", the default, "yfcc15m", "cc12m") or a file:
              OpenAI's JIT archive, or a state dict (OpenAI's or open_clip's) as a pickle or
              safetensors; it may lie anywhere in a training checkpoint, under any prefix.

    OpenAI's weights need QuickGELU in the text tower; with GELU they load without complaint and
    the text side is spoiled. So QuickGELU is taken for tags that ask for it, for files in OpenAI's
    form (a JIT archive, or keys such as ``input_resolution``), and for "-quickgelu" names. Any
    other file does not say: "RN50" then means GELU, as in open_clip, and a warning says so.

    Raises:
        LabError: unknown backbone or tag, a transformer, a file that is missing, corrupt or of
            another architecture, or a tag that is neither cached nor can be downloaded.
    """
    where = pick(device)
    checkpoint = str(checkpoint or "")
    if backbone == "mini":
        config, state, source = _find_mini(checkpoint)
    elif backbone in RESNETS:
        config, state, source = _find_resnet(backbone, checkpoint)
    else:
        known = backbone in open_clip.list_models()
        why = "is no CLIP ResNet (this lab prunes convolutions)" if known else "is unknown"
        raise LabError(f"backbone {backbone!r} {why}; use mini, {', '.join(RESNETS)}")
    clip = build_mini(config)
    if state is not None:
        fill(clip, state, backbone, source)
        if config.get("quick_gelu", False) is None:
            warnings.warn(
                f"{source} does not say which GELU it was trained with, so the text tower uses "
                "GELU; if it was QuickGELU, as in all published CLIP ResNets, use "
                f"backbone='{backbone}{QUICK}'",
                stacklevel=2,
            )
    templates = config.get("templates", "photo")
    return Backbone(clip, mini_tokenizer(config), backbone, templates).to(where).eval()


def _layers(visual: ModifiedResNet) -> tuple[nn.Module, ...]:
    return visual.layer1, visual.layer2, visual.layer3, visual.layer4


def _find_mini(checkpoint: str) -> tuple[dict, dict[str, Tensor] | None, Path]:
    """(config, weights or None for random ones, file) of a mini CLIP."""
    if checkpoint == "random":
        return MINI, None, Path()
    folder = mini_folder(checkpoint)
    weights, about = folder / "model.safetensors", folder / "config.json"
    for path in (weights, about):
        if not path.is_file():
            raise LabError(
                f"{path} not found; train the mini CLIP with `opentrans-lab mini-clip`, or name a "
                "folder that has one in checkpoint= or OPENTRANS_MINI_CLIP"
            )
    try:
        config = json.loads(about.read_bytes())
        build_mini(config)
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{about} is no config of a CLIP ({error!r}); restore it") from error
    return config, read(weights)[0], weights


def _find_resnet(name: str, checkpoint: str) -> tuple[dict, dict[str, Tensor] | None, Path]:
    """The same for a CLIP ResNet; the config's ``quick_gelu`` is None if nothing tells."""
    config = copy.deepcopy(RESNETS[name])
    if checkpoint == "random":
        return config, None, Path()
    base, tag = name.removesuffix(QUICK), checkpoint or "openai"
    known = get_pretrained_cfg(base, tag)
    path = fetch(base, tag, known) if known else at_home(tag)
    if not path.is_file():
        tags = ", ".join(t for n, t in open_clip.list_pretrained() if n == base)
        raise LabError(f"checkpoint {tag!r} is no file and no tag of {base}; its tags are {tags}")
    state, openai = read(path)
    quick = openai or known.get("quick_gelu", False) or name.endswith(QUICK)
    config["quick_gelu"] = bool(quick) if quick or known else None
    return config, state, path
