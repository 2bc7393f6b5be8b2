"""Spending the zeros: exact, whatever it gains."""

import copy
from importlib import import_module

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import save_file

from opentrans_lab.files import pack_bits, read_state_dict, unpack_bits
from opentrans_lab.masks import Mask

sparse = import_module("opentrans_lab.costs.payoff")  # its face has the function of that name


@pytest.fixture
def tower():
    torch.manual_seed(0)
    visual = ModifiedResNet((1, 1, 1, 1), output_dim=16, heads=4, image_size=64, width=8)
    for norm in (m for m in visual.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
        norm.bias.data.normal_(0, 0.1)
    return visual.eval()


def starved(tower, density=0.03):
    """A mask under which some inner channels are read by nothing."""
    mask = Mask.random_global(tower, round(density * Mask.dense(tower).total), seed=0)
    mask.apply(tower)
    return mask


@pytest.mark.parametrize("shape", [(3,), (8,), (5, 7), (2, 3, 3, 3)])
def test_bits_round_trip(shape):
    bits = torch.rand(shape) < 0.5
    packed = pack_bits(bits)
    assert len(packed) == -(-bits.numel() // 8)
    assert torch.equal(unpack_bits(packed, shape), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_weights_are_lossless_and_small(tower, tmp_path, dtype):
    starved(tower, 0.1)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tower.state_dict().items()}
    trunk = {k: v for k, v in state.items() if not k.startswith("attnpool")}
    sparse.save_sparse(trunk, tmp_path / "packed.safetensors")
    save_file(trunk, tmp_path / "plain.safetensors")
    again = read_state_dict(tmp_path / "packed.safetensors")
    assert again.keys() == trunk.keys()
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in trunk.items())
    plain, packed = ((tmp_path / f"{n}.safetensors").stat().st_size for n in ("plain", "packed"))
    assert packed < plain / 2


def test_dropping_unread_channels_changes_nothing(tower):
    starved(tower)
    images = torch.rand(2, 3, 64, 64)
    before = sparse.Trunk(tower)(images)
    slim = copy.deepcopy(tower)
    dropped = sparse.drop_unread_channels(slim)
    assert dropped
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in tower.parameters())
    torch.testing.assert_close(sparse.Trunk(slim)(images), before, rtol=1e-4, atol=1e-5)
    assert sparse.drop_unread_channels(copy.deepcopy(slim)) < dropped


def test_sparse_products_are_the_same_convolution(tower):
    starved(tower)
    images = torch.rand(2, 3, 64, 64)
    before = sparse.Trunk(tower)(images)
    other = copy.deepcopy(tower)
    replaced = sparse.sparse_products(other)
    kinds = [type(m).__name__ for m in other.modules()]
    assert replaced == kinds.count("SparseConv1x1") > 10
    torch.testing.assert_close(sparse.Trunk(other)(images), before, rtol=1e-4, atol=1e-5)


def test_payoff_measures_every_way_and_leaves_the_tower_alone(tower):
    mask = Mask.random_global(tower, round(0.1 * Mask.dense(tower).total))
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    table = sparse.payoff(tower, mask, size=64, repeats=2)
    assert list(table["way"])[:3] == ["torch", "dead channels removed", sparse.PRODUCTS]
    assert "ONNX Runtime" in set(table["way"])
    assert table["error"].lt(1e-4).all() and table["masked_ms"].gt(0).all()
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())


def test_disk_sizes_are_of_the_trunk(tower):
    mask = Mask.random_global(tower, round(0.1 * Mask.dense(tower).total))
    table = sparse.disk_sizes(tower, mask).set_index("dtype")
    weights = sum(v.numel() for k, v in tower.state_dict().items() if not k.startswith("attn"))
    assert table.loc["float32", "dense_mb"] == pytest.approx(4e-6 * weights, rel=0.2)
    assert (table["ratio"] > 2).all()
