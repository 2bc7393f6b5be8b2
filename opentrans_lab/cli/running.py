"""The commands that run notebooks: one, a grid, a campaign; what they will cost and have found.

Each imports what it needs when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, UseAppendAction, arg

from ..checks import Factor
from ..errors import LabError
from .tables import TableCommand

if TYPE_CHECKING:
    import pandas as pd

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
class PlanCommand(TableCommand):
    """What a grid will cost before it runs: device hours, peak memory and disk, run by run."""

    grid: Positional[Path]
    """Such as notebooks/grids/paper.yaml; what has finished is not counted."""
    images_per_second: Factor = 0.0
    """Training pictures that one device does in a second, with the grid's first framework; 0
    measures it here."""
    out: Path | None = None
    """Write the table as CSV."""

    def table(self) -> pd.DataFrame:
        from .. import runs

        speed, how = self.images_per_second, "as given"
        jobs = runs.load_grid(self.grid)
        work = runs.reference(jobs)
        if not speed:
            speed, how = runs.measured(work)
        macs = runs.step_macs(work)
        rate = speed * macs
        table = runs.plan(jobs, rate)
        print(runs.describe_plan(table))
        about = f"{work.recipe.framework}, {work.lab.backbone}, {work.lab.size} px"
        print(
            "assumptions:\n"
            f"  {speed:.4g} training pictures a second, {how}, for {about}: "
            f"{macs / 1e9:.4g} GMACs a picture, {rate / 1e12:.4g} TMACs a second.\n"
            "  All else takes its MACs at that rate."
        )
        print("\n".join(f"  {line}" for line in runs.ASSUMPTIONS))
        return table


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
    to results/<table>/<framework>/seed-<n>, and listed in results/README.md.
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


def _one_of(workers: int, scheduler: str) -> None:
    if workers > 1 and scheduler:
        raise LabError("--scheduler brings its own workers; leave --workers out")


def _exit_code(results: list) -> int:
    failed = [result for result in results if result.status == "failed"]
    return 0 if not failed else 2 if all(result.users for result in failed) else 1
