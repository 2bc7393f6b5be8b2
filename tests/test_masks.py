"""Masks: exact counts, nested, zeros that stay, files that round-trip."""

import copy
import json
import pickle

import pytest
import torch
from accelerate import Accelerator
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from opentrans_lab.errors import LabError
from opentrans_lab.files import pack_bits
from opentrans_lab.masks import FIRST, prunable
from opentrans_lab.masks.mask import FORMAT, Mask
from opentrans_lab.records import PROJECT


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
    match = mask.apply(model)
    assert match.prefix == "backbone." and len(match.tensors) == len(mask) and mask.verify(model)
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


# --- other people's models ----------------------------------------------------------------------


class Foreign(nn.Module):
    """A model that keeps the tower where FC-CLIP does, beside weights with the same last names."""

    def __init__(self, tower):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.clip_model = nn.Module()
        self.backbone.clip_model.visual = tower
        self.head = nn.ModuleDict({"conv2": nn.Conv2d(3, 3, 3), "layer1": nn.Conv2d(3, 3, 1)})


def test_the_tower_is_found_where_fcclip_han_and_ddp_keep_it(tower):
    mask = Mask.random_global(tower, 3000)
    inside = "backbone.clip_model.visual."
    for model, prefix in (
        (Foreign(tower), inside),
        (nn.ModuleDict({"module": Foreign(tower)}), f"module.{inside}"),
        (nn.ModuleDict({"backbone": tower}), "backbone."),
        (tower, ""),
    ):
        match = mask.apply(model)
        assert match.prefix == prefix and str(match).startswith(f"{len(mask)} of {len(mask)} tens")
        assert mask.verify(model)
    named = mask.apply(Foreign(tower), prefix="backbone.clip_model.visual")
    assert named.prefix == inside
    with pytest.raises(LabError, match=f"0 of {len(mask)} tensors matched under 'head.'"):
        mask.apply(Foreign(tower), prefix="head")


def test_a_state_dict_is_masked_like_its_model(tower):
    mask = Mask.random_global(tower, 3000)
    state = {f"backbone.{k}": v.clone() for k, v in tower.state_dict().items()}
    mask.apply(state)
    mask.apply(tower)
    assert all(torch.equal(state[f"backbone.{k}"], v) for k, v in tower.state_dict().items())


def test_a_partial_match_is_refused_unless_told(tower):
    mask = Mask.random_global(tower, 3000)
    model = nn.ModuleDict({"backbone": tower})
    tower.layer4 = nn.Identity()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(LabError, match="'backbone.layer4.0.conv1.weight' .* is missing"):
        mask.apply(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    match = mask.apply(model, partial=True)
    assert 0 < len(match.tensors) < len(mask) and not any("layer4" in n for n in match.tensors)
    assert all(not w[~mask[n]].any() for n, w in match.tensors.items())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mask.keep(model, optimizer, partial=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(not w[~mask[n]].any() for n, w in match.tensors.items())


# --- the authors' files -------------------------------------------------------------------------


def authors_file(tower, path, prefix="", skip=()):
    """What their code saves: torch.nn.utils.prune's state dict under ``backbone``."""
    for name, module in tower.named_modules():
        if isinstance(module, nn.Conv2d) and name not in ("conv1", *skip):
            prune.l1_unstructured(module, "weight", amount=0.9)
    state = {prefix + k: v for k, v in tower.state_dict().items()}
    torch.save({"backbone": state, "iteration": 7}, path)
    return {f"{n}.weight": m.weight_mask.bool() for n, m in tower.named_modules()
            if hasattr(m, "weight_mask")}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "visual."])
def test_authors_file_is_read_as_torch_prune_wrote_it(tower, tmp_path, prefix):
    pruned = copy.deepcopy(tower)
    theirs = authors_file(pruned, tmp_path / "seg_backbone_imp21.pth", prefix)
    mask = Mask.from_authors(tmp_path / "seg_backbone_imp21.pth")
    assert mask == Mask(theirs) and mask.meta["source"] == "seg_backbone_imp21.pth"
    mask.apply(tower)
    pruned.eval(), tower.eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(tower(images), pruned(images))


def test_what_we_write_loads_into_a_model_pruned_by_torch(tower, tmp_path):
    mask = Mask.random_global(tower, 3000)
    mask.to_authors(nn.ModuleDict({"backbone": tower}), tmp_path / "imp.pth")
    state = torch.load(tmp_path / "imp.pth", weights_only=True)["backbone"]
    theirs = copy.deepcopy(tower)
    for name, module in theirs.named_modules():
        if f"{name}.weight" in mask:
            prune.identity(module, "weight")
    theirs.load_state_dict(state)  # strict
    assert all(torch.equal(theirs.get_submodule(n.removesuffix(".weight")).weight_orig, w)
               for n, w in prunable(tower).items())  # fmt: skip
    assert Mask.from_authors(tmp_path / "imp.pth") == mask


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file ran')",))


def test_bad_authors_files_change_nothing_and_run_nothing(tower, tmp_path):
    path = tmp_path / "imp.pth"
    path.write_bytes(pickle.dumps({"backbone": Payload()}))
    with pytest.raises(LabError, match="imp.pth"):
        Mask.from_authors(path)
    torch.save({"backbone": tower.state_dict()}, path)
    with pytest.raises(LabError, match="layer1.0.conv1.weight_mask"):
        Mask.from_authors(path)
    authors_file(copy.deepcopy(tower), path)
    state = torch.load(path, weights_only=True)
    state["backbone"]["layer1.0.conv1.weight_mask"][0] = 0.5
    torch.save(state, path)
    with pytest.raises(LabError, match="layer1.0.conv1.weight.* other values than 0 and 1"):
        Mask.from_authors(path)
    wider = ModifiedResNet((1, 1, 1, 1), output_dim=16, heads=4, image_size=64, width=16)
    authors_file(wider, path)
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    with pytest.raises(LabError, match="another backbone"):
        Mask.from_authors(path).apply(tower)
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())


