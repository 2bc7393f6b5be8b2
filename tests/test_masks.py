"""Masks: exact counts, nested, zeros that stay, files that round-trip."""

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import nn

from opentrans_lab.errors import LabError
from opentrans_lab.masks import FIRST, Mask, prunable


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return ModifiedResNet((1, 1, 1, 1), output_dim=16, heads=4, image_size=64, width=8)


def controls(tower):
    ours = Mask.by_magnitude(tower, keep=1234)
    return {
        "ours": ours,
        "random_global": Mask.random_global(tower, 1234, seed=1),
        "random_layerwise": Mask.random_layerwise(ours, seed=1),
    }


def test_every_kind_keeps_exactly_as_many(tower):
    masks = controls(tower)
    assert {m.kept for m in masks.values()} == {1234}
    assert all(FIRST not in m for m in masks.values())
    per_layer = [m.layers()["kept"].tolist() for m in masks.values()]
    assert per_layer[0] == per_layer[2] != per_layer[1]
    assert not torch.equal(masks["ours"]["conv2.weight"], masks["random_layerwise"]["conv2.weight"])


def test_magnitude_keeps_the_largest(tower):
    mask = Mask.by_magnitude(tower, keep=500)
    weights = prunable(tower)
    kept = torch.cat([w[mask[n]].abs() for n, w in weights.items()])
    gone = torch.cat([w[~mask[n]].abs() for n, w in weights.items()])
    assert kept.min() >= gone.max()


def test_ties_are_broken_by_place(tower):
    with torch.no_grad():
        for weight in prunable(tower).values():
            weight.fill_(1.0)
    mask = Mask.by_magnitude(tower, keep=100)
    flat = torch.cat([mask[n].flatten() for n in prunable(tower)])
    assert flat[:100].all() and not flat[100:].any()
    assert mask == Mask.by_magnitude(tower, keep=100)


def test_rounds_are_nested(tower):
    total, mask = Mask.dense(tower).total, Mask.dense(tower)
    for k in range(1, 6):
        with torch.no_grad():  # weights move between rounds, pruned ones may even grow back
            for weight in prunable(tower).values():
                weight.add_(0.1 * torch.randn_like(weight))
        new = Mask.by_magnitude(tower, round(total * 0.9**k), within=mask)
        assert new.within(mask) and not mask.within(new)
        assert new.kept == round(total * 0.9**k)
        assert (new & mask) == new
        mask = new


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    ],
)
def test_zeros_stay_zero_through_training(tower, make):
    model = nn.ModuleDict({"backbone": tower})
    mask = Mask.random_global(tower, 3000, seed=0)
    optimizer = make(model.parameters())
    assert mask.apply(model) == len(mask) and mask.verify(model)
    handle = mask.keep(model, optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        tower(torch.randn(2, 3, 64, 64)).square().sum().backward()
        optimizer.step()
    assert mask.verify(model)
    assert all(w[mask[n]].all() for n, w in prunable(tower).items())
    handle.remove()
    tower(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    assert not mask.verify(model)


def test_round_trip_on_disk_is_small_and_exact(tower, tmp_path):
    mask = Mask(Mask.random_global(tower, 3001, seed=0), round=3, loss="L_KD")
    path = tmp_path / "deep" / "mask.safetensors"
    mask.save(path)
    again = Mask.load(path)
    assert again == mask and again.meta == {"round": "3", "loss": "L_KD"}
    assert path.stat().st_size < mask.total / 8 + 100 * len(mask) + 2000
    assert [p.name for p in path.parent.iterdir()] == ["mask.safetensors"]


def test_another_model_is_refused_and_untouched(tower, tmp_path):
    mask = Mask.random_global(tower, 3000)
    wider = ModifiedResNet((1, 1, 1, 1), output_dim=16, heads=4, image_size=64, width=16)
    deeper = ModifiedResNet((1, 1, 2, 1), output_dim=16, heads=4, image_size=64, width=8)
    for other in (wider, deeper, nn.Linear(3, 3)):
        before = {k: v.clone() for k, v in other.state_dict().items()}
        bad = mask if other is not deeper else Mask.random_global(deeper, 3000)
        with pytest.raises(LabError, match="another backbone"):
            bad.apply(tower if other is deeper else other)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(LabError, match="2 towers"):
        mask.apply(nn.ModuleDict({"a": tower, "b": tower.layer1, "c": nn.ModuleDict({"t": wider})}))


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "broken.safetensors"
    with pytest.raises(LabError, match="broken.safetensors"):
        Mask.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(LabError, match="broken.safetensors"):
        Mask.load(path)
