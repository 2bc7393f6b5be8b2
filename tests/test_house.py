"""The map in docs/house.md is the house: rooms, floors, faces."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import opentrans_lab

LIBRARY = Path(opentrans_lab.__file__).parent
MAP = (LIBRARY.parent / "docs" / "house.md").read_text(encoding="utf-8")
ROOMS = re.findall(r"^\| `(\w+)/` \|", MAP, flags=re.M)  # from the top floor down
GROUND = ("errors", "device", "checks")


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """What a module imports of the library, as seen from its top: ``("masks",)`` is a face."""
    home = path.relative_to(LIBRARY).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = home[: len(home) + 1 - node.level]
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield (*base, *name.split("."))


def above(path: Path) -> list[tuple[str, ...]]:
    """Imports of ``path`` that the map forbids: of a room not below its own, past its face, or of
    a room by what everybody stands on."""
    home = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
    below = ROOMS[ROOMS.index(home) + 1 :] if home in ROOMS else []
    wrong = []
    for target in imports(path):
        own = target[0] == home or target == ("__version__",)
        ground = target[0] in GROUND
        if not own and not ground and not (target[0] in below and len(target) == 1):
            wrong.append(target)
    return wrong


def test_the_map_shows_every_room():
    there = {p.name for p in LIBRARY.iterdir() if (p / "__init__.py").is_file()}
    assert set(ROOMS) == there and len(ROOMS) == len(there)
    loose = {p.stem for p in LIBRARY.glob("*.py")} - {"__init__"}
    assert loose == set(GROUND)


def test_rooms_import_only_rooms_below_them_through_their_faces():
    found = {str(p): above(p) for p in LIBRARY.rglob("*.py") if p.parent != LIBRARY}
    found |= {name: above(LIBRARY / f"{name}.py") for name in GROUND}
    assert not {path: wrong for path, wrong in found.items() if wrong}


def test_an_import_upwards_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "LIBRARY", tmp_path)
    path = tmp_path / "masks" / "wrong.py"
    path.parent.mkdir()
    path.write_text("from ..runs import run_grid\nfrom ..files.paths import lines\n")
    assert above(path) == [("runs",), ("files", "paths")]


def test_a_face_says_what_the_room_offers():
    for room in ROOMS:
        tree = ast.parse((LIBRARY / room / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), room
        kinds = [ast.Expr, ast.ImportFrom, ast.Assign]  # docstring, what is handed on, __all__
        assert all(type(node) in kinds for node in tree.body), room
        given = [a.asname or a.name for n in tree.body[1:-1] for a in n.names]
        assert set(ast.literal_eval(tree.body[-1].value)) == set(given), room


def test_the_librarys_face_is_lazy_and_whole():
    for name in opentrans_lab.__all__:
        assert callable(getattr(opentrans_lab, name))


def test_the_page_of_calls_is_what_the_docstrings_say():
    make = runpy.run_path(str(LIBRARY.parent / "docs" / "make_api.py"))
    written = (LIBRARY.parent / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == make["page"](), "run python docs/make_api.py"


def test_contributing_names_files_that_are_there():
    root = LIBRARY.parent
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:opentrans_lab|tests|notebooks|docs|data)/[\w./-]+)`", text)
    assert len(named) > 10 and not [name for name in named if not (root / name).exists()]
