"""CLIP weights from wherever they are: tags of open_clip, cached or fetched, and files."""

from __future__ import annotations

import urllib.request
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.pretrained import download_pretrained
from torch import Tensor

from .errors import LabError
from .statedict import is_jit, read_state_dict

OPENAI_KEYS = ("input_resolution", "context_length", "vocab_size")  # only in OpenAI's own files
PATIENCE = 10  # seconds to wait for a server before the next one is tried


def fetch(name: str, tag: str, known: dict) -> Path:
    """The file of the open_clip tag ``known``: from the caches, else from its hub or its address.

    Raises:
        LabError: not cached and neither server answers; says what to fetch, and how to use it.
    """
    repository, _, named = known["hf_hub"].rpartition("/")
    for file in (named,) if named else (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME):
        if isinstance(path := try_to_load_from_cache(repository, file), str):
            return Path(path)
    hub, address = f"{constants.ENDPOINT}/{repository}", known["url"]
    old = Path("~/.cache/clip").expanduser() / Path(address).name  # where OpenAI's package keeps it
    sources = [s for s in (address, hub) if s]  # many tags are on the hub alone
    for source in sources if old.is_file() else reversed(sources):
        try:
            if source == hub or not old.is_file():  # ask first: the hub's client retries for long
                question = urllib.request.Request(source, method="HEAD")
                urllib.request.urlopen(question, timeout=PATIENCE).close()
            return Path(download_pretrained(known, prefer_hf_hub=source == hub))
        except (OSError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
    quick = "-quickgelu" if known.get("quick_gelu") else ""
    raise LabError(
        f"the weights {tag!r} of {name} are not in the cache and cannot be downloaded ({reason}); "
        f"fetch {' or '.join(sources)} on another machine and name {name}{quick} with "
        "checkpoint=<path of the file> (on the command line: --checkpoint)"
    )


def read(path: Path) -> tuple[dict[str, Tensor], bool]:
    """(CLIP's state dict in float32, whether the file has OpenAI's form).

    Raises:
        LabError: see :func:`read_state_dict`.
    """
    state = read_state_dict(path, jit=True)
    openai = all(key in state for key in OPENAI_KEYS) or is_jit(path)
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    return {k: v for k, v in state.items() if k not in (*OPENAI_KEYS, "attn_mask")}, openai
