"""Han et al. and FC-CLIP: transformers' Mask2Former to the digit, and what is ours around it."""

import math
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Mask2FormerForUniversalSegmentation

from opentrans_lab.clip import MINI, Backbone, build_mini, frozen_copy, mini_tokenizer
from opentrans_lab.costs import cost, meta_backbone, meta_framework
from opentrans_lab.costs.counter import count
from opentrans_lab.data import scenes
from opentrans_lab.errors import LabError
from opentrans_lab.heads.criterion import assign, regions
from opentrans_lab.heads.fcclip import FCCLIP, attention_pool
from opentrans_lab.heads.han import KD_WEIGHT, Han
from opentrans_lab.heads.inference import cut, merge, pad, segment_classes
from opentrans_lab.masks import Mask
from opentrans_lab.pruning import crop_regions, kd_loss, region_images
from opentrans_lab.train import Chance

TINY = {
    **MINI,
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64},
}
NAMES = tuple(scenes.THINGS[:4]) + scenes.STUFF


def backbone(seed=0):
    torch.manual_seed(seed)
    return Backbone(build_mini(TINY), mini_tokenizer(TINY), "tiny")


def build(kind, **options):
    clip = backbone()
    if kind == "han, taught":
        options["teacher"] = backbone(1)
    elif kind != "han":
        options["clip"] = kind.split()[1]
    torch.manual_seed(0)
    return (Han if kind.startswith("han") else FCCLIP)(clip, "mini", **options)


KINDS = ("han", "han, taught", "fcclip frozen", "fcclip tuned")


@pytest.fixture(params=KINDS)
def model(request):
    return build(request.param)


def scene_batch(n=2, size=64):
    drawn = scenes.render(range(n), size, names=range(4), seed=4, objects=(1, 2), radius=(10, 16))
    names = [*range(4), *range(192, 200)]
    classes = [torch.tensor([names.index(int(c)) for c in image]) for image in drawn.classes]
    return {"images": drawn.images, "masks": drawn.masks, "classes": classes, "names": NAMES}


def head(model):
    return {n: p for n, p in model.named_parameters() if not n.startswith("backbone.")}


# --- transformers' own ----------------------------------------------------------------------------


class Closed(Han):
    """Han, but for transformers' closed-vocabulary classifier."""

    def __init__(self, clip, predictor):
        super().__init__(clip, "mini")
        self.class_embed, self.predictor = nn.Identity(), predictor

    def embed(self, queries):
        return self.predictor(queries)

    def logits(self, scaled, class_names):
        return scaled / self.scale


