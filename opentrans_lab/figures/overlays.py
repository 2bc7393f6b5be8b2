"""Label maps to look at: a colour for every class, the same wherever it is, and sheets of them."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import count
from textwrap import wrap

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.patches import Patch
from torch import Tensor

from ..data import IGNORE
from .letters import brief, to_the_letter

Colour = tuple[float, float, float]

VERDICTS: dict[str, Colour] = {
    "wrong": (0.82, 0.29, 0.36), "right": (0.23, 0.43, 0.65), "no label": (0.93, 0.93, 0.93),
}  # fmt: skip
"""What an error map says of a pixel, and in which colour."""

LEGEND = 200  # classes that a legend holds: a longer one would outgrow what a picture can be

# From OKLab, in which equal distances look equal, to linear sRGB (Ottosson, 2020).
_TO_LMS = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728],
     [1, -0.0894841775, -1.2914855480]]
)  # fmt: skip
_TO_RGB = np.array(
    [[4.0767416621, -3.3077115913, 0.2309699292], [-1.2684380046, 2.6097574011, -0.3413193965],
     [-0.0041960863, -0.7034186147, 1.7076147010]]
)  # fmt: skip


@cache
def colour(name: str) -> Colour:
    """An RGB colour in [0, 1] that depends on the class name alone (case and spaces aside).

    Any colour that a screen can show and that is neither grey nor very dark or light is as likely
    as any other to the eye, so that two of one picture are seldom alike.
    """
    word = " ".join(name.lower().split())
    for attempt in count():
        digest = hashlib.sha256(f"{word}/{attempt}".encode()).digest()
        light, a, b = np.frombuffer(digest[:12], ">u4") / 2**32
        light, a, b = 0.36 + 0.55 * light, 0.66 * a - 0.33, 0.66 * b - 0.33
        linear = _TO_RGB @ (_TO_LMS @ (light, a, b)) ** 3
        if math.hypot(a, b) > 0.07 and linear.min() >= 0 and linear.max() <= 1:
            break
    gamma = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple(gamma.tolist())


def overlay(
    image: Tensor,
    labels: Tensor,
    names: Sequence[str],
    opacity: float = 0.65,
    segments: Tensor | None = None,
) -> np.ndarray:
    """The picture with its label map laid over it: (H, W, 3) float in [0, 1].

    image (3, h, w) in [0, 1], brought to the labels' size; labels (H, W) int64, ignored pixels
    keep the picture. Under the others it is grey, so that hues are the classes' alone.
    ``segments`` (H, W) are parted by white lines, also two of one class.
    """
    image = F.interpolate(image[None].float(), labels.shape[-2:], mode="bilinear")[0]
    picture = image.permute(1, 2, 0).cpu().numpy()
    labels = labels.cpu().numpy()
    palette = np.array([colour(name) for name in names] + [(0.0, 0.0, 0.0)])
    shown = np.where(labels == IGNORE, len(names), labels)
    grey = picture @ np.array([0.299, 0.587, 0.114])
    mixed = (1 - opacity) * grey[..., None] + opacity * palette[shown]
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


def verdicts(labels: Tensor, truth: Tensor) -> Tensor:
    """For each pixel (H, W) int64 an index into ``VERDICTS``: 0 wrong, 1 right, 2 no label."""
    return torch.where(truth == IGNORE, 2, (labels == truth).long())


def error_map(labels: Tensor, truth: Tensor) -> np.ndarray:
    """Where a label map (H, W) is wrong, as a picture (H, W, 3) in the colours of ``VERDICTS``."""
    return np.array(list(VERDICTS.values()))[verdicts(labels, truth).cpu().numpy()]


# --- sheets -------------------------------------------------------------------------------------

Column = str | tuple[str, str]  # a title, or a header that columns side by side share, and a title


def occurring(maps: Sequence[Tensor], names: Sequence[str]) -> list[str]:
    """The names of the classes that label maps hold, those with most pixels first."""
    flat = [m.flatten() for m in maps]
    counts = sum(torch.bincount(m[m != IGNORE], minlength=len(names)).cpu() for m in flat)
    order = torch.as_tensor(counts).argsort(descending=True, stable=True).tolist()
    return [names[i] for i in order if counts[i] > 0] if flat else []


def compare(
    images: Sequence[Tensor],
    columns: Mapping[Column, Sequence[Tensor | np.ndarray]],
    names: Sequence[str],
    titles: Sequence[str] = (),
    segments: Mapping[Column, Sequence[Tensor]] | None = None,
) -> Figure:
    """A row an image: the picture, then one overlay for each column of label maps, and a legend.

    Args:
        images: (3, h, w) in [0, 1].
        columns: an image's label maps (H, W) int64, or error maps, which are shown as they are.
        names: of the classes; the legend holds exactly those that occur somewhere (of very
            many, those with most pixels).
        titles: what to write beside each image.
        segments: of columns that have them, each picture's segments to part by white lines.
    """
    heads = [("", "image")] + [key if isinstance(key, tuple) else ("", key) for key in columns]
    rows: list[list[np.ndarray]] = []
    for row, image in enumerate(images):
        rows.append([image.permute(1, 2, 0).cpu().numpy()])
        for key, maps in columns.items():
            part, parted = maps[row], (segments or {}).get(key)
            if isinstance(part, Tensor):
                part = overlay(image, part, names, segments=parted[row] if parted else None)
            rows[-1].append(part)
    cells = [cell for maps in columns.values() for cell in maps]
    found = occurring([c for c in cells if isinstance(c, Tensor)], names)
    patches = [(brief(name), colour(name)) for name in found[:LEGEND]]
    if len(found) > LEGEND:
        patches.append((f"and {len(found) - LEGEND} more", (1.0, 1.0, 1.0)))
    if any(isinstance(cell, np.ndarray) for cell in cells):
        patches += VERDICTS.items()
    return _sheet(rows, heads, titles, patches)


@to_the_letter
def _sheet(
    rows: Sequence[Sequence[np.ndarray]],
    heads: Sequence[tuple[str, str]],
    titles: Sequence[str],
    patches: Sequence[tuple[str, Colour]],
) -> Figure:
    """Pictures close together under their heads, all measured in inches; the legend is below."""
    wide = min(2.3, max(1.2, 15 / len(heads)))
    new = [bool(i) and heads[i][0] != heads[i - 1][0] for i in range(len(heads))]
    talls = [wide * min(2, max(0.4, row[0].shape[0] / row[0].shape[1])) for row in rows]
    told = [
        [piece for line in title.splitlines() for piece in wrap(brief(line, 160), int(tall / 0.06))]
        for title, tall in zip(titles, talls, strict=False)
    ]
    beside = 0.06 + 0.14 * max(map(len, told), default=-0.4)
    lefts = beside + (wide + 0.04) * np.arange(len(heads)) + 0.14 * np.cumsum(new)
    above = 0.22 + 0.26 * any(group for group, _ in heads)
    entry = 0.068 * max((len(name) for name, _ in patches), default=0) + 0.42
    total = max(lefts[-1] + wide, entry)
    abreast = int(total / entry)
    below = 0.17 * math.ceil(len(patches) / abreast) + 0.12
    height = above + sum(talls) + 0.04 * len(talls) + below
    # With none at all, saving a figure would leave the theme's layout behind.
    still = PlaceHolderLayoutEngine(adjust_compatible=True, colorbar_gridspec=True)
    fig = plt.figure(figsize=(total, height), layout=still)
    top = height - above
    for r, (row, tall) in enumerate(zip(rows, talls, strict=True)):
        for (_, title), left, cell in zip(heads, lefts, row, strict=True):
            place = (left / total, (top - tall) / height, wide / total, tall / height)
            axis = fig.add_axes(place, xticks=[], yticks=[])
            axis.imshow(cell)
            axis.spines[:].set_visible(False)
            if r == 0:
                axis.set_title(brief(title), fontsize=9, pad=3)
        if r < len(told):
            fig.axes[-len(row)].set_ylabel("\n".join(told[r]), fontsize=7.5, labelpad=3)
        top -= tall + 0.04
    for group in dict.fromkeys(group for group, _ in heads if group):
        own = [left for left, head in zip(lefts, heads, strict=True) if head[0] == group]
        ends, y = np.array([own[0], own[-1] + wide]) / total, 1 - 0.25 / height
        fig.add_artist(plt.Line2D(ends, [y, y], color="0.4", lw=0.8))
        place = ends.mean(), y + 0.04 / height
        fig.text(*place, brief(group), ha="center", va="bottom", fontsize=11)
    fig.legend(
        handles=[Patch(color=rgb, label=name) for name, rgb in patches], ncols=abreast,
        loc="upper center", bbox_to_anchor=(0.5, (below - 0.06) / height), frameon=False,
        fontsize=8, borderaxespad=0, borderpad=0,
        handlelength=1.2, columnspacing=1.2, labelspacing=0.35,
    )  # fmt: skip
    return fig
