"""``opentrans-lab``: thin commands over the library. Exit code 0, 1 (a run failed), 2 (mend this).

Each command imports what it needs when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import (
    FlagCreatePairsOff,
    OmitArgPrefixes,
    OmitSubcommandPrefixes,
    Positional,
    UseAppendAction,
    arg,
)
from tyro.conf import subcommand as named

from . import __version__
from .errors import LabError

Parameters = UseAppendAction[tuple[tuple[str, str], ...]]


@dataclass
class RunCommand:
    """Run a notebook (.ipynb) or a grid of them (.yaml); finished runs are not run again."""

    target: Positional[Path]
    """Such as notebooks/03_transfer.ipynb or notebooks/grids/demo.yaml."""
    parameters: Annotated[
        Parameters, arg(name="parameter", aliases=["-p"], metavar="NAME VALUE")
    ] = ()
    """A parameter of the notebook; repeat for more."""
    force: bool = False
    """Also what has finished before; old results go when the new ones are complete."""
    workers: int = 1
    """Of a grid, runs at a time on this machine; they share its GPUs, or its cores."""
    scheduler: str = ""
    """Run a grid on the workers of this dask scheduler ("tcp://…") instead."""

    def __call__(self) -> int:
        from .batch import outcome, run_grid, run_notebook
        from .grids import load_grid

        if self.target.suffix in (".yaml", ".yml"):
            if self.parameters:
                raise LabError(f"-p goes with a notebook; write parameters into {self.target}")
            jobs = load_grid(self.target)
            return _exit_code(
                run_grid(jobs, self.force, workers=self.workers, scheduler=self.scheduler)
            )
        if self.workers > 1 or self.scheduler:
            raise LabError(f"--workers and --scheduler go with a grid, not with {self.target}")
        result = run_notebook(self.target, dict(self.parameters), self.force)
        if result.users:
            raise LabError(result.error)
        print(f"{self.target.stem}: {outcome(result)}\n{result.folder}")
        return _exit_code([result])


@dataclass
class ReportCommand:
    """Write one static HTML site from all runs; needs no network to be read."""

    out: Path | None = None
    """Folder of the site (default: report in the folder of runs)."""

    def __call__(self) -> int:
        from .report import build_report

        print(f"report: {build_report(self.out)}")
        return 0


@dataclass
class CampaignCommand:
    """Run a large grid in slices: stops cleanly when time is up, and goes on the next time.

    What has finished is also copied, without notebooks and weights, to results/<revision>.
    """

    minutes: float = 60.0
    """After this, training stops at its next step with a checkpoint."""
    grid: Path = Path("notebooks/grids/campaign.yaml")
    """What to run, in the order of importance."""
    workers: int = 1
    """Runs at a time on this machine; they share its GPUs, or its cores."""
    scheduler: str = ""
    """Run on the workers of this dask scheduler ("tcp://…") instead."""

    def __call__(self) -> int:
        from .batch import run_grid, run_notebook
        from .grids import load_grid
        from .report import build_report
        from .results import publish

        done = run_grid(
            load_grid(self.grid),
            deadline=self.minutes,
            workers=self.workers,
            scheduler=self.scheduler,
        )
        code = _exit_code(done)
        if finished := [r.folder for r in done if r.status in ("ok", "finished before")]:
            print(f"published: {publish(finished)}")
        tables = self.grid.parent.parent / "05_paper_tables.ipynb"
        if tables.is_file():  # it reads the other runs, so what it said before is out of date
            code = max(code, _exit_code([run_notebook(tables, force=True)]))
        print(f"report: {build_report()}")
        return code


@dataclass
class AlphaCommand:
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
    bootstrap: int = 0
    """Replicates for the freeze probability (100 is plenty)."""
    seed: int = 0
    exclude: UseAppendAction[tuple[str, ...]] = ()
    """Leave out a layer or all below a name ("attnpool", as the notebooks do); repeat for more."""
    compare: str | None = None
    """"authors": their published selection on RN50 beside slices + peak_official, their choice."""
    out: Path | None = None
    """Write the table as CSV."""

    def __call__(self) -> int:
        from tqdm.auto import tqdm

        from .alpha import compare_authors, layer_alphas
        from .results import atomic_path

        if self.compare not in (None, "authors"):
            raise LabError(f"--compare {self.compare} is unknown; the one choice is authors")
        if self.out and self.out.is_dir():
            raise LabError(f"--out {self.out} is a folder; name a file in it")
        weights = self._weights()
        table = layer_alphas(
            weights,
            self.reshape,
            self.rule,
            self.control,
            self.bootstrap,
            self.seed,
            self.exclude,
            progress=tqdm,
        )
        print(table.drop(columns=["reshape", "rule"]).to_string(index=False, float_format="%.4g"))
        fitted, left_out = int(table["alpha"].notna().sum()), ", ".join(self.exclude)
        without = f" (without {left_out})" if left_out else ""
        median = f"median alpha over these {fitted}: {table['alpha'].median():.4f}"
        print(f"{fitted} of {len(table)} layers{without} fitted, {median}")
        if self.out:
            with atomic_path(self.out) as path:
                table.to_csv(path, index=False)
            print(f"table: {self.out}")
        if self.compare:
            print(compare_authors(layer_alphas(weights, "slices", "peak_official")))
        return 0

    def _weights(self):
        """A CLIP ResNet's image tower, or the bare state dict of anything else: no model built."""
        import open_clip

        from .backbone import RESNETS, load_backbone
        from .statedict import read_state_dict
        from .weights import fetch

        file, prefix = Path(self.model).expanduser(), self.prefix
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
        file = Path(self.checkpoint).expanduser()
        if not known and not file.is_file():
            tags = open_clip.list_pretrained_tags_by_model(self.model)
            raise LabError(
                f"--checkpoint {self.checkpoint!r} is no file and no tag of {self.model}; "
                f"its tags are {', '.join(tags)}"
            )
        file = fetch(self.model, self.checkpoint, known) if known else file
        return read_state_dict(file, prefix or "visual.", jit=True)


