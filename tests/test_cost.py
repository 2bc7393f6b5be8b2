"""Costs: the published counts, the paper's cells, other people's counters, and plain arithmetic."""

import pytest
import torch
from torch import nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as m2f

from opentrans_lab.alpha import AUTHORS_FROZEN
from opentrans_lab.clip import load_backbone
from opentrans_lab.costs import cost, recipes, training_cost
from opentrans_lab.costs.counter import (
    convolutions,
    count,
    fvcore,
    layer_costs,
    meta_backbone,
    meta_framework,
    on_meta,
    parse_size,
    thop,
    trace,
)
from opentrans_lab.errors import LabError
from opentrans_lab.heads import FRAMEWORKS
from opentrans_lab.heads.deeplabv3 import DeepLabV3
from opentrans_lab.masks import Mask

GIGA, NUMBERS = 1e9, ["params", "macs", "sparse_params", "sparse_macs"]


class Mask2Former(nn.Module):
    """The published heads from transformers' modules, until or unless the lab has its own."""

    queries = 100

    def __init__(self, backbone, preset="paper"):
        super().__init__()
        config = Mask2FormerConfig(num_queries=self.queries, dim_feedforward=2048)
        self.backbone = backbone
        self.pixel_decoder = m2f.Mask2FormerPixelDecoder(config, list(backbone.channels))
        self.decoder = m2f.Mask2FormerTransformerModule(256, config)
        self.class_embed = nn.Linear(256, 256)

    def decode(self, images):
        pixels = self.pixel_decoder(self.backbone(images))
        decoded = self.decoder(
            list(pixels.multi_scale_features), pixels.mask_features, output_hidden_states=True
        )
        return pixels, decoded

    def forward(self, images):
        _, decoded = self.decode(images)
        return self.class_embed(decoded.intermediate_hidden_states[-1])


