"""What a grid of notebooks will cost, before anything is paid: hours, memory and disk, run by run.

A plan lists the very stages that the notebooks will ask for. So one that several runs share is
counted once, in the run that comes first, and one that has finished counts nothing.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import pandas as pd
import torch

from ..costs import step_costs
from ..errors import LabError
from ..experiments import Recipe, framework_options
from ..files import looking_once
from ..heads import build
from ..records import load, runs_root
from ..report import number
from .estimate import REGIONS, Work, step_macs, work_of
from .grids import Job

RUN_BYTES = 2e6  # of a run's notebook, page and figures; measured on the demo
ASSUMPTIONS = (
    "Only training and evaluation count: not reading pictures from disk, alpha, figures, start-up,",
    "  nor the second evaluation in which FC-CLIP's two classifiers are taken apart.",
    "MACs are dense and of all layers: plain torch multiplies zeros, and frozen layers may save.",
    f"Algorithm 1's teacher sees {REGIONS} crops a batch, the most there can be, and forgets them.",
    "Evaluation pictures are 4:3 with the parameter size as their shorter side.",
    "Memory is float32, without the libraries' own; bf16 takes about half of what grows with size.",
    "Disk is what stays; while a model trains, its checkpoint takes three times its size more.",
)


@looking_once()
def plan(jobs: Sequence[Job], macs_per_second: float) -> pd.DataFrame:
    """What is left to do of ``jobs`` and what it takes: one line a job, in order.

    Args:
        macs_per_second: multiply-accumulates that one device does in training.

    Returns:
        notebook, parameters (the given ones), stages (left), pictures (trained on), macs, hours (of
        one device), memory and disk (bytes; memory of the largest stage).

    Raises:
        LabError: as ``estimate.work_of``.
    """
    seen, rows = set(), []
    for job in jobs:
        done = load(job.folder)
        new = {} if done else {w.folder: w for w in work_of(job) if not w.finished}
        left = [work for folder, work in new.items() if folder not in seen]
        seen |= new.keys()
        macs = sum(work.macs for work in left)
        rows.append({
            "notebook": job.notebook.stem, "parameters": dict(job.parameters),
            "stages": len(left), "pictures": sum(work.pictures for work in left),
            "macs": macs, "hours": macs / macs_per_second / 3600,
            "memory": max((work.memory for work in left), default=0),
            "disk": sum(work.disk for work in left) + (0 if done else RUN_BYTES),
        })  # fmt: skip
    return pd.DataFrame(rows)


def reference(jobs: Sequence[Job]) -> Work:
    """The first stage of ``jobs`` that fine-tunes: what a throughput in pictures speaks of.

    Where they only prune, a fine-tuning of DeepLabV3 with the same CLIP.

    Raises:
        LabError: they train nothing.
    """
    works = [work for job in jobs for work in work_of(job)]
    if not works:
        raise LabError("no notebook of this grid trains anything, so there is nothing to plan")
    tuned = next((work for work in works if work.recipe), None)
    preset = "mini" if works[0].lab.backbone == "mini" else "paper"
    return tuned or replace(works[0], kind="segment", recipe=Recipe(preset=preset))


def measured(work: Work) -> tuple[float, str]:
    """Training pictures a second of ``work``'s framework on this device, and what was measured.

    Real steps with random weights on scenes of the real size: on a GPU with a device's share of the
    batch, or as many halves of it as it takes to fit; on a CPU with two pictures.

    Raises:
        LabError: not even two pictures fit.
    """
    recipe, size = work.recipe, work.lab.size
    lab = replace(work.lab, checkpoint="random", dataset="scenes", data_root="", jitter=False,
                  pool=0, targets="fresh")  # fmt: skip
    backbone = lab.load()
    device = next(backbone.parameters()).device
    batch_size = max(2, recipe.batch_size // lab.devices) if device.type == "cuda" else 2
    model = build(recipe.framework, backbone, recipe.preset, **framework_options(lab, recipe))

    def steps(batch_size: int) -> float:
        batch = next(lab.batches(batch_size, recipe.seed)(0))
        found = step_costs(
            model, lambda b: model.loss(model(b["images"]), b), batch, {"none": []}, 3, device,
            recipe.precision,
        )  # fmt: skip
        return float(found["images_per_second"].iloc[0])

    speed, batch_size = _fitting(steps, batch_size)
    told = f"measured here ({device.type}, {batch_size} pictures of {size} px a step, 3 steps)"
    return speed, told


def _fitting(steps: Callable[[int], float], batch_size: int) -> tuple[float, int]:
    """What ``steps`` gives for this batch, or for the largest half of halves of it that fits."""
    while True:
        try:
            return steps(batch_size), batch_size
        except torch.OutOfMemoryError as error:
            if batch_size <= 2:
                raise LabError(
                    "not even two pictures of a training step fit into this device's memory; give "
                    "--images-per-second, or a smaller size"
                ) from error
            batch_size = max(2, batch_size // 2)


@looking_once()
def past_speed(jobs: Sequence[Job]) -> float:
    """MACs a second of the finished fine-tunings of ``jobs`` (their median); NaN without any."""
    speeds = []
    for work in {w.folder: w for job in jobs for w in work_of(job) if w.finished}.values():
        if work.recipe:
            result = json.loads((work.folder / "result.json").read_bytes())["result"]
            speeds.append((result.get("images_per_second") or math.nan) * step_macs(work))
    speeds = [speed for speed in speeds if speed == speed]
    return median(speeds) if speeds else math.nan


def describe_plan(table: pd.DataFrame) -> str:
    """The plan as text: a line a job, the totals, and where it all will lie."""
    shown = pd.DataFrame({"run": table["notebook"]})
    differ = pd.DataFrame(list(table["parameters"]), dtype=object)  # 300 stays 300 beside none
    for name in differ.columns[differ.astype(str).nunique() > 1]:
        shown[name] = differ[name].where(differ[name].notna(), "")
    shown["stages"] = table["stages"]
    shown["pictures"] = table["pictures"].map("{:,}".format)
    shown["PMACs"] = (table["macs"] / 1e15).map(number)
    shown["hours"] = table["hours"].map("{:,.2f}".format)
    shown["peak GB"] = (table["memory"] / 1e9).map("{:.1f}".format)
    shown["disk GB"] = (table["disk"] / 1e9).map("{:.2f}".format)
    hours, macs = table["hours"], table["macs"].sum() / 1e15
    total = (
        f"in all: {hours.sum():,.1f} hours of one device ({number(macs)} PMACs, "
        f"{table['pictures'].sum():,} training pictures), the longest run {hours.max():,.1f} h; "
        f"at most {table['memory'].max() / 1e9:.1f} GB of memory; "
        f"{table['disk'].sum() / 1e9:.2f} GB under {runs_root()}"
    )
    return f"{shown.to_string(index=False)}\n{total}"
