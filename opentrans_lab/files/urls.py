"""Paths as links and as URIs, in which every letter and byte of a name keeps its meaning."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

FILE = "file://"


def href(path: Path | str) -> str:
    """A relative path as a link says it."""
    return quote(os.fsencode(path))


def linked(link: str) -> str:
    """The path that :func:`href` made ``link`` of."""
    return os.fsdecode(unquote_to_bytes(link))


class Files:
    """Papermill's way to read and write what it is given as ``file://``.

    In a path it would take braces for parameters, and text with names that are no UTF-8 it could
    not write.
    """

    def read(self, uri: str) -> str:
        return self._path(uri).read_text(encoding="utf-8")

    def write(self, text: str, uri: str) -> None:
        # In JSON, a lone surrogate that is replaced so is the same surrogate.
        self._path(uri).write_text(text, encoding="utf-8", errors="backslashreplace")

    def pretty_path(self, uri: str) -> str:
        return uri

    def _path(self, uri: str) -> Path:
        return Path(linked(uri.removeprefix(FILE)))
