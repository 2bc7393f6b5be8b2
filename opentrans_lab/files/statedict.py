"""Tensors out of foreign files, without building a model and without running what is in them."""

from __future__ import annotations

import json
import math
import re
import warnings
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open

from ..errors import LabError
from .outputs import at_home
from .paths import shards
from .prefixes import choose, flatten, fold_pruned, largest

if TYPE_CHECKING:  # else torch is imported where it is needed, see ``prefixes``
    from torch import Tensor

SPARSE = "opentrans-sparse-1"
_INERT = [  # what training scripts keep beside the weights; none of it runs anything
    Namespace, PosixPath, np.dtype, np.ndarray, *{type(np.dtype(c)) for c in "?bhilqBHILQefd"},
    *((getattr(np._core.multiarray, made), f"numpy.{core}.multiarray.{made}")
      for core in ("core", "_core") for made in ("scalar", "_reconstruct")),
]  # fmt: skip


def read_state_dict(
    path: str | Path, prefix: str = "", jit: bool = False, names: Collection[str] = ()
) -> dict[str, Tensor]:
    """The named tensors of one model in a file, on the CPU, in the file's dtypes and order.

    Reads what :func:`read_tensors` reads. Nested checkpoints ({"state_dict": …, "step": …}) are
    opened at the part with most of `names`, or without them with most matrices, and ``module.``
    prefixes are dropped. With `prefix` only the keys below it are kept, without it ("visual."), at
    whatever depth it lies. Weights pruned by torch.nn.utils.prune are given as they act. Where
    there are several copies, a warning says which is read; a moving average (EMA) comes last.

    Raises:
        LabError: missing or unreadable file, no tensors in it, or no key with that prefix.
    """
    state = _load(path, jit)
    tensors = flatten(state)
    if not tensors:
        raise LabError(f"{path} holds no state dict; save model.state_dict() instead")
    if prefix:
        prefix = prefix.rstrip(".") + "."
        counts = Counter(k[:at] for k in tensors if (at := f".{k}".find(f".{prefix}")) >= 0)
        if not counts:
            raise LabError(
                f"{path} has no key under {prefix!r}; its first is {next(iter(tensors))!r}"
            )
        above = choose(counts, path) + prefix
        kept = {k.removeprefix(above): v for k, v in tensors.items() if k.startswith(above)}
        return fold_pruned(kept)
    part = largest(state, path, names)
    return {re.sub(r"^(module\.)+", "", key): tensor for key, tensor in part.items()}


def read_tensors(path: str | Path, jit: bool = False) -> dict[str, Tensor]:
    """Every tensor of a file by its dotted name, as it is there, on the CPU.

    Reads safetensors (those of ``costs.save_sparse`` and the index of several files, too), pickles
    of tensors and plain values (``weights_only``, so no code of theirs runs) and, told to by `jit`,
    TorchScript archives, the form of OpenAI's files: loading one may run what is in it, so ask only
    for a CLIP. The content of a file tells its form, not its ending.

    Raises:
        LabError: no such file, no weights in it, or more than tensors.
    """
    return flatten(_load(path, jit))


def check_file(path: Path) -> bytes:
    """The first bytes of a file that may hold weights.

    Raises:
        LabError: there is none, or what lies there is known to be something else.
    """
    if path.is_dir():
        raise LabError(f"{path} is a folder; name the file of weights in it")
    if not path.is_file():
        raise LabError(f"{path} does not exist; give a .safetensors or .pt file")
    with path.open("rb") as file:
        head = file.read(512)
    what = ""
    if not head:
        what = "it is empty; fetch it again"
    elif head.startswith(b"version https://git-lfs"):
        what = "it is a pointer of Git LFS; fetch the file itself with `git lfs pull`"
    elif head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        what = "it is a web page that was saved in its place; download the file itself"
    if what:
        raise LabError(f"{path} cannot be read as weights: {what}")
    return head


def is_jit(path: Path) -> bool:
    """Whether a file is a TorchScript archive, the form in which OpenAI publishes CLIP."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor as (ceil(n / 8),) uint8, the first of eight in the highest bit."""
    import torch

    return torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool tensor of ``shape`` that :func:`pack_bits` packed."""
    import torch

    if len(packed) != -(-math.prod(shape) // 8):
        raise ValueError(f"{len(packed)} bytes for a shape of {list(shape)}")
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape))
    return torch.from_numpy(bits.view(bool)).view(*shape)


def _load(path: str | Path, jit: bool) -> Mapping:
    """What a file holds, whatever form it has."""
    path = at_home(path)
    try:
        head = check_file(path)
        state = _read(path, head, jit)
    except LabError:
        raise
    except Exception as error:  # readers raise whatever the broken bytes lead to
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise LabError(
                f"{path} cannot be read as weights: it holds more than tensors ({found[1]}), and "
                "reading that can run code; if you trust it, open it with the code it came from "
                "and save its state_dict() alone"
            ) from error
        raise LabError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is damaged, cut off or "
            "not written by torch.save or safetensors; fetch it or save it again"
        ) from error
    if not isinstance(state, Mapping):
        raise LabError(f"{path} holds no state dict; save model.state_dict() instead")
    return state


def _read(path: Path, head: bytes, jit: bool):
    import torch

    if head[8:9] == b"{":
        return _unpack(path)
    if head.startswith(b"{"):
        return _sharded(path)
    if is_jit(path):
        if not jit:
            raise LabError(
                f"{path} is a TorchScript archive, which holds code; save its state dict alone"
            )
        with warnings.catch_warnings():  # OpenAI's files have this form, deprecated or not
            warnings.simplefilter("ignore", FutureWarning)
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
    with torch.serialization.safe_globals(_INERT), path.open("rb") as file:  # torch reads endings
        return torch.load(file, map_location="cpu", weights_only=True)


def _sharded(path: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index ("model.safetensors.index.json") names."""
    files = shards(path)
    if not files:
        raise LabError(f"{path} is JSON and holds no weights; name the file of weights beside it")
    if missing := [file.name for file in files if not file.is_file()]:
        raise LabError(f"{path} names {missing[0]}, which is not beside it; fetch that, too")
    return {key: tensor for file in files for key, tensor in read_tensors(file).items()}


def _unpack(path: Path) -> dict[str, Tensor]:
    """A safetensors file, packed or not."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
    if meta.get("format") == SPARSE:
        for name, shape in json.loads(meta["shapes"]).items():
            kept = unpack_bits(tensors.pop(f"{name}|bits"), shape)
            values = tensors.pop(f"{name}|values")
            tensors[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(kept, values)
    return tensors
