"""What experiments run on, and the cache that their stages share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from .backbone import Backbone, load_backbone
from .data import load_dataset
from .results import atomic_path, run_key, runs_root


@dataclass(frozen=True)
class Lab:
    """What every experiment runs on: the CLIP, the data, the picture size."""

    backbone: str = "mini"
    checkpoint: str = ""
    """open_clip tag or path of the CLIP weights; empty for the mini CLIP."""
    dataset: str = "scenes"
    data_root: str = ""
    size: int = 128
    """Side of the training pictures in pixels (the paper: 512)."""
    device: str = "auto"

    @property
    def params(self) -> dict:
        """What the results depend on (not the device)."""
        return {key: value for key, value in asdict(self).items() if key != "device"}

    def load(self) -> Backbone:
        """A fresh dense CLIP backbone."""
        return load_backbone(self.backbone, self.checkpoint or None, device=self.device)

    def data(self, split: str, **options):
        """A split of the data set."""
        return load_dataset(self.dataset, split, self.data_root or None, size=self.size, **options)

    def batches(self, batch_size: int, seed: int, limit: int | None = None) -> Callable:
        """``batches(start)`` of the training split for ``fit``."""
        train = self.data("train", limit=limit)
        return lambda start: train.batches(batch_size, seed=seed, start=start, device=self.device)


def cached(stage: str, params: dict, work: Callable[[Path], dict]) -> tuple[Path, dict]:
    """``work(folder)``'s result, computed unless this stage has it; returns (folder, result).

    Processes that want the same stage wait for the first. The runner's ``--force`` sets
    ``OPENTRANS_FORCE`` to its own start (seconds since the epoch): older results are made anew.
    """
    folder = runs_root() / "stages" / stage / run_key(params)
    done = folder / "result.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        since = float(os.environ.get("OPENTRANS_FORCE", 0))
        if done.exists() and done.stat().st_mtime < since:
            shutil.rmtree(folder)
        if not done.exists():
            result = {"parameters": params, "result": work(folder)}
            with atomic_path(done) as path:
                path.write_text(json.dumps(result, indent=2))
    return folder, json.loads(done.read_text())["result"]
