"""``opentrans-lab``: thin commands over the library. Exit code 0, 1 (a run failed), 2 (mend this).

Each command imports what it needs when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated

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

from .. import __version__
from ..checks import Factor, check
from ..errors import LabError
from ..files import at_home
from .commands import (
    AlphaCommand,
    CostCommand,
    DataCommand,
    EvaluateCommand,
    MaskCommand,
    check_out,
    save_out,
)

Parameters = UseAppendAction[tuple[tuple[str, str], ...]]
REPEATED = ("--parameter", "--exclude")  # options that may be given more than once


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
        from ..runs import load_grid, outcome, run_grid, run_notebook

        _one_of(self.workers, self.scheduler)
        if self.target.suffix in (".yaml", ".yml"):
            if self.parameters:
                raise LabError(f"-p goes with a notebook; write parameters into {self.target}")
            jobs = load_grid(self.target)
            return _exit_code(
                run_grid(jobs, self.force, workers=self.workers, scheduler=self.scheduler)
            )
        if self.workers != 1 or self.scheduler:
            raise LabError(f"--workers and --scheduler go with a grid, not with {self.target}")
        names = [name for name, _ in self.parameters]
        if twice := [name for name in names if names.count(name) > 1]:
            raise LabError(f"-p {twice[0]} is there twice; give it once, or write a grid of runs")
        result = run_notebook(self.target, dict(self.parameters), self.force)
        if result.users:
            raise LabError(result.error)
        print(f"{self.target.stem}: {outcome(result)}\n{result.folder}")
        return _exit_code([result])


@dataclass
class PlanCommand:
    """What a grid will cost before it runs: device hours, peak memory and disk, run by run."""

    grid: Positional[Path]
    """Such as notebooks/grids/paper.yaml; what has finished is not counted."""
    images_per_second: Factor = 0.0
    """Training pictures that one device does in a second, with the grid's first framework; 0
    measures it here."""
    out: Path | None = None
    """Write the table as CSV."""

    def __call__(self) -> int:
        from ..runs import (
            ASSUMPTIONS,
            describe_plan,
            load_grid,
            measured,
            plan,
            reference,
            step_macs,
        )

        speed, how = self.images_per_second, "as given"
        check_out(self.out)
        jobs = load_grid(self.grid)
        work = reference(jobs)
        if not speed:
            speed, how = measured(work)
        rate = speed * step_macs(work)
        table = plan(jobs, rate)
        print(describe_plan(table))
        about = f"{work.recipe.framework}, {work.lab.backbone}, {work.lab.size} px"
        print(
            "assumptions:\n"
            f"  {speed:.4g} training pictures a second, {how}, for {about}: "
            f"{step_macs(work) / 1e9:.4g} GMACs a picture, {rate / 1e12:.4g} TMACs a second.\n"
            "  All else takes its MACs at that rate."
        )
        print("\n".join(f"  {line}" for line in ASSUMPTIONS))
        save_out(table, self.out)
        return 0


@dataclass
class ReportCommand:
    """Write one static HTML site from all runs; needs no network to be read."""

    out: Path | None = None
    """Folder of the site (default: report in the folder of runs)."""

    def __call__(self) -> int:
        from ..report import build_report

        print(f"report: {build_report(self.out)}")
        return 0


@dataclass
class CampaignCommand:
    """Run a large grid in slices: stops cleanly when time is up, and goes on the next time.

    What is missing most runs next. What has finished is also copied, without notebooks and weights,
    to results/<revision>.
    """

    minutes: float = 60.0
    """After this, training stops at its next step with a checkpoint; then tables and report are
    written, which takes a minute or two."""
    grid: Path = Path("notebooks/grids/campaign.yaml")
    """What to run, the more important first."""
    workers: int = 1
    """Runs at a time on this machine; they share its GPUs, or its cores."""
    scheduler: str = ""
    """Run on the workers of this dask scheduler ("tcp://…") instead."""

    def __call__(self) -> int:
        from ..runs import campaign

        _one_of(self.workers, self.scheduler)
        done, report = campaign(self.grid, self.minutes, self.workers, self.scheduler)
        print(f"report: {report}")
        return _exit_code(done)


@dataclass
class NotebooksCommand:
    """Copy the lab's notebooks and grids to a folder of yours, for who installed without them."""

    folder: Positional[Path]
    """A new or empty one."""

    def __call__(self) -> int:
        from ..files import copy_shipped

        print(f"notebooks: {copy_shipped('notebooks', self.folder)}; start with 00_index.ipynb")
        return 0


@dataclass
class MiniClipCommand:
    """Train the mini CLIP from scratch on procedural scenes; resumes where it stopped."""

    steps: int | None = None
    """Optimiser steps (default: as many as the shipped weights have seen)."""
    out: Path | None = None
    """Folder for checkpoints, weights, configuration and card (default: mini_clip in the folder of
    runs)."""
    device: str = "auto"
    """A torch device."""

    def __call__(self) -> int:
        from ..experiments import MiniConfig, train_mini

        config = MiniConfig() if self.steps is None else MiniConfig(steps=self.steps)
        print(f"mini CLIP: {train_mini(config, out=self.out, device=self.device)}")
        return 0


Command = (
    Annotated[RunCommand, named("run")]
    | Annotated[PlanCommand, named("plan")]
    | Annotated[ReportCommand, named("report")]
    | Annotated[AlphaCommand, named("alpha")]
    | Annotated[CostCommand, named("cost")]
    | Annotated[MaskCommand, named("mask")]
    | Annotated[DataCommand, named("data")]
    | Annotated[EvaluateCommand, named("evaluate")]
    | Annotated[CampaignCommand, named("campaign")]
    | Annotated[NotebooksCommand, named("notebooks")]
    | Annotated[MiniClipCommand, named("mini-clip")]
)


def _one_of(workers: int, scheduler: str) -> None:
    if workers > 1 and scheduler:
        raise LabError("--scheduler brings its own workers; leave --workers out")


def _expand(command: object) -> None:
    """Put the home folder for ``~`` in a command's paths: no shell does it in ``--out=~/x``."""
    for name, value in vars(command).items():
        if isinstance(value, Path):
            setattr(command, name, at_home(value))
        elif is_dataclass(value):
            _expand(value)


def _once(args: list[str]) -> None:
    options = [arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")]
    for option in set(options).difference(REPEATED):
        if options.count(option) > 1:
            raise LabError(f"{option} is there twice, and only one could count; give it once")


def _exit_code(results: list) -> int:
    failed = [result for result in results if result.status == "failed"]
    return 0 if not failed else 2 if all(result.users for result in failed) else 1


def main(args: list[str] | None = None) -> None:
    """Entry point; ``args`` replaces the command line."""
    args = sys.argv[1:] if args is None else args
    for stream in (sys.stdout, sys.stderr):  # a locale that lacks a letter ends no run
        stream.reconfigure(errors="backslashreplace")
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
        _expand(command)
        _once(args)
        check(command)
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
