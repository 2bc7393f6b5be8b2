"""Other people's words in figures, drawn as they are written: names, files, parameters."""

from __future__ import annotations

import unicodedata

from matplotlib import rc_context

to_the_letter = rc_context({"text.parse_math": False})
"""Decorates a function that draws: what is between two dollars in its texts is no formula."""

INSTEAD = {"Cc": " ", "Zl": " ", "Zp": " ", "Cs": "\N{REPLACEMENT CHARACTER}"}


def shown(text: object, most: int = 48) -> str:
    """``text`` on one line, without what no font can draw; the middle of a long one is left out."""
    line = "".join(INSTEAD.get(unicodedata.category(c), c) for c in str(text))
    return line if len(line) <= most else f"{line[: most - most // 3 - 1]}…{line[-(most // 3) :]}"
