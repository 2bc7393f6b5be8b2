"""Time the spectrum analysis on a full-size CLIP RN50 (random weights), as ratios in one run.

    python tests/bench_alpha.py            (or: make bench)

Everything that is timed runs in this process, one after the other, on the same weights; memory is
measured in fresh ones. WeightWatcher is an optional yardstick: without it its lines are left out
and said so. Times drift with the machine; the ratios are what counts. The fits of powerlaw double
as an exact check of ours.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import numpy as np
import open_clip
import powerlaw
import psutil
import torch
from torch import nn

from opentrans_lab.alpha import layers
from opentrans_lab.alpha.alphas import esd, fit_alpha, layer_alphas

POOL = ("attnpool",)  # not a convolution: 55 layers are the paper's tower

MEMORY = {"slices": {}, "with a shuffled control": {"control": "permute"},
          "with a Gaussian one": {"control": "gaussian"}, "fft": {"reshape": "fft"}}


def timed(work, repeats: int = 3) -> tuple[float, object]:
    """Best seconds of `repeats`, and the last result."""
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    return best, result


def rn50() -> nn.Module:
    """The tower, with LAPACK loaded before a clock runs."""
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    torch.linalg.eigvalsh(torch.eye(8, dtype=torch.float64))
    return open_clip.create_model("RN50", pretrained=None).visual


def first_fit(tower: nn.Module, **options):
    esd.CACHE.clear()
    return layer_alphas(tower, exclude=POOL, **options)


def line(what: str, seconds: float, ours: float | None = None, aim: str = "") -> None:
    ratio = f"{seconds / ours:7.1f} x ours   {aim}" if ours else ""
    print(f"{what:48s}{seconds:9.3f} s {ratio}", flush=True)


def extra_memory(work) -> float:
    """Peak of this process's memory while `work` runs, in MB over what it held before."""
    process, done, peak = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    gc.collect()
    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return (peak - before) / 1e6


def memory_of(options: dict) -> float:
    tower = rn50()
    return extra_memory(lambda: first_fit(tower, **options))


def main() -> None:
    warnings.simplefilter("ignore")
    tower = rn50()
    trunk = nn.ModuleDict({n.replace(".", "/"): m for n, m in tower.named_modules()
                           if isinstance(m, nn.Conv2d)})
    print(f"{len(trunk)} convolutions, {torch.get_num_threads()} threads")
    fresh = dict(mp_context=get_context("spawn"), max_tasks_per_child=1)  # freed memory stays held
    with ProcessPoolExecutor(1, **fresh) as pool:
        for what, extra in zip(MEMORY, pool.map(memory_of, MEMORY.values()), strict=True):
            print(f"peak memory over the weights, {what}: {extra:.0f} MB (goal: under 300)")
    print()

    ours, table = timed(lambda: first_fit(tower))
    refit, _ = timed(lambda: layer_alphas(tower, exclude=POOL))
    found = [layer for layer in layers(tower) if layer.name in set(table.name)]
    spectra = [eigs[eigs > 0] for eigs in esd.spectra(found)]
    scan, fits = timed(lambda: [fit_alpha(e) for e in spectra])
    line("whole tower, ours", ours)
    line("the same again, from cached eigenvalues", refit)
    print(f"{'':48s}first fit is {ours / refit:.1f} x the re-fit   (goal: 10)")
    line(f"xmin scan alone, {sum(map(len, spectra)):,} eigenvalues, ours", scan)

    if find_spec("weightwatcher"):
        import weightwatcher
        from weightwatcher.WW_powerlaw import WWFit

        with contextlib.redirect_stdout(io.StringIO()):
            loop, _ = timed(lambda: [WWFit(e) for e in spectra], repeats=2)
            watcher = weightwatcher.WeightWatcher(model=trunk)
            whole, details = timed(lambda: watcher.analyze(), repeats=2)
        line("xmin scan, WeightWatcher's loop", loop, scan, "(goal: 7)")
        line("whole tower, weightwatcher.analyze()", whole, ours, "(goal: 2.5, aim: 5)")
        both = table.set_index(table.name.str.replace(".", "/")).join(
            details.set_index("longname")[["alpha"]], rsuffix="_ww", how="inner")
        worst = (both.alpha / both.alpha_ww - 1).abs().max()
        print(f"{'':48s}alpha of {len(both)} layers agrees within {worst:.1e}")
    else:
        print("WeightWatcher is not installed (pip install weightwatcher): its lines are left out")

    reference, theirs = timed(lambda: [powerlaw.Fit(
        e, verbose=0, parameter_ranges={"alpha": [1, None]}) for e in spectra], repeats=1)
    line("xmin scan, powerlaw 2.0", reference, scan, "(goal: 60)")
    alpha = max(abs(a.alpha / b.power_law.alpha - 1) for a, b in zip(fits, theirs, strict=True))
    gap = max(abs(a.D - b.D) for a, b in zip(fits, theirs, strict=True))
    xmin = sum(a.xmin == b.xmin for a, b in zip(fits, theirs, strict=True))
    print(f"{'':48s}alpha within {alpha:.1e}, D within {gap:.1e}, xmin equal in {xmin}/{len(fits)}")


if __name__ == "__main__":
    main()
