"""Which notebooks to run with which parameters: names checked, values typed, lists multiplied out.

A mistyped parameter would only make papermill warn; here it is an error that lists the valid names.
"""

from __future__ import annotations

import difflib
import itertools
from ast import literal_eval
from functools import cache
from pathlib import Path
from typing import NamedTuple

import nbformat
import papermill
import yaml

from .errors import LabError
from .files import shipped
from .results import run_dir
from .sources import absolute

GRID_KEYS = {"runs", "defaults", "outermost"}
ENTRY_KEYS = {"notebook", "parameters", "after_all"}
OTHER_GRID = {"grid"}


class Job(NamedTuple):
    """A notebook and the parameters given for it; the others are the notebook's defaults."""

    notebook: Path
    parameters: dict
    after_all: bool = False
    """It reads the runs before it, so it starts when these have ended."""

    @property
    def full(self) -> dict:
        """All parameters (see :func:`complete`)."""
        return complete(self.notebook, self.parameters)

    @property
    def folder(self) -> Path:
        """Where its run lives."""
        return run_dir(self.notebook.stem, self.full)


def defaults(notebook: Path | str) -> dict:
    """Names and default values of a notebook's ``parameters`` cell; empty where it has none.

    Raises:
        LabError: no such notebook, not a notebook, or a default that is no literal.
    """
    notebook = Path(notebook)
    if not notebook.is_file():
        near = sorted(p.name for p in notebook.parent.glob("*.ipynb"))
        raise LabError(f"no notebook {notebook}" + (f"; there are: {', '.join(near)}" * bool(near)))
    return dict(_defaults(notebook, notebook.stat().st_mtime_ns))


@cache
def _defaults(notebook: Path, changed: int) -> dict:
    """Read once, as a grid asks for the same ones hundreds of times."""
    try:
        found = papermill.inspect_notebook(nbformat.read(notebook, as_version=4))
    except (ValueError, KeyError) as error:
        raise LabError(f"{notebook} is not a readable notebook ({error})") from error
    try:
        return {name: literal_eval(parameter["default"]) for name, parameter in found.items()}
    except (ValueError, SyntaxError) as error:
        raise LabError(f"{notebook}: its parameters cell must hold literals only") from error


def complete(notebook: Path | str, given: dict) -> dict:
    """All parameters of a notebook: its defaults, with ``given`` in the defaults' types.

    Paths are absolute, see ``sources.absolute``.

    Raises:
        LabError: an unknown name (with the valid ones) or a value of another type.
    """
    known = defaults(notebook)
    for name in given.keys() - known.keys():
        raise LabError(f"{Path(notebook).name} has no parameter {name!r}{_choices(name, known)}")
    typed = {name: _typed(name, value, known[name]) for name, value in given.items()}
    return absolute(known | typed)


def _choices(name: str, known: dict) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{hint} valid names: {', '.join(known) or 'none'}"


def _typed(name: str, value, default):
    """``value`` (from a command line or YAML) in the type of the notebook's ``default``."""
    kind = type(default)
    if default is None or type(value) is kind:
        return value
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if not isinstance(value, bool):
            if kind is int and (isinstance(value, str) or value.is_integer()):
                return int(value)
            if kind is float or kind is str and isinstance(value, (int, float)):
                return kind(value)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise LabError(
        f"parameter {name!r} is of type {kind.__name__}, such as {default!r}, not {value!r}"
    )