class FcClip(Mask2Former):
    queries = 250

    def __init__(self, backbone, preset="paper"):
        super().__init__(backbone)
        self.pooled = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256))
        widths = [nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
        self.class_embed = nn.Sequential(*widths, nn.Linear(256, 1024))
        self.log_scale = nn.Parameter(torch.ones(()))
        self.void = nn.Parameter(torch.ones(1, 1024))  # only read where there is text

    def forward(self, images):
        pixels, decoded = self.decode(images)
        for masks, hidden in zip(
            decoded.masks_queries_logits, decoded.intermediate_hidden_states, strict=True
        ):
            regions = torch.einsum("bqhw,bchw->bqc", masks.sigmoid(), pixels.mask_features)
            self.class_embed(hidden.transpose(0, 1) + self.pooled(regions))


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    """The lab's own frameworks; those that it lacks are the published heads above."""
    added = {"han": Mask2Former, "fcclip": FcClip}
    added = {key: head for key, head in added.items() if key not in FRAMEWORKS}
    FRAMEWORKS.update(added)
    yield
    for key in added:
        del FRAMEWORKS[key]


@pytest.fixture(scope="module")
def mini():
    return count(meta_backbone("mini"), (96, 128))


def random_mask(visual, density=0.3, seed=0):
    return Mask.random_global(visual, round(density * Mask.dense(visual).total), seed)


def line(table, convention, component="total"):
    found = table[(table["convention"] == convention) & (table["component"] == component)]
    assert len(found) == 1
    return found.iloc[0]


# --- published numbers ----------------------------------------------------------------------------


def test_the_trunk_at_the_papers_size():
    counted = count(meta_backbone("RN50"))
    rows = counted.rows("trunk")
    assert sum(p.numel() for p in counted.parameters("trunk").values()) == 23_527_264
    assert convolutions(rows) == rows["macs"].sum() == 104_058_470_400
    assert round(fvcore(rows) / GIGA, 3) == 104.541
    assert round(thop(rows) / GIGA, 3) == 105.041


@pytest.mark.parametrize("framework", ["han", "fcclip", "deeplabv3"])
def test_all_dense_cells_of_table_1_to_the_printed_digit(framework):
    table = cost(framework)
    total, printed = line(table, "paper"), line(table, "paper", "printed")
    for column, unit in zip(NUMBERS[:2], (1e6, 1e9), strict=True):
        assert round(total[column] / unit, 1) == round(printed[column] / unit, 1)
    rest = line(table, "paper", "residual")
    for column in NUMBERS:
        assert rest[column] == total[column] - printed[column]
    assert abs(rest["sparse_params"]) < 0.05e6
    assert abs(rest["sparse_macs"]) < 0.4e9  # 173.3 G is reached by nothing


@pytest.mark.parametrize(
    ("framework", "params"), [("han", 20_560_320), ("fcclip", 21_032_385)], ids=["han", "fcclip"]
)
def test_uniform_heads_count_every_parameter(framework, params):
    counted = count(meta_framework(framework))
    assert sum(p.numel() for p in counted.parameters("head").values()) == params
    table = cost(framework)
    assert line(table, "uniform")["params"] == 23_527_264 + params
    assert line(table, "uniform", "trunk")["macs"] == 104_058_470_400


def test_what_thop_sees_of_fcclip_is_computed():
    _, head = recipes.RECIPES["fcclip"](count(meta_framework("fcclip")))
    assert round(head.macs / GIGA, 3) == 95.013
    assert round(head.params / 1e6, 3) == 15.442


def test_training_cost_rebuilds_tables_2_and_4():
    table = training_cost("han").set_index(["select", "row"])
    assert (table["frozen_macs"] / GIGA).round(3)["low_alpha"].tolist() == [19.384, 19.384]
    rest = table["residual"]
    assert (rest == table["paper"] - table["printed"]).all()  # all are shown
    for select in ("none", "high_alpha", "low_alpha"):
        assert abs(rest[select, "dense"]) < 0.1
    assert 1.3 < rest["random", "dense"] < rest["low_alpha", "ours"] < 1.8  # these do not fit
    assert table["frozen"].tolist() == [0, 27, 27, 27, 27]
    full = table["full"]
    assert full["none", "dense"] == pytest.approx(306, rel=0.01)
    assert full["low_alpha", "ours"] < full["low_alpha", "dense"] < full["none", "dense"]


# --- other people's counters ----------------------------------------------------------------------


def test_fvcore_agrees_on_a_trunk_and_a_whole_head():
    analysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis
    model = nn.Sequential(load_backbone("mini", "random", "cpu")).eval()
    images = torch.zeros(1, 3, 64, 96)
    theirs = analysis(model, images).unsupported_ops_warnings(False)
    theirs = theirs.uncalled_modules_warnings(False).total()
    assert fvcore(count(model, (64, 96)).trace.rows) == theirs

    config = Mask2FormerConfig(num_queries=7, dim_feedforward=64, encoder_layers=1)
    decoder = m2f.Mask2FormerPixelDecoder(config, [8, 8, 8, 8]).eval()
    maps = [torch.zeros(1, 8, 64 // stride, 96 // stride) for stride in (4, 8, 16, 32)]

    class Masks(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, *maps):
            return self.decoder(list(maps)).mask_features

    theirs = analysis(Masks().eval(), tuple(maps)).unsupported_ops_warnings(False)
    theirs = theirs.uncalled_modules_warnings(False).total()
    assert fvcore(trace(on_meta(Masks()), *(m.to("meta") for m in maps)).rows) == theirs


def test_thop_agrees_on_a_trunk():
    profile = pytest.importorskip("thop").profile
    backbone = load_backbone("mini", "random", "cpu")
    macs, params = profile(backbone, (torch.zeros(1, 3, 64, 96),), verbose=False)
    counted = count(meta_backbone("mini"), (64, 96))
    assert thop(counted.rows("trunk")) == macs
    assert sum(p.numel() for p in counted.parameters("trunk").values()) == params


# --- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["deeplabv3", "han", "fcclip"])
def test_nothing_is_allocated(framework):
    model = meta_framework(framework)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert count(model, (64, 64)).model is model


def test_a_model_with_weights_is_counted_as_shapes_and_stays_as_it_is():
    model = DeepLabV3(load_backbone("mini", "random", "cpu"), preset="mini").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    counted = count(model, (64, 96))
    assert all(p.is_meta for p in counted.model.parameters())
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    by_key = cost("deeplabv3", "64x96", backbone="mini", preset="mini")
    assert line(cost(model, "64x96"), "uniform").equals(line(by_key, "uniform"))


def test_cost_is_linear_in_the_batch_and_in_the_pixels(mini):
    once = layer_costs(mini).set_index("module")
    backbone = meta_backbone("mini")
    four = layer_costs(count(backbone, (96, 128), batch=4)).set_index("module")
    large = layer_costs(count(backbone, (192, 256))).set_index("module")
    assert (four["macs"] == 4 * once["macs"]).all() and (four["params"] == once["params"]).all()
    assert (large["macs"] == 4 * once["macs"]).all() and once["macs"].sum() > 0


def test_a_convolution_by_hand():
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    [row] = count(conv, (32, 48)).trace.rows.itertuples()
    assert (row.op, row.macs, row.elements) == ("convolution", 16 * 24 * 8 * 27, 16 * 24 * 8)


def test_a_masked_layer_costs_its_kept_weights_times_output_positions(mini):
    mask = random_mask(load_backbone("mini", "random", "cpu").visual)
    layers = layer_costs(mini, mask).set_index("module")
    for name, keep in mask.items():
        layer = layers.loc[f"visual.{name.removesuffix('.weight')}"]
        positions = layer["macs"] // keep.numel()
        assert positions * keep.numel() == layer["macs"] > 0
        assert layer["sparse_macs"] == positions * int(keep.sum())
        assert layer["sparse_params"] == int(keep.sum())
    masked = [f"visual.{name.removesuffix('.weight')}" for name in mask]
    others = layers.drop(index=masked)
    assert "visual.conv1" in others.index and not set(masked) & set(others.index)
    assert (others["macs"] == others["sparse_macs"]).all()
    assert (others["params"] == others["sparse_params"]).all()


def test_density_one_is_dense_and_layers_add_up(tmp_path):
    visual = load_backbone("mini", "random", "cpu").visual
    dense, sparse = Mask.dense(visual), random_mask(visual)
    sparse.save(tmp_path / "m.safetensors")
    arguments = {"size": "64x96", "backbone": "mini", "preset": "mini"}
    bare = line(cost("deeplabv3", **arguments), "uniform")
    full = line(cost("deeplabv3", mask=dense, **arguments), "uniform")
    assert (full[NUMBERS] == bare[NUMBERS]).all()
    assert full["sparse_params"] == full["params"] and full["sparse_macs"] == full["macs"]

    counted = count(meta_framework("deeplabv3", "mini", "mini"), "64x96")
    layers = layer_costs(counted, sparse)
    table = cost("deeplabv3", mask=tmp_path / "m.safetensors", **arguments)
    table = table[table["convention"] == "uniform"].set_index("component")
    inside = layers[layers["component"] != "outside the forward pass"]
    assert (inside[NUMBERS].sum() == table.loc["total", NUMBERS]).all()
    parts = table.drop(index=["total", "outside the forward pass"])
    assert (parts[NUMBERS].sum() == table.loc["total", NUMBERS]).all()
    pruned = sparse.total - sparse.kept
    assert table.loc["total", "params"] - table.loc["total", "sparse_params"] == pruned


def test_training_cost_of_any_selection_mask_and_schedule():
    arguments = {"framework": "deeplabv3", "backbone": "mini", "preset": "mini", "size": "64x64"}
    arguments |= {"images": 1000, "warmup": 0}
    layers = ["conv1", "layer1.0.conv1", "layer4.0.downsample.0"]
    table = training_cost(frozen={"none": [], "some": layers}, **arguments).set_index("select")
    saved = 1000 * table["frozen_macs"]["some"] / 1e15
    for column in ("paper", "full"):
        assert table[column]["none"] - table[column]["some"] == pytest.approx(saved)
    assert saved > 0 and table["printed"].isna().all()

    visual = load_backbone("mini", "random", "cpu").visual
    same = training_cost(frozen={"none": []}, mask=Mask.dense(visual), **arguments).iloc[0]
    assert same["paper"] == table["paper"]["none"] and same["full"] == table["full"]["none"]
    mask = random_mask(visual)
    less = training_cost(frozen={"none": []}, mask=mask, **arguments).iloc[0]
    counted = layer_costs(count(meta_framework("deeplabv3", "mini", "mini"), "64x64"), mask)
    pictures = counted.loc[counted["module"].str.endswith("visual.conv1"), "sparse_macs"].sum()
    thrice = 3 * counted["sparse_macs"].sum() - pictures  # which need no gradient
    assert pictures > 0 and less["full"] == pytest.approx(1000 * thrice / 1e15)
    late = training_cost(frozen={"some": layers}, **(arguments | {"warmup": 1000})).iloc[0]
    assert late["paper"] == table["paper"]["none"]


# --- what users get wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["800", "800x", "x", "800x1216x3", "-8x8", "800*1216", "16x64"])
def test_malformed_sizes(size):
    with pytest.raises(LabError, match="size"):
        parse_size(size)
    assert parse_size("800X1216") == parse_size((800, 1216)) == (800, 1216)


def test_unknown_frameworks_backbones_layers_and_foreign_masks():
    with pytest.raises(LabError, match="unknown framework='segformer'"):
        cost("segformer", "64x64")
    with pytest.raises(LabError, match="backbone 'RN51' is unknown"):
        cost("deeplabv3", "64x64", backbone="RN51")
    mask = Mask.dense(load_backbone("mini", "random", "cpu").visual)
    with pytest.raises(LabError, match="another backbone"):
        cost("deeplabv3", "64x64", mask)
    with pytest.raises(LabError, match="nowhere.safetensors does not exist"):
        cost("deeplabv3", "64x64", "nowhere.safetensors")
    with pytest.raises(LabError, match="no convolution of the trunk"):
        training_cost("deeplabv3", "64x64", frozen={"x": ["layer9.conv1"]})
    with pytest.raises(LabError, match="selections are of RN50"):
        training_cost("deeplabv3", "64x64", backbone="mini", preset="mini")
    with pytest.raises(LabError, match="warmup=2"):
        training_cost("deeplabv3", "64x64", images=1, warmup=2)


def test_a_forward_pass_that_needs_values_is_named():
    class Peeks(nn.Module):
        def forward(self, images):
            return images * images.sum().item()

    with pytest.raises(LabError, match="Peeks cannot be counted"):
        count(Peeks(), (32, 32))


def test_every_recipe_and_assumption_has_its_source():
    sources = recipes.SOURCES
    assert sources["source"].str.len().min() > 20
    named = " ".join(sources["frameworks"])
    assert all(key in named for key in recipes.RECIPES)
    assert recipes.MEDIAN_LAYER not in AUTHORS_FROZEN
