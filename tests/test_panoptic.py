"""Panoptic quality against numbers computed by hand and against torchmetrics."""

import math

import pytest
import torch
from torchmetrics.detection import PanopticQuality as Oracle

from opentrans_lab.clip import load_backbone
from opentrans_lab.data import IGNORE, load_dataset
from opentrans_lab.evaluation.panoptic import count_segments, evaluate_panoptic, summarise
from opentrans_lab.heads import build

NAMES, THINGS = ("cat", "dog", "grass"), torch.tensor([True, True, False])
CAT, DOG, GRASS = range(3)


def picture(text: str) -> torch.Tensor:
    """A map from rows of characters: '.' is -1."""
    rows = text.split()
    return torch.tensor([[-1 if c == "." else int(c, 36) for c in row] for row in rows])


def count(segments: str, kinds: list[int], truth: str, classes: list[int | None]) -> torch.Tensor:
    """``classes`` of the truth's regions; None: a crowd of cats."""
    regions, predicted = picture(truth), picture(segments)
    table = torch.tensor([*(CAT if c is None else c for c in classes), IGNORE])
    masks = [regions == k for k, c in enumerate(classes) if c is not None]
    found = [{"id": k, "class": c} for k, c in enumerate(kinds)]
    kept = torch.tensor([c for c in classes if c is not None])
    shape = (len(masks), *regions.shape)
    return count_segments(
        predicted, found, table[regions], torch.stack(masks).view(shape), kept, len(NAMES)
    )


def test_by_hand_with_crowd_and_void():
    truth = """ 0000..22
                0000..22
                11112233
                11112233 """  # 0 and 1 cats, 2 grass, 3 a crowd of cats, the rest void
    pred = """  00044411
                00044411
                22221153
                22221155 """
    # 0 cat: 6 of 8 pixels, IoU 6/8. 1 grass: 4 + 4 of 8, IoU 8/8. 2 cat: 8/8. 4 dog: 2 on region 0,
    # 4 on void: more than half void, so it is excused. 3 and 5 cats: on the crowd, excused.
    counts = count(pred, [CAT, GRASS, CAT, CAT, DOG, CAT], truth, [CAT, CAT, GRASS, None])
    assert counts.tolist() == [[6 / 8 + 1, 2, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    found = summarise(counts, NAMES, THINGS)
    assert found.pq == pytest.approx((1.75 / 2 + 1) / 2)
    assert math.isnan(found.per_class["pq"][DOG]) and found.rq == 1
    assert found.pq_things == pytest.approx(0.875) and found.pq_stuff == 1


def test_void_pixels_do_not_count_against_a_prediction():
    truth, pred = "00.. 00..", "0000 0000"
    assert count(pred, [CAT], truth, [CAT]).tolist()[CAT] == [1.0, 1, 0, 0]


def test_misses_false_alarms_and_other_classes():
    truth, pred = "0011 0011", "0011 0011"
    counts = count(pred, [CAT, CAT], truth, [CAT, DOG])  # the dog is called a cat
    assert counts.tolist() == [[1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    found = summarise(counts, NAMES, THINGS)
    assert found.per_class["rq"].tolist()[:2] == pytest.approx([1 / 1.5, 0])
    assert found.pq == pytest.approx((1 / 1.5 + 0) / 2)
    half = count("0... 0...", [CAT], "00.. 00..", [CAT])  # an IoU of exactly 0.5 is no partner
    assert half.tolist()[CAT] == [0, 0, 1, 1]
    nothing = count("....", [], "00..", [CAT])
    assert nothing.tolist()[CAT] == [0, 0, 0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_torchmetrics_agrees_without_crowds(seed):
    """On random blocks; torchmetrics has void, too, but no crowds."""
    generator = torch.Generator().manual_seed(seed)

    def blocks(shift: int) -> torch.Tensor:
        small = torch.randint(0, 6, (5, 5), generator=generator)
        return small.repeat_interleave(8, 0).repeat_interleave(8, 1).roll(shift, 1)

    # segment -> class: 0..2 cats and dogs, 3 and 4 grass (joined), 5 void
    table = torch.tensor([CAT, CAT, DOG, GRASS, GRASS, IGNORE])
    truth = blocks(0)
    pred = torch.where(torch.rand(40, 40, generator=generator) < 0.85, truth, blocks(1))
    truth[truth == 4] = 3
    pred[pred == 4] = 3
    pred[pred == 5] = 0  # every pixel is predicted
    kept = [k for k in (0, 1, 2, 3) if (truth == k).any()]
    found = [{"id": k, "class": int(table[k])} for k in (0, 1, 2, 3) if (pred == k).any()]
    masks = torch.stack([truth == k for k in kept])
    counts = count_segments(pred, found, table[truth], masks, table[kept], 3)
    oracle = Oracle(
        things={CAT, DOG}, stuffs={GRASS}, return_per_class=True, allow_unknown_preds_category=True
    )  # what is neither is void
    pairs = (torch.stack([table[ids] % 77, ids], -1)[None] for ids in (pred, truth))  # -1 -> 76
    mine = summarise(counts, NAMES, THINGS).per_class["pq"].fillna(0.0).tolist()
    assert oracle(*pairs)[0].tolist() == pytest.approx(mine, abs=1e-6)


def test_a_split_through_a_framework():
    torch.manual_seed(0)
    model = build("fcclip", load_backbone("mini", device="cpu"), "mini").train()
    data = load_dataset("scenes", "val", limit=3, size=64)
    found = evaluate_panoptic(model, data, 2, "cpu", progress=False)
    assert model.training
    regions = sum(len(c) for b in data.batches(3, train=False) for c in b["classes"])
    assert found.per_class[["tp", "fn"]].to_numpy().sum() == regions
    assert len(found.per_class) == 200 and found.per_class["thing"].sum() == 192


def test_a_perfect_model_has_a_quality_of_one():
    data = load_dataset("scenes", "val", limit=2, size=64)

    class Knows(torch.nn.Module):
        def panoptic(self, images, names, things):
            (batch,) = data.batches(2, train=False)
            out = []
            for masks, classes in zip(batch["masks"], batch["classes"], strict=True):
                segments = (masks.long() * torch.arange(len(masks))[:, None, None]).sum(0)
                infos = [{"id": k, "class": int(c)} for k, c in enumerate(classes)]
                segments[~masks.any(0)] = -1
                out.append((segments.repeat_interleave(2, 0).repeat_interleave(2, 1), infos))
            return out

    found = evaluate_panoptic(Knows(), data, 2, "cpu", progress=False)
    assert found.pq == found.sq == found.rq == 1 and found.pq_things == found.pq_stuff == 1
