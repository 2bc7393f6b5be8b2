"""The commands that print a table: alphas, costs, a model's score; and what a data set holds.

Each imports what it needs when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional, UseAppendAction

from ..checks import Count, Seed
from ..errors import LabError
from ..files import DRAWN, TABLES, at_home, keep, writable

if TYPE_CHECKING:
    import pandas as pd


class TableCommand:
    """A command whose table is printed and, where ``--out`` names a place, written there."""

    out: Path | None

    def table(self) -> pd.DataFrame:
        """Print what there is to read and return what is to be written."""
        raise NotImplementedError

    def __call__(self) -> int:
        from ..records import save_table

        if self.out:  # refused before the work
            writable(self.out, "--out", TABLES)
        table = self.table()
        if self.out:
            print(f"table: {keep(self.out, partial(save_table, table))}")
        return 0


@dataclass
class AlphaCommand(TableCommand):
    """Fit a power law to the weight spectrum of every layer: which ones are well trained?"""

    model: Positional[str]
    """"mini", a model of open_clip ("RN50", "ViT-B-16"), or a file of weights."""
    checkpoint: str = ""
    """open_clip tag or file; a CLIP ResNet's default is "openai"."""
    prefix: str = ""
    """Of a file of weights, only the keys below this ("visual.")."""
    reshape: str = "slices"
    """How a weight becomes matrices: slices, flatten or fft."""
    rule: str = "csn"
    """Where the tail begins: csn, mid, peak or peak_official."""
    control: str | None = None
    """Also fit randomised weights: permute or gaussian."""
    bootstrap: Count = 0
    """Replicates for the freeze probability (100 is plenty)."""
    seed: Seed = 0
    exclude: UseAppendAction[tuple[str, ...]] = ()
    """Leave out a layer or all below a name ("attnpool", as the notebooks do); repeat for more."""
    compare: str | None = None
    """"authors": their published selection on RN50 beside slices + peak_official, their choice."""
    out: Path | None = None
    """Write the table as CSV."""

    def __call__(self) -> int:
        from ..alpha import compare_authors, layer_alphas

        if self.compare not in (None, "authors"):
            raise LabError(f"--compare {self.compare} is unknown; the one choice is authors")
        code = super().__call__()
        if self.compare:  # which may fail, when the table is written
            print(compare_authors(layer_alphas(self._weights(), "slices", "peak_official")))
        return code

    def table(self) -> pd.DataFrame:
        from tqdm.auto import tqdm

        from ..alpha import layer_alphas

        table = layer_alphas(
            self._weights(), self.reshape, self.rule, self.control, self.bootstrap, self.seed,
            self.exclude, progress=tqdm,
        )  # fmt: skip
        print(table.drop(columns=["reshape", "rule"]).to_string(index=False, float_format="%.4g"))
        fitted, left_out = int(table["alpha"].notna().sum()), ", ".join(self.exclude)
        without = f" (without {left_out})" if left_out else ""
        median = f"median alpha over these {fitted}: {table['alpha'].median():.4f}"
        print(f"{fitted} of {len(table)} layers{without} fitted, {median}")
        return table

    def _weights(self):
        """A CLIP ResNet's image tower, or the bare state dict of anything else: no model built."""
        import open_clip

        from ..clip import RESNETS, fetch, load_backbone
        from ..files import read_state_dict

        file, prefix = at_home(self.model), self.prefix
        if file.is_file():
            if self.checkpoint:
                raise LabError(f"{file} is a file already; --checkpoint goes with a model's name")
            return read_state_dict(file, prefix, jit=True)
        others = set(open_clip.list_models()) - RESNETS.keys()
        if self.model not in others:  # a ResNet, the mini, or an error that lists them
            if prefix:
                raise LabError(f"--prefix goes with a file of weights, not with {self.model}")
            return load_backbone(self.model, self.checkpoint, "cpu").visual
        known = open_clip.pretrained.get_pretrained_cfg(self.model, self.checkpoint)
        file = at_home(self.checkpoint)
        if not known and not file.is_file():
            tags = open_clip.list_pretrained_tags_by_model(self.model)
            raise LabError(
                f"--checkpoint {self.checkpoint!r} is no file and no tag of {self.model}; "
                f"its tags are {', '.join(tags)}"
            )
        file = fetch(self.model, self.checkpoint, known) if known else file
        return read_state_dict(file, prefix or "visual.", jit=True)


