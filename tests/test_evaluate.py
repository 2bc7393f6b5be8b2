"""The metric against an independent count, and the loop around it."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from opentrans_lab.data import IGNORE, load_dataset
from opentrans_lab.errors import LabError
from opentrans_lab.evaluation.evaluate import confusion, evaluate, miou, predict, summarise

module = import_module("opentrans_lab.evaluation.evaluate")  # its face has the function


def plain_ious(pred: np.ndarray, label: np.ndarray, n: int) -> dict[int, float]:
    """IoU of each class in the ground truth, by sets of pixels."""
    keep = label != IGNORE
    pred, label = pred[keep], label[keep]
    out = {}
    for c in range(n):
        if (label == c).any():
            out[c] = ((pred == c) & (label == c)).sum() / ((pred == c) | (label == c)).sum()
    return out


def check(pred: np.ndarray, label: np.ndarray, n: int) -> None:
    counts = confusion(torch.tensor(pred), torch.tensor(label), n)
    assert counts.shape == (n, n) and counts.dtype == torch.int64
    assert counts.sum() == (label != IGNORE).sum()
    seen = torch.arange(n) % 3 != 0
    result = summarise(counts, tuple(map(str, range(n))), seen)
    ious = plain_ious(pred, label, n)

    def mean(classes):
        return np.mean([ious[c] for c in classes]) if classes else math.nan

    expected = [
        mean(list(ious)),
        mean([c for c in ious if seen[c]]),
        mean([c for c in ious if not seen[c]]),
    ]
    found = [result.miou, result.miou_seen, result.miou_unseen]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    table = result.per_class
    assert list(table.columns) == ["id", "name", "seen", "iou", "pixels"]
    assert set(table.id[table.pixels > 0]) == set(ious) == set(table.id[table.iou.notna()])
    keep = label != IGNORE
    if keep.any():
        np.testing.assert_allclose(result.pixel_accuracy, (pred == label)[keep].mean())
        weighted = sum(ious[c] * (label == c).sum() for c in ious) / keep.sum()
        np.testing.assert_allclose(result.fwiou, weighted)
    else:
        assert math.isnan(result.pixel_accuracy) and math.isnan(result.fwiou)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [2, 7, 300])
def test_metrics_equal_a_plain_count_on_random_maps(n, seed):
    rng = np.random.default_rng(seed)
    label = rng.integers(IGNORE, n, (40, 50))
    pred = np.where(rng.random((40, 50)) < 0.6, label.clip(0), rng.integers(0, n, (40, 50)))
    check(pred, label, n)


CASES = {
    "perfect": ([0, 1, 2, 3], [0, 1, 2, 3]),
    "all wrong": ([1, 2, 3, 0], [0, 1, 2, 3]),
    "class absent from the prediction": ([0, 0, 0, 1], [0, 1, 2, 2]),
    "class absent from the ground truth": ([0, 3, 3, 1], [0, 0, 1, 1]),
    "one class predicted everywhere": ([2, 2, 2, 2], [0, 1, 2, 3]),
    "prediction only on ignored pixels": ([3, 0, 1, 1], [-1, 0, 1, 1]),
    "all ignored": ([0, 1, 2, 3], [-1, -1, -1, -1]),
}


@pytest.mark.parametrize("case", CASES)
def test_metrics_on_adversarial_cases(case):
    check(*(np.array(x) for x in CASES[case]), n=5)


def test_miou_by_hand():
    # Ground truth 0 0 0 1; class 2 does not occur, yet predicting it costs class 0.
    counts = confusion(torch.tensor([0, 0, 2, 1]), torch.tensor([0, 0, 0, 1]), 3)
    assert counts.tolist() == [[2, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert miou(counts) == pytest.approx((2 / 3 + 1) / 2)
    assert miou(counts, torch.tensor([True, False, True])) == pytest.approx(2 / 3)
    assert math.isnan(miou(counts, torch.tensor([False, False, True])))


def test_prediction_does_not_depend_on_the_piece(monkeypatch):
    scores = torch.randn(37, 5, 6, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(scores[None], (23, 31), mode="bilinear", align_corners=False)[0].argmax(0)
    for piece in (2**25, 10 * 23 * 31, 1):
        monkeypatch.setattr(module, "PIECE", piece)
        assert torch.equal(predict(scores, (23, 31)), whole)
    assert torch.equal(predict(scores.bfloat16(), (5, 6)), scores.bfloat16().argmax(0))


class ByColour(nn.Module):
    """Scores by closeness to a grey value a name, at a quarter of the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))
        self.frozen = nn.BatchNorm2d(1).eval()
        self.asked: list[tuple[str, ...]] = []

    def scores(self, images, class_names):
        assert not self.training and not torch.is_grad_enabled()
        self.asked.append(class_names)
        grey = F.avg_pool2d(images.mean(1, keepdim=True), 4)  # (B, 1, h, w)
        values = torch.tensor([float(n) for n in class_names], device=images.device)
        return -self.scale * (grey - values[:, None, None]).abs()