def load_grid(path: Path | str, within: tuple[str, ...] = ()) -> list[Job]:
    """The jobs of a grid file, in order; a list of values means one job for each.

    ::

        defaults: {dataset: scenes}      # for every notebook that has the parameter
        outermost: seed                  # all of the first seed, then all of the second, …
        runs:
          - 00_index
          - notebook: 03_transfer
            parameters: {seed: [0, 1, 2], density: [0.1, 0.2]}
          - grid: table1                 # all jobs of table1.yaml, in the same folder
          - notebook: 05_paper_tables
            after_all: true              # starts when all above it have ended

    A notebook is named relative to the grid's folder, the one above it or the lab's notebooks.

    Raises:
        LabError: no such file, not YAML, a key twice, an unknown key, notebook or parameter.
    """
    path = Path(path)
    try:
        grid = yaml.load(path.read_bytes(), _OnceEach)
    except OSError as error:
        raise LabError(f"no grid {path}; give a .yaml of notebooks/grids") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LabError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(grid, dict) or not grid.get("runs") or grid.keys() - GRID_KEYS:
        raise LabError(f"{path} must hold `runs` and may hold `defaults` and `outermost`")
    shared = grid.get("defaults") or {}
    outermost = grid.get("outermost") or ""
    kinds = isinstance(grid["runs"], list), _named(shared), isinstance(outermost, str)
    if not all(kinds):
        raise LabError(
            f"{path}: `runs` must be a list, `defaults` a mapping of names to values, and "
            "`outermost` one name"
        )
    jobs, used = [], set()
    for entry in grid["runs"]:
        entry = {"notebook": entry} if isinstance(entry, str) else entry
        if isinstance(entry, dict) and entry.keys() == OTHER_GRID:
            other = path.parent / f"{entry['grid']}.yaml"
            if other.name in within:
                raise LabError(f"{path}: grid {entry['grid']!r} holds itself")
            jobs += load_grid(other, (*within, path.name))
            continue
        if not isinstance(entry, dict) or entry.keys() - ENTRY_KEYS or "notebook" not in entry:
            raise LabError(
                f"{path}: {entry!r} must hold `notebook` and may hold `parameters` and "
                "`after_all`, or name another `grid`"
            )
        if not _named(entry.get("parameters") or {}):
            raise LabError(
                f"{path}: `parameters` of {entry['notebook']} must map names to values (YAML reads "
                "on, off, yes and no as no names: quote them)"
            )
        if not isinstance(entry.get("after_all", False), bool):
            raise LabError(f"{path}: `after_all` of {entry['notebook']} must be true or false")
        notebook = find_notebook(str(entry["notebook"]), path)
        known = defaults(notebook)
        used |= known.keys() & shared.keys()
        given = {k: v for k, v in shared.items() if k in known} | (entry.get("parameters") or {})
        if empty := [k for k, v in given.items() if v == []]:
            raise LabError(f"{path}: {empty[0]!r} of {entry['notebook']} is a list without values")
        lists = [v if isinstance(v, list) else [v] for v in given.values()]
        for values in itertools.product(*lists):
            given_here = dict(zip(given, values, strict=True))
            jobs.append(Job(notebook, given_here, bool(entry.get("after_all"))))
    if unused := shared.keys() - used:
        raise LabError(
            f"{path}: no notebook that it names has the parameters {', '.join(sorted(unused))}; "
            "`defaults` do not reach the jobs of another grid"
        )
    if outermost:
        jobs = _regroup(jobs, outermost, path)
    return jobs


class _OnceEach(yaml.SafeLoader):
    """Refuses a key that a mapping has twice: PyYAML lets the last one win, and a sweep is lost."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            name = (key.tag, key.value)
            if name in seen:
                twice = f"{key.value!r} twice"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
            seen.add(name)
        return node


def _named(parameters: object) -> bool:
    return isinstance(parameters, dict) and all(isinstance(name, str) for name in parameters)


def _regroup(jobs: list[Job], name: str, grid: Path) -> list[Job]:
    """``jobs`` with equal values of a parameter together, in the order in which these appear."""
    values = [job.full.get(name) for job in jobs]
    if all(value is None for value in values):
        raise LabError(f"{grid}: no notebook has the parameter {name!r} that is to be `outermost`")
    ranks = [(job.after_all, values.index(at)) for job, at in zip(jobs, values, strict=True)]
    return [job for _, job in sorted(zip(ranks, jobs, strict=True), key=lambda pair: pair[0])]


def find_notebook(name: str, grid: Path) -> Path:
    """The notebook that a grid calls so.

    Raises:
        LabError: it is in none of the folders where it is looked for.
    """
    grid = grid.resolve()
    folders = (grid.parent, grid.parent.parent, shipped("notebooks"))
    candidates = [folder / f"{name.removesuffix('.ipynb')}.ipynb" for folder in folders]
    found = next((p for p in candidates if p.is_file()), None)
    if found is None:
        raise LabError(
            f"{grid}: no notebook {name!r} in {grid.parent}, the folder above it or {folders[-1]}"
        )
    return found
