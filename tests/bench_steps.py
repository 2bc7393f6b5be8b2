"""Time training steps as ratios in one run: of a full-size CLIP RN50 with layers frozen, and of the
mini lab's L_KD with its targets looked up.

    python tests/bench_steps.py            (or: make bench)

The selections take turns. ``low_alpha`` is the paper's: the layers that its authors froze, their
batch normalisation trainable; ``prefix`` is stem and layer1 whole, where backward stops. Weights
are random and pictures are noise, for neither changes the time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import pandas as pd
import torch

from opentrans_lab.alpha import AUTHORS_FROZEN
from opentrans_lab.clip import load_backbone
from opentrans_lab.costs import savings, step_costs
from opentrans_lab.costs.counter import on_meta
from opentrans_lab.data import load_dataset
from opentrans_lab.device import pick
from opentrans_lab.files import atomic_path
from opentrans_lab.heads import build
from opentrans_lab.pruning.imp import PruneConfig, Student, distillation
from opentrans_lab.pruning.teacher import Teacher

AIM = 20.0  # percent of the trunk's step that a frozen prefix saves
LOOKED_UP = 2.5  # times faster an L_KD step is whose targets are looked up
SELECTIONS = {"none": [], "low_alpha": AUTHORS_FROZEN, "prefix": ["stem", "layer1"]}
NAMES = tuple(f"thing {i}" for i in range(20))


def trunk(images, size):
    """CLIP's tower alone, under a loss that reads its last map."""
    torch.manual_seed(0)
    model = load_backbone("RN50", "random", "cpu")
    return model, {"images": images}, lambda b: {"loss": model(b["images"])[-1].square().mean()}


def deeplabv3(images, size):
    """The tower dilated, under its ASPP and a loss on every pixel."""
    torch.manual_seed(0)
    model = build("deeplabv3", load_backbone("RN50", "random", "cpu"), "paper")
    labels = torch.randint(len(NAMES), (len(images), size, size))
    batch = {"images": images, "labels": labels, "names": NAMES}
    return model, batch, lambda b: model.loss(model(b["images"]), b)


def looked_up(count=28, repeats=5):
    """Seconds of an L_KD step of the mini lab, targets computed and looked up, in turns."""
    clip = load_backbone("mini")
    student = Student(clip).to(memory_format=torch.channels_last).train()
    batch = next(load_dataset("scenes", "train", limit=count).batches(count, device="auto"))
    taken = {"fresh": [], "cached": []}
    steps = {how: distillation(student, Teacher(clip, how), PruneConfig()) for how in taken}
    for _ in range(repeats + 1):  # the first ones warm up, and fill the cache
        for how, objective in steps.items():
            began = time.perf_counter()
            objective(student, batch)["loss"].backward()
            student.zero_grad()
            if pick().type == "cuda":
                torch.cuda.synchronize()
            taken[how].append(time.perf_counter() - began)
    return (median(seconds[1:]) for seconds in taken.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=0, help="0: 16 on a GPU, else 4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the table there, as CSV")
    asked = parser.parse_args()
    gpu = pick("auto").type == "cuda"
    size, count = asked.size, asked.batch_size or (16 if gpu else 4)
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    print(f"\na training step, {count} pictures of {size} pixels, {pick('auto')}")
    tables = []
    for make in (trunk, deeplabv3):
        model, batch, objective = make(images, size)
        framework = on_meta(model)
        found = step_costs(model, objective, batch, SELECTIONS, asked.repeats)
        table = savings(framework, SELECTIONS, found, size=(size, size))
        print(f"\n{make.__name__} (RN50); savings in percent of a step")
        print(table.drop(columns="energy_J").to_string(index=False, float_format="%.3g"))
        about = {"model": make.__name__, "size": size, "batch_size": count}
        device = f"{pick('auto')}, {torch.get_num_threads()} threads"
        tables.append(table.assign(**about, device=device))
        if make is trunk:
            saved = table.set_index("select")["step_saving"]["prefix"]
            print(f"stem and layer1 frozen whole: {saved:.1f} % saved (aim: {AIM:.0f} %)")
    fresh, cached = looked_up(repeats=asked.repeats)
    print(f"\nan L_KD step, mini, 28 pictures: {fresh:.2f} s with targets computed, {cached:.2f} s "
          f"looked up, {fresh / cached:.1f} times faster (aim: {LOOKED_UP})")  # fmt: skip
    if asked.out:
        with atomic_path(asked.out) as path:
            pd.concat(tables).to_csv(path, index=False)


if __name__ == "__main__":
    main()
