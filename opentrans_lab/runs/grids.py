"""Which notebooks to run with which parameters: names checked, values typed, lists multiplied out.

A mistyped parameter would only make papermill warn; here it is an error that lists the valid names.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import yaml

from ..errors import LabError
from ..files import shipped
from ..records import SWITCHES, absolute, defaults, given_in_types, run_dir

GRID_KEYS = {"runs", "defaults", "outermost"}
ENTRY_KEYS = {"notebook", "parameters", "after_all"}
OTHER_GRID = {"grid"}


class Job(NamedTuple):
    """A notebook and the parameters given for it; the others are the notebook's defaults."""

    notebook: Path
    parameters: dict
    after_all: bool = False
    """It reads the runs before it, so it starts when these have ended."""
    table: str = ""
    """The grid that lists it; empty where that is a collection of grids, or none."""

    @property
    def full(self) -> dict:
        """All parameters (see :func:`complete`)."""
        return complete(self.notebook, self.parameters)

    @property
    def folder(self) -> Path:
        """Where its run lives."""
        return run_dir(self.notebook.stem, self.full)


def complete(notebook: Path | str, given: dict) -> dict:
    """All parameters of a notebook: its defaults, with ``given`` in the defaults' types.

    Paths are absolute, see ``sources.absolute``.

    Raises:
        LabError: an unknown name (with the valid ones) or a value of another type.
    """
    return absolute(defaults(notebook) | given_in_types(notebook, given))


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
        grid = yaml.load(path.read_bytes(), _Spelled)
    except OSError as error:
        raise LabError(f"no grid {path}; give a .yaml of notebooks/grids") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LabError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(grid, dict) or not grid.get("runs") or grid.keys() - GRID_KEYS:
        raise LabError(f"{path} must hold `runs` and may hold `defaults` and `outermost`")
    shared = grid.get("defaults") or {}
    outermost = grid.get("outermost") or ""
    kinds = isinstance(grid["runs"], list), isinstance(shared, dict), isinstance(outermost, str)
    if not all(kinds):
        raise LabError(
            f"{path}: `runs` must be a list, `defaults` a mapping of names to values, and "
            "`outermost` one name"
        )
    collection = any(isinstance(e, dict) and e.keys() == OTHER_GRID for e in grid["runs"])
    table = "" if collection else path.stem
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
        if not isinstance(entry.get("parameters") or {}, dict):
            raise LabError(f"{path}: `parameters` of {entry['notebook']} must map names to values")
        last = SWITCHES.get(str(entry.get("after_all", "no")).lower())
        if last is None:
            raise LabError(f"{path}: `after_all` of {entry['notebook']} must be true or false")
        notebook = find_notebook(str(entry["notebook"]), path)
        known = defaults(notebook)
        used |= known.keys() & shared.keys()
        given = {k: v for k, v in shared.items() if k in known} | (entry.get("parameters") or {})
        if empty := [k for k, v in given.items() if v == []]:
            raise LabError(f"{path}: {empty[0]!r} of {entry['notebook']} is a list without values")
        lists = [v if isinstance(v, list) else [v] for v in given.values()]
        for values in itertools.product(*lists):
            given_here = given_in_types(notebook, dict(zip(given, values, strict=True)))
            jobs.append(Job(notebook, given_here, last, table))
    if unused := shared.keys() - used:
        raise LabError(
            f"{path}: no notebook that it names has the parameters {', '.join(sorted(unused))}; "
            "`defaults` do not reach the jobs of another grid"
        )
    if outermost:
        jobs = _regroup(jobs, outermost, path)
    return jobs


class _Spelled(yaml.SafeLoader):
    """Reads scalars as texts, as they are spelled: what is a number, the notebook's defaults say.

    Refuses a key that a mapping has twice: PyYAML lets the last one win, and a sweep is lost.
    """

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # merging stays

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            name = (key.tag, key.value)
            if name in seen:
                twice = f"{key.value!r} twice"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
            seen.add(name)
        return node


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
