"""Checkpoints as training scripts leave them: found wherever they lie, told, or refused."""

import argparse
import json
import pathlib
import shutil
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from opentrans_lab.alpha import layer_alphas
from opentrans_lab.cli.masks import MaskApply
from opentrans_lab.clip import load_backbone
from opentrans_lab.errors import LabError
from opentrans_lab.evaluation.segment import segment
from opentrans_lab.files import read_state_dict
from opentrans_lab.heads import build
from opentrans_lab.masks import Mask
from opentrans_lab.records import PROJECT, weights

SHIPPED = PROJECT / "data" / "mini_clip"


@pytest.fixture(scope="module")
def state():
    return load_file(SHIPPED / "model.safetensors")


@pytest.fixture(scope="module")
def truth():
    return load_backbone("mini", SHIPPED, "cpu").visual.state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("mini")
    shutil.copy(SHIPPED / "config.json", place)
    return place


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return ModifiedResNet((1, 1, 1, 1), output_dim=16, heads=4, image_size=64, width=8)


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def noise(state):
    return {k: torch.ones_like(v) for k, v in state.items()}


def loaded(checkpoint, folder):
    path = folder / "model.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(checkpoint) if isinstance(checkpoint, bytes) else torch.save(checkpoint, path)
    return load_backbone("mini", folder, "cpu").visual.state_dict()


def same(a, b, tolerance=0.0):
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= tolerance for k in a)


def refused(work, *arguments):
    with pytest.raises(LabError) as error:
        work(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


names = some.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)


@settings(max_examples=15, deadline=None)
@given(prefix=some.lists(names, max_size=4), nesting=some.lists(names, max_size=3), hole=names)
def test_a_clip_is_found_under_any_prefix_and_nesting(state, truth, folder, prefix, nesting, hole):
    checkpoint = under("".join(f"{p}." for p in prefix), state) | {f"{hole}_": torch.ones(2, 2)}
    for key in nesting:
        checkpoint = {key: checkpoint, "epoch": 3, "extra": torch.ones(5)}
    assert same(loaded(checkpoint, folder), truth)


@pytest.mark.parametrize("wrap", [
    lambda s: {"ema": noise(s), "model": s},
    lambda s: under("ema_model.module.", noise(s)) | under("online.", s),
    lambda s: {"model_ema": {"module": noise(s)}, "state_dict": under("module._orig_mod.", s)},
])  # fmt: skip
def test_of_copies_the_trained_one_is_read_and_it_is_told(state, truth, folder, wrap):
    with pytest.warns(UserWarning, match="as many weights under '.*ema.*, which are read"):
        assert same(loaded(wrap(state), folder), truth)


