"""Where to compute, and with which seed: decided once, the same everywhere."""

from __future__ import annotations

import random

import numpy as np
import torch

from .errors import LabError


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


def bf16_pays(device: torch.device) -> bool:
    """True where bfloat16 matrix products have hardware of their own (recent GPUs and CPUs)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
