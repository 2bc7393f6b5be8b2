"""Finished runs, found again: one's own, and those that are published.

``results/<table>/<framework>/seed-<n>[-<setting>]/`` is for readers; which code, device and
parameters a run had, its ``metrics.json`` says.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from ..files import at_home
from .results import PROJECT, load, runs_root

DIRTY = "-dirty"  # ends a revision with uncommitted changes, which nobody can go back to


def results_root() -> Path:
    """Where published runs are: ``$OPENTRANS_RESULTS``, else the project's ``results``."""
    return at_home(os.environ.get("OPENTRANS_RESULTS") or PROJECT / "results")


def published() -> list[tuple[Path, dict]]:
    """Folder and record of every published run, by folder, also those that are not quoted."""
    return sorted(_finished(results_root(), "[!.]*/[!.]*/[!.]*"), key=lambda run: run[0])


def quoted(record: dict) -> bool:
    """Whether a published run is evidence: its code is committed, so that others can run it."""
    return not record["revision"].endswith(DIRTY)


def run_name(folder: Path) -> str:
    """A run in a few words: ``03_transfer/<key>``, of a published one where it is published."""
    root = results_root() if folder.is_relative_to(results_root()) else folder.parents[1]
    return folder.relative_to(root).as_posix()


def records(notebook: str | None = None) -> list[tuple[Path, dict]]:
    """Folder and record of every finished run, by notebook name and then by time.

    Published runs count, too, if they are ``quoted``; of several with the same parameters, the own
    run or the newest.
    """
    there = [
        (folder, record)
        for folder, record in published()
        if quoted(record) and notebook in (None, record["notebook"])
    ]
    own = _finished(runs_root(), f"{glob.escape(notebook) if notebook else '[!.]*'}/[!.]*")
    found = {
        (record["notebook"], record["key"]): (folder, record)
        for folder, record in (*sorted(there, key=_made), *own)  # the last one stays
    }
    return sorted(found.values(), key=_made)


def _finished(root: Path, folders: str) -> Iterator[tuple[Path, dict]]:
    for path in root.glob(f"{folders}/metrics.json"):
        if record := load(path.parent):
            yield path.parent, record


def _made(run: tuple[Path, dict]) -> tuple[str, str, str]:
    return run[1]["notebook"], run[1]["created"], run[1]["key"]


def collect(notebook: str | None = None) -> pd.DataFrame:
    """All finished runs, one a row: ``notebook, key, seed, device, wall_s, revision, created,
    folder`` and one column for each ``parameters.<name>`` and ``metrics.<name>`` (nested names
    joined by dots). Empty, with ``notebook`` and ``key``, where nothing has run."""
    rows = [{**record, "folder": str(folder)} for folder, record in records(notebook)]
    if not rows:
        return pd.DataFrame(columns=["notebook", "key", "folder"])
    frame = pd.json_normalize(rows)
    return frame[[c for c in frame if c != "status" and not c.startswith("versions.")]]
