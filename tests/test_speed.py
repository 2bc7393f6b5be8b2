"""Measured steps, the formulas beside them, and the words that intervals get."""

import math
import re

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opentrans_lab.clip import load_backbone
from opentrans_lab.costs import savings, step_costs, training_cost
from opentrans_lab.finetuning import STAGES, freeze, unfreeze
from opentrans_lab.heads import build
from opentrans_lab.report.claims import freezing_verdict, gains, judged, verdict

FROZEN = {"none": [], "middle": ["layer3.0.conv2"], "prefix": ["stem", "layer1"]}
MINI = {"size": (64, 64), "backbone": "mini", "preset": "mini"}


def test_a_frozen_prefix_keeps_less_for_backward_and_trains_less():
    model = load_backbone("mini", "random", "cpu")
    model.visual.attnpool.requires_grad_(False)
    batch = {"images": torch.rand(8, 3, 64, 64)}
    found = step_costs(
        model, lambda b: {"loss": model(b["images"])[-1].square().mean()}, batch, FROZEN, 2, "cpu"
    ).set_index("select")
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.loc["none", "trainable"] == whole
    middle = model.visual.layer3[0].conv2.weight.numel()
    assert found.loc["middle", "trainable"] == whole - middle
    stages = ("conv", "bn", "layer1.")
    prefix = sum(p.numel() for n, p in model.visual.named_parameters() if n.startswith(stages))
    assert found.loc["prefix", "trainable"] == whole - prefix
    # The maps before layer2, float32 or bfloat16, are what forward need not keep.
    assert found.loc["prefix", "memory_MB"] < 0.8 * found.loc["none", "memory_MB"]
    assert (found["step_s"] > 0).all() and found["energy_J"].isna().all()
    both = savings("deeplabv3", FROZEN, found.reset_index(), **MINI).set_index("select")
    assert both.loc["none", ["paper_saving", "full_saving", "step_saving"]].tolist() == [0, 0, 0]
    assert both.loc["middle", "paper_saving"] > both.loc["middle", "full_saving"] > 0
    assert both.loc["prefix", "layers"] == 3 + sum(
        isinstance(m, torch.nn.Conv2d) for m in model.visual.layer1.modules()
    )


def test_only_leading_stages_spare_the_gradient_that_passes():
    frozen = {
        "none": [],
        "whole": ["stem", "layer1"],
        "layers": [f"conv{i}" for i in (1, 2, 3)],
        "stem": ["stem"],
        "later": ["layer1"],
    }
    cost = training_cost("deeplabv3", frozen=frozen, images=1, warmup=0, **MINI)
    cost = cost.set_index("select")
    saved = cost.loc["none", ["paper", "full"]] - cost[["paper", "full"]]
    assert saved.loc["stem", "paper"] == pytest.approx(saved.loc["layers", "paper"])
    assert saved.loc["later", "full"] == pytest.approx(saved.loc["later", "paper"])  # 1 pass
    assert saved.loc["whole", "full"] > saved.loc["stem", "full"] + saved.loc["later", "full"]


@pytest.mark.parametrize("names", [
    [], ["layer1.0.conv2", "layer3.0.conv1"], ["stem"], ["stem", "layer1"], ["layer1"],
    ["stem", "layer1", "layer2"], list(STAGES[:4]),
    ["conv1", "conv2"],
])  # fmt: skip
def test_the_full_formula_is_what_torch_multiplies(names):
    """Of the trunk in forward and backward: torch's own counter sees each product that is done."""
    model = load_backbone("mini", "random", "cpu")
    build("deeplabv3", model, "mini")  # which sets the stride
    images = torch.rand(1, 3, 64, 64)

    def multiplied(names):
        unfreeze(model)
        freeze(model, names)
        with FlopCounterMode(display=False) as counter:
            out = sum(x.sum() for x in model(images))
            out.backward()
        return counter.get_total_flops() / 2

    cost = training_cost("deeplabv3", frozen={"none": [], "x": names}, images=1, warmup=0, **MINI)
    promised = 1e15 * (cost["full"].iloc[0] - cost["full"].iloc[1])
    assert promised == pytest.approx(multiplied([]) - multiplied(names), rel=1e-6, abs=1)


def test_a_verdict_follows_from_the_interval():
    assert verdict(2.0, 1.9) == "wins" and verdict(-2.0, 1.9) == "loses"
    assert verdict(2.0, 2.1) == verdict(-0.1, 0.2) == "ties"
    assert verdict(9.0, math.nan) == "one seed"


def lines(gain, half=None):
    """A line a setting; with ``half``, as several seeds give it."""
    index = pd.MultiIndex.from_product([range(len(gain)), ["none", "low_alpha"]],
                                       names=["regime", "select"])  # fmt: skip
    table = pd.DataFrame({"n": 3, "seen_gain": [x for g in gain for x in (0.0, g)]}, index)
    if half is not None:
        table["seen_gain ±"] = [x for h in half for x in (0.0, h)]
    return judged(table)


@pytest.mark.parametrize("gain, half, words", [
    ([1, 2], [0.5, 0.5], "helps: .* it wins in 2, ties in 0, loses in 0 of 2"),
    ([1, 2], [0.5, 3], "helps in some settings and costs in none"),
    ([-1, -2], [0.5, 0.5], "costs: "),
    ([-1, 0.1], [0.5, 0.5], "costs in some settings and helps in none"),
    ([-1, 1], [0.5, 0.5], "depends on the setting"),
    ([-1, 1], [2, 2], "makes no difference that shows"),
    ([-1, 2, 2], None, "One seed decides nothing: .* in 2 of 3 settings, by .1.0 points"),
])  # fmt: skip
def test_the_freezing_verdict_changes_with_the_data(gain, half, words):
    assert re.search(words, freezing_verdict(lines(gain, half)))


def test_gains_are_held_against_the_same_regime():
    table = pd.DataFrame(
        {"regime": ["a", "a", "b", "b"], "select": ["none", "x"] * 2, "seen": [1.0, 3.0, 10.0, 9.0]}
    )
    assert gains(table, ["seen"])["seen_gain"].tolist() == [0.0, 2.0, 0.0, -1.0]
