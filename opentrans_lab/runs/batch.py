"""Grids of notebooks: in this process one after another, or on the workers of dask.distributed.

A grid goes on when one of its jobs fails, and finished jobs are not run again.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from ..checks import Duration, Positive, checked
from ..files import looking_once
from ..records import load, runs_root, writable_runs
from .grids import Job
from .job import RunResult, run_job
from .workers import run_on_workers


def run_notebook(
    path: Path | str, parameters: dict | None = None, force: bool = False
) -> RunResult:
    """Run one notebook and return its ``RunResult``; a finished run is not run again.

    Args:
        parameters: those that differ from the notebook's; texts are converted.
        force: also a finished run, whose folder is replaced on success.

    Raises:
        LabError: an unknown notebook or parameter.
    """
    return run_job(Job(Path(path), parameters or {}), time.time() if force else None)


@checked
def run_grid(
    jobs: Sequence[Job | tuple[Path, dict]],
    force: bool = False,
    deadline: Duration | None = None,
    workers: Positive = 1,
    scheduler: str = "",
) -> list[RunResult]:
    """Run ``jobs``, say how each went, and go on when one fails.

    Args:
        deadline: minutes after which none is started. Those that are running then stop at their
            next training step with a checkpoint, and go on from there the next time.
        workers: processes on this machine that run a job each; they share its GPUs, or its cores.
        scheduler: address of a dask scheduler ("tcp://…") whose workers run the jobs instead. They
            must see the project and the folder of runs under the same paths.

    Returns:
        one result a job, in the order of ``jobs``; equal jobs are one.

    Raises:
        LabError: an unknown notebook or parameter in any job, or a folder of runs that cannot be
            written, before the first one is run; a scheduler that does not answer.
    """
    once: dict[Path, Job] = {}
    begun = time.time()
    with looking_once():
        for job in (Job(*job) for job in jobs):
            once.setdefault(job.folder, job)
        folders, jobs = list(once), list(once.values())
        done = {i: run_job(jobs[i]) for i, at in enumerate(folders) if not force and load(at)}
    since, until = begun if force else None, None if deadline is None else begun + 60 * deadline
    left = {i: job for i, job in enumerate(jobs) if i not in done}
    if left:
        writable_runs()
    several = workers > 1 or scheduler
    with tqdm(total=len(jobs), desc="runs", disable=None if several else True) as bar:

        def started(i: int, where: str) -> None:
            tqdm.write(f"[{i + 1}/{len(jobs)}] {describe(jobs[i])}{where} …")

        def ended(i: int, result: RunResult) -> None:
            done[i] = result
            tqdm.write(f"[{i + 1}/{len(jobs)}] {describe(jobs[i])}: {outcome(result)}")
            bar.update()

        for i in sorted(done):
            ended(i, done[i])
        if several and left:
            run_on_workers(left, since, until, workers, scheduler, started, ended)
        else:
            for i, job in left.items():
                if until is None or time.time() < until:
                    started(i, "")
                    ended(i, run_job(job, since, until))
    results = [
        done.get(i) or RunResult(job, folders[i], "out of time") for i, job in enumerate(jobs)
    ]
    _summary(results, time.time() - begun)
    return results


def describe(job: Job) -> str:
    """The job in one line: ``03_transfer seed=1``."""
    return " ".join([job.notebook.stem, *(f"{k}={v}" for k, v in job.parameters.items())])


def outcome(result: RunResult) -> str:
    """How a job ended, in words."""
    time_taken = f" ({result.wall_s:.0f} s)" if result.status in ("ok", "failed") else ""
    detail = f"\n{result.error}" if result.error else f", {result.note}" if result.note else ""
    return f"{result.status}{time_taken}{detail}"


def _summary(results: list[RunResult], seconds: float) -> None:
    counts = {s: sum(r.status == s for r in results) for s in ("ok", "finished before", "failed")}
    print(
        f"{counts['ok']} run now in {seconds:.0f} s, {counts['finished before']} finished before"
        f" (`opentrans-lab run --force` redoes them), {counts['failed']} failed;"
        f" all under {runs_root()}"
    )
    for result in results:
        if result.status == "failed":
            print(f"  failed: {describe(result.job)}")
    if waiting := sum(r.status == "out of time" for r in results):
        print(f"  out of time: {waiting} not finished; the same command goes on with them")
