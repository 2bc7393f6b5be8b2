"""What processes that share a batch must agree on: means over all of it, each picture's chance.

With these a loss is the same whether one process sees the whole batch or many see a part each and
their gradients are averaged. In one process nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


def together() -> tuple[int, int]:
    """(rank, number of processes): (0, 1) without ``torchrun``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def wait() -> None:
    """Until all processes have come here."""
    if together()[1] > 1:
        dist.barrier()


def average(count: Tensor) -> Tensor:
    """The mean of a number over the processes; no gradient."""
    count = count.detach().clone()
    processes = together()[1]
    if processes > 1:
        dist.all_reduce(count)
        count /= processes
    return count


def same_buffers(model: nn.Module) -> None:
    """The first process's buffers for all: each has normalised its own part of the last batch."""
    for buffer in model.buffers() if together()[1] > 1 else ():
        dist.broadcast(buffer, 0)


def shared_mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """This process's part of the (weighted) mean over everyone's ``values`` (N, …); 0 of nothing.

    Further axes stay: a mean for each.

    The mean of the parts over the processes, which averaged gradients take, is the mean of all.
    """
    if weights is None:
        weights = torch.ones_like(values)
    total = average(weights.sum(0))
    return (values * weights).sum(0) / torch.where(total > 0, total, 1)


def gathered(values: Tensor) -> Tensor:
    """Everyone's ``values`` (N,), which may differ in length, on the CPU."""
    rank, processes = together()
    parts: list = [None] * processes
    parts[rank] = values.cpu()
    if processes > 1:
        dist.all_gather_object(parts, parts[rank])
    return torch.cat(parts)


def picture_seeds(seed: int, step: int, count: int) -> list[int]:
    """A seed for each of the ``count`` pictures of a step's whole batch."""
    return np.random.SeedSequence([seed, step]).generate_state(count, np.uint64).tolist()


class Chance:
    """Random numbers that belong to pictures: picture i's follow from its seed alone.

    Args:
        seeds: one a picture; without any, all draw from torch's own generator.
    """

    def __init__(self, seeds: Sequence[int] | None, device: torch.device) -> None:
        self.device = device
        self.own = None
        if seeds is not None:
            self.own = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def rand(self, rows: Sequence[int], *shape: int) -> Tensor:
        """Uniform numbers (sum of rows, *shape), of which picture i draws the next rows[i]."""
        if self.own is None:
            return torch.rand(sum(rows), *shape, device=self.device)
        parts = [
            torch.rand(n, *shape, device=self.device, generator=generator)
            for n, generator in zip(rows, self.own, strict=True)
        ]
        return torch.cat(parts)
