"""What a run leaves behind: one folder a run, ``metrics.json`` in it.

``runs/<notebook>/<key>/`` follows from the parameters and what the files are that they name (see
``sources``): where both are equal, it is one run.
"""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd

from .. import __version__
from ..errors import LabError
from ..files import at_home, atomic_path, writable_folder
from .sources import absolute, identity, made_from

PROJECT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "torchvision", "open_clip_torch", "transformers", "accelerate", "numpy")
TEXTS = ("name", "picture", "largest", "data")  # columns of tables that hold people's own words
ASIDE = "-old"  # ends the name of a folder that another is about to replace
STAGE = "OPENTRANS_STAGE"  # the folder in which the runner lets a notebook write, until it is done

OTHER_RUNS = """set the variable OPENTRANS_RUNS to a folder that can, in a shell or in a notebook:
  export OPENTRANS_RUNS=~/opentrans-runs
  %env OPENTRANS_RUNS=~/opentrans-runs"""


def save_table(table: pd.DataFrame, path: Path | str, index: bool = False) -> None:
    """Write ``table`` as CSV to ``path``, whole or not at all."""
    with atomic_path(path) as tmp:
        table.to_csv(tmp, index=index, errors="backslashreplace")


def read_table(path: Path | str) -> pd.DataFrame:
    """What :func:`save_table` wrote; a class called NA, 007 or True keeps its name.

    Raises:
        OSError: not there.
    """
    texts = dict.fromkeys(TEXTS, str)
    return pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=[""])


def runs_root() -> Path:
    """The folder of all runs: ``$OPENTRANS_RUNS``, else ``runs`` of the project around the cwd."""
    if named := os.environ.get("OPENTRANS_RUNS"):
        return at_home(named).resolve()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file():
            return folder / "runs"
    return here / "runs"


def writable_runs(folder: Path | None = None) -> Path:
    """:func:`runs_root`, or a folder in it, once it is sure that it can be written.

    Raises:
        LabError: it cannot; says which variable names another one.
    """
    return writable_folder(folder or runs_root(), "the folder of runs", OTHER_RUNS)