@dataclass
class CostCommand:
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

    def __call__(self) -> int:
        from .cost import SIZE, TRAINING_SIZE, cost, training_cost
        from .masks import Mask
        from .results import atomic_path

        mask = Mask.load(self.mask) if self.mask else None
        about = dict(mask=mask, backbone=self.backbone, preset=self.preset)
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
        if self.out:
            with atomic_path(self.out) as path:
                table.to_csv(path, index=False)
            print(f"table: {self.out}")
        return 0


@dataclass
class MaskInfo:
    """Density, origin and every layer of a mask."""

    mask: Positional[Path]
    """Of this lab (.safetensors) or the authors' (.pth)."""

    def __call__(self) -> int:
        from .maskfiles import describe

        print(describe(self.mask))
        return 0


@dataclass
class MaskApply:
    """Set a checkpoint's pruned weights to 0 and write it as safetensors."""

    mask: Positional[Path]
    """Of this lab (.safetensors) or the authors' (.pth)."""
    checkpoint: Positional[Path]
    """State dict that holds the CLIP tower, anywhere."""
    out: Path
    """Where to write."""
    prefix: str | None = None
    """Of the tower ("backbone.clip_model.visual."); found by itself when left out."""
    partial: bool = False
    """Go on if only some of the mask's tensors are there."""
    compact: bool = False
    """One bit a zero: a pruned tower becomes about a sixth, a whole CLIP, whose text tower stays
    dense, shrinks by a fifth; this lab reads it like any other file."""
    force: bool = False
    """Overwrite."""

    def __call__(self) -> int:
        from .maskfiles import apply_to_file

        print(apply_to_file(self.mask, self.checkpoint, self.out, self.prefix, self.partial,
                            self.compact, self.force))  # fmt: skip
        return 0


@dataclass
class MaskConvert:
    """The authors' masks to this lab's form, or back."""

    mask: Positional[Path]
    """Of this lab (.safetensors) or the authors' (.pth)."""
    out: Positional[Path]
    """Its ending says which form."""
    checkpoint: Path | None = None
    """The tower's weights, which the authors' form holds, too."""
    force: bool = False
    """Overwrite."""

    def __call__(self) -> int:
        from .maskfiles import convert

        print(convert(self.mask, self.out, self.checkpoint, self.force))
        return 0


MaskAction = (
    Annotated[MaskInfo, named("info")]
    | Annotated[MaskApply, named("apply")]
    | Annotated[MaskConvert, named("convert")]
)


@dataclass
class MaskCommand:
    """Masks in files: what one is, put it into a checkpoint, exchange it with the authors' code."""

    action: MaskAction

    def __call__(self) -> int:
        return self.action()


@dataclass
class EvaluateCommand:
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

    def __call__(self) -> int:
        from .measure import measure

        print(measure(**vars(self)))
        return 0


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
        from .datacheck import check

        picture = self.picture or Path(f"data_{self.dataset}_{self.split}.png")
        try:
            found = check(self.dataset, self.split, self.root, picture)
        except LabError as error:
            print(f"opentrans-lab: {error}", file=sys.stderr)
            return 1
        print(found)
        if found.images:
            print(f"  overlay            {picture}")
        return 0 if found.fine else 1


@dataclass
class MiniClipCommand:
    """Train the mini CLIP from scratch on procedural scenes; resumes where it stopped."""

    steps: int | None = None
    """Optimiser steps (default: as many as the shipped weights have seen)."""
    out: Path = Path("runs/mini_clip")
    """Folder for checkpoints, weights, configuration and card."""
    device: str = "auto"
    """A torch device."""

    def __call__(self) -> int:
        from .mini_clip import MiniConfig, train_mini

        config = MiniConfig() if self.steps is None else MiniConfig(steps=self.steps)
        print(f"mini CLIP: {train_mini(config, out=self.out, device=self.device)}")
        return 0


Command = (
    Annotated[RunCommand, named("run")]
    | Annotated[ReportCommand, named("report")]
    | Annotated[AlphaCommand, named("alpha")]
    | Annotated[CostCommand, named("cost")]
    | Annotated[MaskCommand, named("mask")]
    | Annotated[DataCommand, named("data")]
    | Annotated[EvaluateCommand, named("evaluate")]
    | Annotated[CampaignCommand, named("campaign")]
    | Annotated[MiniClipCommand, named("mini-clip")]
)


def _exit_code(results: list) -> int:
    failed = [result for result in results if result.status == "failed"]
    return 0 if not failed else 2 if all(result.users for result in failed) else 1


def main(args: list[str] | None = None) -> None:
    """Entry point; ``args`` replaces the command line."""
    args = sys.argv[1:] if args is None else args
    if args == ["--version"]:
        print(f"opentrans-lab {__version__}")
        return
    command = tyro.cli(
        FlagCreatePairsOff[OmitArgPrefixes[OmitSubcommandPrefixes[Command]]],
        prog="opentrans-lab",
        description="Transferable and principled efficiency for open-vocabulary segmentation."
        f" Version {__version__}.",
        args=args,
    )
    try:
        code = command()
    except LabError as error:
        print(f"opentrans-lab: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("opentrans-lab: stopped; finished runs are kept", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
