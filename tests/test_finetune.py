"""Selection by alpha and freezing."""

import numpy as np
import pandas as pd
import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import nn

from opentrans_lab.errors import LabError
from opentrans_lab.finetune import freeze, select_layers, unfreeze

ALPHAS = pd.DataFrame({"name": list("abcdefg"), "alpha": [3.0, 1.5, np.nan, 6.0, 2.0, 4.0, 5.0]})


def test_low_and_high_are_opposite_ends():
    assert select_layers(ALPHAS, "low_alpha") == ["a", "b", "e"]
    assert select_layers(ALPHAS, "high_alpha") == ["d", "f", "g"]
    assert select_layers(ALPHAS, "none") == []
    assert select_layers(ALPHAS, "low_alpha", 1.0) == list("abdefg")


def test_random_is_seeded_and_never_takes_what_was_not_fitted():
    draws = [select_layers(ALPHAS, "random", seed=s) for s in range(50)]
    assert draws == [select_layers(ALPHAS, "random", seed=s) for s in range(50)]
    assert all(len(d) == 3 and "c" not in d for d in draws)
    assert len({tuple(d) for d in draws}) > 5


def test_half_of_55_is_the_papers_27():
    table = pd.DataFrame({"name": [f"l{i}" for i in range(55)], "alpha": np.arange(55.0)})
    assert len(select_layers(table)) == 27


def test_frozen_layers_are_bit_identical_after_training():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"backbone": ModifiedResNet((1, 1, 1, 1), output_dim=16, heads=4, image_size=64, width=8)}
    )
    names = ["conv1", "layer2.0.conv2", "layer4.0.downsample.0"]
    assert freeze(model, names) == sum(
        model["backbone"].get_submodule(n).weight.numel() for n in names
    )
    before = {k: v.clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model["backbone"](torch.randn(2, 3, 64, 64)).square().sum().backward()
        optimizer.step()
    same = {k for k, v in model.named_parameters() if torch.equal(v, before[k])}
    assert same == {f"backbone.{n}.weight" for n in names}
    assert all(model.get_parameter(k).grad is None for k in same)
    unfreeze(model, names)
    assert all(p.requires_grad for p in model.parameters())


def test_unknown_words_are_refused():
    with pytest.raises(LabError, match="'lowest'"):
        select_layers(ALPHAS, "lowest")
    with pytest.raises(LabError, match="fraction"):
        select_layers(ALPHAS, fraction=2)
    with pytest.raises(LabError, match="0 of 1 tensors matched"):
        freeze(nn.Linear(2, 2), ["conv1"])
