"""Tensors out of foreign files, without building a model and without running what is in them."""

from __future__ import annotations

import json
import math
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .errors import LabError

SPARSE = "opentrans-sparse-1"


def read_state_dict(
    path: str | Path, prefix: str = "", inside: str = "", jit: bool = False
) -> dict[str, Tensor]:
    """The named tensors of a file, on the CPU, in the file's dtypes and order.

    Reads safetensors (those of ``sparse.save_sparse`` too), pickles of plain tensors
    (``weights_only``, so no code of theirs runs) and, told to by `jit`, TorchScript archives, the
    form of OpenAI's files: loading one may run what is in it, so ask only for a CLIP. Nested
    checkpoints ({"state_dict": …, "step": …}) are opened, at the key `inside` if they have it, else
    down to the first level with matrices, and there the part with most of them; what is no tensor
    is left out, and a ``module.`` prefix is dropped. With `prefix` only the keys below it are kept,
    without it ("visual.").

    Raises:
        LabError: missing or unreadable file, no tensors in it, or no key with that prefix.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise LabError(f"{path} does not exist; give a .safetensors or .pt file")
    try:
        state = _read(path, jit)
    except LabError:
        raise
    except Exception as error:  # readers raise whatever the broken bytes lead to
        raise LabError(
            f"{path} cannot be read as weights ({type(error).__name__}); it is damaged or holds "
            "more than tensors: fetch it again, or save its state dict alone"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get(inside), Mapping):
        state = state[inside]
    level = [state] if isinstance(state, Mapping) else []
    while level and not any(map(_matrices, level)):
        level = [v for part in level for v in part.values() if isinstance(v, Mapping)]
    state = max(level, key=_matrices, default=state)
    named = state.items() if isinstance(state, Mapping) else ()
    tensors = {str(k).removeprefix("module."): v for k, v in named if isinstance(v, Tensor)}
    if not tensors:
        raise LabError(f"{path} holds no state dict; save model.state_dict() instead")
    kept = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if not kept:
        raise LabError(f"{path} has no key under {prefix!r}; its first is {next(iter(tensors))!r}")
    return kept


def _matrices(state: Mapping) -> int:
    return sum(isinstance(v, Tensor) and v.ndim > 1 for v in state.values())


def is_jit(path: Path) -> bool:
    """Whether a file is a TorchScript archive, the form in which OpenAI publishes CLIP."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor as (ceil(n / 8),) uint8, the first of eight in the highest bit."""
    return torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool tensor of ``shape`` that :func:`pack_bits` packed."""
    if len(packed) != -(-math.prod(shape) // 8):
        raise ValueError(f"{len(packed)} bytes for a shape of {list(shape)}")
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape))
    return torch.from_numpy(bits.view(bool)).view(*shape)


def _unpack(path: Path) -> dict[str, Tensor]:
    """A safetensors file, packed or not."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
    if meta.get("format") == SPARSE:
        for name, shape in json.loads(meta["shapes"]).items():
            kept = unpack_bits(tensors.pop(f"{name}|bits"), shape)
            values = tensors.pop(f"{name}|values")
            tensors[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(kept, values)
    return tensors


def _read(path: Path, jit: bool):
    if path.suffix == ".safetensors":
        return _unpack(path)
    if is_jit(path) and not jit:
        raise LabError(
            f"{path} is a TorchScript archive, which holds code; save its state dict alone"
        )
    if is_jit(path):
        with warnings.catch_warnings():  # OpenAI's files have this form, deprecated or not
            warnings.simplefilter("ignore", FutureWarning)
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
    return torch.load(path, map_location="cpu", weights_only=True)
