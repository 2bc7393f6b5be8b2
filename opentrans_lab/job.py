"""One notebook with its parameters, run whole or not at all.

A run is written to a stage folder and becomes ``runs/<notebook>/<key>/`` in one rename when its
last cell has passed. Nothing here changes the process's own environment, so that several jobs can
share a process. Starts notebooks and knows no models.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
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

ATTEMPTS = 2  # of a job that fails by no fault of the user's: machines hiccup


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


def run_job(job: Job, force_since: float | None = None, until: float | None = None) -> RunResult:
    """Run ``job`` unless it has finished before; what fails by itself is tried once more.

    Args:
        force_since: runs and cached stages older than this (seconds since the epoch) are redone.
        until: when training stops with a checkpoint (seconds since the epoch).

    Raises:
        LabError: an unknown notebook or parameter.
    """
    params = complete(*job[:2])
    folder = run_dir(job.notebook.stem, params)
    if force_since is None and load(folder):
        note = "the notebook has changed since: --force redoes it"
        return RunResult(job, folder, "finished before", note=note * _stale(job.notebook, folder))
    for _ in range(ATTEMPTS):
        result = _attempt(job, params, folder, force_since, until)
        if result.status != "failed" or result.users:
            return result
    return replace(result, error=f"{result.error}\n  tried {ATTEMPTS} times; {_log(result)}")


def _attempt(
    job: Job, params: dict, folder: Path, force_since: float | None, until: float | None
) -> RunResult:
    known = defaults(job.notebook)
    changed = {key: value for key, value in params.items() if value != known[key]}
    begun = time.monotonic()
    with _staged(folder) as stage:
        run = Run(job.notebook.stem, params, stage)
        told = {STAGE: str(stage), "OPENTRANS_RUNS": str(runs_root())}
        if force_since is not None:
            told["OPENTRANS_FORCE"] = str(force_since)  # stages older than this are made anew
        if until is not None:
            told["OPENTRANS_DEADLINE"] = str(until)
        error, kind = _execute(job.notebook, stage / "executed.ipynb", changed, told)
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


def _log(result: RunResult) -> str:
    """Where the failed notebook lies, with all that it printed."""
    left = result.folder / "failed.ipynb"
    return f"all that it printed: {left}" if left.is_file() else "it left no notebook"


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


def _kernels(told: dict[str, str]) -> type[AsyncKernelManager]:
    """Kernels of this very interpreter, whatever kernels are registered on the machine.

    Args:
        told: environment variables that they get beside this process's.
    """

    class ThisPython(AsyncKernelManager):
        transport_encryption = "auto"  # other users of the machine cannot listen in

        @property
        def kernel_spec(self) -> KernelSpec:
            # Its own log says only that it was interrupted, which is how kernels are ended.
            command = get_kernel_dict(["--log-level=CRITICAL"])
            return KernelSpec(resource_dir=RESOURCES, **command | {"env": told})

    return ThisPython


def _execute(notebook: Path, output: Path, changed: dict, told: dict[str, str]) -> tuple[str, str]:
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
            kernel_manager_class=_kernels(told),
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
def _staged(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` where the kernel writes; removed at the end.

    Stages that killed runners of this machine have left are removed too.
    """
    prefix = f".{folder.name}@{socket.gethostname()}@"
    for left in folder.parent.glob(f"{prefix}*"):
        if not _alive(int(left.name.removeprefix(prefix).partition("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
    stage = folder.with_name(f"{prefix}{os.getpid()}")
    stage.mkdir(parents=True)
    try:
        yield stage
    finally:
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