class Maps(nn.Module):
    """A backbone as transformers' pixel decoder asks for it."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    def forward(self, images):
        return SimpleNamespace(feature_maps=self.clip(images))


class Drawn(Chance):
    """Notes what ours draws, in order: points of the matching, many points to choose from, rest."""

    def __init__(self):
        super().__init__(None, torch.device("cpu"))
        self.numbers = []

    def rand(self, rows, *shape):
        self.numbers.append(super().rand(rows, *shape))
        return self.numbers[-1]


class Again(TorchFunctionMode):
    """Gives them to transformers' loss, which goes from layer to layer, the last one first, there
    from image to image, and whose matched masks stand in the order of their queries."""

    def __init__(self, drawn, matches, image):
        super().__init__()
        layers, images = len(matches), int(image.max()) + 1
        match, many, rest = drawn.numbers
        self.queue = []
        for layer in (-1, *range(layers - 1)):
            self.queue += [m[None, layer] for m in match.unflatten(0, (-1, layers))]
            order = (image * 1000 + matches[layer]).argsort()
            self.queue += [p.unflatten(0, (-1, layers))[order, layer] for p in (many, rest)]
        assert images == len(match) // layers

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.rand:
            return func(*args, **(kwargs or {}))
        numbers = self.queue.pop(0)
        assert numbers.shape == args
        return numbers


def test_masks_and_loss_are_those_of_transformers():
    clip = backbone().eval()
    preset = build("han").preset
    config = preset.config(clip.channels)
    config.num_labels = len(NAMES)
    theirs = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for p in theirs.parameters():  # many start at 0 or 1 and would hide a mistake
            p += 0.05 * torch.randn_like(p)
    theirs.model.pixel_level_module.encoder = Maps(clip)
    ours = Closed(clip, theirs.class_predictor)
    ours.load_mask2former(theirs.state_dict())
    ours.train().backbone.eval()
    theirs.train().model.pixel_level_module.encoder.eval()
    data = scene_batch(3)
    data["masks"][1], data["classes"][1] = data["masks"][1][:0], data["classes"][1][:0]

    outputs, drawn = ours(data["images"]), Drawn()
    logits = ours.embed(outputs["queries"])
    losses, matches = ours.criterion(outputs["masks"], logits, *regions(data), drawn)
    loss = losses | {"loss": sum(losses.values())}
    image = region_images(data["masks"])
    with Again(drawn, matches, image) as again:
        expected = theirs(
            data["images"],
            mask_labels=[m.float() for m in data["masks"]],
            class_labels=data["classes"],
            output_auxiliary_logits=True,
        )
    assert not again.queue
    layers = [a["masks_queries_logits"] for a in expected.auxiliary_logits]
    layers.append(expected.masks_queries_logits)
    assert len(outputs["masks"]) == len(layers) == preset.decoder_layers + 1
    for mine, other in zip(outputs["masks"], layers, strict=True):
        assert mine.std() > 0.1
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(loss["loss"], expected.loss, atol=1e-5, rtol=1e-6)
    loss["loss"].backward()
    gradient = ours.transformer.queries_features.weight.grad.clone()
    ours.zero_grad()
    expected.loss.backward()
    other = theirs.model.transformer_module.queries_features.weight.grad
    torch.testing.assert_close(gradient, other, atol=1e-4, rtol=1e-3)


def test_weights_of_another_size_are_refused():
    model = build("han")
    other = replace(model.preset, dim=32).config(model.backbone.channels)
    state = Mask2FormerForUniversalSegmentation(other).state_dict()
    with pytest.raises(LabError, match="pixel_level_module.decoder of Preset"):
        model.load_mask2former(state)


def test_the_pyramid_is_no_deformable_attention_and_costs_less():
    other = build("han", pixel_decoder="fpn")
    with pytest.raises(LabError, match="pixel_decoder='msda'"):
        other.load_mask2former({})
    for framework in ("han", "fcclip"):
        totals = {}
        for decoder in ("msda", "fpn"):
            model = meta_framework(framework, pixel_decoder=decoder)
            table = cost(model).query("convention == 'uniform'").set_index("component")
            totals[decoder] = table["macs"][["pixel_decoder", "total"]]
            samples = count(model).trace.rows["op"].eq("grid_sampler_2d").any()
            assert samples == (decoder == "msda")
        assert (totals["fpn"] < totals["msda"]).all()
        rest = [t["total"] - t["pixel_decoder"] for t in totals.values()]
        assert rest[0] == rest[1]


def test_matches_are_the_cheapest():
    costs = torch.rand(2, 2, 3, 4)
    costs[0, 0, 1] = math.nan  # taken where nothing else is left, as transformers does
    found = assign(costs, [2, 4])
    assert found.shape == (2, 6)
    for layer, of_layer in enumerate(costs):
        for one, query in zip(of_layer, found[layer].split([2, 4]), strict=True):
            taken = query[query >= 0]
            assert len(taken.unique()) == len(taken) == min(3, len(query))
            regions = torch.arange(len(query))
            total = one[taken, regions[query >= 0]].nan_to_num(1e9).sum()
            few = one[:, : len(query)].nan_to_num(1e9)
            tall = few if len(query) <= 3 else few.T
            best = min(
                sum(tall[q, k] for k, q in enumerate(order))
                for order in permutations(range(len(tall)), tall.shape[1])
            )
            torch.testing.assert_close(total, best)


def test_paper_presets_have_the_published_counts():
    with torch.device("meta"):
        han, fcclip = Han(meta_backbone("RN50")), FCCLIP(meta_backbone("RN50"))
    outside = ("project.", "void", "log_scale", "kd_scale")
    counts = [
        sum(p.numel() for n, p in head(model).items() if not n.startswith(without))
        for model, without in ((han, outside), (fcclip, ("void",)))
    ]
    assert counts == [20_560_320, 21_032_385]
    assert han.preset.points == 12_544 and fcclip.void.shape == (1024,)


def expected_std(name, p):
    """What the initialisation of this tensor should spread like; None: it is not random."""
    if name in ("log_scale", "kd_scale") or "norm" in name or name.startswith("pooled.0"):
        return None
    if name == "void" or "level_embed" in name or "queries" in name:
        return 1.0
    if "mask_embedder" in name or name.split(".")[0] in ("class_embed", "pooled", "project"):
        return None if name.endswith("bias") else math.sqrt(1 / 3 / p.shape[-1])
    if p.ndim == 1 or "sampling_offsets" in name or "attention_weights" in name:
        return None
    if "transformer.decoder.layers" in name or "value_proj" in name or "output_proj" in name:
        return math.sqrt(2 / sum(p.shape))
    return 0.02


@pytest.mark.parametrize("kind", ["han", "fcclip frozen"])
def test_no_parameter_is_left_uninitialised(kind):
    """Memory is filled with NaN before: what nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    try:
        model = build(kind)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, p in head(model).items():
        assert p.isfinite().all(), name
        std = expected_std(name, p)
        if std is not None:
            assert p.std().item() == pytest.approx(std, rel=0.02 + 4 / math.sqrt(p.numel())), name
            assert abs(p.mean()) < 5 * std / math.sqrt(p.numel()), name
        elif name.endswith("sampling_offsets.bias"):  # eight directions, four radii
            assert p.abs().max() == 4 and p.std() > 1
        elif "attention_weights" in name or name.endswith("sampling_offsets.weight"):
            assert not p.any(), name
        elif name.endswith(".weight"):
            assert (p == 1).all(), name  # norms


