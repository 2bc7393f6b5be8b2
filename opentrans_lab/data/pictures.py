"""Pictures and labels as cameras and tools write them: one reading for all who look at them.

A picture is what a viewer shows: upright, in colour, 8 bit. A label is what was stored: ids, not
the colours of a palette. Both are the same pixels: see :func:`aligned`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..errors import LabError
from .transforms import GREY

TURN = ExifTags.Base.Orientation
STRETCHED = {"L;2": 85, "L;4": 17}  # what Pillow multiplies grey of 2 and 4 bits with


class Picture(NamedTuple):
    """A picture as a viewer shows it."""

    pixels: np.ndarray  # (H, W, 3) uint8
    turn: int  # EXIF's 1 to 8: how the stored pixels were turned for that, 1 is not at all


def read_picture(source: Path | Image.Image) -> Picture:
    """A picture, turned as its EXIF says; of several frames or pages the first.

    16 bits are rounded to 8, which is what networks are trained on, and what is transparent lies
    over grey.

    Raises:
        LabError: missing, broken or too large, or numbers of which nobody knows which is white.
    """
    with _opened(source) as image:
        image, turn = _upright(image)
        if image.mode.startswith(("I", "F")):  # Pillow would cut 16 bits off at 255
            image = Image.fromarray(_in_8_bits(np.asarray(image), image.mode, _name(source)))
        if image.has_transparency_data:
            ground = Image.new("RGBA", image.size, (GREY, GREY, GREY, 255))
            image = Image.alpha_composite(ground, image.convert("RGBA"))
        return Picture(np.array(image.convert("RGB")), turn)


def _in_8_bits(values: np.ndarray, mode: str, name: str) -> np.ndarray:
    """Grey values (H, W) of more than 8 bits as uint8."""
    if mode == "I" and values.size and 0 <= values.min() and values.max() <= 255:
        return values.astype(np.uint8)  # 32 bits that hold 8
    if mode == "F" or values.size and not 0 <= values.min() <= values.max() <= 65535:
        kind = "floats" if mode == "F" else "integers"
        raise LabError(
            f"{name} is a picture of 32-bit {kind}, which says nothing of its range; save it in 8 "
            "or 16 bits, or give segment a (3, H, W) tensor in [0, 1]"
        )
    return np.rint(values / 257).astype(np.uint8)


def read_label(path: Path) -> np.ndarray:
    """The ids (H, W) of a label, as numpy has its bits: 1 to 8 as uint8, 16 as uint16.

    A palette gives its indices, 1 bit 0 and 1. An EXIF turn of the label's own is carried out.

    Raises:
        LabError: not to be decoded, colours, several frames, or partly transparent.
    """
    with _opened(path) as image:
        tile = _lossless(_single(image, path), path).tile  # some formats have none
        args = tile[0].args if tile else ""
        stretch = STRETCHED.get(args if isinstance(args, str) else args[0], 1)
        image, _ = _upright(image)
    if image.mode == "LA":
        image, alpha = image.split()
        if alpha.getextrema()[0] < 255:
            raise LabError(f"{path} is partly transparent, which is no class; save it without that")
    values = np.asarray(image)
    if values.ndim != 2:
        raise LabError(
            f"{path} is a colour picture ({image.mode}); labels have one channel of class ids: "
            "save it as grey of 8 or 16 bit, or with a palette"
        )
    values = values.astype(np.uint8) if values.dtype == bool else values
    return values // stretch if stretch > 1 else values


def read_colours(path: Path) -> np.ndarray:
    """Red, green and blue (H, W, 3) int32 of a label that codes its ids in them.

    Raises:
        LabError: not to be decoded, or no RGB picture.
    """
    with _opened(path) as image:
        image, _ = _upright(_lossless(_single(image, path), path))
    if image.mode != "RGB":
        raise LabError(f"{path} has mode {image.mode}; labels of this data set are RGB pictures")
    return np.asarray(image).astype(np.int32)


def _lossless(image: Image.Image, path: Path) -> Image.Image:
    if image.format in ("JPEG", "MPO"):  # whatever its name says
        raise LabError(f"{path} is a JPEG, which blurs ids into others; save the label as PNG anew")
    return image


def aligned(label: np.ndarray, path: Path, picture: Picture, of: Path) -> np.ndarray:
    """A label (H, W) int32 on its upright picture, however it was drawn.

    One whose size is the upright picture's was drawn on that, as viewers and labelling tools show
    it. One that only fits the picture as stored was drawn on that, and is turned as the picture
    was, unless an EXIF turn of its own has said otherwise. So where both fit (turns by 180
    degrees, mirrored and square pictures), the label counts as drawn on the upright picture.

    Raises:
        LabError: the sizes differ.
    """
    if label.shape == picture.pixels.shape[:2]:
        return label
    if label.shape[::-1] == picture.pixels.shape[:2] and picture.turn > 4 and not _turns(path):
        image = Image.fromarray(label)
        image.getexif()[TURN] = picture.turn
        return np.array(ImageOps.exif_transpose(image))
    sizes = " and ".join(f"{w}x{h}" for h, w in (label.shape, picture.pixels.shape[:2]))
    raise LabError(f"{path} and {of} differ in size ({sizes}); they must be one picture")


def _turns(label: Path) -> bool:
    """Whether a label file asks for a turn itself; Matlab's cannot."""
    if label.suffix == ".mat":
        return False
    with _opened(label) as image:
        return _upright(image)[1] > 1


@contextmanager
def _opened(source: Path | Image.Image) -> Iterator[Image.Image]:
    """An image whose decoding, if it fails meanwhile, is told in one sentence."""
    name = _name(source)
    try:
        opened = nullcontext(source) if isinstance(source, Image.Image) else Image.open(source)
        with opened as image:
            yield image
    except LabError:
        raise
    except FileNotFoundError:
        raise LabError(f"{name} is missing; restore the file") from None
    except Image.DecompressionBombError as error:
        raise LabError(f"{name} is too large to be decoded ({error}); reduce or cut it") from error
    except Exception as error:  # Pillow's decoders raise many kinds on a broken file
        raise LabError(f"{name} cannot be decoded ({error}); restore the file") from error


def _name(source: Path | Image.Image) -> str:
    named = getattr(source, "filename", "") if isinstance(source, Image.Image) else source
    return str(named or "the picture")


def _upright(image: Image.Image) -> tuple[Image.Image, int]:
    """The image decoded and turned, and how it was (1 to 8)."""
    turn = getattr(image, "tag_v2", {}).get(TURN)  # Pillow turns a TIFF while it loads …
    if turn:
        image.filename = ""  # … which goes wrong where it maps the file to memory (Pillow 13.0)
    image.load()
    try:
        turn = turn or image.getexif().get(TURN)
    except Exception:  # a broken EXIF block says nothing, but the picture is whole
        turn = 1
    turn = turn if turn in range(2, 9) else 1
    return image if turn == 1 else ImageOps.exif_transpose(image), turn


def _single(image: Image.Image, path: Path) -> Image.Image:
    if getattr(image, "n_frames", 1) > 1:
        raise LabError(f"{path} has {image.n_frames} frames; a label is one: save it alone")
    return image
