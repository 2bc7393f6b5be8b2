"""The parameters that a notebook's cell has set, and what is made of them, in one line each.

::

    params = parameters()  # of the cell above
    run = Run("03_transfer", params)
    lab, pruning, recipe = Lab.of(params), PruneConfig.of(params), Recipe.of(params)
"""

import linecache
from dataclasses import fields
from typing import ClassVar, Self

from IPython import InteractiveShell, get_ipython

from ..checks import choices
from ..errors import LabError
from .notebook import assigned

HEAD = "# Parameters\n"  # begins the cell that papermill injects


def parameters() -> dict:
    """Names that the notebook's parameters cell sets, each with the value that it has now.

    A kernel knows no tags, only the code that it has run: its largest cell that assigns nothing
    but literals is the parameters cell, and so is a later one that sets most of the same names, as
    it may have been edited. A small one, to try a value, changes only this value.

    Raises:
        LabError: outside a notebook, no such cell has run, a name has been deleted since, or
            papermill has set one that the cell does not have.
    """
    shell = get_ipython()
    if shell is None:
        raise LabError("parameters() reads a notebook's cells; elsewhere, write them as a dict")
    known, injected = {}, {}
    for code in _ran(shell):
        names = _literals(code)
        if code.startswith(HEAD):
            injected |= names
        elif len(names) > len(known) or 2 * len(names.keys() & known.keys()) > len(known):
            known, injected = names, {}
    if not known:
        raise LabError(
            "no parameters cell has run in this kernel; run it first (one that begins with "
            f"{HEAD.strip()!r} is taken for papermill's)"
        )
    for name in injected.keys() - known.keys():
        raise LabError(f"the parameters cell has no {name!r}{choices(name, known)}")
    for name in known.keys() - shell.user_ns.keys():
        raise LabError(f"parameter {name!r} has been deleted; run the parameters cell again")
    return {name: shell.user_ns[name] for name in known}


def _ran(shell: InteractiveShell) -> list[str]:
    """The cells in the order in which they ran; nbval keeps them out of the history, and then
    each counts once, as tracebacks know them."""
    told = shell.history_manager.input_hist_parsed[1:]  # the first is always empty
    names = [name for name in linecache.cache if shell.compile.format_code_name(name)]
    return told or ["".join(linecache.getlines(name)) for name in names]


def _literals(code: str) -> dict:
    try:
        return assigned(code, "")
    except LabError:
        return {}  # it computes, so it is no cell of parameters


class OfParameters:
    """A dataclass whose fields a notebook's parameters can give, each by its name."""

    NEEDS: ClassVar[tuple[str, ...]] = ()
    """Parameters that a notebook must have; other fields may stay at their defaults."""
    PREFIX: ClassVar[str] = ""
    """Comes before a field's name in ``NEEDS`` where the name alone is another record's."""

    @classmethod
    def of(cls, params: dict, **given) -> Self:
        """One made of those ``params`` that are its fields, and of the fields ``given`` here.

        Raises:
            LabError: a parameter that it needs is missing, or a value is impossible.
        """
        names = {field.name: field.name for field in fields(cls)}
        names |= {name.removeprefix(cls.PREFIX): name for name in cls.NEEDS}
        read = {field: name for field, name in names.items() if field not in given}
        for name in set(cls.NEEDS).intersection(read.values()) - params.keys():
            raise LabError(f"{cls.__name__} needs the parameter {name!r}{choices(name, params)}")
        return cls(**{f: params[name] for f, name in read.items() if name in params}, **given)