@dataclass
class CostCommand(TableCommand):
    """Parameters and MACs of a framework, the paper's way and counted evenly; no weights needed."""

    framework: str = "deeplabv3"
    """A key of the frameworks: deeplabv3, han, fcclip."""
    size: str | None = None
    """Height x width of the picture (default: the paper's, 800x1216, in training 512x512)."""
    mask: Path | None = None
    """Count the weights that survive in this mask."""
    backbone: str = "RN50"
    preset: str = "paper"
    training: bool = False
    """The cost of a whole fine-tuning, by selection of frozen layers."""
    out: Path | None = None
    """Write the table as CSV."""

    def table(self) -> pd.DataFrame:
        from ..costs import SIZE, TRAINING_SIZE, cost, training_cost
        from ..masks import Mask

        mask = Mask.load(self.mask) if self.mask else None
        about = {"mask": mask, "backbone": self.backbone, "preset": self.preset}
        if self.training:
            table = training_cost(self.framework, self.size or TRAINING_SIZE, **about)
        else:
            table = cost(self.framework, self.size or SIZE, **about)
        shown = table.copy()
        for column in shown.columns.intersection(["macs", "sparse_macs"]):
            shown[column] = (shown[column].astype(float) / 1e9).round(3)
        units = {"macs": "GMACs", "sparse_macs": "sparse_GMACs"}
        print(shown.rename(columns=units).to_string(index=False, na_rep="", float_format="%.6g"))
        print("1 FLOP = 1 MAC. 'paper' is reconstructed; residual = total - printed.")
        return table


@dataclass
class EvaluateCommand(TableCommand):
    """mIoU of a trained model on any data set: train on one, measure on all seven."""

    model: Positional[Path]
    """Folder of a trained model (runs/stages/segment/<key>)."""
    dataset: str = "scenes"
    """coco, cityscapes, ade150, ade847, voc20, voc21, pc59, pc459, folder or scenes."""
    root: Path | None = None
    """The data set's folder (default: OPENTRANS_DATA or DETECTRON2_DATASETS)."""
    split: str = "val"
    size: int = 0
    """Shorter side in pixels (0: as on disk)."""
    window: int = 0
    """Side of a sliding window (0: whole pictures)."""
    images: int = 0
    """The first n images only (0: all)."""
    batch_size: int = 4
    on_error: Literal["raise", "skip"] = "raise"
    """Stop at an image that cannot be read, or leave it out, count and list it."""
    panoptic: bool = False
    """Panoptic quality instead, of a mask framework."""
    checkpoint: Path | None = None
    """The CLIP that the model was made from, if that was a file."""
    out: Path | None = None
    """Write the per-class table as CSV."""
    device: str = "auto"

    def table(self) -> pd.DataFrame:
        from ..evaluation import measure

        found = measure(**{name: value for name, value in vars(self).items() if name != "out"})
        print(found)
        return found.table


@dataclass
class DataCommand:
    """Open every file of a data set: what is there, what is missing, broken or out of range."""

    action: Positional[Literal["check"]]
    """What to do."""
    dataset: Positional[str]
    """coco, cityscapes, ade150, ade847, voc20, voc21, pc59, pc459 or folder."""
    root: Path | None = None
    """Its folder, or the one around it (default: OPENTRANS_DATA or DETECTRON2_DATASETS)."""
    split: str = "val"
    picture: Path | None = None
    """Save an overlay of the first four images here (default: data_<dataset>_<split>.png)."""

    def __call__(self) -> int:
        from ..evaluation import check

        picture = self.picture or Path(f"data_{self.dataset}_{self.split}.png")
        writable(picture, "--picture", DRAWN)
        found = check(self.dataset, self.split, self.root)
        print(found)
        if found.images:
            print(f"  overlay            {keep(picture, found.save_overlay)}")
        return 0 if found.fine else 1
