"""The mini lab's world: procedural scenes with exact labels, rendered on any torch device.

A scene is one *stuff* background ("grass") and a few *things* with composed names ("striped red
star"). Everything about scene i of seed s follows from (s, i) alone, so a data set is a range of
integers. Random numbers are always drawn on the CPU and the picture is computed on the device:
CPU and GPU agree up to float rounding. It is a laboratory and never a stand-in for COCO.

Open vocabulary: some names are *unseen* in segmentation training. They are compositions of known
attributes, and every name with a held-out attribute value (one colour, one shape).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import LabError

TEXTURES = ("solid", "striped", "dotted")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "moon", "bar")
STUFF = ("grass", "sand", "water", "brick", "sky", "road", "snow", "wood")
THINGS = tuple(" ".join(p) for p in itertools.product(TEXTURES, COLOURS, SHAPES))
CLASSES = THINGS + STUFF
UNSEEN_COLOUR, UNSEEN_SHAPE = "pink", "moon"

IGNORE = -1  # the label of pixels of no class, everywhere in the lab
MAX_OBJECTS = 6
RADIUS = (18.0, 34.0)  # of a thing, in pixels, in a segmentation scene


def _is_seen(texture: int, colour: int, shape: int) -> bool:
    held_out = COLOURS[colour] == UNSEEN_COLOUR or SHAPES[shape] == UNSEEN_SHAPE
    # A Latin-square rule: every attribute value keeps about three of four compositions.
    return not held_out and (texture + 2 * colour + 3 * shape) % 4 != 0


SEEN = tuple(
    _is_seen(*p)
    for p in itertools.product(range(len(TEXTURES)), range(len(COLOURS)), range(len(SHAPES)))
) + (True,) * len(STUFF)

_RGB = torch.tensor(
    [
        [0.86, 0.10, 0.10],
        [0.97, 0.52, 0.05],
        [0.95, 0.90, 0.10],
        [0.10, 0.60, 0.15],
        [0.10, 0.85, 0.85],
        [0.12, 0.20, 0.85],
        [0.48, 0.12, 0.62],
        [1.00, 0.55, 0.75],
    ]
)


@dataclass(frozen=True)
class Scenes:
    """A batch of B rendered scenes of S x S pixels."""

    images: Tensor  # (B, 3, S, S) float32 in [0, 1]
    labels: Tensor  # (B, S, S) int64 index into CLASSES, IGNORE on a plain background
    masks: list[Tensor]  # per image (K, S, S) bool, disjoint: things, then the background
    classes: list[Tensor]  # per image (K,) int64 index into CLASSES
    captions: list[str]  # "a striped red star and a solid blue ring on grass"


def render(
    indices: Sequence[int],
    size: int = 128,
    seed: int = 0,
    domain: str = "base",
    names: str | Sequence[int] = "seen",
    objects: tuple[int, int] = (1, 4),
    radius: tuple[float, float] = RADIUS,
    plain: float = 0.0,
    device: str | torch.device = "cpu",
) -> Scenes:
    """Render scenes ``indices`` of the world ``seed``.

    Args:
        size: side in pixels. Textures and ``radius`` are in pixels, so a smaller picture is a
            crop of the same world and not a reduced one.
        domain: ``"base"``, or ``"shifted"``: other palettes, coarser grain, more noise, and
            sizes from 0.7 to 1.35 times the given.
        names: which things may appear: ``"seen"``, ``"all"``, or indices into ``THINGS``.
        objects: smallest and largest number of things.
        plain: share of scenes on plain grey, of no class and not in the caption.

    Raises:
        LabError: unknown domain or names.
    """
    if domain not in ("base", "shifted"):
        raise LabError(f"unknown scene domain {domain!r}; use 'base' or 'shifted'")
    if not 0 <= objects[0] <= objects[1] <= MAX_OBJECTS:
        raise LabError(f"objects={objects} must be (least, most) with at most {MAX_OBJECTS}")
    pool, device = _pool(names), torch.device(device)
    table, coarse, grain = _draw(indices, seed, size)
    count = (objects[0] + table[:, 0] * (objects[1] - objects[0] + 1)).long()
    count = count.clamp_(max=objects[1])  # (B,)
    stuff = (table[:, 1] * len(STUFF)).long().clamp_(max=len(STUFF) - 1)
    stuff = torch.where((table[:, 2] < plain) & (count > 0), -1, stuff)  # -1: plain grey
    things = _place(table[:, 10:], pool, size, radius, domain)

    ys, xs = torch.meshgrid(*(torch.arange(size, device=device) + 0.5,) * 2, indexing="ij")
    smooth = F.interpolate(coarse.to(device), size=(size, size), mode="bicubic")  # (B, 2, S, S)
    grain = grain.to(device)
    images = _backgrounds(stuff, table[:, 3:10].to(device), xs, ys, smooth, grain, domain)
    owner = torch.full(images.shape[:1] + images.shape[2:], -1, device=device)  # (B, S, S)
    for k in range(int(count.max()) if len(count) else 0):
        rows = torch.nonzero(count > k).flatten()
        thing = {key: value[rows, k].to(device) for key, value in things.items()}
        cover, paint = _paint(thing, xs, ys)  # (R, S, S) in [0, 1], (R, 3, S, S)
        at = rows.to(device)
        images[at] = torch.lerp(images[at], paint, cover[:, None])
        owner[at] = torch.where(cover > 0.5, k, owner[at])
    noise = 0.10 if domain == "shifted" else 0.03
    images = (images + noise * (2 * grain - 1)).clamp_(0, 1)
    return _annotate(images, owner, things["class"], stuff, count)


def _pool(names: str | Sequence[int]) -> Tensor:
    if isinstance(names, str):
        if names not in ("seen", "all"):
            raise LabError(f"unknown names={names!r}; use 'seen', 'all' or indices into THINGS")
        names = [i for i in range(len(THINGS)) if names == "all" or SEEN[i]]
    return torch.as_tensor(names, dtype=torch.int64)


_PER_THING = 26  # random numbers that one thing uses


def _draw(indices: Sequence[int], seed: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform numbers of each scene: a table, two coarse fields, and a grain a pixel."""
    table = torch.empty(len(indices), 10 + MAX_OBJECTS * _PER_THING)
    coarse = torch.empty(len(indices), 2, size // 16 + 2, size // 16 + 2)
    grain = torch.empty(len(indices), 3, size, size)
    generator = torch.Generator()
    for row, index in enumerate(indices):
        # An odd multiplier spreads (seed, index) over 63 bits, so that worlds do not overlap.
        generator.manual_seed((seed * 0x9E3779B97F4A7C15 + int(index) * 0x2545F491) % 2**63)
        for tensor in (table, coarse, grain):
            tensor[row].uniform_(generator=generator)
    return table, coarse, grain


def _place(
    u: Tensor, pool: Tensor, size: int, radius: tuple[float, float], domain: str
) -> dict[str, Tensor]:
    """Class, geometry and look of MAX_OBJECTS things a scene, each (B, MAX_OBJECTS, ...)."""
    u = u.view(len(u), MAX_OBJECTS, _PER_THING)
    low, high = radius
    r = low * (high / low) ** u[..., 0]  # log-uniform
    if domain == "shifted":
        r = r * (0.7 + 0.65 * u[..., 1])
    margin = (0.85 * r).clamp(max=size / 2)  # (B, K)
    tries = u[..., 2:18].unflatten(-1, (8, 2))  # eight candidate places
    tries = margin[..., None, None] + tries * (size - 2 * margin)[..., None, None]
    place = tries[:, :, 0].clone()  # (B, K, 2)
    for k in range(1, MAX_OBJECTS):  # take the candidate with the widest gap to those before
        gap = (tries[:, k, :, None] - place[:, None, :k]).norm(dim=-1) - r[:, None, :k]
        best = gap.amin(-1).argmax(-1)
        place[:, k] = tries[torch.arange(len(u)), k, best]
    return {
        "class": pool[(u[..., 18] * len(pool)).long().clamp(max=len(pool) - 1)],
        "place": place,
        "radius": r,
        "turn": 2 * math.pi * u[..., 19],
        "phase": u[..., 20],
        "shade": 2 * math.pi * u[..., 21],
        "strength": 0.25 * u[..., 22],
        "jitter": 0.12 * (u[..., 23:26] - 0.5),
    }


# --- things -------------------------------------------------------------------------------------
# Each shape is a signed function of local coordinates: negative inside, about 1 unit a radius.


def _polygon(u: Tensor, v: Tensor, sides: int, inner: float) -> Tensor:
    """A regular polygon (inner = cos(pi/sides)) or a star (inner smaller), outer radius 1."""
    half = math.pi / sides
    angle = torch.remainder(torch.atan2(v, u) + half, 2 * half) - half  # a tip points along 0
    x, y = torch.cos(angle), torch.sin(angle).abs()
    rho = torch.hypot(u, v)
    # The edge runs from the tip (1, 0) to the notch at angle `half`.
    nx, ny = inner * math.sin(half), 1 - inner * math.cos(half)
    return (rho * (x * nx + y * ny) - nx) / math.hypot(nx, ny)


_SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda u, v: torch.hypot(u, v) - 0.85,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.74,
    "triangle": lambda u, v: _polygon(u, v, 3, 0.5),
    "star": lambda u, v: _polygon(u, v, 5, 0.4),
    "cross": lambda u, v: torch.minimum(
        torch.maximum(u.abs() - 0.95, v.abs() - 0.28),
        torch.maximum(v.abs() - 0.95, u.abs() - 0.28),
    ),
    "ring": lambda u, v: (torch.hypot(u, v) - 0.72).abs() - 0.2,
    "moon": lambda u, v: torch.maximum(torch.hypot(u, v) - 0.92, 0.78 - torch.hypot(u - 0.48, v)),
    "bar": lambda u, v: torch.maximum(u.abs() - 1.0, v.abs() - 0.27),
}