@pytest.fixture(scope="module")
def grey_folder(tmp_path_factory):
    """Seven pictures in two sizes: grey blocks 0, 0.5 and 1, some of them ignored."""
    root = tmp_path_factory.mktemp("grey")
    for kind in ("images", "labels"):
        (root / kind / "val").mkdir(parents=True)
    (root / "classes.csv").write_text("id,name,ignore\n0,0.0,0\n1,0.5,0\n2,1.0,0\n3,void,1\n")
    rng = np.random.default_rng(0)
    for i in range(7):
        blocks = rng.integers(0, 4, (6, 8) if i % 3 else (5, 9))
        label = np.kron(blocks, np.ones((8, 8), int)).astype(np.uint8)
        noisy = label.clip(max=2) * 127.0 + rng.normal(0, 45, label.shape)
        pixels = np.repeat(noisy.clip(0, 255).astype(np.uint8)[..., None], 3, -1)
        Image.fromarray(pixels).save(root / f"images/val/{i}.png")
        Image.fromarray(label).save(root / f"labels/val/{i}.png")
    return root


@pytest.mark.parametrize("size", [None, 24])
def test_evaluate_counts_every_image_once_at_label_resolution(grey_folder, size):
    dataset, model = load_dataset("folder", "val", grey_folder, size=size), ByColour().train()
    model.frozen.eval()
    result = evaluate(model, dataset, batch_size=3, device="cpu", progress=False)
    assert model.training and not model.frozen.training  # each as it was
    assert set(model.asked) == {dataset.names}

    preds, labels = [], []
    model.eval()
    for batch in dataset.batches(1, train=False):
        with torch.no_grad():
            scores = model.scores(batch["images"], dataset.names)
        label = batch["labels"]
        up = F.interpolate(scores, label.shape[-2:], mode="bilinear", align_corners=False)
        preds.append(up.argmax(1).flatten())
        labels.append(label.flatten())
    pred, label = torch.cat(preds).numpy(), torch.cat(labels).numpy()
    assert len(label) == sum(48 * 64 if i % 3 else 40 * 72 for i in range(7))
    assert result.confusion.sum() == (label != IGNORE).sum()
    expected = plain_ious(pred, label, 3)
    assert result.miou == pytest.approx(np.mean(list(expected.values())))
    assert 0.5 < result.miou < 1 and math.isnan(result.miou_unseen)
    for batch_size in (1, 7):
        again = evaluate(model, dataset, batch_size, "cpu", progress=False)
        assert torch.equal(again.confusion, result.confusion)


def test_evaluate_restores_the_model_after_an_error(grey_folder):
    class Broken(ByColour):
        def scores(self, images, class_names):
            raise RuntimeError("broken")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, load_dataset("folder", "val", grey_folder), device="cpu", progress=False)
    assert model.training


