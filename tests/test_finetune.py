"""Selection by alpha and freezing."""

import copy
import math
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import nn

from opentrans_lab.alpha import layer_alphas
from opentrans_lab.clip import load_backbone
from opentrans_lab.errors import LabError
from opentrans_lab.finetuning import (
    STAGES,
    freeze,
    hold_norms,
    select_layers,
    unfreeze,
)
from opentrans_lab.masks import Mask

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
    for _ in range(50):
        optimizer.zero_grad()
        model["backbone"](torch.randn(2, 3, 64, 64)).square().sum().backward()
        optimizer.step()
    same = {k for k, v in model.named_parameters() if torch.equal(v, before[k])}
    assert same == {f"backbone.{n}.weight" for n in names}
    assert all(model.get_parameter(k).grad is None for k in same)
    assert not any(model.get_parameter(k) in optimizer.state for k in same)
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def tower():
    torch.manual_seed(0)
    return ModifiedResNet((1, 1, 1, 1), output_dim=16, heads=4, image_size=64, width=8)


def test_layers_without_alpha_are_named():
    with pytest.warns(UserWarning, match="1 layers have no alpha and stay trainable: c"):
        select_layers(ALPHAS)


def test_unfreezing_gives_the_model_back():
    model, images = tower(), torch.randn(2, 3, 64, 64)
    model.conv2.weight.requires_grad_(False)  # the user's own doing
    free = {k for k, p in model.named_parameters() if p.requires_grad}
    freeze(model, ["conv1", "layer1.0.conv1"], norm=True)
    freeze(model, ["stem", "layer1"])
    held = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model.train()(images)
    still = {k for k, v in held.items() if torch.equal(model.state_dict()[k], v)}
    assert still == {k for k in held if k.split(".")[0] in ("bn1", "bn2", "bn3", "layer1")}
    unfreeze(model)
    assert free == {k for k, p in model.named_parameters() if p.requires_grad}
    model.train()(images)
    assert not any(torch.equal(model.state_dict()[k], v) for k, v in held.items())


def test_a_frozen_norm_is_the_one_behind_its_convolution():
    model = tower()
    freeze(model, ["conv2", "layer3.0.conv1", "layer3.0.downsample.0"], norm=True)
    frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
    assert {k.removesuffix(".weight").removesuffix(".bias") for k in frozen} == {
        "conv2", "bn2", "layer3.0.conv1", "layer3.0.bn1", "layer3.0.downsample.0",
        "layer3.0.downsample.1",
    }  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 5])
def test_backward_stops_behind_frozen_leading_stages(count):
    """No gradient is asked for before the first trainable stage: autograd's graph ends there."""
    model, images = nn.Sequential(tower()), torch.randn(2, 3, 64, 64)
    weights = freeze(model, STAGES[:count])
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert weights == sum(p.numel() for p in frozen)
    x, grown = images, []
    x = model[0].stem(x)
    grown.append(x.requires_grad)
    for stage in STAGES[1:]:
        x = getattr(model[0], stage)(x)
        grown.append(x.requires_grad)
    assert grown == [False] * count + [True] * (5 - count)


def test_a_prefix_is_as_far_as_half_of_each_stage_has_small_alpha():
    names = ["conv1", "conv2", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1",
             "layer3.0.conv1"]  # fmt: skip

    def prefix(alphas, fraction=0.5):
        return select_layers(pd.DataFrame({"name": names, "alpha": alphas}), "prefix", fraction)

    assert prefix([1, 5, 5, 1, 5, 1]) == ["stem", "layer1"]
    assert prefix([5, 5, 1, 5, 1, 1]) == []
    assert prefix([1, 1, 1, 1, 1, 5], 5 / 6) == ["stem", "layer1", "layer2"]
    assert prefix([1, np.nan, 1, 5, 5, 5], 2 / 5) == ["stem", "layer1"]


