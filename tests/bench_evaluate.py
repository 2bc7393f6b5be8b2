"""Scoring and counting of 847 classes at 640 x 640: how fast, beside torchmetrics' counting alone.

Every figure is a ratio of medians inside this run; run it with ``make bench``.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from opentrans_lab.device import pick
from opentrans_lab.evaluation import confusion, predict

CLASSES, SIDE, ROUNDS = 847, 640, 7


def seconds(work, device: torch.device) -> float:
    def once() -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    return median(once() for _ in range(ROUNDS))


def main() -> None:
    device = pick()
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(CLASSES, SIDE // 4, SIDE // 4, generator=generator).to(device)
    label = torch.randint(-1, CLASSES, (SIDE, SIDE), generator=generator).to(device)
    pred = predict(scores, (SIDE, SIDE))
    oracle = MulticlassConfusionMatrix(CLASSES, ignore_index=-1).to(device)
    theirs = seconds(lambda: oracle.update(pred, label), device)
    counting = seconds(lambda: confusion(pred, label, CLASSES), device)
    both = seconds(lambda: confusion(predict(scores, (SIDE, SIDE)), label, CLASSES), device)
    print(f"{CLASSES} classes at {SIDE} x {SIDE} on {device.type}, one picture")
    print(f"  counting            {theirs / counting:6.2f} x as fast as torchmetrics")
    print(
        f"  scoring + counting  {1 / both:6.2f} images/s, {theirs / both:.3f} x torchmetrics' "
        f"counting alone ({1 / theirs:.2f} images/s)"
    )


if __name__ == "__main__":
    main()
