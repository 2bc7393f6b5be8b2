"""How the mini lab's things and backgrounds look: shapes, textures and palettes, on any device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

TEXTURES = ("solid", "striped", "dotted")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "moon", "bar")
STUFF = ("grass", "sand", "water", "brick", "sky", "road", "snow", "wood")

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


def paint(
    classes: Tensor, thing: dict[str, Tensor], xs: Tensor, ys: Tensor
) -> tuple[Tensor, Tensor]:
    """Coverage (R, S, S) and colour (R, 3, S, S) of one thing a scene.

    ``classes`` (R,) lie on the CPU, where looking at them makes nobody wait for the device.
    """
    r, turn = thing["radius"][:, None, None], thing["turn"][:, None, None]
    dx = (xs - thing["place"][:, 0, None, None]) / r
    dy = (ys - thing["place"][:, 1, None, None]) / r
    u, v = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
    shape = classes % len(SHAPES)
    colour = classes // len(SHAPES) % len(COLOURS)
    texture = (classes // (len(SHAPES) * len(COLOURS)))[:, None, None]

    signed = torch.empty_like(u)
    for index in shape.unique().tolist():
        rows = torch.nonzero(shape == index).flatten().to(u.device)
        signed[rows] = _SHAPES[SHAPES[index]](u[rows], v[rows])
    cover = (0.5 - signed * r).clamp(0, 1)  # an edge one pixel wide

    phase = thing["phase"][:, None, None]
    stripes = (torch.sin(2 * math.pi * (1.7 * u + phase)) > 0) & (texture == 1).to(u.device)
    cell_u, cell_v = (torch.remainder(2.2 * w + phase, 1) - 0.5 for w in (u, v))
    dots = (torch.hypot(cell_u, cell_v) < 0.27) & (texture == 2).to(u.device)
    across = dx * thing["shade"][:, None, None].cos() + dy * thing["shade"][:, None, None].sin()
    light = 1 + thing["strength"][:, None, None] * across
    gain = light * (1 - 0.65 * stripes.float() - 0.85 * dots.float())  # dark stripes, pale dots
    base = _RGB[colour].to(u.device) + thing["jitter"]  # (R, 3)
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


def backgrounds(
    stuff: Tensor, u: Tensor, xs: Tensor, ys: Tensor, smooth: Tensor, grain: Tensor, domain: str
) -> Tensor:
    """(B, 3, S, S) pictures of the background alone; ``stuff`` (B,) lies on the CPU."""
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
