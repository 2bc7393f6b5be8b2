"""What is written: asked before the work whether it can be, then written whole or not at all."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import LabError

TABLES = (".csv", ".csv.gz", ".txt")
DRAWN = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf", ".svg", ".eps")
ELSEWHERE = "name another place"


def at_home(path: Path | str) -> Path:
    """``path`` with ``~`` expanded, which no shell does in ``--out=~/x``.

    Raises:
        LabError: nobody of that name has a home here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise LabError(f"{path}: whose home is meant is not known here; name it in full") from error


def writable(path: Path | str, named: str = "", suffixes: Sequence[str] = ()) -> Path:
    """``path`` with ``~`` expanded, once it is sure that a file can be written there.

    Args:
        named: what names it, such as "--out", for the message.
        suffixes: those that the writer knows; empty where any will do.

    Raises:
        LabError: a folder or a device is in the way, another suffix, or no place to write.
    """
    path = at_home(path)
    what = f"{named} {path}".strip()
    writable_folder(path.parent, named)
    try:
        if path.is_dir():
            raise LabError(f"{what} is a folder; name a file in it")
        if path.exists() and not path.is_file():
            raise LabError(f"{what} is no file that can be replaced; {ELSEWHERE}")
    except OSError as error:
        raise _refused(what, error, ELSEWHERE) from error
    if suffixes and not path.name.lower().endswith(tuple(suffixes)):
        raise LabError(f"{what} must end in {' or '.join(suffixes)}, which is what can be written")
    return path


def writable_folder(path: Path | str, named: str = "", remedy: str = ELSEWHERE) -> Path:
    """The same of a folder that files are to be written to; where it is not there, it can be made.

    Nothing is left behind: an unnamed file is opened where the first folder would be made.
    """
    path = found = at_home(path)
    try:
        while not (found.exists() or found.is_symlink()):
            found = found.parent
        with tempfile.TemporaryFile(dir=found):
            return path
    except OSError as error:
        raise _refused(f"{named} {path}".strip(), error, remedy) from error


def _refused(what: str, error: OSError, remedy: str) -> LabError:
    return LabError(f"{what} cannot be written ({error.strerror}); {remedy}")


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes ``path`` on success and vanishes on error.

    Readers see the old file or the new one, never a part. The suffix is kept, as writers look at
    it; folders are made.

    Raises:
        LabError: see :func:`writable`.
    """
    path = writable(path).resolve()  # a link stays, and what it leads to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = path.name[-40:]  # a name may be as long as the file system takes already
    tmp = path.with_name(f".{os.getpid()}-{time.monotonic_ns()}-{ending}")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def keep(
    path: Path, save: Callable[[Path], object], rescue: Callable[[Path], object] | None = None
) -> Path:
    """``save(path)`` for a result that took work: where that fails now, it is kept elsewhere.

    Args:
        rescue: writes it to another place, if ``save`` does not.

    Raises:
        LabError: says where it lies instead.
    """
    try:
        save(path)
    except Exception as error:  # a full disk, a value that a writer does not take
        try:
            spare = Path(tempfile.mkdtemp(prefix="opentrans-lab-")) / path.name
            (rescue or save)(spare)
        except Exception as other:
            raise LabError(f"{path} is not written ({error}), nor is a copy of it ({other}); make "
                           "space and do it again") from error  # fmt: skip
        raise LabError(f"{path} is not written ({error}); {spare} is, so copy that") from error
    return path