def test_evaluate_on_scenes_splits_seen_and_unseen():
    class Painter(nn.Module):
        """Answers with the best fixed class: all of its errors are known."""

        def scores(self, images, class_names):
            scores = torch.zeros(len(images), len(class_names), 4, 4, device=images.device)
            scores[:, class_names.index("grass")] = 1
            return scores

    dataset = load_dataset("scenes", "val", size=64, limit=24)
    result = evaluate(Painter(), dataset, batch_size=10, device="cpu", progress=False)
    labels = torch.cat([b["labels"] for b in dataset.batches(24, train=False)])
    grass = dataset.names.index("grass")
    share = float((labels == grass).sum() / labels.numel())
    occurring = labels.unique()
    assert result.pixel_accuracy == pytest.approx(share)
    assert result.miou == pytest.approx(share / len(occurring))
    assert result.miou_seen == pytest.approx(share / int(dataset.seen[occurring].sum()))
    assert result.miou_unseen == 0


def agree_to_the_last_bit(pred: torch.Tensor, label: torch.Tensor, n: int) -> None:
    """Ours, torchmetrics' counts, and numpy's mean of plain IoUs."""
    from torchmetrics.classification import MulticlassConfusionMatrix

    counts = confusion(pred, label, n)
    assert torch.equal(counts, MulticlassConfusionMatrix(n, ignore_index=IGNORE)(pred, label))
    expected = list(plain_ious(pred.numpy(), label.numpy(), n).values())
    assert miou(counts) == np.mean(expected) if expected else math.isnan(miou(counts))


@pytest.mark.parametrize("n", [3, 7, 150, 847])
@pytest.mark.parametrize("seed", range(4))
def test_numpy_and_torchmetrics_agree_to_the_last_bit(n, seed):
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(-1, n, (2, 40, 30), generator=rng)
    agree_to_the_last_bit(torch.randint(0, n, (2, 40, 30), generator=rng), label, n)


@pytest.mark.parametrize("case", CASES)
def test_they_agree_on_adversarial_cases(case):
    agree_to_the_last_bit(*(torch.tensor(x) for x in CASES[case]), n=5)


SHARED = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from opentrans_lab.data import load_dataset
from opentrans_lab.evaluation import evaluate
sys.path.insert(0, sys.argv[1])
from test_evaluate import ByColour
dist.init_process_group("gloo")
data = load_dataset("folder", "val", sys.argv[2], on_error="skip")
found = evaluate(ByColour(), data, 2, "cpu", progress=False)
about = {"counts": found.confusion, "miou": found.miou, "skipped": found.skipped}
torch.save(about, f"{sys.argv[3]}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("broken", [False, True])
def test_two_processes_count_what_one_counts(grey_folder, tmp_path, broken):
    """Seven pictures in batches of two, so one process has four and the other three."""
    root = grey_folder
    if broken:
        root = tmp_path / "broken"
        shutil.copytree(grey_folder, root)
        (root / "images/val/3.png").write_bytes(b"")
    (tmp_path / "shared.py").write_text(SHARED)
    script = [str(tmp_path / "shared.py"), str(Path(__file__).parent), str(root), str(tmp_path)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, *script]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    data = load_dataset("folder", "val", root, on_error="skip")
    one = evaluate(ByColour(), data, 2, "cpu", progress=False)
    assert len(one.skipped) == int(broken)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found["counts"], one.confusion) and found["miou"] == one.miou
        assert found["skipped"] == one.skipped