# --- scores, sizes, other shapes ----------------------------------------------------------------


def test_by_score_keeps_the_best_of_each_layer(tower):
    ours = Mask.by_magnitude(tower, keep=1234)
    scores = {n: torch.rand(w.shape) for n, w in prunable(tower).items()}
    mask = Mask.by_score(scores, ours)
    assert mask.layers()["kept"].equals(ours.layers()["kept"])
    for name, chosen in mask.items():
        if 0 < chosen.sum() < chosen.numel():
            assert scores[name][chosen].min() > scores[name][~chosen].max()


def test_memory_format_does_not_matter(tower):
    plain = Mask.by_magnitude(tower, keep=1234)
    tower.to(memory_format=torch.channels_last)
    again = Mask.by_magnitude(tower, keep=1234)
    assert again == plain
    assert Mask.by_magnitude(tower, 700, again) == Mask.by_magnitude(tower, 700, plain)


def test_full_size_mask_is_small_on_disk(tmp_path):
    with torch.device("meta"):
        rn50 = ModifiedResNet((3, 4, 6, 3), output_dim=1024, heads=32, image_size=224, width=64)
    shapes = {name: weight.shape for name, weight in prunable(rn50).items()}
    mask = Mask({name: torch.rand(shape) < 0.1 for name, shape in shapes.items()})
    mask.save(tmp_path / "m.safetensors")
    assert mask.total == 23_474_016 - 864 and len(mask) == 54
    assert (tmp_path / "m.safetensors").stat().st_size < 4e6
    assert Mask.load(tmp_path / "m.safetensors") == mask


def test_the_readmes_five_lines_work_as_they_stand(tower, tmp_path, monkeypatch, capsys):
    section = (PROJECT / "README.md").read_text().split("## Put the mask into your own model")[1]
    code = section.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    mask = Mask.random_global(tower, 3000)
    mask.save("mask.safetensors")
    model = nn.ModuleDict({"backbone": tower})
    space = {"model": model, "torch": torch}
    exec(code, space)
    n = len(mask)
    assert f"{n} of {n} tensors matched under 'backbone.'" in capsys.readouterr().out
    tower(torch.randn(2, 3, 64, 64)).square().sum().backward()
    space["optimizer"].step()
    assert mask.verify(model)


class Archive(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path, self.weight = str(path), torch.ones(3, 3)

    @torch.jit.export
    def __getstate__(self):
        return self.path

    @torch.jit.export
    def __setstate__(self, path: str):
        self.path, self.weight = path, torch.ones(3, 3)
        torch.save(torch.ones(1), path)

    def forward(self, x):
        return x @ self.weight


def test_an_archive_with_code_is_not_even_opened(tmp_path):
    torch.jit.script(Archive(tmp_path / "ran")).save(tmp_path / "imp.pth")
    with pytest.raises(LabError, match="TorchScript archive, which holds code"):
        Mask.from_authors(tmp_path / "imp.pth")
    assert not (tmp_path / "ran").exists()


def test_what_has_no_rank_or_other_layers_is_refused(tower):
    deeper = ModifiedResNet((1, 1, 2, 1), output_dim=16, heads=4, image_size=64, width=8)
    mask, deep = Mask.random_global(tower, 3000), Mask.random_global(deeper, 3000)
    for work in (lambda: deep.within(mask), lambda: mask.within(deep), lambda: mask & deep,
                 lambda: Mask.by_magnitude(tower, 100, within=deep)):  # fmt: skip
        with pytest.raises(LabError, match="another backbone"):
            work()
    tower.conv2.weight.data[0, 0] = float("nan")
    with pytest.raises(LabError, match="NaN"):
        Mask.by_magnitude(tower, 100)


def test_damaged_masks_are_named(tower, tmp_path):
    mask = Mask.random_global(tower, 3000)
    packed = {name: pack_bits(t) for name, t in mask.items()}
    shapes = {name: list(t.shape) for name, t in mask.items()}
    for said in ({}, {"shapes": "{"}, {"shapes": json.dumps({"none": [3]})},
                 {"shapes": json.dumps(shapes | {"conv2.weight": [9, 9, 9, 9]})}):  # fmt: skip
        save_file(packed, tmp_path / "m.safetensors", metadata=said | {"format": FORMAT})
        with pytest.raises(LabError, match="m.safetensors is a damaged mask"):
            Mask.load(tmp_path / "m.safetensors")


def test_keep_wants_the_models_own_optimizer_and_takes_accelerates(tower):
    mask, other = Mask.random_global(tower, 3000), nn.Linear(3, 3)
    with pytest.raises(LabError, match="none of the tower's weights"):
        mask.keep(tower, torch.optim.SGD(other.parameters(), 0.1))
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(tower, torch.optim.SGD(tower.parameters(), 0.1))
    mask.apply(model)
    mask.keep(model, optimizer)
    accelerator.backward(model(torch.randn(2, 3, 64, 64)).square().sum())
    optimizer.step()
    assert mask.verify(model)


def test_a_model_pruned_by_torch_is_told_apart(tower):
    mask = Mask.random_global(tower, 3000)
    for name in mask:
        prune.identity(tower.get_submodule(name.removesuffix(".weight")), "weight")
    with pytest.raises(LabError, match="prune.remove"):
        mask.apply(tower)
