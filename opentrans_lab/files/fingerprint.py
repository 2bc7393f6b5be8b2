"""Fingerprints of files: pictures by name, size and time of their last change, lists by content.

So one thing is not seen: a picture of the same size in another's place that a tool has given the
old time, too.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from .paths import wanted

LISTS = (".csv", ".json", ".txt")
SMALL = 2**20  # bytes

_walked: ContextVar[dict | None] = ContextVar("_walked", default=None)


@contextmanager
def looking_once() -> Iterator[None]:
    """Within it, each data set is looked at once: a plan asks for the same one hundreds of times.

    For what takes seconds; a person may mend a label between two cells of a notebook.
    """
    token = _walked.set({} if (known := _walked.get()) is None else known)
    try:
        yield
    finally:
        _walked.reset(token)


def fingerprint(paths: Iterable[Path | str]) -> str:
    """Sixteen hexadecimal digits that change with the files at and under ``paths``.

    One ``stat`` a file. What systems leave there (``files.wanted``) is left out. Links are
    followed, each folder once. What is missing or cannot be read counts as not there.
    """
    paths = tuple(sorted(map(os.fspath, paths)))
    known = _walked.get()
    if known is None or paths not in known:
        found, seen = hashlib.sha256(), set()
        for path in paths:
            for line in _lines(path, seen):
                found.update("\0".join(map(str, line)).encode(errors="surrogateescape") + b"\n")
        if known is None:
            return found.hexdigest()[:16]
        known[paths] = found.hexdigest()[:16]
    return known[paths]


def _lines(path: str, seen: set[str]) -> Iterator[tuple]:
    """What counts of a file, or of all files under a folder; ``seen`` breaks circles of links."""
    try:
        with os.scandir(path) as found:
            entries = sorted((e for e in found if wanted(e.name)), key=lambda e: e.name)
    except OSError:
        with suppress(OSError):
            about = os.stat(path)
            small = path.endswith(LISTS) and about.st_size <= SMALL
            yield path, about.st_size, digest(Path(path)) if small else about.st_mtime_ns
        return
    yield path, "folder"
    if (real := os.path.realpath(path)) in seen:
        return
    seen.add(real)
    for entry in entries:
        if entry.is_dir():
            yield from _lines(entry.path, seen)
        else:
            with suppress(OSError):  # a link to nothing
                about = entry.stat()
                yield entry.path, about.st_size, about.st_mtime_ns


def digest(path: Path) -> str:
    """SHA-256 of a file, read once as long as it stays the same; "" where there is none."""
    try:
        about = path.stat()
        return _read(path, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    except OSError:
        return ""


@cache
def _read(path: Path, *state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
