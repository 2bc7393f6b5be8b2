"""The k largest of many tensors: exactly k, ties by place, in little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from ..errors import LabError


def count(keep: float, total: int) -> int:
    """A number of weights, rounded where it was computed from a share (``0.1 * total``).

    Raises:
        LabError: no number, or the share itself.
    """
    if getattr(keep, "ndim", None) == 0:
        keep = keep.item()  # of torch or numpy
    if isinstance(keep, bool) or not isinstance(keep, Real) or not math.isfinite(keep):
        raise LabError(f"keep={keep!r} is no number of weights; give one from 1 to {total:,}")
    if not isinstance(keep, Integral) and 0 < keep <= 1:
        raise LabError(
            f"keep={keep} is a share and not a number of weights; of these it is "
            f"keep={round(keep * total)}"
        )
    return round(keep)


def top_k(
    tensors: Iterable[Tensor],
    keep: float,
    within: Sequence[Tensor | None] | None = None,
    score: Callable[[Tensor], Tensor] = torch.Tensor.float,
) -> list[Tensor]:
    """Exactly ``keep`` True, over all tensors, at the largest scores; of equal ones the earliest.

    ``keep`` is read by :func:`count`.

    Scores are made one tensor at a time, and twice, since all of them would double the memory.

    Args:
        within: bool tensors, where a weight may be kept at all (None: everywhere).
        score: tensor -> float32 of its shape.
    """
    tensors = [t.detach() for t in tensors]
    within = [None] * len(tensors) if within is None else within
    within = [m if m is None else m.to(t.device) for t, m in zip(tensors, within, strict=True)]
    keep = count(keep, sum(t.numel() for t in tensors))
    alive = [t.numel() if m is None else int(m.sum()) for t, m in zip(tensors, within, strict=True)]
    if not 0 <= keep <= sum(alive):
        raise LabError(f"cannot keep {keep:,} of {sum(alive):,} weights")
    pool = torch.empty(sum(alive), dtype=torch.float32, device=tensors[0].device)
    for part, t, m in zip(pool.split(alive), tensors, within, strict=True):
        part.copy_(score(t).flatten() if m is None else score(t).masked_select(m))
    if pool.isnan().any():
        raise LabError("the weights hold NaN, which has no rank; load a sound checkpoint")
    threshold = _kth_largest(pool, keep)
    left = keep - int((pool > threshold).sum())  # of those at the threshold, the first so many
    del pool
    chosen = []
    for t, m in zip(tensors, within, strict=True):
        scores = score(t).contiguous()  # of a channels_last weight, too
        best, tied = scores > threshold, scores == threshold
        if m is not None:
            best, tied = best & m, tied & m
        where = tied.flatten().nonzero().flatten()[:left]
        best.view(-1)[where] = True
        left -= len(where)
        chosen.append(best)
    return chosen


def _kth_largest(values: Tensor, k: int) -> float:
    """The k-th largest value, infinity for none; ``values`` lose their order.

    Numpy's partition in place is the fast and small one on a CPU.
    """
    if k == 0:
        return float("inf")
    place = len(values) - k
    if values.device.type == "cpu":
        values.numpy().partition(place)
        return float(values[place])
    return float(values.kthvalue(place + 1).values)
