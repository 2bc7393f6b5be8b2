"""A large grid in slices of time: what is missing most runs next, and what has run is published.

All of its state is the folder of runs, which can be carried to another machine.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..checks import Duration, Positive, checked
from ..files import looking_once, writable_folder
from ..records import described, identity, load, records, results_root
from ..report import build_report, duration, experiment
from .batch import run_grid, run_notebook
from .grids import Job, find_notebook, load_grid
from .job import RunResult
from .plan import past_speed, plan
from .published import INDEX, places, publish

TABLES = "05_paper_tables"


@looking_once()
def missing_first(jobs: Sequence[Job]) -> list[Job]:
    """``jobs`` by how many seeds their experiment has: those with the fewest first.

    Seeds count that have run here or are published; where there are equally many, the order of the
    grid decides. What is published runs again only when nothing else is left, and what has finished
    here goes last.
    """
    there = [(record["notebook"], described(record)) for _, record in records()]
    known = {(name, experiment(params)) for name, params in there}
    seeds = Counter((name, experiment(params, seedless=True)) for name, params in there)
    ranks = []
    for job in jobs:
        name, params = job.notebook.stem, identity(job.full)
        which = (name, experiment(params, seedless=True))
        again = (name, experiment(params)) in known
        here = again and load(job.folder) is not None
        ranks.append((job.after_all, here, again, seeds[which]))
        seeds[which] += not again
    return [job for _, job in sorted(zip(ranks, jobs, strict=True), key=lambda pair: pair[0])]


@looking_once()
def outlook(jobs: Sequence[Job]) -> str:
    """How much of ``jobs`` is done or published, and how long one device takes for the rest."""
    there = {(record["notebook"], experiment(described(record))) for _, record in records()}
    own = [job for job in jobs if load(job.folder) is not None]
    left = [job for job in jobs if (job.notebook.stem, experiment(identity(job.full))) not in there]
    told = f"campaign: {len(own)} of {len(jobs)} runs finished"
    if others := len(jobs) - len(own) - len(left):
        told += f", {others} more published"
    if not left:
        return told
    speed = past_speed(jobs)
    if math.isnan(speed):
        return f"{told}; how long the others take can be told after the first"
    seconds = 3600 * plan(left, speed)["hours"].sum()
    return f"{told}; the others take one device about {duration(seconds)} at the speed so far"


@checked
def campaign(
    grid: Path, minutes: Duration, workers: Positive = 1, scheduler: str = ""
) -> tuple[list[RunResult], Path]:
    """Run ``grid`` for some minutes, publish what has finished, and write the tables and report.

    Args:
        workers, scheduler: as for ``batch.run_grid``.

    Returns:
        how each job ended, and the report's page.

    Raises:
        LabError: as ``batch.run_grid``.
    """
    remedy = "set the variable OPENTRANS_RESULTS to a folder that can"
    writable_folder(results_root(), "the folder of published runs", remedy)
    jobs = load_grid(grid)
    print(outlook(jobs))
    done = run_grid(missing_first(jobs), False, minutes, workers, scheduler)
    if folders := publish(places(jobs)):
        print(f"published: {len(folders)} runs, listed in {results_root() / INDEX}")
    # It reads the other runs, so what it said before is out of date.
    done.append(run_notebook(find_notebook(TABLES, grid), force=True))
    print(outlook(jobs))
    return done, build_report()
