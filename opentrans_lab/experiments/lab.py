"""What experiments run on, and the cache that their stages share."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from filelock import FileLock, Timeout

from ..checks import Count, Must, Positive, check
from ..clip import Backbone, load_backbone
from ..data import load_dataset
from ..errors import OutOfTime, deadline
from ..files import atomic_path, entries
from ..pruning import TARGETS, Teacher
from ..records import (
    OfParameters,
    absolute,
    data_files,
    run_key,
    runs_root,
    weights,
    writable_runs,
)


@dataclass(frozen=True)
class Lab(OfParameters):
    """What every experiment runs on: the CLIP, the data, the picture size."""

    NEEDS: ClassVar = ("backbone", "checkpoint", "dataset", "data_root", "size", "device")

    backbone: str = "mini"
    checkpoint: str = ""
    """open_clip tag or path of the CLIP weights; empty for the mini CLIP."""
    dataset: str = "scenes"
    data_root: str = ""
    size: Annotated[int, Must("32 or more", lambda pixels: pixels >= 32)] = 128
    """Side of the training pictures in pixels (the paper: 512)."""
    device: str = "auto"
    jitter: bool = False
    """Large-scale jitter of the training pictures (data sets on disk)."""
    devices: Positive = 1
    """Processes that share each batch of a fine-tuning: GPUs of this machine, or parts of its
    CPU."""
    pool: Count = 1024
    """Scenes to train on, each drawn once and looked at by the teacher once; 0: without end."""
    targets: Annotated[str, TARGETS] = "cached"
    """Of L_KD, see ``teacher``: ``"fresh"`` ones are of the pictures as augmentation shows them."""

    def __post_init__(self) -> None:
        check(self)
        for name, value in absolute(vars(self)).items():  # a lab is where it was made
            object.__setattr__(self, name, value)

    @property
    def params(self) -> dict:
        """What the results depend on: contents of files and not their names, not the device."""
        known = asdict(self) | {"checkpoint": weights(self.backbone, self.checkpoint)}
        scenes = self.dataset == "scenes"  # drawn for size, never augmented
        if scenes:
            known["data_root"] = ""
        else:
            known["data files"] = data_files(self.dataset, self.data_root)
        usual = {
            "jitter": not self.jitter,
            "pool": not (scenes and self.pool),
            "targets": scenes or self.targets == "fresh",
        }
        unused = {"device", "devices"} | {key for key, nothing in usual.items() if nothing}
        return {key: value for key, value in known.items() if key not in unused}

    def load(self) -> Backbone:
        """A fresh dense CLIP backbone."""
        return load_backbone(self.backbone, self.checkpoint or None, device=self.device)

    def teacher(self, clip: Backbone) -> Teacher:
        """``clip`` as L_KD's teacher, whose targets lie beside the runs."""
        return Teacher(clip, self.targets, runs_root() / "targets")

    def data(self, split: str, **options):
        """A split of the data set."""
        return load_dataset(self.dataset, split, self.data_root or None, size=self.size, **options)

    def batches(self, batch_size: int, seed: int, limit: int | None = None) -> Callable:
        """``batches(start)`` of the training split for ``fit``.

        A folder without a split ``train`` is trained on what else it has beside ``val``, and a
        warning says so.
        """
        if self.dataset == "scenes":
            limit = limit or self.pool or None
        train = self.data(self._training_split(), limit=limit, jitter=self.jitter)
        return lambda start: train.batches(batch_size, seed=seed, start=start, device=self.device)

    def _training_split(self) -> str:
        images = Path(self.data_root) / "images"
        if self.dataset != "folder" or not images.is_dir() or (images / "train").exists():
            return "train"
        others = [n for n in entries(images) if n != "val" and (images / n).is_dir()]
        if not others:
            return "train"  # whose error names what there is
        warnings.warn(f"{images} has no train: {others[0]!r} is trained on", stacklevel=3)
        return others[0]


def stage_folder(stage: str, params: dict) -> Path:
    """Where the stage with these parameters is kept; it is finished if ``result.json`` is there."""
    return runs_root() / "stages" / stage / run_key(params)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process makes this stage.

    Raises:
        OutOfTime: the deadline has come while another one does.
    """
    lock, told = FileLock(folder.parent / f".{folder.name}.lock"), False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            if not told:
                print(f"waiting for {folder}, which another process makes …", flush=True)
            told = True
            if time.time() > deadline():
                raise OutOfTime(f"another process still makes {folder}") from None
    try:
        yield
    finally:
        lock.release()


def cached(stage: str, params: dict, work: Callable[[Path], dict]) -> tuple[Path, dict]:
    """``work(folder)``'s result, computed unless this stage has it; returns (folder, result).

    Processes that want the same stage wait for the first, and say so. What ``work`` leaves in
    ``folder/checkpoints`` goes when the result is on disk. The runner's ``--force`` sets
    ``OPENTRANS_FORCE`` to its own start (seconds since the epoch): older results are made anew.
    """
    folder = stage_folder(stage, params)
    done = folder / "result.json"
    writable_runs(folder.parent).mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)  # its removal was cut short
        since = float(os.environ.get("OPENTRANS_FORCE", 0))
        made = [done] if done.exists() else [p for p in folder.rglob("*") if p.is_file()]
        if made and max(path.stat().st_mtime for path in made) < since:
            folder.rename(old)  # at once: a half-removed stage would pass for a whole one
            shutil.rmtree(old)
        if not done.exists():
            folder.mkdir(exist_ok=True)
            try:
                result = {"parameters": params, "result": work(folder)}
            except BaseException:
                with suppress(OSError):
                    folder.rmdir()  # an empty folder says nothing; checkpoints stay
                raise
            with atomic_path(done) as path:
                path.write_text(json.dumps(result, indent=2), encoding="utf-8")
            now = max(time.time(), since)  # clocks jump, and those of file servers differ
            os.utime(done, (now, now))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # last: killed before, it goes on
    return folder, json.loads(done.read_bytes())["result"]