def _paint(thing: dict[str, Tensor], xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage (R, S, S) and colour (R, 3, S, S) of one thing a scene."""
    r, turn = thing["radius"][:, None, None], thing["turn"][:, None, None]
    dx = (xs - thing["place"][:, 0, None, None]) / r
    dy = (ys - thing["place"][:, 1, None, None]) / r
    u, v = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
    shape = thing["class"] % len(SHAPES)
    colour = thing["class"] // len(SHAPES) % len(COLOURS)
    texture = thing["class"] // (len(SHAPES) * len(COLOURS))

    signed = torch.empty_like(u)
    for index, name in enumerate(SHAPES):
        rows = shape == index
        if rows.any():
            signed[rows] = _SHAPES[name](u[rows], v[rows])
    cover = (0.5 - signed * r).clamp(0, 1)  # an edge one pixel wide

    phase = thing["phase"][:, None, None]
    stripes = (torch.sin(2 * math.pi * (1.7 * u + phase)) > 0) & (texture == 1)[:, None, None]
    cell_u, cell_v = (torch.remainder(2.2 * w + phase, 1) - 0.5 for w in (u, v))
    dots = (torch.hypot(cell_u, cell_v) < 0.27) & (texture == 2)[:, None, None]
    across = dx * thing["shade"][:, None, None].cos() + dy * thing["shade"][:, None, None].sin()
    light = 1 + thing["strength"][:, None, None] * across
    gain = light * (1 - 0.65 * stripes.float() - 0.85 * dots.float())  # dark stripes, pale dots
    base = _RGB.to(u.device)[colour] + thing["jitter"]  # (R, 3)
    return cover, base[:, :, None, None] * gain[:, None] + (0.82 * light * dots)[:, None]


# --- stuff --------------------------------------------------------------------------------------
# Each returns (R, S, S) in about [0, 1], which mixes the two colours of the palette below.


def _brick(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
    row = torch.floor(y / 9)
    joint = torch.remainder(x + 9 * torch.remainder(row, 2), 18)
    return ((torch.remainder(y, 9) < 1.6) | (joint < 1.6)).float()


_STUFF: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    # x, y in pixels with a random origin; a, b smooth fields; g grain, all (R, S, S)
    "grass": lambda x, y, a, b, g: 0.5 * a + 0.5 * torch.sin(2.1 * x + 6 * a).abs() * g,
    "sand": lambda x, y, a, b, g: 0.3 * a + 0.7 * g**2,
    "water": lambda x, y, a, b, g: 0.5 + 0.5 * torch.sin(0.55 * y + 5 * a + 2 * b),
    "brick": lambda x, y, a, b, g: _brick(x, y, a) + 0.25 * a * (1 - _brick(x, y, a)),
    "sky": lambda x, y, a, b, g: (2.2 * (0.6 * a + 0.4 * b) - 0.6).clamp(0, 1),
    "road": lambda x, y, a, b, g: (
        ((torch.remainder(y, 42) < 4) & (torch.remainder(x, 24) < 14)).float() + 0.15 * g
    ),
    "snow": lambda x, y, a, b, g: 0.8 * (a * b) + (g > 0.985).float(),
    "wood": lambda x, y, a, b, g: 0.5 + 0.5 * torch.sin(0.32 * x + 9 * a + 0.05 * y),
}
_PALETTE = torch.tensor(  # stuff, two ends, rgb
    [
        [[0.10, 0.32, 0.08], [0.45, 0.68, 0.25]],
        [[0.88, 0.78, 0.55], [0.66, 0.54, 0.34]],
        [[0.10, 0.36, 0.52], [0.38, 0.66, 0.78]],
        [[0.58, 0.27, 0.20], [0.78, 0.75, 0.70]],
        [[0.50, 0.72, 0.95], [0.97, 0.98, 1.00]],
        [[0.27, 0.27, 0.29], [0.85, 0.83, 0.75]],
        [[0.93, 0.95, 0.98], [0.72, 0.78, 0.88]],
        [[0.45, 0.28, 0.14], [0.68, 0.47, 0.27]],
    ]
)
_SHIFTED = torch.tensor(  # a drier, darker, dimmer world: rgb gains of each stuff
    [
        [1.45, 1.05, 0.80],
        [0.80, 0.72, 0.75],
        [0.85, 1.10, 0.80],
        [0.85, 0.95, 1.15],
        [0.95, 0.80, 0.75],
        [1.25, 1.15, 1.05],
        [0.88, 0.86, 0.92],
        [0.75, 0.75, 0.85],
    ]
)


def _backgrounds(
    stuff: Tensor, u: Tensor, xs: Tensor, ys: Tensor, smooth: Tensor, grain: Tensor, domain: str
) -> Tensor:
    """(B, 3, S, S) pictures of the background alone."""
    shifted = domain == "shifted"
    zoom = 1.5 if shifted else 1.0
    images = torch.empty_like(grain)
    for index in stuff.unique().tolist():
        rows = torch.nonzero(stuff == index).flatten().to(grain.device)
        if index < 0:
            grey = 0.35 + 0.4 * u[rows, 0]
            images[rows] = grey[:, None, None, None].expand(-1, 3, *xs.shape)
            continue
        x = (xs + 64 * u[rows, 0, None, None]) / zoom  # (R, S, S)
        y = (ys + 64 * u[rows, 1, None, None]) / zoom
        a, b = smooth[rows, 0], smooth[rows, 1]
        mix = _STUFF[STUFF[index]](x, y, a, b, grain[rows, 0])[:, None]
        low, high = _PALETTE[index].to(u.device)[:, :, None, None]
        gain = (0.88 + 0.24 * u[rows, 2:5])[:, :, None, None]
        if shifted:
            gain = gain * _SHIFTED[index].to(u.device)[:, None, None]
        images[rows] = (low + (high - low) * mix) * gain
    return images.clamp_(0, 1)


def _annotate(
    images: Tensor, owner: Tensor, things: Tensor, stuff: Tensor, count: Tensor
) -> Scenes:
    """Labels, masks and captions from the thing that owns each pixel (-1 = background)."""
    labels, masks, classes, captions = torch.empty_like(owner), [], [], []
    for row, (n, background) in enumerate(zip(count.tolist(), stuff.tolist(), strict=True)):
        background = len(THINGS) + background if background >= 0 else IGNORE
        ids = torch.tensor([*things[row, :n].tolist(), background], device=owner.device)
        labels[row] = ids[owner[row]]  # owner -1 takes the last entry
        slots = torch.tensor([*range(n), -1], device=owner.device)
        regions = owner[row] == slots[:, None, None]
        keep = regions.flatten(1).any(1) & (ids != IGNORE)
        masks.append(regions[keep])
        classes.append(ids[keep])
        visible = [f"a {THINGS[i]}" for i in classes[-1].tolist() if i < len(THINGS)]
        text = " and ".join(visible)
        if background != IGNORE:
            text = f"{text} on {CLASSES[background]}" if text else CLASSES[background]
        captions.append(text)
    return Scenes(images, labels, masks, classes, captions)
