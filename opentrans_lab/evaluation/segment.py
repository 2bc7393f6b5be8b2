"""One picture, any names: ``segment("photo.jpg", ["zebra", "grass", "sky"])``."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from ..checks import choose
from ..clip import ClassNames, checked_names, load_backbone
from ..data import pictures
from ..device import float32, pick
from ..errors import LabError
from ..figures import compare, overlay
from ..files import at_home, read_state_dict
from ..heads import FRAMEWORKS, build
from ..records import runs_root
from .evaluate import evaluating, predict

LEAST = 32  # pixels a side: the trunk's stride


@dataclass(frozen=True)
class Segmentation:
    """A labelled picture."""

    image: Tensor = field(repr=False)  # (3, H, W) float32 in [0, 1]
    labels: Tensor = field(repr=False)  # (H, W) int64, an index into names
    coarse: Tensor = field(repr=False)  # (C, h, w) float32 on the CPU, as the model gives them
    names: tuple[str, ...]  # one a class, its first where it has several
    model: str  # where the weights are from

    @property
    def scores(self) -> Tensor:
        """Of each class at the picture's own size (C, H, W), float32: as large as that is."""
        size = tuple(self.labels.shape)
        return F.interpolate(self.coarse[None], size, mode="bilinear", align_corners=False)[0]

    @property
    def overlay(self) -> Image.Image:
        """The picture under its colours; a class has the same colour in every picture."""
        mixed = overlay(self.image, self.labels, self.names)
        return Image.fromarray((255 * mixed).round().astype(np.uint8))

    @property
    def figure(self) -> Figure:
        """Picture and overlay side by side, with a legend."""
        return compare([self.image], {"prediction": [self.labels]}, self.names)

    @property
    def shares(self) -> dict[str, float]:
        """Fraction of the pixels a class covers, largest first."""
        counts = torch.bincount(self.labels.flatten(), minlength=len(self.names)).double()
        counts /= counts.sum()
        order = counts.argsort(descending=True).tolist()
        return {self.names[i]: float(counts[i]) for i in order if counts[i] > 0}


@float32()
def segment(
    image: str | Path | Image.Image | Tensor | np.ndarray,
    class_names: ClassNames,
    framework: str = "deeplabv3",
    model: nn.Module | str | Path | None = None,
    size: int | None = None,
    device: str | torch.device = "auto",
) -> Segmentation:
    """Label every pixel of a picture with one of the names given.

    Args:
        image: a file (turned as its EXIF says; grey, 16-bit and transparent ones, too), a PIL
            image, (H, W, 3) bytes as an array, or a (3, H, W) float tensor in [0, 1].
        class_names: any names; a class may also be several names of one thing,
            ``["zebra", ("grass", "meadow")]``, of which the best counts.
        framework: key of ``FRAMEWORKS``.
        model: a module of ``frameworks.build``, or the folder of a trained one
            (``runs/stages/segment/<key>``). Default: the newest of this framework.
            A module is as it was afterwards, but on ``device``.
        size: the shorter side in pixels for the model, such as the one it was trained at; the
            result always has the picture's own size. Default: a trained folder's size; for a
            module, the picture's.

    Raises:
        LabError: no names, an empty one or two that CLIP reads alike, an unknown framework, an
            unreadable or too small picture, or no trained model.
    """
    class_names = list(class_names) if isinstance(class_names, Iterator) else class_names
    names = checked_names(class_names)
    choose("framework", framework, FRAMEWORKS)
    picture = read_picture(image)
    where, source = pick(device), type(model).__name__
    if not isinstance(model, nn.Module):
        folder = at_home(model) if model else newest(framework)
        model, trained = open_model(folder, where)
        size, source = size or trained, str(folder)
    with evaluating(model, where):
        scores = model.scores(fitted(picture, size)[None].to(where), class_names)[0].float()
        # A few classes at a time: vocabularies can be long.
        labels = predict(scores, tuple(picture.shape[1:]))
    return Segmentation(picture, labels.cpu(), scores.cpu(), names, source)


