"""Label maps to look at: a colour for every class, the same in every picture."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from .scenes import IGNORE


def colour(name: str) -> tuple[float, float, float]:
    """An RGB colour in [0, 1] that depends on the class name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    hue, light, strength = digest[0] / 256, 0.42 + digest[1] / 1000, 0.65 + digest[2] / 800
    return colorsys.hls_to_rgb(hue, light, strength)


def overlay(
    image: Tensor,
    labels: Tensor,
    names: Sequence[str],
    opacity: float = 0.65,
    segments: Tensor | None = None,
) -> np.ndarray:
    """The picture with its label map laid over it: (H, W, 3) float in [0, 1].

    image (3, h, w) in [0, 1], brought to the labels' size; labels (H, W) int64, ignored pixels
    keep the picture. ``segments`` (H, W) are parted by white lines, also two of one class.
    """
    image = F.interpolate(image[None].float(), labels.shape[-2:], mode="bilinear")[0]
    picture = image.permute(1, 2, 0).cpu().numpy()
    labels = labels.cpu().numpy()
    palette = np.array([colour(name) for name in names] + [(0.0, 0.0, 0.0)])
    shown = np.where(labels == IGNORE, len(names), labels)
    mixed = (1 - opacity) * picture + opacity * palette[shown]
    mixed = np.where((labels == IGNORE)[..., None], picture, mixed)
    if segments is not None:
        mixed[borders(segments.cpu().numpy())] = 1.0
    return mixed


def borders(segments: np.ndarray) -> np.ndarray:
    """Pixels (H, W) bool whose right or lower neighbour belongs to another segment."""
    edge = np.zeros(segments.shape, dtype=bool)
    edge[:, :-1] |= segments[:, :-1] != segments[:, 1:]
    edge[:-1] |= segments[:-1] != segments[1:]
    return edge


def compare(
    images: Sequence[Tensor],
    columns: dict[str, Sequence[Tensor]],
    names: Sequence[str],
    titles: Sequence[str] = (),
    most: int = 6,
    segments: Mapping[str, Sequence[Tensor]] | None = None,
    heading: str = "",
) -> Figure:
    """A row an image: the picture, then one overlay for each column of label maps.

    ``segments`` holds, for columns that have them, each picture's segments to part by lines. The
    legend beside a row names the classes that cover most of its maps.
    """
    rows, wide = len(images), len(columns) + 1
    fig, axes = plt.subplots(
        rows, wide + 1, figsize=(2.3 * wide + 3.0, 2.4 * rows), squeeze=False,
        gridspec_kw={"width_ratios": [1] * wide + [1.1], "wspace": 0.04, "hspace": 0.12},
    )  # fmt: skip
    for row, image in enumerate(images):
        axes[row, 0].imshow(image.permute(1, 2, 0).cpu().numpy())
        for column, (title, maps) in enumerate(columns.items(), 1):
            parted = segments[title][row] if segments and title in segments else None
            axes[row, column].imshow(overlay(image, maps[row], names, segments=parted))
            if row == 0:
                axes[row, column].set_title(title, fontsize=10)
        shown = np.concatenate([maps[row].cpu().numpy().ravel() for maps in columns.values()])
        ids, counts = np.unique(shown[shown != IGNORE], return_counts=True)
        top = ids[np.argsort(-counts)][:most]
        patches = [Patch(color=colour(names[i]), label=names[i]) for i in top]
        axes[row, wide].legend(handles=patches, loc="center left", frameon=False, fontsize=8)
        if row < len(titles):
            axes[row, 0].set_ylabel(titles[row], fontsize=8)
        for axis in axes[row]:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    axes[0, 0].set_title("image", fontsize=10)
    if heading:
        fig.suptitle(heading, y=fig.subplotpars.top + 0.5 / fig.get_figheight(), va="bottom")
    return fig