def test_what_training_scripts_keep_beside_is_harmless(state, truth, folder):
    beside = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("x")), "best": np.float64(0.3),
        "curve": np.arange(3), "optimizer": {"state": {0: {"exp_avg": torch.ones(9, 9)}}},
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(loaded(beside | {"model": OrderedDict(under("clip.", state))}, folder), truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_become_float32_and_integers_are_no_weights(state, truth, folder, dtype):
    floats = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    found = loaded(under("student.", floats), folder)
    assert found["conv1.weight"].dtype == torch.float32 and same(found, truth, 0.3)
    whole = {k: v.to(torch.int8) if v.is_floating_point() else v for k, v in state.items()}
    assert "torch.int8, not floating point" in refused(loaded, whole, folder)


def test_models_are_float32_whatever_the_default_is(state, truth, folder):
    torch.set_default_dtype(torch.float64)
    try:
        found = loaded(under("clip.", state), folder)
        model = build("deeplabv3", load_backbone("mini", SHIPPED, "cpu"), "mini")
        picture = np.zeros((64, 96, 3), np.uint8)
        assert segment(picture, ["a", "b"], model=model).scores.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(found, truth) and found["conv1.weight"].dtype == torch.float32


def test_weights_pruned_by_torch_are_read_as_they_act(state, truth, folder, tmp_path):
    pruned, masks = {}, {}
    for key, value in state.items():
        if key.endswith("conv2.weight"):
            masks[key] = torch.rand(value.shape) < 0.5
            holes = value.masked_fill(~masks[key], torch.nan)  # what is pruned may be anything
            pruned |= {f"{key}_orig": holes, f"{key}_mask": masks[key].to(value.dtype)}
        else:
            pruned[key] = value
    found = loaded({"net": under("backbone.", pruned)}, folder)
    for key, mask in masks.items():
        key = key.removeprefix("visual.")
        if key in found:
            assert torch.equal(found[key], truth[key].where(mask, 0))
    mask = Mask.by_magnitude(load_backbone("mini", SHIPPED, "cpu").visual, 20000)
    mask.save(tmp_path / "m.safetensors")
    torch.save({"net": pruned}, tmp_path / "p.pt")
    MaskApply(tmp_path / "m.safetensors", tmp_path / "p.pt", tmp_path / "o.safetensors")()
    assert mask.verify(load_file(tmp_path / "o.safetensors"))


def test_the_part_that_holds_the_tower_is_masked_and_not_the_larger_one(tower, tmp_path):
    mask = Mask.random_global(tower, 3000)
    mask.save(tmp_path / "m.safetensors")
    head = {f"layer{i}.weight": torch.ones(3, 3) for i in range(999)}
    torch.save({"head": head, "trunk": tower.state_dict()}, tmp_path / "c.pt")
    MaskApply(tmp_path / "m.safetensors", tmp_path / "c.pt", tmp_path / "o.safetensors")()
    assert mask.verify(load_file(tmp_path / "o.safetensors"))


@pytest.mark.parametrize("form", [
    lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    lambda layer: parametrizations.weight_norm(layer),
    lambda layer: spectral_norm(layer),
    lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
])  # fmt: skip
@pytest.mark.parametrize("which", [slice(None), slice(3, 4)])
def test_the_remedy_for_computed_weights_works(tower, form, which):
    mask = Mask.random_global(tower, 3000)
    model = nn.ModuleDict({"deep": nn.ModuleDict({"er": tower})})
    layers = [tower.get_submodule(n.removesuffix(".weight")) for n in mask]
    for layer in layers[which]:
        form(layer)
    for partial in (False, True):
        message = refused(lambda p=partial: mask.apply(model, partial=p))
    assert refused(mask.apply, model.state_dict()) == message
    remedy = message.split("each layer with ")[1]
    for layer in layers[which]:
        eval(remedy, {"torch": torch, "layer": layer})
    mask.apply(model)
    assert mask.verify(model)


def test_a_file_of_parametrised_weights_names_the_remedy(state, folder):
    original = "conv2.parametrizations.weight.original"
    renamed = {k.replace("conv2.weight", original): v for k, v in state.items()}
    message = refused(loaded, under("model.", renamed), folder)
    assert "remove_parametrizations(layer, 'weight')" in message and "state_dict() again" in message


def test_the_image_tower_alone_is_told_with_a_remedy_that_works(truth, folder):
    message = refused(loaded, {"net": under("encoder.", truth)}, folder)
    assert "image tower alone" in message
    backbone = load_backbone("mini", SHIPPED, "cpu")
    nn.init.zeros_(backbone.visual.conv1.weight)
    remedy = message[message.index("backbone.visual.load") :]
    eval(remedy, {"backbone": backbone, "read_state_dict": read_state_dict})
    assert same(backbone.visual.state_dict(), truth)


@pytest.mark.parametrize("content, word", [
    (b"", "it is empty"),
    (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
    (b"\n<?xml version='1.0'?><Error>AccessDenied</Error>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "git lfs pull"),
    (b'{"weights": 1}', "is JSON"),
])  # fmt: skip
def test_files_that_are_something_else(folder, tmp_path, content, word):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    for work in (read_state_dict, Mask.from_authors):
        message = refused(work, path)
        assert word in message and str(path) in message
    assert word in refused(loaded, content, folder)


def test_a_pointer_or_folder_is_no_mask(tmp_path):
    (tmp_path / "m.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refused(Mask.load, tmp_path / "m.safetensors")
    for work in (Mask.load, Mask.from_authors, read_state_dict):
        assert "is a folder" in refused(work, tmp_path)


def test_a_whole_module_is_refused_by_its_class(folder):
    for checkpoint in (nn.Linear(2, 2), {"model": nn.Linear(2, 2), "epoch": 3}):
        message = refused(loaded, checkpoint, folder)
        assert "Linear" in message and "save its state_dict() alone" in message


def test_the_content_tells_the_form_not_the_ending(state, tmp_path):
    save_file(state, tmp_path / "really.pt")
    torch.save(state, tmp_path / "really.safetensors")
    for name in ("really.pt", "really.safetensors"):
        assert read_state_dict(tmp_path / name).keys() == state.keys()


def test_an_index_of_several_files_is_read_whole(state, truth, folder):
    files = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(state)}
    for name in set(files.values()):
        save_file({k: v for k, v in state.items() if files[k] == name}, folder / name)
    index = json.dumps({"metadata": {}, "weight_map": files}).encode()
    assert same(loaded(index, folder), truth)
    before = weights("mini", str(folder))
    save_file(noise(load_file(folder / "part-0.safetensors")), folder / "part-0.safetensors")
    assert weights("mini", str(folder)) != before  # keys of runs follow all of its files
    (folder / "part-1.safetensors").unlink()
    assert "part-1.safetensors, which is not beside it" in refused(loaded, index, folder)


def test_a_prefix_is_found_at_any_depth_and_copies_are_told(tmp_path):
    weights = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)).state_dict()
    torch.save({"ema": {"net": noise(weights)}, "model": {"net": weights}}, tmp_path / "c.pt")
    with torch.no_grad(), pytest.warns(UserWarning, match="'ema.net.'|'ema.'"):
        for found in (read_state_dict(tmp_path / "c.pt"),
                      {k.removeprefix("net."): v for k, v in
                       read_state_dict(tmp_path / "c.pt", "net.").items()}):  # fmt: skip
            assert all(torch.equal(found[k], v) for k, v in weights.items())
    averaged = read_state_dict(tmp_path / "c.pt", "ema.net.")
    assert all((v == 1).all() for v in averaged.values()) and averaged.keys() == weights.keys()


# --- alphas of what is bare -----------------------------------------------------------------------


def test_linear_maps_that_look_like_tables_and_the_reverse():
    torch.manual_seed(0)
    state = {
        "label_embed.weight": torch.randn(60, 40), "label_embed.bias": torch.zeros(60),
        "wte_proj.weight": torch.randn(60, 40), "wte_proj.bias": torch.zeros(60),
        "words.weight": torch.randn(2000, 30), "tok_emb.weight": torch.randn(60, 40),
        "classes.weight": torch.randn(2000, 30), "classes.bias": torch.zeros(2000),
        "member.weight": torch.randn(60, 40),
    }  # fmt: skip
    table = layer_alphas(state).set_index("name")
    linear = ["label_embed", "wte_proj", "classes", "member"]
    assert sorted(table.index[table.alpha.notna()]) == sorted(linear)
    assert (table.type[linear] == "linear").all()
    for name, why in (("words", "shape"), ("tok_emb", "name")):
        assert f"by its {why}" in table.status[name] and "build the model" in table.status[name]


def test_layers_of_a_checkpoint_and_of_a_compiled_model_have_their_own_names():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    expected = layer_alphas(model)
    inner = nn.Sequential(torch.compile(model[0]), model[1])
    checkpoint = {"epoch": 3, "model": torch.compile(model).state_dict()}
    for source in (torch.compile(model), inner, inner.state_dict(), checkpoint):
        assert layer_alphas(source).equals(expected)


def test_a_moving_average_comes_last_under_a_prefix_and_beside_pruned_weights(tmp_path):
    path, plain = tmp_path / "x.pt", {"visual.conv1.weight": torch.ones(3, 3)}
    average = {key: tensor + 8 for key, tensor in plain.items()}
    torch.save({"ema": average, "state_dict": {f"module.{k}": v for k, v in plain.items()}}, path)
    for prefix in ("visual.", "visual"):
        with pytest.warns(UserWarning, match="'ema.'"):
            assert read_state_dict(path, prefix)["conv1.weight"].max() == 1
    pruned = {"visual.conv1.weight_orig": torch.ones(3, 3)}
    pruned["visual.conv1.weight_mask"] = torch.eye(3)
    torch.save({"model": pruned, "model_ema": average}, path)
    with pytest.warns(UserWarning, match="'model_ema.'"):
        found = read_state_dict(path, names=["visual.conv1.weight"])
    assert found["visual.conv1.weight"].equal(torch.eye(3))


def test_parts_beside_the_one_that_is_read_are_named(tmp_path):
    tower = {"visual.conv1.weight": torch.ones(3, 3), "visual.fc.weight": torch.ones(3, 3)}
    head = {"conv_seg.weight": torch.ones(2, 3)}
    torch.save({"backbone": tower, "decode_head": head}, tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="only 'backbone' is read; decode_head beside it"):
        assert read_state_dict(tmp_path / "x.pt").keys() == tower.keys()
