"""What has run is published: ``results/<table>/<framework>/seed-<n>[-<setting>]/``.

These folders are small and meant to be committed: ``records`` reads them beside one's own runs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from ..files import atomic_path, looking_once
from ..records import described, load, quoted, results_root, run_key
from ..report import experiment, published_page
from .grids import Job

INDEX = "README.md"  # of all that is published
ALONE = "clip"  # in place of a framework, where there is none
LONG = 32  # letters of a value that still stands in a folder's name


@looking_once()
def places(jobs: Sequence[Job]) -> dict[Path, Path]:
    """Where in ``results`` the runs of a grid belong, by the folder of each run.

    The setting is what the jobs of one table, framework and notebook differ in, but for the seed,
    so that a name stays when a grid gets more values. What reads other runs has no place.
    """
    groups: dict[tuple[str, str], dict[str, dict[Path, dict]]] = defaultdict(dict)
    for job in jobs:
        if not job.after_all:
            name, params = job.notebook.stem, job.full
            group = groups[job.table or name, _slug(params.get("framework") or ALONE)]
            group.setdefault(name, {})[job.folder] = params
    found: dict[Path, Path] = {}
    for (table, framework), notebooks in groups.items():
        for notebook, runs in notebooks.items():
            names = [name for name in next(iter(runs.values())) if name != "seed"]
            varying = [k for k in names if len({_slug(p.get(k)) for p in runs.values()}) > 1]
            for folder, params in runs.items():
                words = [f"seed-{params.get('seed', 0)}", *[notebook] * (len(notebooks) > 1)]
                words += [f"{k}-{_slug(params.get(k))}" for k in varying]
                found.setdefault(folder, Path(table, framework, "-".join(words)))
    return found


def _slug(value: object) -> str:
    """A value as a part of a folder's name, on any file system."""
    text = re.sub(r"[^\w.]+", "_", str(value)) or "none"
    return text if len(text) <= LONG else run_key({"value": value})


def publish(where: Mapping[Path, Path]) -> list[Path]:
    """Copy what finished runs measured (no notebooks, no weights) to where they belong in
    ``results``, and write its index. Returns their folders there.

    A run goes where an older one of the same experiment was; beside one of another experiment,
    under its key; and from uncommitted code beside what is quoted. A run that another runner makes
    anew just now is left out, and what is published of it stays.
    """
    done = []
    with FileLock(results_root() / ".lock"):  # several campaigns may end at the same time
        for folder, wanted in where.items():
            record, files = load(folder), _measured(folder)
            if None in (record, files) or load(folder) != record:  # else all is of one run
                continue
            place = _place(results_root() / wanted, record)
            if (there := load(place)) and there["created"] > record["created"]:
                continue
            done.append(place)
            (place / "metrics.json").unlink(missing_ok=True)  # what makes a run comes last
            for stale in [path for path in place.glob("*") if path.name not in files]:
                stale.unlink()
            for name in sorted(files, key=lambda name: name == "metrics.json"):
                with atomic_path(place / name) as copy:
                    copy.write_bytes(files[name])
        if done:
            with atomic_path(results_root() / INDEX) as page:
                page.write_text(published_page(), encoding="utf-8")
    return done


def _place(place: Path, record: dict) -> Path:
    """``place``, or one beside it where a run of another experiment is there."""
    if not quoted(record):
        place = place.with_name(f"{place.name}-uncommitted")
    there = load(place) or record
    same = [(r["notebook"], experiment(described(r))) for r in (there, record)]
    return place if same[0] == same[1] else place.with_name(f"{place.name}-{record['key']}")


def _measured(folder: Path) -> dict[str, bytes] | None:
    """A run's numbers, tables and figures by file name; None if one of them vanishes meanwhile."""
    try:
        return {
            path.name: path.read_bytes()
            for path in folder.glob("[!.]*")
            if path.suffix in (".json", ".csv", ".png")
        }
    except FileNotFoundError:
        return None
