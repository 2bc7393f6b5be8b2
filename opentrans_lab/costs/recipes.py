"""How the paper's FLOPs and parameters were probably counted: a recipe for each framework.

Reconstructed from the printed numbers, never tuned to them: ``SOURCES`` says why each line is what
it is. Every number is a sum over the traced operations, see :mod:`opentrans_lab.costs.counter`.
"""

from functools import lru_cache
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn

from . import counter
from .counter import Counted, count, meta_backbone

DENSITY = 0.1  # of the paper's subnetwork
LOW_CHANNELS = 48  # of DeepLabV3+'s decoder
MEDIAN_LAYER = "layer4.0.conv1"  # of 0.537 G at 512x512, see SOURCES

SOURCES = pd.DataFrame(
    [
        ("trunk", "thop", "han fcclip", "thop 0.1.1: conv MACs, 4 an element out of an affine norm "
         "(2 x 2), 1 out of average pooling; all sparse cells are the dense ones less 0.9 of it"),
        ("head", "fvcore", "han", "fvcore 0.1.5: MACs without baddbmm, 5 an element out of layer "
         "and group norms, 4 out of grid_sample and bilinear upsampling; with thop's trunk it "
         "gives 268.2, thop's own count of this head does not"),
        ("head", "thop", "fcclip", "thop hooks modules by exact type, so of FC-CLIP's public code "
         "it misses, in parameters too, the FPN and mask convolutions (detectron2's subclass of "
         "Conv2d), nn.MultiheadAttention, embeddings, GroupNorm, einsums and mask pooling: 95.013 G"
         " and 15.442 M of 21.032 M remain"),
        ("all", "conv only", "deeplabv3", "weights and MACs of convolutions (the trunk's: thop's) "
         "of a trunk of output stride 32, an ASPP that reads a map of stride 16 all the same, and "
         f"DeepLabV3+'s decoder ({LOW_CHANNELS} low-level channels), which the authors' code has; "
         "no projection to text"),
        ("sparse", "flat", "all", "dense - (1 - density) x thop's trunk, not this mask; Han et "
         "al.'s printed 173.3 G is reached by no rule that we know"),
        ("training", "thop, products", "han", "N (d T + T + H) + Nw T + (N - Nw) (T - C): N images,"
         " Nw of them before freezing, d density, T thop's trunk as above, H the head's MACs "
         "without baddbmm in a training pass, where it classifies after each of its ten layers, C "
         "frozen convolutions; without the head's backward pass. A guess, made after looking at 28 "
         "combinations (T: bare MACs, fvcore, thop; H: bare MACs with and without baddbmm, "
         "fvcore, and this one; C: with norms at 0, 2 or 4 an element): the one that uses the "
         "trunk of Table 1, and has no printed cell of dense, alpha and alpha* above 0.1 P off"),
        ("training, low_alpha", "", "han", "the 27 layers frozen in the authors' public code"),
        ("training, high_alpha", "", "han", "the other 28 less the median one, which is neither "
         f"above nor below; nobody says which it is: {MEDIAN_LAYER} stands for any of 0.537 G, "
         "inferred from the printed 172.3 P, the one assumption here that is"),
        ("training, random", "", "han", "the mean over random sets of 27 layers; which ones the "
         "authors drew is unknown"),
    ],
    columns=["component", "counter", "frameworks", "source"],
)  # fmt: skip
"""Where the ``paper`` convention comes from: our reading of the printed numbers."""


class Part(NamedTuple):
    """One line of a paper row, dense."""

    component: str
    counter: str
    params: int
    macs: int


@lru_cache(maxsize=8)
def _plain(backbone: str, size: tuple[int, int]) -> Counted:
    return count(meta_backbone(backbone), size)


def thop_trunk(counted: Counted) -> Part:
    """What thop says of the trunk alone at output stride 32, whatever the framework has made of its
    own."""
    plain = _plain(counted.model.backbone.name, counted.size)
    return Part("trunk", "thop", _numel(plain, "trunk"), counter.thop(plain.rows("trunk")))


def _numel(counted: Counted, component: str) -> int:
    return sum(p.numel() for p in counted.parameters(component).values())


def _han(counted: Counted) -> list[Part]:
    fvcore = counter.fvcore(counted.rows("head"))
    return [thop_trunk(counted), Part("head", "fvcore", _numel(counted, "head"), fvcore)]


def _fcclip(counted: Counted) -> list[Part]:
    """Of the head only what thop sees, see ``SOURCES``."""
    unseen = []
    for name, module in counted.model.named_modules():
        if type(module).__name__ in ("Mask2FormerAttention", "MultiheadAttention"):
            unseen.append(f"{name}.")  # nn.MultiheadAttention, both of them, in FC-CLIP's code
        elif type(module).__name__ == "Mask2FormerPixelDecoder":
            convs = ("adapter_1", "layer_1", "mask_projection")
            unseen += [f"{name}.{conv}." for conv in convs]
    rows = counted.rows("head")
    rows = rows[~(rows["module"] + ".").str.startswith(tuple(unseen))]
    params = sum(
        p.numel()
        for name, p in counted.parameters("head").items()
        if not name.startswith(tuple(unseen))
        and type(counted.model.get_submodule(name.rpartition(".")[0])) in counter.THOP_HOOKS
    )
    return [thop_trunk(counted), Part("head", "thop", params, counter.thop(rows))]


def _deeplabv3(counted: Counted) -> list[Part]:
    """Convolutions: a trunk of output stride 32, an ASPP at 16, the authors' decoder at 4."""
    backbone, aspp = counted.model.backbone, counted.model.aspp
    (low, *_, high), width = backbone.channels, aspp.project[0].out_channels
    h, w = counted.size
    with torch.device("meta"):
        lateral = nn.Conv2d(low, LOW_CHANNELS, 1, bias=False)
        fuse = nn.Sequential(
            nn.Conv2d(LOW_CHANNELS + width, width, 3, padding=1, bias=False),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )
    trunk = thop_trunk(counted)
    weights = _conv_weights(backbone.visual) - _conv_weights(backbone.visual.attnpool)
    parts = [
        ("aspp", aspp, _rows(aspp, high, h // 16, w // 16)),
        ("decoder", lateral, _rows(lateral, low, h // 4, w // 4)),
        ("decoder", fuse, _rows(fuse, LOW_CHANNELS + width, h // 4, w // 4)),
    ]
    return [trunk._replace(counter="thop, conv only", params=weights)] + [
        Part(name, "conv only", _conv_weights(module), counter.convolutions(rows))
        for name, module, rows in parts
    ]


def _rows(module: nn.Module, channels: int, height: int, width: int) -> pd.DataFrame:
    return counter.trace(module, torch.empty(1, channels, height, width, device="meta")).rows


def _conv_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))


RECIPES = {"han": _han, "fcclip": _fcclip, "deeplabv3": _deeplabv3}
