"""What each of two classifiers brings, and how sure that is."""

import numpy as np
import pytest
import torch

from opentrans_lab.clip import load_backbone
from opentrans_lab.data import load_dataset
from opentrans_lab.evaluation import evaluate
from opentrans_lab.experiments import Lab, Recipe, segment_stage
from opentrans_lab.experiments.ensemble import compare_parts, gain, part_table, picture_counts
from opentrans_lab.heads import build
from opentrans_lab.pruning import PruneConfig

SIX = dict(limit=6, size=64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("fcclip", load_backbone("mini", device="cpu"), "mini", seen_names=["grass"])


def test_the_whole_and_each_part_are_what_evaluate_finds(model):
    data = load_dataset("scenes", "val", **SIX)
    lines = compare_parts(model, data, 4, "cpu", draws=20)
    assert [(line["part"], line["names"]) for line in lines] == [
        ("head", "seen"), ("head", "unseen"), ("CLIP", "seen"), ("CLIP", "unseen"),
    ]  # fmt: skip
    assert (model.seen_exponent, model.unseen_exponent) == (0.4, 0.8)  # as before
    whole = evaluate(model, data, 4, device="cpu", progress=False)
    assert lines[0]["whole"] == pytest.approx(100 * whole.miou_seen)
    assert lines[1]["whole"] == pytest.approx(100 * whole.miou_unseen)
    model.seen_exponent = model.unseen_exponent = 1.0
    try:
        clip = evaluate(model, data, 4, device="cpu", progress=False)
    finally:
        model.seen_exponent, model.unseen_exponent = 0.4, 0.8
    assert lines[2]["alone"] == pytest.approx(100 * clip.miou_seen)
    assert lines[2]["gain"] == pytest.approx(lines[2]["whole"] - lines[2]["alone"])


def test_attributes_come_back_after_an_error(model):
    data = load_dataset("scenes", "val", **SIX)
    model.PARTS = {"broken": {"seen_exponent": "no number"}}
    try:
        with pytest.raises(Exception):  # noqa: B017
            compare_parts(model, data, 4, "cpu")
    finally:
        del model.PARTS
    assert model.seen_exponent == 0.4


def test_one_classifier_has_no_parts():
    model = build("deeplabv3", load_backbone("mini", device="cpu"), "mini")
    assert compare_parts(model, load_dataset("scenes", "val", **SIX), 4, "cpu") == []


def _pictures(right: np.ndarray, size: int = 100) -> torch.Tensor:
    """Two classes of ``size`` pixels a picture, of which ``right`` (N,) are found in each."""
    right = torch.tensor(right)
    hits = torch.stack([right, right], dim=1)  # (N, C)
    return torch.stack([hits, torch.full_like(hits, size), torch.full_like(hits, size)], dim=1)


def test_a_gain_of_nothing_is_nothing_and_a_sure_one_is_sure():
    random = np.random.default_rng(0)
    hard = random.integers(20, 80, 60)  # pictures differ far more than the models do
    same = gain(_pictures(hard), _pictures(hard))
    assert same["gain"] == same["low"] == same["high"] == 0
    better = gain(_pictures(hard + 5), _pictures(hard))
    assert 0 < better["low"] <= better["gain"] <= better["high"]
    total = hard.sum() / (200 * 60 - hard.sum())
    assert better["alone"] == pytest.approx(100 * total)


def test_an_interval_covers_its_truth_about_nineteen_times_in_twenty():
    random = np.random.default_rng(1)
    covered = 0
    for k in range(100):
        a, b = random.integers(40, 60, (2, 50))  # equal on average
        found = gain(_pictures(a), _pictures(b), draws=300, seed=k)
        covered += found["low"] <= 0 <= found["high"]
    assert 85 <= covered <= 100


def test_classes_that_never_occur_do_not_count(model):
    data = load_dataset("scenes", "val", **SIX)
    counts = picture_counts(model, data, 4, "cpu")
    assert counts.shape == (6, 3, 200) and (counts[:, 1].sum(1) == 64 * 64).all()
    present = counts[:, 1].sum(0) > 0
    few = counts[..., present]
    assert gain(counts, counts)["whole"] == pytest.approx(gain(few, few)["whole"])


def test_a_table_of_trained_rows_is_computed_once(monkeypatch):
    lab, pruning = Lab(size=64, device="cpu"), PruneConfig(density=0.5, p=0.5, steps=1)
    recipe = Recipe("fcclip", steps=2, batch_size=2, eval_images=4)
    table = part_table(lab, recipe, pruning, "dense", draws=10)
    assert table["row"].tolist() == ["dense"] * 4
    done = segment_stage(lab, recipe, pruning)
    assert table["whole"].tolist()[:2] == pytest.approx(
        [done.metrics["seen"], done.metrics["unseen"]]
    )
    # Is not needed again:
    monkeypatch.setattr("opentrans_lab.experiments.ensemble.picture_counts", None)
    assert part_table(lab, recipe, pruning, "dense", draws=10).equals(table)
