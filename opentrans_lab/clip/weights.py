"""CLIP weights from wherever they are, tags of open_clip or files, into open_clip's own model."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import open_clip
from huggingface_hub import constants, try_to_load_from_cache
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.model import CLIP
from open_clip.pretrained import download_pretrained
from torch import Tensor

from ..errors import LabError
from ..files import below, computed, fold_pruned, is_jit, prefixes, read_tensors

OPENAI_KEYS = ("input_resolution", "context_length", "vocab_size")  # only in OpenAI's own files
PATIENCE = 10  # seconds to wait for a server before the next one is tried
RESNETS = {
    name: config
    for name in open_clip.list_models()
    if isinstance((config := open_clip.get_model_config(name))["vision_cfg"].get("layers"), list)
}
"""open_clip model configs of its CLIP ResNets, by name."""


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
    """(all tensors of a file that holds a CLIP, whether the file has OpenAI's form).

    Raises:
        LabError: see :func:`read_tensors`.
    """
    tensors = fold_pruned(read_tensors(path, jit=True))
    openai = {key.rpartition(".")[2] for key in tensors}.issuperset(OPENAI_KEYS)
    return tensors, openai or is_jit(path)


def fill(clip: CLIP, tensors: dict[str, Tensor], name: str, path: Path) -> None:
    """Load every weight into ``clip``, wherever a CLIP lies among the ``tensors`` of a file.

    Raises:
        LabError: they do not fit; says which do not, and which backbone would.
    """
    ours = clip.state_dict()
    needed = {key: value for key, value in ours.items() if "num_batches" not in key}
    prefix, state = below(tensors, needed, path)
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(())
    wrong = [f"no {prefix}{key}" for key in needed if key not in state]
    tops = {key.split(".")[0] for key in ours}  # what lies beside them is not CLIP's
    wrong += [f"unknown {prefix}{k}" for k in state if k not in ours and k.split(".")[0] in tops]
    wrong += [
        f"{prefix}{key} {tuple(value.shape)} instead of {tuple(ours[key].shape)}"
        for key, value in state.items()
        if key in ours and value.shape != ours[key].shape
    ]
    wrong += [
        f"{prefix}{key} of {state[key].dtype}, not floating point"
        for key in needed
        if key in state and not state[key].is_floating_point()
    ]
    if wrong:
        _other_form(tensors, prefix, needed, path)
        fits = _architecture(state)
        remedy = f"use backbone={fits!r}" if fits not in (None, name) else f"use weights of {name}"
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise LabError(f"{path} does not fit {name} ({'; '.join(wrong[:3])}{more}); {remedy}")
    clip.load_state_dict(state, strict=False)


def _other_form(tensors: dict[str, Tensor], prefix: str, needed: dict, path: Path) -> None:
    """Refuse a file whose weights are these, but parametrised, or the image tower alone."""
    made = computed(tensors)
    if remedy := next((made[prefix + key] for key in needed if prefix + key in made), None):
        raise LabError(
            f"{path} holds what weights are computed from, not the weights: make them plain in the "
            f"model that it came from, each layer with {remedy}, and save its state_dict() again"
        )
    tower = {k.removeprefix("visual.") for k in needed if k.startswith("visual.")}
    for above, count in prefixes(tensors, tower).items():
        if count == len(tower) and not f".{above}".endswith(".visual."):
            raise LabError(
                f"{path} holds CLIP's image tower alone: load a whole CLIP, and then "
                f"backbone.visual.load_state_dict(read_state_dict({str(path)!r}, {above!r}))"
            )


def _architecture(state: dict[str, Tensor]) -> str | None:
    """The CLIP ResNet with this many blocks and channels, if there is one."""
    blocks = {tuple(key.split(".")[1:3]) for key in state if key.startswith("visual.layer")}
    layers = [sum(layer == f"layer{i}" for layer, _ in blocks) for i in (1, 2, 3, 4)]
    stem = state.get("visual.conv3.weight")
    for name, config in RESNETS.items():
        vision = config["vision_cfg"]
        if vision["layers"] == layers and stem is not None and len(stem) == vision["width"]:
            return name
    return None