@pytest.mark.parametrize("broken", [False, True])
def test_an_interrupted_evaluation_goes_on(grey_folder, tmp_path, monkeypatch, broken):
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    root = tmp_path / "data"
    shutil.copytree(grey_folder, root)
    if broken:
        (root / "images/val/1.png").write_bytes(b"")

    def data():
        return load_dataset("folder", "val", root, on_error="skip")

    whole = evaluate(ByColour(), data(), 2, "cpu", progress=False)

    class Dies(ByColour):
        def scores(self, images, class_names):
            if len(self.asked) == 4:
                raise KeyboardInterrupt
            return super().scores(images, class_names)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Dies(), data(), 2, "cpu", progress=False, out=tmp_path / "out")
    model = ByColour()
    again = evaluate(model, data(), 2, "cpu", progress=False, out=tmp_path / "out")
    assert torch.equal(again.confusion, whole.confusion) and again.skipped == whole.skipped
    assert 0 < len(model.asked) < 7  # not from the beginning
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(KeyboardInterrupt):
        evaluate(Dies(), data(), 2, "cpu", progress=False, out=tmp_path / "out")
    refused = pytest.raises(LabError, match="progress of another evaluation")
    with refused:
        evaluate(model, data(), 3, "cpu", progress=False, out=tmp_path / "out")
    with refused, torch.no_grad():  # the same name, other weights
        model.scale += 1
        evaluate(model, data(), 2, "cpu", progress=False, out=tmp_path / "out")
    Image.new("RGB", (9, 9)).save(root / "images/val/2.png")  # and other files
    with refused:
        evaluate(ByColour(), data(), 2, "cpu", progress=False, out=tmp_path / "out")


class Where(nn.Module):
    """Scores that say where they were computed: one channel of the pixel values, at stride 4."""

    def scores(self, images, class_names):
        assert max(images.shape[-2:]) <= 32
        return F.avg_pool2d(images[:, : len(class_names)], 4)


def test_a_sliding_window_covers_everything_in_place():
    ramp = torch.linspace(0, 1, 75).expand(50, 75)
    images = torch.stack([ramp, ramp.flip(1), torch.full_like(ramp, 0.3)])[None]
    scores = module._scores(Where(), images, ("a", "b", "c"), 32)
    found = F.interpolate(scores, (50, 75), mode="bilinear", align_corners=False)
    assert (found - images).abs()[..., 2:-2].max() < 0.02
    whole = module._scores(Where(), images[..., :32, :32], ("a", "b", "c"), 32)
    assert torch.equal(whole, F.avg_pool2d(images[..., :32, :32], 4))
    for length in (20, 32, 33, 75, 640):
        places = module._places(length, 32)
        assert places == sorted(set(places)) and places[0] == 0
        assert all(b - a <= 20 for a, b in zip(places, places[1:], strict=False))
        assert places[-1] == max(0, length - 32)


def test_windows_that_do_not_fit_are_refused(grey_folder):
    for wrong in ({"window": 30}, {"window": -4}, {"batch_size": 0}):
        with pytest.raises(LabError, match="=".join(map(str, *wrong.items()))):
            evaluate(ByColour(), load_dataset("folder", "val", grey_folder), **wrong)


MEMORY = """
import re, torch
from pathlib import Path
from opentrans_lab.data import load_dataset
from opentrans_lab.evaluation import evaluate
names = [f"{i}" for i in range(847)]
class Heavy(torch.nn.Module):
    def scores(self, images, class_names):
        return torch.randn(len(images), len(class_names), *(n // 4 for n in images.shape[-2:]))
class Data:
    title, names, prompts, size, skipped = "d", tuple(names), tuple(names), None, []
    seen = torch.ones(847, dtype=torch.bool)
    def __len__(self): return 16
    def batches(self, *args, **kwargs):
        labels = torch.randint(0, 847, (16, 640, 640))
        yield {"images": torch.zeros(16, 3, 640, 640), "labels": labels, "files": ["f"] * 16}
def peak():  # of this process alone; ru_maxrss would begin with its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
data = Data()
next(data.batches())
before = peak()
evaluate(Heavy(), data, 16, "cpu", progress=False)
print((peak() - before) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_hundreds_of_classes_at_full_resolution_fit():
    """847 classes on 16 pictures of 640 pixels: scores alone would be 22 GB at full resolution."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0.05 < float(done.stdout) < 1.5  # GiB above what was there
