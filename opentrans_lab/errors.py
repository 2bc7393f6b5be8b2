"""The exceptions that a user is meant to see."""

from __future__ import annotations

import os


class LabError(ValueError):
    """Something the user can mend: one sentence that names the file, key or layer and the remedy.

    The command line prints the sentence alone and exits with 2; everything else is our bug and
    keeps its traceback.
    """

    def __str__(self) -> str:
        return shown(super().__str__())


def shown(text: object) -> str:
    """A text, or a path, in letters that every file and screen takes: a name's bytes that are no
    UTF-8, which Python keeps as lone surrogates, as ``\\udce9``."""
    return str(text).encode("utf-8", "backslashreplace").decode()


class OutOfTime(Exception):
    """Training stopped at its deadline with a checkpoint; the same call goes on from there."""


def deadline() -> float:
    """When training is to stop (seconds since the epoch): the runner's ``OPENTRANS_DEADLINE``."""
    return float(os.environ.get("OPENTRANS_DEADLINE", "inf"))
