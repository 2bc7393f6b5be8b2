"""Files and folders: a data set's, each looked at once, those that a user names, and as links."""

import csv
import glob
import json
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from ..errors import LabError
from .outputs import at_home

DATA_VARIABLES = ("OPENTRANS_DATA", "DETECTRON2_DATASETS")  # the second for benchmarks only
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LEFT_BEHIND = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin",
               "lost+found", "system volume information")  # fmt: skip


def entries(folder: Path | str) -> list[str]:
    """Names in a folder, sorted, without what systems leave there: hidden ones and their like.

    Raises:
        LabError: not there, not a folder, or not readable.
    """
    try:
        return sorted(filter(wanted, os.listdir(folder)))
    except OSError as error:
        raise unreadable(error) from error


def wanted(name: str) -> bool:
    """Whether a person put it there: no ``._`` twin, ``.ipynb_checkpoints``, ``Thumbs.db``."""
    return not name.startswith(".") and name.lower() not in LEFT_BEHIND


def unreadable(error: OSError) -> LabError:
    """What the system says of a file, in words that name it."""
    return LabError(
        f"{error.filename} cannot be read ({error.strerror}); it must be there, be a folder where "
        "one is expected, and allow reading"
    )


def there(path: Path) -> bool:
    """Whether a file exists, or a folder with something in it."""
    return bool(entries(path)) if path.is_dir() else path.exists()


def lines(path: Path) -> list[str]:
    """The first word of each line of a list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return [line.split()[0] for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise unreadable(error) from error
    except UnicodeDecodeError as error:
        raise LabError(f"{path} is no list of names in UTF-8 ({error}); save it as such") from error


def stems(folder: Path | str, *suffixes: str) -> dict[str, str]:
    """What stands before a suffix, in capitals or not -> the whole name, in the order of names.

    Raises:
        LabError: two files have the same stem.
    """
    found: dict[str, str] = {}
    for name in entries(folder):
        suffix = next((s for s in suffixes if name.lower().endswith(s.lower())), None)
        if suffix is None:
            continue
        stem = name[: -len(suffix)]
        if stem in found:
            raise LabError(f"{folder} holds both {found[stem]} and {name}, to which the same "
                           "picture or label would belong; rename or remove one")  # fmt: skip
        found[stem] = name
    return found


def located(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Paths as the files are spelled, whose suffix may be in capitals; and those of no file."""
    known: dict[str, dict[str, str]] = {}
    spelled, lost = [], []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in known:
            names = entries(folder) if os.path.exists(folder) else []
            known[folder] = {_plain(n): n for n in names} | {n: n for n in names}
        here = known[folder].get(name) or known[folder].get(_plain(name))
        spelled.append(os.path.join(folder, here) if here else path)
        if not here:
            lost.append(path)
    return spelled, lost


def _plain(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem + suffix.lower()


def read_csv(path: Path, columns: tuple[str, ...]) -> dict[int, dict[str, str]]:
    """Rows of a table that has these columns, by their line in the file.

    Blanks around cells, capitals in the first line, empty lines and a byte order mark do not count.

    Raises:
        LabError: not there, no comma-separated table in UTF-8, a column is missing or twice there,
            or a row has more cells than the first line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Strict: an open quote would swallow the lines that follow.
            reader = csv.reader(file, skipinitialspace=True, strict=True)
            cells = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except FileNotFoundError:
        raise LabError(f"{path} is missing; it lists the classes ({', '.join(columns)})") from None
    except OSError as error:
        raise unreadable(error) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise LabError(
            f"{path} is not a UTF-8 comma-separated table ({error}); save it as one, with quotes "
            "around what has commas or quotes in it"
        ) from error
    (_, first), *rest = [(line, row) for line, row in cells if any(row)] or [(1, [])]
    header = [name.lower() for name in first]
    if wrong := [name for name in columns if header.count(name) != 1]:
        found = "no column" if wrong[0] not in header else "more than one column"
        raise LabError(
            f"{path} has {found} {wrong[0]!r}; its first line must name it once, with commas "
            f"between the names, but is {','.join(first)!r}"
        )
    for line, row in rest:
        if any(row[len(header) :]):
            raise LabError(
                f"{path}, line {line}: {','.join(row)!r} has more cells than the first line; put "
                "quotes around what has a comma in it"
            )
    padding = [""] * len(header)
    return {line: dict(zip(header, row + padding, strict=False)) for line, row in rest}


def named_root(key: str, given: str | Path | None) -> tuple[str, str]:
    """The folder that is asked for a data set's, and what names it: ``data_root`` or a variable.

    Both are "" where nothing does.
    """
    sources = {"data_root": given} | {v: os.environ.get(v) for v in _variables(key)}
    return next(((str(value), source) for source, value in sources.items() if value), ("", ""))


def _variables(key: str) -> tuple[str, ...]:
    return DATA_VARIABLES[:1] if key == "folder" else DATA_VARIABLES


def find_root(key: str, given: str | Path | None, layout: str) -> Path:
    """The folder of a data set that :func:`named_root` tells."""
    value, source = named_root(key, given)
    if not value:
        others = " or ".join(_variables(key))
        raise LabError(f"dataset={key!r} needs data_root (or the variable {others}): {layout}")
    folder = at_home(value)
    if not folder.is_dir():
        raise LabError(f"{source}={value} is not a folder: {layout}")
    return folder


def find_pictures(text: str) -> list[Path]:
    """The files that a text names: paths, folders and patterns with ``*``, parted by spaces.

    What has spaces in it goes in quotes. A folder stands for the pictures in it, by name.

    Raises:
        LabError: one that leads to no picture.
    """
    try:
        whole = os.path.exists(os.path.expanduser(text))  # False for a list longer than a name
        parts = [text] if whole else shlex.split(text)
    except ValueError as error:
        raise LabError(f"pictures={text!r}: {error}; quote what has spaces in it") from error
    found: dict[Path, None] = {}
    for part in parts:
        path = at_home(part)
        if path.is_dir():
            some = [path / n for n in entries(path) if n.lower().endswith(PICTURES)]
            if not some:
                raise LabError(f"{path} holds no picture ({', '.join(PICTURES)}); name another")
        else:
            there = next(p for p in (path, *path.parents) if os.path.exists(p))
            pattern = str(path.relative_to(there))  # a folder that is there is no pattern
            some = [there / p for p in sorted(glob.glob(pattern, root_dir=there, recursive=True))]
            some = [path] if path.is_file() else [p for p in some if p.is_file() and wanted(p.name)]
        if not some:
            raise LabError(
                f"there is no picture {path} (looked for in {Path.cwd()}); pictures= takes files, "
                "folders and patterns, with quotes around what has spaces in it"
            )
        found |= dict.fromkeys(some)
    return list(found)


def shards(path: Path) -> list[Path]:
    """The files of weights that an index of several names ("weight_map"); none for other files."""
    with path.open("rb") as file:
        if file.read(1) != b"{":
            return []
    try:
        files = json.loads(path.read_bytes())["weight_map"].values()
        return [path.parent / name for name in dict.fromkeys(files)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def href(path: Path | str) -> str:
    """A relative path as a link says it, in which every letter and byte keeps its meaning."""
    return quote(os.fsencode(path))


def linked(link: str) -> str:
    """The path that :func:`href` made ``link`` of."""
    return os.fsdecode(unquote_to_bytes(link))
