"""CLIP weights from wherever they are: tags of open_clip, cached or fetched, and files."""

from __future__ import annotations

import urllib.request
import warnings
import zipfile
from pathlib import Path

import torch
from huggingface_hub import constants, try_to_load_from_cache
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.pretrained import download_pretrained
from safetensors.torch import load_file
from torch import Tensor

from .errors import LabError

OPENAI_KEYS = ("input_resolution", "context_length", "vocab_size")  # only in OpenAI's own files
PATIENCE = 10  # seconds to wait for a server before the next one is tried


def fetch(name: str, tag: str, known: dict) -> Path:
    """The file of the open_clip tag ``known``: from the caches, else from its hub or its address.

    Raises:
        LabError: not cached and neither server answers; says what to fetch, and how to use it.
    """
    repository = known["hf_hub"].rstrip("/")
    for file in (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME):
        if isinstance(path := try_to_load_from_cache(repository, file), str):
            return Path(path)
    hub, address = f"{constants.ENDPOINT}/{repository}", known["url"]
    old = Path("~/.cache/clip").expanduser() / Path(address).name  # where OpenAI's package keeps it
    for source in (address, hub) if old.is_file() else (hub, address):
        try:
            if source == hub or not old.is_file():  # ask first: the hub's client retries for long
                question = urllib.request.Request(source, method="HEAD")
                urllib.request.urlopen(question, timeout=PATIENCE).close()
            return Path(download_pretrained(known, prefer_hf_hub=source == hub))
        except (OSError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
    raise LabError(
        f"the weights {tag!r} of {name} are not in the cache and cannot be downloaded ({reason}); "
        f"fetch {address} (or {hub}) on another machine and use backbone='{name}-quickgelu', "
        "checkpoint=<path of the file>"
    )


def read(path: Path) -> tuple[dict[str, Tensor], bool]:
    """(state dict in float32, whether the file has OpenAI's form).

    Reads safetensors, TorchScript archives, and pickles of tensors alone (``weights_only``). Takes
    ``state_dict`` out of a training checkpoint, drops ``module.`` prefixes and what is no weight.

    Raises:
        LabError: the file is damaged or is no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            state, jit = load_file(path), False
        elif jit := _is_jit(path):
            with warnings.catch_warnings():  # OpenAI's files have this form, deprecated or not
                warnings.simplefilter("ignore", FutureWarning)
                state = dict(torch.jit.load(path, map_location="cpu").state_dict())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise whatever the broken bytes lead to
        raise LabError(
            f"{path} cannot be read as weights ({type(error).__name__}); it is damaged or holds "
            "more than tensors: fetch it again, or save its state dict alone"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise LabError(f"{path} holds no state dict; save model.state_dict() instead")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    openai = jit or all(key in state for key in OPENAI_KEYS)
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    return {k: v for k, v in state.items() if k not in (*OPENAI_KEYS, "attn_mask")}, openai


def _is_jit(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())
