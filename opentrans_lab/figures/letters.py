"""Other people's words in figures, drawn as they are written: names, files, parameters."""

import unicodedata

from matplotlib import rc_context

from ..errors import shown

to_the_letter = rc_context({"text.parse_math": False})
"""Decorates a function that draws: what is between two dollars in its texts is no formula."""

BREAKS = ("Cc", "Zl", "Zp")  # Unicode's control characters and ends of lines


def brief(text: object, most: int = 48) -> str:
    """``text`` on one line; of more than ``most`` letters, the middle gives way to an ellipsis."""
    line = "".join(" " if unicodedata.category(c) in BREAKS else c for c in shown(text))
    tail = most // 3
    return line if len(line) <= most else f"{line[: most - tail - 1]}…{line[-tail:]}"