def read_picture(image: str | Path | Image.Image | Tensor | np.ndarray) -> Tensor:
    """A picture as (3, H, W) float32 in [0, 1]: as ``pictures.read_picture`` shows it.

    Raises:
        LabError: unreadable, of another shape or range, or without a pixel of size.
    """
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise LabError(
                f"a picture as tensor is (3, H, W) floats in [0, 1], got {tuple(image.shape)} "
                f"{image.dtype}; divide bytes by 255"
            )
        pixels = image.detach().float().cpu()
        if pixels.numel() and not (pixels.min() >= -1e-3 and pixels.max() <= 1 + 1e-3):
            raise LabError(
                f"a picture as tensor lies in [0, 1], this one from {pixels.min():.3g} to "
                f"{pixels.max():.3g}; divide bytes by 255"
            )
    else:
        if isinstance(image, np.ndarray):
            image = _from_array(image)
        if not isinstance(image, Image.Image):
            path = at_home(image)
            if not path.is_file():
                raise LabError(f"there is no picture {path}")
            image = path
        rgb = pictures.read_picture(image).pixels
        pixels = torch.from_numpy(rgb).permute(2, 0, 1).float() / 255
    if not min(pixels.shape[1:]):
        raise LabError(f"the picture has no pixels: {tuple(pixels.shape)}")
    return pixels


def fitted(picture: Tensor, size: int | None = None) -> Tensor:
    """A picture (3, H, W) in [0, 1] as a model gets it: its shorter side ``size``, 32 at least."""
    h, w = picture.shape[1:]
    scale = max((size or min(h, w)) / min(h, w), LEAST / min(h, w))
    shape = [round(h * scale), round(w * scale)]
    return F.interpolate(picture[None], shape, mode="bilinear", antialias=True)[0].clamp(0, 1)


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2:]
    if array.dtype != np.uint8 or array.ndim < 2 or channels not in ((), (3,), (4,)):
        raise LabError(
            f"a picture as array is (H, W), (H, W, 3) or (H, W, 4) bytes, got {array.shape} "
            f"{array.dtype}; floats go in as a (3, H, W) tensor in [0, 1]"
        )
    return Image.fromarray(array)


def newest(framework: str) -> Path:
    """Folder of the model of this framework that was trained last.

    Raises:
        LabError: none was.
    """
    stages = runs_root() / "stages" / "segment"
    done = sorted(stages.glob("[!.]*/result.json"), key=lambda p: p.stat().st_mtime)
    for path in reversed(done):
        if json.loads(path.read_bytes())["parameters"]["framework"] == framework:
            return path.parent
    raise LabError(
        f"no trained model of {framework!r} under {runs_root()}; train one, for instance with "
        f"`opentrans-lab run notebooks/03_transfer.ipynb -p framework {framework} -p rows dense`, "
        "or give one in model="
    )


def open_model(
    folder: Path, device: torch.device, checkpoint: str | Path | None = None
) -> tuple[nn.Module, int]:
    """(the trained model in a stage's folder, the size of its training pictures).

    Args:
        checkpoint: the CLIP it was made from, for its text tower, where that was a file.

    Raises:
        LabError: not the folder of a trained model.
    """
    try:
        about = json.loads((folder / "result.json").read_bytes())["parameters"]
    except (OSError, ValueError, KeyError) as error:
        raise LabError(f"{folder} holds no trained model ({error})") from error
    state = read_state_dict(folder / "model.safetensors")
    clip = load_backbone(about["backbone"], checkpoint or _weights(about), device)
    model = build(about["framework"], clip, about["preset"])
    model.load_state_dict(state)
    return model, about["size"]


def _weights(about: dict) -> str:
    """Where the text tower is: a stage remembers a tag, but a file only by its content."""
    tag = about["checkpoint"]
    if about["backbone"] == "mini":
        return ""
    if len(tag) == 64:
        raise LabError(
            f"this model's {about['backbone']} was read from a file: name it in checkpoint= of "
            "open_model (--checkpoint), and give segment the module in model="
        )
    return tag
