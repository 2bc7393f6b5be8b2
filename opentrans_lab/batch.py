"""Notebooks as jobs: one with its parameters, or a grid of them; finished runs are not run again.

A run is written to a stage folder and becomes ``runs/<notebook>/<key>/`` in one rename when its
last cell has passed, so a run is whole or absent. The runner starts notebooks and knows no models.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from .grids import Job, complete, defaults
from .page import run_page
from .results import STAGE, Run, atomic_path, load, run_dir, run_key, runs_root


@dataclass(frozen=True)
class RunResult:
    """How a job ended."""

    job: Job
    folder: Path
    status: str
    """``"ok"``, ``"finished before"``, ``"failed"`` or ``"out of time"`` (goes on next time)."""
    wall_s: float = 0.0
    error: str = ""
    users: bool = False
    """A failure that the user can mend (a ``LabError``): ``error`` is one sentence."""
    note: str = ""


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
    return _run(Job(Path(path), parameters or {}), time.time() if force else None)


def run_grid(
    jobs: Sequence[tuple[Path, dict]], force: bool = False, deadline: float | None = None
) -> list[RunResult]:
    """Run ``jobs`` one after another, say how each went, and go on when one fails.

    Args:
        deadline: minutes after which none is started. The one that is running then stops at its
            next training step with a checkpoint, and goes on from there the next time.

    Raises:
        LabError: an unknown notebook or parameter in any job, before the first one is run.
    """
    jobs = [Job(*job) for job in jobs]
    folders = [run_dir(job.notebook.stem, complete(*job)) for job in jobs]
    begun, results = time.time(), []
    until = None if deadline is None else begun + 60 * deadline
    for i, (job, folder) in enumerate(zip(jobs, folders, strict=True), 1):
        done = load(folder) and not force
        if not done and until is not None and time.time() >= until:
            results.append(RunResult(job, folder, "out of time"))
            continue
        if not done:
            print(f"[{i}/{len(jobs)}] {describe(job)} …", flush=True)
        results.append(_run(job, begun if force else None, until))
        print(f"[{i}/{len(jobs)}] {describe(job)}: {outcome(results[-1])}", flush=True)
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
        f" (--force redoes them), {counts['failed']} failed; all under {runs_root()}"
    )
    for result in results:
        if result.status == "failed":
            print(f"  failed: {describe(result.job)}")
    if waiting := sum(r.status == "out of time" for r in results):
        print(f"  out of time: {waiting} not finished; the same command goes on with them")


def _run(job: Job, force_since: float | None, until: float | None = None) -> RunResult:
    params = complete(*job)
    name, folder = job.notebook.stem, run_dir(job.notebook.stem, params)
    if force_since is None and load(folder):
        note = "the notebook has changed since: --force redoes it"
        return RunResult(job, folder, "finished before", note=note * _stale(job.notebook, folder))
    known = defaults(job.notebook)
    changed = {key: value for key, value in params.items() if value != known[key]}
    begun, run = time.monotonic(), Run(name, params)
    with _staged(folder, force_since, until) as stage:
        error, kind = _execute(job.notebook, stage / "executed.ipynb", changed)
        if not error:
            if load(stage) is None:
                run.save({})  # a notebook without numbers, such as the index
            error = _wrong_record(job.notebook, load(stage), params)
        wall, users = time.monotonic() - begun, kind == "LabError"
        if kind == "OutOfTime":
            return RunResult(job, folder, "out of time", wall, note=error)
        if error:
            if not users and (stage / "executed.ipynb").exists():
                folder.mkdir(parents=True, exist_ok=True)
                os.replace(stage / "executed.ipynb", folder / "failed.ipynb")
            return RunResult(job, folder, "failed", wall, error, users)
        with atomic_path(stage / "report.html") as page:
            page.write_text(run_page(stage, load(stage)), encoding="utf-8")
        _publish(stage, folder, force_since is not None)
    return RunResult(job, folder, "ok", wall)


def _stale(notebook: Path, folder: Path) -> bool:
    """Whether ``notebook`` holds other code than the run that was made from it."""
    executed = folder / "executed.ipynb"
    return executed.is_file() and _code(notebook) != _code(executed)


def _code(notebook: Path) -> list[str]:
    cells = nbformat.read(notebook, as_version=4).cells
    own = (c for c in cells if "injected-parameters" not in c.metadata.get("tags", []))
    return [cell.source for cell in own if cell.cell_type == "code"]


def _wrong_record(notebook: Path, record: dict, params: dict) -> str:
    """A sentence where the notebook saved its run under another name or other parameters."""
    if record["notebook"] != notebook.stem:
        return f"{notebook.name} calls itself {record['notebook']!r} in Run(…); name it as its file"
    if record["key"] == run_key(params):
        return ""
    saved = record["parameters"]
    names = sorted(k for k in params.keys() | saved if params.get(k) != saved.get(k))
    return (
        f"{notebook.name}: Run(…, params) must name every parameter of the parameters cell with its"
        f" value and nothing else; it differs in: {', '.join(names)}"
    )


class _ThisPython(AsyncKernelManager):
    """Kernels of this very interpreter, whatever kernels are registered on the machine."""

    transport_encryption = "auto"  # other users of the machine cannot listen in

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


def _execute(notebook: Path, output: Path, changed: dict) -> tuple[str, str]:
    """Run the cells; returns what went wrong in words and its kind, both "" for nothing.

    ``LabError`` is for the user to mend and ``OutOfTime`` no error; anything else is a bug.
    """
    try:
        papermill.execute_notebook(
            notebook,
            output,
            changed,
            kernel_name="python3",
            language="python",
            kernel_manager_class=_ThisPython,
            progress_bar=sys.stderr.isatty(),
        )
    except PapermillExecutionError as error:
        if error.ename in ("LabError", "OutOfTime"):
            return error.evalue, error.ename
        cells = nbformat.read(notebook, as_version=4).cells
        at = next((i for i, c in enumerate(cells, 1) if c.source == error.source), "?")
        trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).strip().splitlines()
        where = f"{notebook.name}, cell {at} (In [{error.exec_count}]): {error.ename}"
        return "\n  | ".join([where, *trace[-14:]]), error.ename
    except DeadKernelError as error:
        return f"{notebook.name}: its kernel died, perhaps for want of memory ({error})", "dead"
    return "", ""


@contextmanager
def _staged(folder: Path, force_since: float | None, until: float | None) -> Iterator[Path]:
    """A folder beside ``folder``, where the kernel writes (by environment); removed at the end.

    Stages that killed runners of this machine have left are removed too.
    """
    prefix = f".{folder.name}@{socket.gethostname()}@"
    for left in folder.parent.glob(f"{prefix}*"):
        if not _alive(int(left.name.removeprefix(prefix).partition("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
    stage = folder.with_name(f"{prefix}{os.getpid()}")
    stage.mkdir(parents=True)
    told = {STAGE: str(stage), "OPENTRANS_RUNS": str(runs_root())}
    if force_since is not None:
        told["OPENTRANS_FORCE"] = str(force_since)  # cached stages older than this are made anew
    if until is not None:
        told["OPENTRANS_DEADLINE"] = str(until)  # training stops then, with a checkpoint
    before = dict(os.environ)
    os.environ.update(told)
    try:
        yield stage
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(stage, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()  # where nothing came of it


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _publish(stage: Path, folder: Path, force: bool) -> None:
    """Make ``stage`` the run's folder. Where another runner was faster, its run stays."""
    if load(folder) and not force:
        return
    aside = stage.with_name(f"{stage.name}-old")
    if folder.exists():
        os.rename(folder, aside)
    try:
        os.rename(stage, folder)
    except OSError:
        if load(folder) is None:
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
