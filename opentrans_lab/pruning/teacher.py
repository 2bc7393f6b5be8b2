"""L_KD's teacher: what the frozen dense CLIP says of a picture's regions, computed once.

Its embedding of a crop depends on nothing but its weights, the picture, the region and the rule of
the crop, so it is looked up by these: rounds, seeds and ablations ask for the same ones again and
again. A picture's regions are embedded together and by themselves, in float32, when the first of
them is asked for: what is found does not depend on who asked first.

In training on files a picture is flipped, scaled and cut. The target is that of the region in the
picture as it is, at its training size; ``targets="fresh"`` takes the crop from what is shown, each
time. Of pictures that a batch does not name, every target is fresh.

On disk a picture is one safetensors file of float32. Half precision would move an embedding by
2e-4 of its length (the mini CLIP's, measured) and save half of little.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checks import choose
from ..clip import Backbone, frozen_copy
from ..data import Sample
from ..files import atomic_path
from .losses import crop_regions, crop_rule

TARGETS = ("cached", "fresh")
MEMORY, DISK = 2e9, 8e9  # bytes of one teacher's targets; COCO's of RN50 are about 5.5e9


class Teacher:
    """A frozen copy of ``clip`` and its targets.

    Args:
        targets: ``"cached"``, or ``"fresh"`` for no cache.
        folder: where targets are kept for other processes and for later, below a key of the
            weights and the rule of the crop. Several may write there at once, and be killed.
            Without one they last as long as this object.
        memory, disk: bytes at most, of embeddings held and of files here. What does not fit is
            computed again.

    Raises:
        LabError: unknown ``targets``.
    """

    def __init__(
        self,
        clip: Backbone,
        targets: str = "cached",
        folder: Path | None = None,
        memory: float = MEMORY,
        disk: float = DISK,
    ) -> None:
        choose("targets", targets, TARGETS)
        self.clip = frozen_copy(clip).to(memory_format=torch.channels_last)
        self.fresh = targets == "fresh"
        self.memory, self.disk = memory, disk
        self._held: dict[str, tuple[list[int], Tensor]] = {}  # by content, the oldest first
        self._bytes, self._written = 0, None
        self._folder = None if folder is None or self.fresh else Path(folder) / self._key()

    @classmethod
    def of(cls, teacher: Teacher | Backbone) -> Teacher:
        """``teacher`` itself, or one with this CLIP, which remembers in memory alone."""
        return teacher if isinstance(teacher, Teacher) else cls(teacher)

    @torch.no_grad()
    def __call__(self, batch: dict, masks: list[Tensor], chosen: list[Tensor]) -> Tensor:
        """Targets (R, D), float32, unit length, of some regions of a batch.

        Args:
            batch: as ``loader`` describes it. masks: of each picture those that count, (K, H, W).
            chosen: of each picture their places (K,) among its masks, on the CPU.
        """
        images = batch["images"]
        self.clip.to(images.device)
        if self.fresh or "samples" not in batch:
            return self._embed(images, masks)
        rows, found, first = [], [], 0
        for sample, places in zip(batch["samples"], chosen, strict=True):
            ids, targets = self._look(sample, batch)
            at = {region: first + row for row, region in enumerate(ids)}
            wanted = sample.regions[places.numpy()].tolist()
            rows.append(torch.tensor([at.get(i, -1) for i in wanted], dtype=torch.int64))
            found.append(targets)
            first += len(ids)
        nothing = images.new_zeros(1, self.clip.embed_dim)  # row -1
        target = torch.cat([*found, nothing])[torch.cat(rows).to(images.device)]
        # A region may be too small to be seen in the whole picture: it is taught as it is shown.
        small = [(row < 0).nonzero().flatten() for row in rows]
        if any(map(len, small)):
            cut = [m[s.to(m.device)] for m, s in zip(masks, small, strict=True)]
            where = (torch.cat(rows) < 0).nonzero().flatten().to(images.device)
            target[where] = self._embed(images, cut)
        return target

    def _embed(self, images: Tensor, masks: list[Tensor]) -> Tensor:
        return self.clip.embed(crop_regions(images, masks, self.clip.image_size))

    def _look(self, sample: Sample, batch: dict) -> tuple[list[int], Tensor]:
        """Region ids of a picture and their embeddings: from memory, from disk, or computed."""
        content, device = sample.content, batch["images"].device
        if content in self._held:
            return self._held[content]
        path = self._folder and self._folder / content[:2] / f"{content}.safetensors"
        entry = _read(path) if path else None
        if entry is None:
            if self._written is None:
                self._announce(batch)
            whole = sample.whole()
            ids = torch.as_tensor(whole["regions"])
            image = whole["image"].to(device).float().div_(255)[None]
            masks = whole["segments"].to(device) == ids.to(device)[:, None, None]
            with torch.autocast(device.type, enabled=False):
                entry = {"regions": ids, "targets": self._embed(image, [masks])}
            if path:
                self._write(path, entry)
        found = entry["regions"].tolist(), entry["targets"].to(device)
        self._held[content] = found
        self._bytes += found[1].nbytes
        while self._bytes > self.memory and len(self._held) > 1:
            self._bytes -= self._held.pop(next(iter(self._held)))[1].nbytes
        return found

    def _key(self) -> str:
        """What embeddings depend on beside the picture: the weights and the crop."""
        found = hashlib.sha256(crop_rule(self.clip.image_size).encode())
        for name, tensor in self.clip.visual.state_dict().items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return found.hexdigest()[:20]

    def _announce(self, batch: dict) -> None:
        """Before the first is computed: where they go, and how large that will be."""
        self._written = _survey(self._folder) if self._folder else 0
        regions = sum(len(sample.regions) for sample in batch["samples"]) / len(batch["samples"])
        about = 4 * self.clip.embed_dim * regions * batch["length"] / 1e6
        most, where = (self.disk, self._folder) if self._folder else (self.memory, "memory")
        print(f"targets of {batch['length']:,} pictures: {about:,.1f} MB in {where}, at most "
              f"{most / 1e6:,.0f} MB")  # fmt: skip

    def _write(self, path: Path, entry: dict[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in entry.values())
        if self._written + size > self.disk:
            return
        self._written += size
        with suppress(FileNotFoundError), atomic_path(path) as partial:
            save_file({name: tensor.cpu().contiguous() for name, tensor in entry.items()}, partial)


def _read(path: Path) -> dict[str, Tensor] | None:
    """What a file holds; nothing where there is none, or a full disk has left a stump."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None


def _survey(folder: Path) -> int:
    """Bytes in the folder. What killed processes were writing goes; one that lives and writes just
    now finds it gone, and has its targets all the same."""
    for path in folder.glob("*/.*"):
        path.unlink(missing_ok=True)
    return sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
