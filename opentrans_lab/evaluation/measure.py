"""A trained model on any data set, for the command: what ``evaluate`` finds, as a table to read."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from ..checks import Count, Positive, checked
from ..data import load_dataset
from ..device import pick
from ..errors import LabError
from ..files import writable_folder
from ..records import run_key
from .evaluate import Window, evaluate
from .panoptic import evaluate_panoptic
from .segment import open_model

SHOWN = 30  # classes
PATH_CHECK = "a path check: the mini CLIP knows no photographs"


@dataclass
class Measured:
    """What an evaluation found."""

    text: str  # to be read: shares in percent
    table: pd.DataFrame  # one row a class, shares as fractions

    def __str__(self) -> str:
        return self.text


@checked
def measure(
    model: Path,
    dataset: str = "scenes",
    root: Path | None = None,
    split: str = "val",
    size: Count = 0,
    window: Window = 0,
    images: Count = 0,
    batch_size: Positive = 4,
    on_error: Literal["raise", "skip"] = "raise",
    panoptic: bool = False,
    checkpoint: Path | None = None,
    device: str = "auto",
) -> Measured:
    """Evaluate the model of a stage's folder, see the command's help.

    An interrupted mIoU goes on from where it was, if the folder can be written.

    Raises:
        LabError: no trained model, data that cannot be read, or no panoptic quality of this
            framework or data.
    """
    if panoptic and window:
        raise LabError("--panoptic looks at whole pictures: leave --window out")
    where = pick(device)
    network, _ = open_model(model, where, checkpoint)
    data = load_dataset(dataset, split, root, size, images, on_error=on_error)
    title = data.title
    if dataset != "scenes" and network.backbone.name == "mini":
        title += f"; {PATH_CHECK}"
    if panoptic:
        if not hasattr(network, "panoptic"):
            raise LabError(f"{type(network).__name__} labels pixels and has no segments; "
                           "--panoptic needs a mask framework (han, fcclip)")  # fmt: skip
        found = evaluate_panoptic(network, data, batch_size, where)
        table, skipped = found.per_class, data.skipped
        scores = {"PQ": found.pq, "SQ": found.sq, "RQ": found.rq, "PQ of things": found.pq_things,
                  "PQ of stuff": found.pq_stuff}  # fmt: skip
        shown = table.query("tp + fp + fn > 0")
    else:
        asked = {"model": str(model.resolve()), "data": dataset, "root": str(root), "split": split,
                 "size": size, "window": window, "images": images, "batch": batch_size}  # fmt: skip
        progress = model / "evaluations" / run_key(asked)
        try:
            writable_folder(progress, "the progress of the evaluation,")
        except LabError as error:
            warnings.warn(f"{error}, or an interruption means to begin again", stacklevel=2)
            progress = None
        found = evaluate(network, data, batch_size, where, window=window, out=progress)
        table, skipped = found.per_class, found.skipped
        scores = {"mIoU": found.miou, "mIoU of seen names": found.miou_seen,
                  "mIoU of unseen names": found.miou_unseen,
                  "pixel accuracy": found.pixel_accuracy, "fwIoU": found.fwiou}  # fmt: skip
        shown = table.query("pixels > 0").sort_values("pixels", ascending=False)
    table.insert(0, "data", title)
    percent = [c for c in ("iou", "pq", "sq", "rq") if c in shown]
    lines = [title, *(f"  {name:<22}{100 * value:6.2f} %" for name, value in scores.items())]
    if shown.empty:
        lines.append("no pixel that was read has a class, so there is nothing to measure; see "
                     "`opentrans-lab data check`")  # fmt: skip
    else:
        part = shown.assign(**{c: 100 * shown[c] for c in percent}).head(SHOWN)
        lines.append(part.to_string(index=False, float_format="%.2f", na_rep="–"))
    if len(shown) > SHOWN:
        lines.append(f"and {len(shown) - SHOWN} classes more (--out writes all)")
    if skipped:
        lines.append(f"{len(skipped)} images were skipped:")
        lines += [f"  {reason}" for _, reason in skipped]
    return Measured("\n".join(lines), table)
