"""The mini lab's world: procedural scenes with exact labels, rendered on any torch device.

A scene is one *stuff* background ("grass") and a few *things* with composed names ("striped red
star"). Everything about scene i of seed s follows from (s, i) alone, so a data set is a range of
integers. Random numbers are always drawn on the CPU and the picture is computed on the device:
CPU and GPU agree up to float rounding. It is a laboratory and never a stand-in for COCO.

Open vocabulary: some names are *unseen* in segmentation training. They are compositions of known
attributes, and every name with a held-out attribute value (one colour, one shape).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import choose
from ..errors import LabError
from .painter import COLOURS, SHAPES, STUFF, TEXTURES, backgrounds, paint

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
    choose("domain", domain, ("base", "shifted"))
    if not 0 <= objects[0] <= objects[1] <= MAX_OBJECTS:
        raise LabError(f"objects={objects} must be (least, most) with at most {MAX_OBJECTS}")
    pool, device = _pool(names), torch.device(device)
    table, coarse, grain = _draw(indices, seed, size)
    count = (objects[0] + table[:, 0] * (objects[1] - objects[0] + 1)).long()
    count = count.clamp_(max=objects[1])  # (B,)
    stuff = (table[:, 1] * len(STUFF)).long().clamp_(max=len(STUFF) - 1)
    stuff = torch.where((table[:, 2] < plain) & (count > 0), -1, stuff)  # -1: plain grey
    classes, things = _place(table[:, 10:], pool, size, radius, domain)

    ys, xs = torch.meshgrid(*(torch.arange(size, device=device) + 0.5,) * 2, indexing="ij")
    smooth = F.interpolate(coarse.to(device), size=(size, size), mode="bicubic")  # (B, 2, S, S)
    grain = grain.to(device)
    images = backgrounds(stuff, table[:, 3:10].to(device), xs, ys, smooth, grain, domain)
    owner = torch.full(images.shape[:1] + images.shape[2:], -1, device=device)  # (B, S, S)
    for k in range(int(count.max()) if len(count) else 0):
        rows = torch.nonzero(count > k).flatten()
        thing = {key: value[rows, k].to(device) for key, value in things.items()}
        cover, look = paint(classes[rows, k], thing, xs, ys)  # (R, S, S) in [0, 1], (R, 3, S, S)
        at = rows.to(device)
        images[at] = torch.lerp(images[at], look, cover[:, None])
        owner[at] = torch.where(cover > 0.5, k, owner[at])
    noise = 0.10 if domain == "shifted" else 0.03
    images = (images + noise * (2 * grain - 1)).clamp_(0, 1)
    return _annotate(images, owner, classes, stuff)


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Class, and geometry and look, of MAX_OBJECTS things a scene, each (B, MAX_OBJECTS, ...)."""
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
    return pool[(u[..., 18] * len(pool)).long().clamp(max=len(pool) - 1)], {
        "place": place,
        "radius": r,
        "turn": 2 * math.pi * u[..., 19],
        "phase": u[..., 20],
        "shade": 2 * math.pi * u[..., 21],
        "strength": 0.25 * u[..., 22],
        "jitter": 0.12 * (u[..., 23:26] - 0.5),
    }


def _annotate(images: Tensor, owner: Tensor, things: Tensor, stuff: Tensor) -> Scenes:
    """Labels, masks and captions from the thing that owns each pixel (-1 = background).

    Which regions are to be seen is the one question that waits for the device.
    """
    background = torch.where(stuff >= 0, len(THINGS) + stuff, IGNORE)
    ids = torch.cat([things, background[:, None]], dim=1)  # (B, MAX_OBJECTS + 1)
    slots = owner % ids.shape[1]  # (B, S, S): the background is the last
    seen = torch.stack([(slots == k).flatten(1).any(1) for k in range(ids.shape[1])], dim=1)
    seen = seen.cpu() & (ids != IGNORE)
    rows, columns = seen.nonzero(as_tuple=True)  # of each region, image by image
    found, counts = ids[seen], seen.sum(1).tolist()
    captions = []
    for row in found.split(counts):
        shown = [CLASSES[i] for i in row.tolist()]
        text = " and ".join(f"a {name}" for name in shown if name not in STUFF)
        ground = shown[-1] if shown and shown[-1] in STUFF else ""
        captions.append(f"{text} on {ground}" if text and ground else text or ground)
    rows, columns, found, ids = (x.to(owner.device) for x in (rows, columns, found, ids))
    return Scenes(
        images,
        ids.gather(1, slots.flatten(1)).view_as(slots),
        list((slots[rows] == columns[:, None, None]).split(counts)),
        list(found.split(counts)),
        captions,
    )
