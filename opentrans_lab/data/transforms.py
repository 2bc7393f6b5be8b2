"""How a picture and its segments are shown: one size, one cut, one flip for both of them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

GREY = 128  # of the padding: close to CLIP's mean colour


class Look(NamedTuple):
    """How a training picture is shown."""

    flip: bool = False
    scale: float = 1.0  # of the picture, whose longer side then is scale · size
    place: tuple[float, float] = (0.0, 0.0)  # of the cut in what is too large, (down, right), 0..1


def look(seed: int, position: int, jitter: bool) -> Look:
    """What chance gives the sample at this position of the stream."""
    random = np.random.default_rng([seed, 1, position])
    flip = bool(random.integers(2))
    if not jitter:
        return Look(flip)
    scale, down, right = random.uniform([0.1, 0, 0], [2, 1, 1])
    return Look(flip, scale, (down, right))


def fit_square(
    image: tv_tensors.Image, mask: tv_tensors.Mask, size: int, look: Look
) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Longer side to ``look.scale`` · ``size``, aspect kept, then cut or padded right and below.

    image (3, H, W) uint8 -> (3, size, size), padded grey; mask (H, W) -> (size, size), padded
    with -1. The mask is only picked from: ``nearest-exact`` takes the pixel under the centre,
    plain nearest would shift it against the image by up to half a pixel.
    """
    h, w = scaled(*image.shape[-2:], look.scale * size / max(image.shape[-2:]))
    image, mask = F.resize(image, [h, w], antialias=True), picked(mask, [h, w])
    if look.flip:
        image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
    if h > size or w > size:
        down, right = (round(p * max(0, n - size)) for p, n in zip(look.place, (h, w), strict=True))
        h, w = min(h, size), min(w, size)
        image, mask = (F.crop(x, down, right, h, w) for x in (image, mask))
    padding = [0, 0, size - w, size - h]
    return F.pad(image, padding, fill=GREY), F.pad(mask, padding, fill=-1)


def picked(mask: tv_tensors.Mask, size: list[int]) -> tv_tensors.Mask:
    """Of each pixel the one under its centre."""
    exact = InterpolationMode.NEAREST_EXACT
    return tv_tensors.Mask(F.resize_image(mask[None].as_subclass(Tensor), size, exact)[0])


def floored(mask: tv_tensors.Mask, size: list[int]) -> tv_tensors.Mask:
    """Plain nearest, as OpenCV has it: what the literature's reduced ADE20K labels were made by."""
    rows, columns = (torch.arange(n) * m // n for n, m in zip(size, mask.shape, strict=True))
    return tv_tensors.Mask(mask.as_subclass(Tensor)[rows[:, None], columns])


def scaled(height: int, width: int, scale: float) -> list[int]:
    """Height and width times ``scale``, rounded."""
    return [max(1, round(height * scale)), max(1, round(width * scale))]
