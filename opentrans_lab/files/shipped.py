"""What travels with the library: the mini CLIP, class names, the paper's tables, notebooks."""

import os
import shutil
from importlib import resources
from pathlib import Path

from ..errors import LabError
from .outputs import at_home, writable_folder
from .paths import there


def shipped(path: str) -> Path:
    """A file or folder that travels with the library, such as ``"data/paper"`` or ``"notebooks"``.

    The same in a checkout, where these lie at the top, and in an installed wheel, which has copies.
    """
    return Path(str(resources.files("opentrans_lab").joinpath("_shipped", path))).resolve()


def copy_shipped(path: str, folder: Path) -> Path:
    """Copy what :func:`shipped` names into ``folder``, which must be new or empty; returns it.

    Raises:
        LabError: there is something already.
    """
    folder = writable_folder(folder)
    if folder.exists() and there(folder):
        raise LabError(f"{folder} is not empty; name a new folder: nothing of yours is overwritten")
    left_out = shutil.ignore_patterns(".*", "__pycache__")
    return Path(shutil.copytree(shipped(path), folder, ignore=left_out, dirs_exist_ok=True))


def mini_folder(checkpoint: str = "") -> Path:
    """Where the mini CLIP is: ``checkpoint``, ``$OPENTRANS_MINI_CLIP``, or the project's own."""
    named = checkpoint or os.environ.get("OPENTRANS_MINI_CLIP") or shipped("data/mini_clip")
    return at_home(named)
