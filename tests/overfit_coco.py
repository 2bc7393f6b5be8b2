"""Can each framework learn real photographs? Eight of COCO, seen again and again: `make overfit`.

Text embeddings are orthogonal (random, for this check alone): what is asked is whether masks,
matching and losses work, not what CLIP knows. So Han et al. have no teacher, and FC-CLIP's
exponents are 0. Writes the curve, the
overlays and `overfit.csv` to the folder given; fails below 50 % mIoU over the classes present.

    python tests/overfit_coco.py <coco> <out> [framework …]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F

from opentrans_lab.clip import load_backbone
from opentrans_lab.data import load_dataset
from opentrans_lab.device import pick
from opentrans_lab.evaluation.evaluate import confusion, miou, predict
from opentrans_lab.figures import overlays
from opentrans_lab.heads import FRAMEWORKS, build
from opentrans_lab.train import TrainConfig, fit

SIZE, IMAGES, STEPS, GOAL = 192, 8, {"deeplabv3": 120, "han": 500, "fcclip": 500}, 50.0


def orthogonal(backbone, names: tuple[str, ...]) -> None:
    """Replace CLIP's words by orthonormal vectors, one a name."""
    generator = torch.Generator().manual_seed(0)
    table = torch.linalg.qr(torch.randn(backbone.embed_dim, len(names), generator=generator))[0].T
    where = {name: k for k, name in enumerate(names)}
    backbone.text = lambda asked, templates=None: F.normalize(
        table[[where[name] for name in asked]].to(backbone.visual.conv1.weight.device), dim=-1
    )


def overfit(framework: str, coco: Path, out: Path) -> dict:
    """Train on the pictures as they are, without augmentation, and measure on the same."""
    torch.manual_seed(0)
    data = load_dataset("coco", "val", coco, size=SIZE, limit=IMAGES)
    batches = [batch for batch in data.batches(1, train=False)]
    whole = {
        "images": torch.cat([_square(batch["images"], "bilinear") for batch in batches]),
        "labels": torch.cat([_square(batch["labels"][:, None]) for batch in batches])[:, 0],
        "names": data.names,
    }
    kinds = [labels.unique() for labels in whole["labels"]]
    whole["classes"] = [kind[kind >= 0] for kind in kinds]
    whole["masks"] = [
        labels == classes[:, None, None]
        for labels, classes in zip(whole["labels"], whole["classes"], strict=True)
    ]
    backbone = load_backbone("mini")
    orthogonal(backbone, data.names)
    options = {"clip": "tuned"} if framework == "fcclip" else {}
    model = build(framework, backbone, "mini", **options)
    if framework == "fcclip":
        model.seen_exponent = model.unseen_exponent = 0.0

    def forever(start: int):
        while True:
            yield whole

    config = TrainConfig(STEPS[framework], IMAGES, lr=1e-3, schedule="cosine", warmup=20)
    done = fit(model, lambda net, b: model.loss(net(b["images"]), b), forever, config,
               title=framework)  # fmt: skip
    model.eval()
    device = pick("auto")
    with torch.no_grad():
        scores = model.scores(whole["images"].to(device), data.names).cpu()
    predicted = torch.stack([predict(one, (SIZE, SIZE)) for one in scores])
    score = 100 * miou(confusion(predicted, whole["labels"], len(data.names)))
    columns = {"ground truth": list(whole["labels"]), framework: list(predicted)}
    figure = overlays.compare(list(whole["images"]), columns, data.names)
    figure.savefig(out / f"{framework}.png", dpi=70, bbox_inches="tight")
    plt.close(figure)
    done.history.assign(framework=framework).to_csv(out / f"{framework}.csv", index=False)
    tenths = done.history["loss"].groupby(done.history.index * 10 // len(done.history)).mean()
    return {
        "framework": framework, "steps": STEPS[framework], "mIoU": score,
        "loss by tenths": " ".join(f"{value:.2f}" for value in tenths),
        "steady": bool((tenths.diff().dropna() < 0.02 * tenths.iloc[0]).all()),
    }  # fmt: skip


def _square(x: torch.Tensor, mode: str = "nearest") -> torch.Tensor:
    """(1, C, h, w) to SIZE x SIZE; labels are never interpolated."""
    if mode == "nearest":
        return F.interpolate(x.float(), (SIZE, SIZE), mode=mode).long()
    return F.interpolate(x, (SIZE, SIZE), mode=mode, antialias=True).clamp(0, 1)


def main(coco: Path, out: Path, frameworks: list[str]) -> int:
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([overfit(name, coco, out) for name in frameworks or FRAMEWORKS])
    curves = pd.concat(pd.read_csv(out / f"{name}.csv") for name in table["framework"])
    figure, axis = plt.subplots()
    for name, lines in curves.groupby("framework", sort=False):
        axis.plot(lines["step"], lines["loss"] / lines["loss"].iloc[0], label=name)
    axis.set(xlabel="step", ylabel="loss / first loss", yscale="log")
    axis.legend()
    figure.savefig(out / "curves.png", dpi=80, bbox_inches="tight")
    table.to_csv(out / "overfit.csv", index=False)
    print(table.to_string(index=False))
    return int(not (table["mIoU"].ge(GOAL) & table["steady"]).all())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