def plain(value, where: str = "value", odd: Callable[[float], object] = lambda value: None):
    """``value`` in JSON's own types: 0-d tensors and arrays to numbers, and what ``odd`` makes of
    NaN and inf, which JSON lacks.

    Raises:
        LabError: a type that JSON does not have.
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v, f"{where}.{k}", odd) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, where, odd) for v in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, (int, float)):
        if getattr(value, "ndim", None) != 0:
            raise LabError(f"{where} is a {type(value).__name__}; use a number, text or list")
        return plain(value.item(), where, odd)
    return value if math.isfinite(value) else odd(value)


def run_key(params: dict) -> str:
    """Ten hex digits that depend on names and values only; 1 and 1.0 are one value, NaN, infinity
    and its negative three."""

    def canonical(value):
        if isinstance(value, dict):
            return {k: canonical(v) for k, v in value.items()}
        if isinstance(value, list):
            return [canonical(v) for v in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    text = json.dumps(canonical(plain(params, "parameter", float)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def run_dir(notebook: str, params: dict) -> Path:
    """Where the run of ``notebook`` ("03_transfer") with all its ``params`` lives, made from their
    files as they are now."""
    return runs_root() / notebook / run_key(identity(params))


@cache
def revision() -> str:
    """The code's git revision ("-dirty" with local changes), else the package's version."""
    if (PROJECT / ".git").exists():
        command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--exclude=*"]
        try:
            described = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
            return described.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass  # no git here, or nothing committed yet
    return __version__


def versions() -> dict[str, str]:
    """Versions of Python, the lab and the libraries that decide a result."""
    found = {"python": sys.version.split()[0], "opentrans_lab": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _device(named: str) -> str:
    """The device in words: "cpu, 2 threads" or "cuda, NVIDIA H200"."""
    if "torch" not in sys.modules:
        return "cpu"  # the run computed nothing on a device
    import torch

    from ..device import pick

    device = pick(named)
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {torch.get_num_threads()} threads"


class Run:
    """One notebook's run: made in the set-up cell, saved in the last one.

    Args:
        notebook: its name without suffix ("03_transfer").
        params: every name of the parameters cell with its value.
        folder: where to write, if not in the folder that follows from these two.

    Raises:
        LabError: a parameter that is no plain value.
    """

    def __init__(self, notebook: str, params: dict, folder: Path | None = None):
        self.notebook = notebook
        self._folder = folder
        params = absolute(params)
        self.params = plain(params, "parameter", str)
        self.made_from = made_from(params)
        self.key = run_key(params | self.made_from)
        self._begun = time.monotonic()

    @property
    def dir(self) -> Path:
        """The run's folder, made on first use (under the runner: its stage, moved when done)."""
        named = self._folder or os.environ.get(STAGE)
        if not named:
            writable_runs()
        folder = Path(named) if named else runs_root() / self.notebook / self.key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def figure(self, fig, name: str) -> None:
        """Save a matplotlib figure as ``<name>.png`` for the report."""
        with atomic_path(self.dir / f"{name}.png") as tmp:
            fig.savefig(tmp, dpi=150, bbox_inches="tight")

    def save(self, metrics: dict, **tables: pd.DataFrame) -> None:
        """Write each table as ``<name>.csv`` and then ``metrics.json``, which ends the run.

        A table without columns says nothing and is not written.

        Args:
            metrics: names to numbers (also 0-d tensors; NaN becomes null), texts, lists, dicts.
        """
        for name, table in tables.items():
            if not len(table.columns):
                continue
            named = not isinstance(table.index, pd.RangeIndex)
            save_table(table, self.dir / f"{name}.csv", index=named)
        record = {
            "status": "ok",
            "notebook": self.notebook,
            "key": self.key,
            "parameters": self.params,
            **({"made_from": self.made_from} if self.made_from else {}),
            "seed": self.params.get("seed"),
            "metrics": plain(metrics, "metric"),
            "device": _device(self.params.get("device") or "auto"),
            "wall_s": round(time.monotonic() - self._begun, 2),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "revision": revision(),
            "versions": versions(),
        }
        with atomic_path(self.dir / "metrics.json") as tmp:
            tmp.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def put(stage: Path, folder: Path, whole: Callable[[], bool]) -> None:
    """Rename ``stage`` to ``folder``; what was there is put aside and goes when that is done.

    On an error or Ctrl-C it comes back. Where another process was faster and its folder is
    ``whole``, that stays.

    Raises:
        OSError: the folder cannot be renamed.
    """
    aside = stage.with_name(f"{stage.name}{ASIDE}")
    try:
        with suppress(FileNotFoundError):  # nothing was there, or another process puts it aside
            os.rename(folder, aside)
        try:
            os.rename(stage, folder)
        except OSError:
            if not whole():
                raise
    except BaseException as error:
        # After Ctrl-C our own folder may be missing because another process has put it aside.
        failed = isinstance(error, OSError) or stage.exists()
        if failed and aside.exists() and not folder.exists():
            os.rename(aside, folder)  # if this fails, too, the old one stays aside
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def load(folder: Path) -> dict | None:
    """The record of the run in ``folder``, None where no run has ended well.

    Raises:
        LabError: a ``metrics.json`` that is not ours.
    """
    path = Path(folder) / "metrics.json"
    try:
        record = json.loads(path.read_bytes())
        return record if record["status"] == "ok" and record["parameters"] is not None else None
    except (FileNotFoundError, NotADirectoryError):  # or another runner replaces it just now
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{path} is damaged; delete its folder and run again") from error


def described(record: dict) -> dict:
    """Parameters of a run, and what it was made from."""
    return record["parameters"] | record.get("made_from", {})
