"""Is this data set whole? Every file opened, every label value looked at, one picture to see."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import IGNORE, load_dataset
from ..errors import LabError
from ..figures import compare
from ..files import atomic_path


@dataclass
class Checked:
    """What a look at one split found."""

    title: str
    images: int  # that could be read
    broken: list[tuple[str, str]]  # file and reason: missing, truncated, sizes or values wrong
    classes: pd.DataFrame = field(repr=False)  # id, name, seen, images, share (of the labelled)
    ignored: float = 0.0  # fraction of the pixels, 1 where none has a class
    sizes: Counter = field(default_factory=Counter, repr=False)  # (height, width) -> images
    missing: int = 0  # files
    shown: list[tuple[Tensor, Tensor, str]] = field(default_factory=list, repr=False)
    """Up to four images (3, h, w) in [0, 1] with their labels (H, W) int64 and files' names."""

    @property
    def fine(self) -> bool:
        return not self.broken and self.classes["images"].any()

    def __str__(self) -> str:
        never = self.classes.loc[self.classes["images"] == 0, "name"].tolist()
        few = ", ".join(never[:12]) + f" and {len(never) - 12} more" * (len(never) > 12)
        heights, widths = zip(*self.sizes, strict=True) if self.sizes else ((0,), (0,))
        lines = [
            self.title,
            f"  images read        {self.images}, {min(widths)} to {max(widths)} pixels wide, "
            f"{min(heights)} to {max(heights)} high",
            f"  pixels ignored     {self.ignored:.1%}",
            f"  classes            {len(self.classes)}, {int(self.classes['seen'].sum())} of them "
            "seen in segmentation training",
            f"  classes never seen {len(never)}" + f": {few}" * bool(never),
            f"  files missing      {self.missing}",
            f"  images not read    {len(self.broken)}",
        ]
        if not self.classes["images"].any():
            lines.append("  no pixel has a class, so there is nothing to train on or to measure; "
                         "compare the labels' values with the list of classes")  # fmt: skip
        lines += [f"    {reason}" for _, reason in self.broken[:20]]
        if len(self.broken) > 20:
            lines.append(f"    and {len(self.broken) - 20} more")
        return "\n".join(lines)

    def save_overlay(self, path: Path) -> None:
        """Write a picture of the images shown under their labels."""
        pictures, maps, files = zip(*self.shown, strict=True)
        figure = compare(pictures, {"labels": maps}, self.classes["name"].tolist(), files)
        with atomic_path(path) as partial:
            figure.savefig(partial, dpi=100, bbox_inches="tight")
        plt.close(figure)


def check(dataset: str, split: str = "val", root: str | Path | None = None) -> Checked:
    """Decode every image and label of a split.

    Raises:
        LabError: folders or lists are missing, so that nobody knows what should be there.
    """
    if dataset == "scenes":
        raise LabError(f"dataset={dataset!r} is made, not read: there are no files to check")
    data = load_dataset(dataset, split, root, on_error="skip")
    count = len(data.names)
    pixels = torch.zeros(count + 1, dtype=torch.int64)  # the last: ignored
    images, sizes, shown = torch.zeros(count, dtype=torch.int64), Counter(), []
    with tqdm(total=len(data), desc=f"check {dataset} {split}", unit="image") as bar:
        for batch in data.batches(1, train=False):
            labels = batch["labels"][0]
            counts = torch.bincount(
                torch.where(labels == IGNORE, count, labels).flatten(), minlength=count + 1
            )
            pixels += counts
            images += counts[:count] > 0
            sizes[tuple(labels.shape)] += 1
            if len(shown) < 4:
                shown.append((batch["images"][0], labels, batch["files"][0]))
            bar.update()
    labelled = max(int(pixels[:count].sum()), 1)
    table = pd.DataFrame({
        "id": range(count), "name": data.names, "seen": data.seen.tolist(),
        "images": images.tolist(), "share": (pixels[:count].double() / labelled).tolist(),
    })  # fmt: skip
    ignored = float(pixels[count] / max(int(pixels.sum()), 1))
    return Checked(data.title, sum(sizes.values()), data.skipped, table, ignored, sizes,
                   len(data.missing), shown)  # fmt: skip
