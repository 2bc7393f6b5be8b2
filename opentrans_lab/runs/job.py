"""One notebook with its parameters, run whole or not at all.

A run is written to a stage folder and becomes ``runs/<notebook>/<key>/`` in one rename when its
last cell has passed. Nothing here changes the process's own environment, so that several jobs can
share a process. Starts notebooks and knows no models.
"""

import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import psutil

from ..errors import LabError
from ..files import atomic_path, keep
from ..records import (
    ASIDE,
    STAGE,
    Run,
    code,
    defaults,
    identity,
    load,
    plain,
    put,
    run_key,
    runs_root,
    writable_runs,
)
from ..report import run_page
from .grids import Job
from .kernel import execute, framed

ATTEMPTS = 2  # of a job that fails by no fault of the user's: machines hiccup
TAKEN = ("report", "stages")  # folders of runs that are no notebook's
OWN: set[Path] = set()  # stages in use by this process, whose jobs may run side by side


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


def run_job(
    job: Job,
    force_since: float | None = None,
    until: float | None = None,
    gone: Callable[[], bool] = bool,
) -> RunResult:
    """Run ``job`` unless it has finished before; what fails by itself is tried once more.

    Args:
        force_since: runs and cached stages older than this (seconds since the epoch) are redone.
        until: when training stops with a checkpoint (seconds since the epoch).
        gone: whether nobody waits for the run any longer; asked every second, it ends the kernel.

    Raises:
        LabError: an unknown notebook or parameter.
    """
    folder = job.folder
    if force_since is None and load(folder):
        note = "the notebook has changed since; `opentrans-lab run --force` redoes it"
        return RunResult(job, folder, "finished before", note=note * _stale(job.notebook, folder))
    for _ in range(ATTEMPTS):
        result = _attempt(job, job.folder, force_since, until, gone)
        if result.status != "failed" or result.users:
            return result
    left = result.folder / "failed.ipynb"
    printed = f"all that it printed: {left}" if left.is_file() else "it left no notebook"
    return replace(result, error=f"{result.error}\n  tried {ATTEMPTS} times; {printed}")


def _attempt(job: Job, folder: Path, *how) -> RunResult:
    """``_run``, with whatever else goes wrong as a failed run: the other jobs go on."""
    begun = time.monotonic()
    try:
        result = _run(job, folder, *how)
    except LabError as error:
        result = RunResult(job, folder, "failed", error=str(error), users=True)
    except Exception as error:  # a full disk, or our own mistake, which keeps its traceback
        trace = "".join(traceback.format_exception(error)).splitlines()
        result = RunResult(job, folder, "failed", error=framed(job.notebook.name, trace))
    return replace(result, wall_s=time.monotonic() - begun)


def _run(
    job: Job,
    folder: Path,
    force_since: float | None,
    until: float | None,
    gone: Callable[[], bool],
) -> RunResult:
    if job.notebook.stem in TAKEN:
        raise LabError(f"{job.notebook} has the name of another folder beside its run: rename it")
    params, known = job.full, defaults(job.notebook)
    changed = {key: value for key, value in params.items() if value != known[key]}
    with _staged(folder) as stage:
        run = Run(job.notebook.stem, params, stage)
        told = {STAGE: str(stage), "OPENTRANS_RUNS": str(runs_root())}
        if force_since is not None:
            told["OPENTRANS_FORCE"] = str(force_since)  # stages older than this are made anew
        if until is not None:
            told["OPENTRANS_DEADLINE"] = str(until)
        error, kind = execute(job.notebook, stage / "executed.ipynb", changed, told, gone)
        if not error:
            if load(stage) is None:
                run.save({})  # a notebook without numbers, such as the index
            error = _wrong_record(job.notebook, load(stage), params, folder)
        users = kind == "LabError"
        if kind == "OutOfTime" or (error and gone()):
            return RunResult(job, folder, "out of time", note=error)
        if error:
            if not users and (stage / "executed.ipynb").exists():
                folder.mkdir(parents=True, exist_ok=True)
                os.replace(stage / "executed.ipynb", folder / "failed.ipynb")
            return RunResult(job, folder, "failed", error=error, users=users)
        keep(
            folder,
            lambda folder: _publish(stage, folder, force_since is not None),
            rescue=lambda spare: shutil.copytree(stage, spare),
        )
    return RunResult(job, folder, "ok")


def _stale(notebook: Path, folder: Path) -> bool:
    """Whether ``notebook`` holds other code than the run that was made from it."""
    executed = folder / "executed.ipynb"
    return executed.is_file() and code(notebook) != code(executed)


def _wrong_record(notebook: Path, record: dict, params: dict, folder: Path) -> str:
    """A sentence where the notebook saved its run under another name or other parameters, or the
    files that ``folder`` stands for have changed."""
    if record["notebook"] != notebook.stem:
        return f"{notebook.name} calls itself {record['notebook']!r} in Run(…); name it as its file"
    if record["key"] == folder.name == run_key(identity(params)):
        return ""
    saved = record["parameters"]
    params = plain(params, "parameter", str)
    names = sorted(k for k in params.keys() | saved if params.get(k) != saved.get(k))
    if not names:
        return f"{notebook.name}: files that it is made from changed while it ran; run it again"
    return (
        f"{notebook.name}: Run(…, params) must name every parameter of the parameters cell with its"
        f" value and nothing else, as parameters() does; it differs in: {', '.join(names)}"
    )


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` where the kernel writes; removed at the end.

    Stages that killed runners of this machine have left are removed too, and an older run that one
    of them had just put aside comes back.
    """
    writable_runs(folder.parent).mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}@{socket.gethostname()}@"
    for left in folder.parent.glob(f"{prefix}*"):
        mine = left.with_name(left.name.removesuffix(ASIDE)) in OWN
        if not mine and not _alive(int(left.name.removeprefix(prefix).partition("-")[0])):
            if left.name.endswith(ASIDE) and not folder.exists():
                with suppress(FileNotFoundError):  # another runner was faster
                    os.rename(left, folder)
            else:
                shutil.rmtree(left, ignore_errors=True)
    stage = folder.with_name(f"{prefix}{os.getpid()}-{uuid4().hex[:8]}")
    OWN.add(stage)
    stage.mkdir(parents=True)  # a runner that came to nothing may have removed the parent
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        OWN.discard(stage)
        with suppress(OSError):
            folder.parent.rmdir()  # where nothing came of it


def _alive(pid: int) -> bool:
    """Whether another process has this number; what bore ours before us, in a container that was
    started again, is dead."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except ProcessLookupError:
        return False
    except (PermissionError, psutil.Error):  # of another user, who may be hidden from us
        return True


def _publish(stage: Path, folder: Path, force: bool) -> None:
    """Make ``stage`` the run's folder, with its page. Where another runner was faster, its run
    stays."""
    with atomic_path(stage / "report.html") as page:
        html = run_page(stage, load(stage))
        page.write_text(html, encoding="utf-8", errors="backslashreplace")
    if force or not load(folder):
        put(stage, folder, lambda: load(folder) is not None)