def test_a_seed_decides_everything():
    first, again = build("han"), build("han")
    state = again.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in first.state_dict().items())
    data, losses = scene_batch(), []
    for model in (first, again):
        torch.manual_seed(3)
        losses.append(model.loss(model(data["images"]), data)["loss"])
    assert torch.equal(*losses)


# --- training -------------------------------------------------------------------------------------


def test_it_learns_two_scenes_under_a_mask(model):
    data = scene_batch()
    visual = model.backbone.visual
    mask = Mask.by_magnitude(visual, Mask.dense(visual).total // 2)
    mask.apply(model)
    before = {k: v.clone() for k, v in visual.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    mask.keep(model, optimizer)
    losses = []
    model.train()
    for step in range(30):
        loss = model.loss(model(data["images"]), data)
        assert all(value.isfinite() for value in loss.values())
        torch.testing.assert_close(sum(v for k, v in loss.items() if k != "loss"), loss["loss"])
        optimizer.zero_grad()
        loss["loss"].backward()
        if not step:  # nothing trainable is off the path: distributed training would wait for it
            on_path = {n for n, p in model.named_parameters() if p.grad is not None}
            assert on_path == {n for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        losses.append(loss["loss"].item())
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert mask.verify(model)
    frozen = isinstance(model, FCCLIP) and model.clip == "frozen"
    same = {k: torch.equal(v, before[k]) for k, v in visual.state_dict().items()}
    if frozen:  # batch normalisation, too
        assert all(same.values()) and not any(m.training for m in model.backbone.modules())
    else:
        assert not same["conv1.weight"] and not same["layer4.0.bn1.running_mean"]
    assert all(equal for key, equal in same.items() if key.startswith("attnpool"))


def test_images_without_regions_and_with_too_many(model):
    data = scene_batch(3)
    many = torch.rand(model.preset.queries + 9, 64, 64) > 0.5
    many[3] = False  # an empty mask is no region
    data["masks"] = [data["masks"][0][:0], many, data["masks"][2]]
    data["classes"] = [data["classes"][0][:0], torch.arange(len(many)) % 12, data["classes"][2]]
    masks, classes = regions(data)
    counts = [0, len(many) - 1, len(data["masks"][2])]
    assert [len(m) for m in masks] == [len(c) for c in classes] == counts
    for chosen in (slice(None), slice(0, 1)):  # the last batch has no region at all
        part = {k: v if k == "names" else v[chosen] for k, v in data.items()}
        if chosen.stop:
            model.backbone.eval()
        loss = model.loss(model(part["images"]), part)
        assert all(value.isfinite() for value in loss.values())
        assert bool(loss["mask"]) == (chosen.stop is None)
        loss["loss"].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_everything_works_under_bfloat16(model):
    data = scene_batch()
    model.backbone.eval()
    torch.manual_seed(0)
    exact = model.loss(model(data["images"]), data)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.loss(model(data["images"]), data)
        scores = model.eval().scores(data["images"], NAMES)
    assert rough["loss"].dtype == scores.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)
    rough["loss"].backward()
    assert scores.isfinite().all()


def test_kd_is_of_the_matched_queries_of_every_layer():
    model = build("han, taught")
    model.preset = replace(model.preset, regions=200)
    teacher = backbone(1).eval()
    data = scene_batch(3)
    data["masks"][1], data["classes"][1] = data["masks"][1][:0], data["classes"][1][:0]
    model.backbone.eval()
    outputs = model(data["images"])
    torch.manual_seed(5)
    loss = model.loss(outputs, data)
    torch.manual_seed(5)
    embedded = model.embed(outputs["queries"])
    logits = model.logits(embedded * model.scale, NAMES)
    _, matches = model.criterion(outputs["masks"], logits, data["masks"], data["classes"])
    text, total = model.backbone.text(NAMES), 0
    counts = [len(m) for m in data["masks"]]
    for layer, found in zip(embedded, matches, strict=True):
        student, target, words, image = [], [], [], []
        for i, queries in enumerate(found.split(counts)):
            for region, query in enumerate(queries.tolist()):
                mask = [m[:0] for m in data["masks"]]
                mask[i] = data["masks"][i][region][None]
                student.append(layer[i, query])
                target.append(teacher.embed(crop_regions(data["images"], mask, 64))[0])
                words.append(text[data["classes"][i][region]])
                image.append(i)
        assert len(student) == sum(map(len, data["masks"]))
        stacked = map(torch.stack, (student, target, words))
        total = total + kd_loss(*stacked, torch.tensor(image), model.kd_scale)["loss"]
    torch.testing.assert_close(loss["kd"], KD_WEIGHT * total)
    model.preset = replace(model.preset, regions=2)  # a random few of them, still paired
    few = [model.loss(outputs, data)["kd"] for _ in range(3)]
    assert all(f.isfinite() for f in few) and not torch.equal(few[0], loss["kd"])


def test_the_teacher_is_nobodys_parameter():
    model, alone = build("han, taught"), build("han")
    assert model.state_dict().keys() == alone.state_dict().keys()
    inside = {id(p) for p in model.parameters()}
    teacher = model._teacher.clip
    assert not any(id(p) in inside or p.requires_grad for p in teacher.parameters())
    model.train()
    assert not teacher.training
    data = scene_batch()
    assert "kd" in model.loss(model(data["images"]), data)
    assert "kd" not in alone.loss(alone(data["images"]), data)


def test_region_dropout_asks_for_fewer_classes():
    model = build("han")
    data = scene_batch()
    classes = regions(data)[1]
    logits = torch.zeros(1, 2, 5, 13)
    logits[..., 12] = 50.0  # all say "no object": wrong for the matched ones alone
    query = torch.cat([torch.arange(len(c)) for c in classes])[None]
    image = region_images(classes)
    chance, criterion = Chance(None, logits.device), model.criterion
    full = criterion.loss_classes(logits, classes, query, image, chance)
    criterion.preset = replace(criterion.preset, region_dropout=1.0)
    assert full > 1 and criterion.loss_classes(logits, classes, query, image, chance) < 1e-6


# --- the ensemble ---------------------------------------------------------------------------------


def ensemble(seen, unseen, seen_names=NAMES[:5]):
    model = build("fcclip frozen", seen_names=seen_names).eval()
    model.seen_exponent, model.unseen_exponent = seen, unseen
    with torch.no_grad():
        outputs = model(scene_batch()["images"])
        outputs["masks"][-1][:, :3] = -9.0  # nothing to look under
        outputs["masks"][-1][:, 3] = 9.0
        logits = model.logits(outputs["embeddings"][-1], NAMES)
        outer, looked = model.outer_logits(outputs, NAMES)
        inner = logits[..., :-1].softmax(-1)
        return model.probabilities(outputs, NAMES), inner, outer.softmax(-1), looked, logits


def test_ensemble_of_exponents_0_is_the_head_and_of_1_is_clip():
    classes, inner, *_, logits = ensemble(0.0, 0.0)
    void = logits.softmax(-1)[..., -1:]
    torch.testing.assert_close(classes[..., :-1] / (1 - void), inner)
    torch.testing.assert_close(classes, logits.softmax(-1))
    classes, inner, outer, looked, _ = ensemble(1.0, 1.0)
    bare = classes[..., :-1] / (1 - classes[..., -1:])
    torch.testing.assert_close(bare[looked], outer[looked])
    assert looked[:, 3].all() and not looked[:, :3].any()
    torch.testing.assert_close(bare[:, :3], inner[:, :3])
    assert not torch.allclose(inner[looked], outer[looked], atol=0.02)


def test_ensemble_weighs_seen_and_unseen_names():
    classes, inner, outer, looked, logits = ensemble(0.4, 0.8)
    seen = torch.arange(len(NAMES)) < 5
    product = torch.where(seen, inner**0.6 * outer**0.4, inner**0.2 * outer**0.8)
    product = torch.where(looked[..., None], product, inner)
    void = logits.softmax(-1)[..., -1:]
    expected = product / product.sum(-1, keepdim=True) * (1 - void)
    torch.testing.assert_close(classes[..., :-1], expected)
    torch.testing.assert_close(classes.sum(-1), torch.ones(2, 32))
    assert classes.isfinite().all()


def test_a_class_is_seen_if_any_of_its_names_is():
    model = build("fcclip frozen", seen_names=["dog", ("cat", "kitten")])
    vocabulary = ["dog", "horse", ("pony", "kitten"), ("horse", "foal")]
    seen = torch.tensor([True, False, True, False])
    assert torch.equal(model.exponents(vocabulary) == torch.tensor(0.4), seen)
    assert build("fcclip frozen").exponents(vocabulary).eq(0.8).all()


def test_seen_names_are_learned_in_training_and_travel_with_the_weights(tmp_path):
    model, data = build("fcclip frozen"), scene_batch()
    model.eval().loss(model(data["images"]), data)
    assert not model.seen_names
    model.train().loss(model(data["images"]), data)
    assert model.seen_names == set(NAMES)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "m.st")
    again = build("fcclip frozen")
    again.load_state_dict(load_file(tmp_path / "m.st"))
    assert again.seen_names == set(NAMES)
    fixed = build("fcclip frozen", seen_names=["dog"])
    fixed.loss(fixed(data["images"]), data)
    assert fixed.seen_names == {"dog"}


def test_attention_pool_under_masks_is_clips():
    pool = backbone().visual.attnpool
    x, masks = torch.randn(2, 256, 2, 2), torch.rand(2, 6, 2, 2) > 0.4
    masks[0, 0] = True
    masks[1, 2] = False
    tokens = x.flatten(2).permute(2, 0, 1)  # (hw, B, C)
    keys = tokens + pool.positional_embedding[1:, None]
    query = (tokens.mean(0, keepdim=True) + pool.positional_embedding[:1, None]).repeat(6, 1, 1)
    blocked = (~masks.flatten(2)).repeat_interleave(pool.num_heads, 0)
    blocked[blocked.all(-1)] = False
    expected, _ = F.multi_head_attention_forward(
        query, keys, keys, 256, pool.num_heads, None,
        torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None, False, 0.0,
        pool.c_proj.weight, pool.c_proj.bias, training=False, need_weights=False,
        attn_mask=blocked, use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
    )  # fmt: skip
    torch.testing.assert_close(attention_pool(pool, x, masks), expected.transpose(0, 1))
    larger = attention_pool(pool, torch.randn(1, 256, 3, 5), torch.ones(1, 4, 3, 5) > 0)
    assert larger.shape == (1, 4, 32) and torch.equal(larger[0, 0], larger[0, 3])


def test_the_head_pools_the_features_under_its_masks():
    model = build("fcclip frozen").eval()
    pixels, masks = torch.randn(1, 64, 4, 4), torch.randn(1, 3, 4, 4)
    masks[0, 1] = -1.0
    hidden = torch.randn(1, 3, 64)
    one = pixels[0][:, masks[0, 0] > 0].mean(1)
    wanted = model.class_embed(model.pooled(one) + hidden[0, 0])
    found = model._embed(hidden[None], [masks], pixels)
    torch.testing.assert_close(found[0, 0, 0], F.normalize(wanted, dim=0) * model.scale)
    assert found.isfinite().all()
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    assert model.scale == 100


# --- inference ------------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_take_any_vocabulary(model):
    images = scene_batch()["images"]
    model.eval()
    scores = model.scores(images, NAMES)
    assert scores.shape == (2, 12, 16, 16) and scores.dtype == torch.float32
    torch.testing.assert_close(model.scores(images, NAMES[::-1]).flip(1), scores)
    many = [f"thing {i}" for i in range(1000)]
    with_many = model.scores(images, many)
    assert with_many.shape == (2, 1000, 16, 16) and with_many.isfinite().all()
    grouped = model.scores(images, [NAMES[:2], *NAMES[2:]])
    assert grouped.shape[1] == 11
    with pytest.raises(LabError, match="at least one name"):
        model.scores(images, [])


@torch.no_grad()
def test_scores_are_class_times_mask(model):
    images = scene_batch(1)["images"]
    outputs = model.eval()(images)
    classes = model.probabilities(outputs, NAMES)
    torch.testing.assert_close(classes.sum(-1), torch.ones(classes.shape[:2]))
    masks = outputs["masks"][-1].sigmoid()
    expected = sum(c[:-1, None, None] * m for c, m in zip(classes[0], masks[0], strict=True))
    torch.testing.assert_close(model.scores(images, NAMES)[0], expected)


def test_cut_finds_every_pixel_of_any_size():
    for height, width in ((64, 96), (37, 100), (90, 33), (20, 171)):
        padded = pad(torch.zeros(1, 3, height, width)).shape[-2:]
        assert padded[0] % 32 == padded[1] % 32 == 0 and padded[0] - height < 32
        x = torch.arange(padded[1] // 4) * 4.0 + 2  # centres in pixels
        y = torch.arange(padded[0] // 4) * 4.0 + 2
        maps = torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]
        part = cut(maps, (height, width), padded)
        assert part.shape[-2:] == (math.ceil(height / 4), math.ceil(width / 4))
        full = F.interpolate(part, (height, width), mode="bilinear")[0, :, 7:-7, 7:-7]
        torch.testing.assert_close(full[1, 0], torch.arange(7.0, width - 7) + 0.5)
        torch.testing.assert_close(full[0, :, 0], torch.arange(7.0, height - 7) + 0.5)


@torch.no_grad()
def test_pictures_of_odd_and_small_sizes(model):
    model.eval()
    scores = model.scores(torch.rand(1, 3, 50, 71), NAMES)
    assert scores.shape == (1, 12, 13, 18) and scores.isfinite().all()
    assert model.scores(torch.rand(1, 3, 20, 30), NAMES).shape == (1, 12, 5, 8)
    ((segments, found),) = model.panoptic(torch.rand(1, 3, 50, 71), NAMES, torch.ones(12) > 0)
    assert segments.shape == (50, 71) and segments.dtype == torch.int64
    assert set(segments.unique().tolist()) <= {-1, *(s["id"] for s in found)}


def test_panoptic_by_hand():
    masks = torch.full((7, 8, 8), -9.0)
    masks[0, :, :4] = 9.0  # thing 0 on the left
    masks[1, :4, 4:] = 9.0  # stuff 2, in two pieces
    masks[2, 4:6, 4:] = 9.0
    masks[3, 6:, 4:] = 9.0  # unsure
    masks[4, :, :] = 9.0  # no object
    masks[5, :4, :4] = 8.0  # thing 0 again, but behind query 0,
    masks[5, 6:, 7] = 8.0  # so that little of it is left
    masks[6, 6:, 4:7] = 0.5  # thing 1, a weak mask
    scores = torch.tensor([0.99, 0.9, 0.95, 0.7, 0.99, 0.85, 0.9])
    kinds = torch.tensor([0, 2, 2, 1, 3, 0, 1])
    classes = torch.full((7, 4), 0.0)
    classes[torch.arange(7), kinds] = scores
    result, segments = merge(classes, masks, [True, True, False], (8, 8))
    expected = torch.full((8, 8), 2)
    expected[:, :4] = 0
    expected[:6, 4:] = 1
    expected[6:, 7] = -1
    assert torch.equal(result, expected)
    assert [(s["id"], s["class"], round(s["score"], 2)) for s in segments] == [
        (0, 0, 0.99), (1, 2, 0.95), (2, 1, 0.9),
    ]  # fmt: skip
    shown = segment_classes(result, segments)
    assert torch.equal(shown, torch.tensor([0, 2, 1, scenes.IGNORE])[expected])
    apart, segments = merge(classes, masks, [True, True, True], (8, 8))
    assert len(segments) == 4 and apart.max() == 3  # two pieces of a thing are two
    larger, _ = merge(classes, masks, [True, True, False], (16, 16))
    assert torch.equal(larger[::2, ::2][1:3, 1:3], result[1:3, 1:3])
    nothing, segments = merge(classes * 0.5, masks, [True, True, False], (8, 8))
    assert (nothing == -1).all() and segments == []


def test_a_pruned_clip_is_the_one_that_classifies():
    clip = backbone()
    pruned = frozen_copy(clip)
    Mask.random_global(pruned.visual, Mask.dense(pruned.visual).total // 10, 0).apply(pruned)
    images, found = scene_batch()["images"], []
    for tower in (clip, pruned):
        torch.manual_seed(0)
        model = FCCLIP(tower, "mini").eval()
        with torch.no_grad():
            found.append(model.outer_logits(model(images), NAMES)[0])
    assert not torch.allclose(*found) and found[1].isfinite().all()


def test_unknown_words_are_refused():
    with pytest.raises(LabError, match="preset='huge'"):
        Han(backbone(), "huge")
    with pytest.raises(LabError, match="preset='huge'"):
        FCCLIP(backbone(), "huge")
    with pytest.raises(LabError, match="clip='melted'"):
        FCCLIP(backbone(), "mini", clip="melted")
    with pytest.raises(LabError, match="pixel_decoder='unet'"):
        Han(backbone(), "mini", pixel_decoder="unet")
