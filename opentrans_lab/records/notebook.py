"""A notebook as a file: read whoever wrote it, and what its cell of parameters says.

Values come as texts from a command line or YAML and are kept as they were spelled until the
parameter is known that they are for: 007 is a name there and a number here.
"""

import ast
import json
import re
from functools import cache
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

from ..checks import choices
from ..errors import LabError

TAG, INJECTED = "parameters", "injected-parameters"  # papermill's
SWITCHES = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)


def read_notebook(path: Path | str) -> NotebookNode:
    """A notebook in today's format (4), each cell with a list of tags.

    Raises:
        LabError: no such notebook, not a notebook, or one for another language than Python.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.ipynb"))
        raise LabError(f"no notebook {path}" + (f"; there are: {', '.join(near)}" * bool(near)))
    try:
        read = nbformat.reads(path.read_text(encoding="utf-8-sig"), as_version=4)
        notebook = nbformat.from_dict(read)  # an upgrade from format 2 leaves bare dicts
    except (ValueError, AttributeError, KeyError, TypeError, nbformat.ValidationError) as error:
        why = str(error).splitlines()[0][:200] if path.stat().st_size else "it is empty"
        raise LabError(f"{path} is not a readable notebook ({why}); restore the file") from error
    about = [notebook.metadata.get(key) for key in ("kernelspec", "language_info")]
    kernel, info = (found if isinstance(found, dict) else {} for found in about)
    language = kernel.get("language") or info.get("name") or "Python"
    if "python" not in str(language).lower():
        raise LabError(f"{path} is a notebook for {language}; only those for Python can be run")
    for cell in notebook.cells:
        tags = cell.metadata.get("tags") or []
        cell.metadata["tags"] = [tags] if isinstance(tags, str) else tags
    return notebook


def code(path: Path | str) -> list[str]:
    """The code of a notebook's own cells: without the parameters that a run was given."""
    cells = read_notebook(path).cells
    return [c.source for c in cells if c.cell_type == "code" and INJECTED not in c.metadata.tags]


def place(path: Path | str, source: str) -> int | str:
    """The number of the cell with this source, from 1."""
    cells = read_notebook(path).cells
    return next((at for at, cell in enumerate(cells, 1) if cell.source == source), "?")


def defaults(notebook: Path | str) -> dict:
    """Names and default values of a notebook's ``parameters`` cell; empty where it has none.

    Raises:
        LabError: as ``read_notebook``, two cells of parameters, or a default that is no literal.
    """
    notebook = Path(notebook)
    changed = notebook.stat().st_mtime_ns if notebook.is_file() else 0
    return dict(_defaults(notebook, changed))


@cache
def _defaults(path: Path, changed: int) -> dict:
    """Read once, as a grid asks for the same ones hundreds of times."""
    tagged = [
        (at, cell)
        for at, cell in enumerate(read_notebook(path).cells, 1)
        if {TAG, INJECTED}.intersection(cell.metadata.tags)
    ]
    if len(tagged) > 1 or any(INJECTED in cell.metadata.tags for _, cell in tagged):
        cells = " and ".join(str(at) for at, _ in tagged)
        raise LabError(
            f"{path}: parameters are in cell {cells}, tagged {TAG!r} or (by an earlier run) "
            f"{INJECTED!r}; keep one cell, tagged {TAG!r}"
        )
    found: dict = {}
    for at, cell in tagged:
        found |= assigned(cell.source, f"{path}, cell {at}")
    return found


def assigned(source: str, where: str) -> dict:
    """What the plain assignments of a cell say; imports, magics and the like are no parameters."""
    try:
        body = ast.parse(TransformerManager().transform_cell(source)).body
    except SyntaxError as error:
        raise LabError(f"{where}, line {error.lineno}: {error.msg}; write Python") from error
    found = {}
    for node in body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = ", ".join(ast.unparse(target) for target in targets)
        try:
            if isinstance(node, ast.AugAssign) or not all(isinstance(t, ast.Name) for t in targets):
                raise ValueError("not a name")
            found |= dict.fromkeys((t.id for t in targets), ast.literal_eval(node.value))
        except (ValueError, TypeError) as error:
            raise LabError(
                f"{where}, line {node.lineno}: {names} is no parameter, since its value is no "
                "literal of its own; write a number, a text or the like, and compute in a later "
                "cell"
            ) from error
    return found


def given_in_types(notebook: Path | str, given: dict) -> dict:
    """``given`` (texts of a command line or YAML too) in the types of the notebook's defaults.

    Raises:
        LabError: an unknown name (with the valid ones) or a value of another type.
    """
    known = defaults(notebook)
    for name in given.keys() - known.keys():
        raise LabError(f"{Path(notebook).name} has no parameter {name!r}{choices(name, known)}")
    return {name: typed(name, value, known[name]) for name, value in given.items()}


def typed(name: str, value, default):
    """``value`` in the type of ``default``: a text is kept as it is spelled, or read as a person
    reads it (010 is ten, on is true); where the default is ``None``, as JSON does.

    Raises:
        LabError: it is of another type.
    """
    kind = type(default)
    try:
        if kind is list and isinstance(value, list):
            like = default[0] if len(set(map(type, default))) == 1 else None
            return [typed(name, each, like) for each in value]
        if kind is dict and isinstance(value, dict):
            return {key: typed(name, each, default.get(key)) for key, each in value.items()}
        if type(value) is kind:
            return value
        if default is None:
            return _json(value) if isinstance(value, str) else value
        if kind is bool:
            return SWITCHES[value.lower()]
        if isinstance(value, bool):
            raise TypeError
        if kind is str and isinstance(value, (int, float)):
            return str(value)
        if kind in (int, float):
            number = _number(value) if isinstance(value, str) else value
            if kind is float or number == int(number):
                return kind(number)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        pass
    raise LabError(
        f"parameter {name!r} is of type {kind.__name__}, such as {default!r}, not {value!r}"
    )


def _json(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def _number(text: str) -> int | float:
    """In decimals first: 010 is ten. YAML's .inf and Python's 0x10 are numbers, too."""
    for read in (int, lambda text: int(text, 0)):
        try:
            return read(text)
        except ValueError:
            pass
    return float(re.sub(r"\.(inf|nan)$", r"\1", text, flags=re.IGNORECASE))
