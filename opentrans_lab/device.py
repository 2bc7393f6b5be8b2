"""Where to compute, and with which seed: decided once, the same everywhere."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from .checks import choose
from .errors import LabError

PRECISIONS = ("auto", "bf16", "fp32")


def pick(device: str | torch.device = "auto") -> torch.device:
    """The device to use: ``"auto"`` takes a CUDA GPU, else Apple's MPS, else the CPU.

    Raises:
        LabError: the named device does not exist here.
    """
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LabError(f"device {device!r} is not usable here; use 'auto' or 'cpu'") from error
    return torch.device(device)


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether training multiplies in bfloat16: with "auto" where the hardware has products of its
    own for it (recent GPUs and CPUs).

    Raises:
        LabError: an unknown precision.
    """
    choose("precision", precision, PRECISIONS)
    return precision == "bf16" or (precision == "auto" and _bf16_pays(device))


def _bf16_pays(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def memory_format(device: torch.device, side: int) -> torch.memory_format:
    """How maps of pictures of ``side`` pixels lie best: channels last, except for large ones on a
    CPU that has AVX2 and no more: there the gradient of a convolution over wide maps takes twice as
    long that way."""
    avx2 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return torch.contiguous_format if avx2 and side >= 256 else torch.channels_last


@contextmanager
def float32() -> Iterator[None]:
    """Within it, also as a decorator, new tensors are float32, whatever the user's default is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def full_precision(x: Tensor) -> AbstractContextManager:
    """No autocast where ``x`` is; shapes alone (the meta device) know none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