def test_norms_held_keep_their_statistics_and_train_their_scales():
    model, images = tower(), torch.randn(2, 3, 64, 64)
    hold_norms(model)
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model.train()(images).sum().backward()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert model.bn1.weight.grad is not None
    one = model(images[:1])
    torch.testing.assert_close(model(images)[:1], one)
    unfreeze(model)
    model(images)
    assert not any(torch.equal(model.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("kind", ["pruned", "half frozen", "ViT"])
def test_selection_on_any_backbone(kind):
    torch.manual_seed(0)
    if kind == "ViT":
        model = VisionTransformer(32, 8, 64, 3, 4, 4.0, output_dim=32)
    else:
        model = load_backbone("mini", device="cpu").visual
    if kind == "pruned":
        mask = Mask.by_magnitude(model, Mask.dense(model).total // 5)
        mask.apply(model)
    alphas = layer_alphas(model)
    if kind == "half frozen":
        freeze(model, select_layers(alphas, "random", seed=3))
        assert layer_alphas(model).equals(alphas)
    low, high = select_layers(alphas), select_layers(alphas, "high_alpha")
    assert low and len(low) == len(high) and not set(low) & set(high)
    model.train().requires_grad_(True)
    with pytest.warns() if kind == "ViT" else nullcontext():
        assert freeze(model, low) > 0
    before = {k: v.clone() for k, v in model.named_parameters() if not v.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    if kind == "pruned":
        mask.keep(model, optimizer)
    size = 32 if kind == "ViT" else model.image_size
    images = torch.randn(2, 3, size, size)
    for _ in range(2):
        model(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(model.get_parameter(k), v) for k, v in before.items())
    assert not any(model.get_parameter(k) in optimizer.state for k in before)
    assert kind != "pruned" or mask.verify(model)


def test_a_fused_attention_is_frozen_whole_or_not_at_all():
    model = VisionTransformer(32, 8, 64, 2, 4, 4.0, output_dim=32)
    layer = "transformer.resblocks.{}.attn.in_proj"
    names = [f"{layer.format(0)}.{part}" for part in "qkv"] + [f"{layer.format(1)}.k"]
    with pytest.warns(UserWarning, match="resblocks.1.attn.in_proj are one tensor"):
        freeze(model, names)
    frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"transformer.resblocks.0.attn.in_proj_weight"}


def test_unknown_words_are_refused():
    with pytest.raises(LabError, match="layer7"):
        freeze(tower(), ["stem", "layer7"])
    with pytest.raises(LabError, match="'lowest'"):
        select_layers(ALPHAS, "lowest")
    with pytest.raises(LabError, match="fraction"):
        select_layers(ALPHAS, fraction=2)
    with pytest.raises(LabError, match="0 of 1 tensors matched"):
        freeze(nn.Linear(2, 2), ["conv1"])


def test_the_stem_alone_is_the_towers_and_not_a_blocks():
    model = nn.ModuleDict({"backbone": tower()})
    assert freeze(model, ["conv1"]) == model["backbone"].conv1.weight.numel()
    assert not model["backbone"].conv1.weight.requires_grad
    assert model["backbone"].layer1[0].conv1.weight.requires_grad


def test_tied_alphas_are_complementary_and_infinite_ones_are_none():
    tied = pd.DataFrame({"name": list("abcd"), "alpha": [2.0, 3.0, 3.0, 4.0]})
    assert select_layers(tied, "low_alpha") == ["a", "b"]
    assert select_layers(tied, "high_alpha") == ["c", "d"]
    with pytest.warns(UserWarning, match="1 layers have no alpha"):
        lost = select_layers(tied.replace(4.0, math.inf), "high_alpha", 0.4)
    assert lost == ["c"]
    hundred = pd.DataFrame({"name": map(str, range(100)), "alpha": range(100)})
    assert len(select_layers(hundred, fraction=0.29)) == 29


def test_a_copy_thaws_too_and_a_norm_returns_to_what_it_was():
    model = tower()
    model.train()
    model.bn1.eval()
    hold_norms(model)
    freeze(model, ["layer1"])
    for one in (copy.deepcopy(model), model):
        unfreeze(one)
        assert all(p.requires_grad for p in one.parameters())
        assert not one.bn1.training and one.layer1[0].bn1.training
