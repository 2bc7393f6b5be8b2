"""What a run is made from beside its parameters: files of the data, of the weights, and pictures.

Keys of runs and of stages hold it, so that nothing counts as finished that would come out
otherwise. What of a file counts, says ``fingerprint``.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from ..errors import LabError
from ..files import digest, find_pictures, fingerprint, mini_folder, named_root, shards

SHIPPED = (
    "497a452f74d835aa651ae2da61a56d7a1f84bc3d8f0be94930356a90bec28d64",
    "4607e6b619c056164d733e447bc010df4930791d0fbeacf1ee02d2016fb8a166",
)
"""SHA-256 of the mini CLIP's weights and configuration that the published runs were made from, and
which their keys do not hold."""
TAGS = ("openai", "yfcc15m", "cc12m")  # open_clip's for its ResNets; importing it takes seconds


def absolute(params: dict) -> dict:
    """``params`` with absolute ``data_root`` and ``checkpoint``, as seen from the working folder.

    An empty ``data_root`` becomes the folder that a variable names.
    """
    found = dict(params)
    if _on_disk(params) and "data_root" in params:
        found["data_root"] = _real(named_root(params["dataset"], params["data_root"])[0])
    if _is_path(params.get("backbone"), checkpoint := params.get("checkpoint")):
        found["checkpoint"] = _real(checkpoint)
    return found


def made_from(params: dict) -> dict[str, str]:
    """What the files are that these :func:`absolute` parameters name, in a few digits each.

    Empty for the mini lab as it is published. The names have blanks, which no parameter has.
    """
    found: dict[str, str] = {}
    if _on_disk(params):
        found["data files"] = data_files(params["dataset"], params.get("data_root"))
    checkpoint = params.get("checkpoint") or ""
    if (content := weights(params.get("backbone"), checkpoint)) not in (checkpoint, SHIPPED[0]):
        found["weights file"] = content[:16]
    if isinstance(named := params.get("pictures"), str) and named:
        with suppress(LabError, OSError):  # the run will say so
            found["picture files"] = fingerprint(p.resolve() for p in find_pictures(named))
    return found


def identity(params: dict) -> dict:
    """All that decides a result and its key: ``params``, absolute, and what they are made from."""
    params = absolute(params)
    return params | made_from(params)


def data_files(dataset: str, data_root: str | Path | None) -> str:
    """A fingerprint of the files of a data set on disk, of all its splits."""
    from ..data import places  # needs torch, which runs of the mini lab need not wait for

    root = _real(named_root(dataset, data_root)[0])
    return fingerprint(os.path.join(root, place) for place in places(dataset) if root)


def weights(backbone: str | None, checkpoint: str) -> str:
    """SHA-256 of the weights (of a mini CLIP with its configuration, unless that is the shipped
    one); a tag, or a path that leads nowhere, as it is."""
    if backbone == "mini" and checkpoint != "random":
        folder = mini_folder(checkpoint)
        found, about = _content(folder / "model.safetensors"), digest(folder / "config.json")
        if found and about != SHIPPED[1]:
            return hashlib.sha256(f"{found} {about}".encode()).hexdigest()
    else:
        found = _content(Path(checkpoint).expanduser()) if _is_path(backbone, checkpoint) else ""
    return found or checkpoint


def _content(path: Path) -> str:
    """SHA-256 of a file of weights, with those that it names where it is an index of several."""
    found = digest(path)
    if found and (files := shards(path)):
        return hashlib.sha256(" ".join([found, *map(digest, files)]).encode()).hexdigest()
    return found


def _on_disk(params: dict) -> bool:
    return params.get("dataset", "scenes") != "scenes"


def _is_path(backbone: object, checkpoint: object) -> bool:
    """Whether ``load_backbone`` would look for a file or folder of this name."""
    if not isinstance(checkpoint, str | Path) or not checkpoint or checkpoint == "random":
        return False
    tag = str(checkpoint).lower().replace("-", "_") in TAGS
    return backbone == "mini" or (not tag and os.path.isfile(os.path.expanduser(checkpoint)))


def _real(path: str | Path) -> str:
    return os.path.realpath(os.path.expanduser(path)) if path else ""
