"""The loader against open_clip itself, with a full-size RN50 checkpoint in every form."""

import copy
import json
import shutil
import warnings

import huggingface_hub.constants
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import convert_weights_to_lp
from safetensors.torch import save_file
from torch import nn

from opentrans_lab.clip.backbone import (
    MEAN,
    MINI,
    STD,
    build_mini,
    embed,
    frozen_copy,
    load_backbone,
    mini_tokenizer,
    trunk,
)
from opentrans_lab.errors import LabError
from opentrans_lab.masks import Mask

NAMES = ["dog", "traffic light", "grass"]
FORMS = {
    "jit": "jit.pt",
    "state dict": "state.pt",
    "training checkpoint": "epoch_3.pt",
    "safetensors": "model.safetensors",
}


def stir(model: nn.Module, seed: int = 0) -> None:
    """Random BatchNorm: as created, open_clip's residual branches are all zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.0, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.1, generator=generator)


def as_archive(state: dict[str, torch.Tensor]) -> torch.jit.ScriptModule:
    """A TorchScript module whose parameter tree is ``state``, as in OpenAI's published files."""
    root = nn.Module()
    for key, value in state.items():
        *parents, leaf = key.split(".")
        node = root
        for name in parents:
            if name not in node._modules:
                node.add_module(name, nn.Module())
            node = node._modules[name]
        node.register_buffer(leaf, value)
    return torch.jit.script(root)


@pytest.fixture(scope="module")
def rn50(tmp_path_factory):
    """(open_clip's own model with QuickGELU, float32; the same weights' path by form)."""
    torch.manual_seed(0)
    model = open_clip.create_model("RN50", force_quick_gelu=True)
    stir(model)
    convert_weights_to_lp(model, torch.float16)
    state = dict(model.state_dict())
    sizes = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    openai = state | {key: torch.tensor(value) for key, value in sizes.items()}

    folder = tmp_path_factory.mktemp("rn50")
    paths = {form: folder / file for form, file in FORMS.items()}
    torch.jit.save(as_archive(openai), paths["jit"])
    torch.save(openai, paths["state dict"])
    nested = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 3, "state_dict": nested}, paths["training checkpoint"])
    save_file(state, paths["safetensors"])
    yield model.float().eval(), paths
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def truth(rn50):
    """What open_clip computes for images and names; "gelu" is the text without QuickGELU."""
    model, _ = rn50
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, 3, 224, 224, generator=generator)
    tokens = open_clip.get_tokenizer("RN50")([f"a photo of a {name}." for name in NAMES])
    gelu = open_clip.create_model("RN50")
    gelu.load_state_dict(model.state_dict())
    with torch.no_grad():
        x = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        seen = model.forward_intermediates(x, image_indices=[1, 2, 3, 4], normalize=True)
        return {
            "images": images,
            "maps": seen["image_intermediates"],
            "image": seen["image_features"],
            "text": model.encode_text(tokens, normalize=True),
            "gelu": gelu.encode_text(tokens, normalize=True),
        }


def assert_is_open_clip(backbone, truth) -> None:
    with torch.no_grad():
        maps, image = backbone(truth["images"]), backbone.embed(truth["images"])
    assert [tuple(m.shape[1:]) for m in maps] == [
        (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)
    ]  # fmt: skip
    for ours, theirs in zip(maps, truth["maps"], strict=True):
        assert theirs.std() > 1e-2 and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.allclose(image, truth["image"], atol=1e-6)
    assert torch.allclose(backbone.text(NAMES), truth["text"], atol=1e-6)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def loaded(rn50):
    return load_backbone("RN50", rn50[1]["jit"], device="cpu")


def test_openais_jit_archive_equals_open_clip(loaded, truth):
    assert_is_open_clip(loaded, truth)


def test_openais_state_dict_equals_open_clip(rn50, truth):
    assert_is_open_clip(load_backbone("RN50", str(rn50[1]["state dict"]), device="cpu"), truth)


def test_a_lost_quickgelu_would_show(loaded, truth):
    """The trap: with GELU everything loads, the image side is right and the text side is not."""
    assert (truth["gelu"] - truth["text"]).abs().max() > 1e-3
    assert (truth["gelu"] - loaded.text(NAMES)).abs().max() > 1e-3


def test_a_training_checkpoint_of_a_quickgelu_model(rn50, truth):
    path = rn50[1]["training checkpoint"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_is_open_clip(load_backbone("RN50-quickgelu", path, device="cpu"), truth)


def test_a_file_that_does_not_say_means_gelu_and_warns(rn50, truth):
    path = rn50[1]["safetensors"]
    with pytest.warns(UserWarning, match="use backbone='RN50-quickgelu'"):
        backbone = load_backbone("RN50", path, device="cpu")
    assert torch.allclose(backbone.text(NAMES), truth["gelu"], atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(backbone.embed(truth["images"]), truth["image"], atol=1e-6)


# --- tags -------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Empty caches, and every connection goes to a port where nobody listens."""
    for scheme in ("http", "https", "all"):
        for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper()):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("checkpoint", [None, "", "openai", "yfcc15m"])
def test_a_tag_that_is_not_cached_says_what_to_do(offline, checkpoint):
    tag = checkpoint or "openai"
    sentence = rf"'{tag}' of RN50 are not in the cache .* fetch https://\S+\.pt .*checkpoint=<path"
    with pytest.raises(LabError, match=sentence) as error:
        load_backbone("RN50", checkpoint)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["RN50", "RN50-quickgelu"])
def test_a_cached_tag_needs_no_network_and_gets_quickgelu(offline, rn50, truth, name):
    folder = offline / "models--timm--resnet50_clip.openai"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    file = folder / "snapshots" / "abc" / "open_clip_model.safetensors"
    file.symlink_to(rn50[1]["safetensors"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = load_backbone(name, "openai", device="cpu")
    assert torch.allclose(backbone.text(NAMES), truth["text"], atol=1e-6)


# --- properties of a backbone ------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini():
    torch.manual_seed(0)
    backbone = load_backbone("mini", "random", device="cpu")
    stir(backbone)
    return backbone


@pytest.mark.parametrize(
    ("name", "channels", "size", "dim"),
    [
        ("RN101", (256, 512, 1024, 2048), 224, 512),
        ("RN50x4", (320, 640, 1280, 2560), 288, 640),
        ("mini", (96, 192, 384, 768), 128, 256),
    ],
)
def test_every_clip_resnet_has_the_same_face(name, channels, size, dim):
    backbone = load_backbone(name, "random", device="cpu")
    assert (backbone.name, backbone.channels, backbone.image_size) == (name, channels, size)
    assert backbone.strides == (4, 8, 16, 32) and backbone.embed_dim == dim
    with torch.no_grad():
        images = torch.rand(1, 3, 64, 96)
        shapes = [tuple(m.shape) for m in backbone(images)]
        assert backbone.embed(images).shape == backbone.text(["dog"]).shape == (1, dim)
    assert shapes == [
        (1, c, 64 // s, 96 // s) for c, s in zip(channels, backbone.strides, strict=True)
    ]


def test_random_weights_follow_the_callers_seed():
    def draw(seed):
        torch.manual_seed(seed)
        return load_backbone("mini", "random", device="cpu").visual.layer2[0].conv2.weight

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


def test_only_the_image_tower_is_the_modules_own(mini):
    names = set(mini.state_dict())
    assert names == {f"visual.{name}" for name in mini.visual.state_dict()}
    assert {f"visual.{n}" for n in Mask.dense(mini.visual)} <= names
    assert not mini.training and all(p.requires_grad for p in mini.parameters())
    assert not any(isinstance(m, nn.Transformer | nn.Embedding) for m in mini.modules())


def test_the_trunk_of_rn50_is_the_papers(loaded):
    kinds = {nn.Conv2d: 0, nn.BatchNorm2d: 0}
    for module in loaded.visual.modules():
        if type(module) in kinds:
            kinds[type(module)] += sum(p.numel() for p in module.parameters())
    assert kinds == {nn.Conv2d: 23_474_016, nn.BatchNorm2d: 53_248}


def test_a_deep_copy_has_its_own_weights_and_the_same_words(mini):
    twin = copy.deepcopy(mini)
    words = mini.text(NAMES)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(mini.state_dict()[n].any() for n in ("visual.conv1.weight", "visual.bn1.weight"))
    assert twin._text is mini._text and torch.equal(twin.text(NAMES), words)


def test_a_frozen_copy_is_a_teacher(mini):
    student = copy.deepcopy(mini).train()
    teacher = frozen_copy(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert student.training and all(p.requires_grad for p in student.parameters())
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(teacher.embed(images), mini.embed(images))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (63, 64), (100, 70), (128, 200)])
def test_any_size_from_32_pixels_gives_maps_and_a_unit_embedding(mini, size):
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        maps, embedding = mini(images), mini.embed(images)
    sides = [(side + 1) // 2 // 2 for side in size]
    for m, channels in zip(maps, mini.channels, strict=True):
        assert tuple(m.shape) == (2, channels, *sides)
        sides = [side // 2 for side in sides]
    assert torch.allclose(embedding.norm(dim=1), torch.ones(2), atol=1e-5)


def test_positions_are_interpolated_and_the_parameter_stays(mini):
    twin = copy.deepcopy(mini)
    pool = twin.visual.attnpool
    parameter, before = pool.positional_embedding, pool.positional_embedding.clone()
    images = torch.rand(1, 3, 192, 256)
    default = twin.embed(images)
    default.sum().backward()
    assert pool.positional_embedding is parameter and torch.equal(parameter, before)
    assert parameter.grad[0].any() and parameter.grad[1:].abs().sum(1).all()

    # By hand: open_clip's own pool, built for this grid, given interpolated positions.
    with torch.no_grad():
        grid = before[1:].T.view(1, -1, 4, 4)
        grid = F.interpolate(grid, (6, 8), mode="bicubic", align_corners=False)
        wide = copy.deepcopy(pool)
        wide.positional_embedding = nn.Parameter(torch.cat([before[:1], grid[0].flatten(1).T]))
        expected = F.normalize(wide(trunk(twin.visual, images)[-1]), dim=-1)
    assert torch.allclose(default, expected, atol=1e-6)


def test_positions_matter_where_they_lie(mini):
    """A wide and a tall picture with the same pixels are not the same to the pool."""
    images = torch.rand(1, 3, 64, 128)
    with torch.no_grad():
        wide, tall = mini.embed(images), mini.embed(images.transpose(2, 3))
    assert (wide - tall).abs().max() > 1e-3


def test_channels_last_and_bf16_agree(mini):
    images = torch.rand(2, 3, 128, 128)
    twin = copy.deepcopy(mini).to(memory_format=torch.channels_last)
    with torch.no_grad():
        last = twin(images.to(memory_format=torch.channels_last))[-1]
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(last, mini(images)[-1], rtol=1e-3, atol=1e-4)
        exact = mini.embed(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = mini.embed(images)
    assert rough.dtype == torch.float32 and (rough * exact).sum(1).min() > 0.98


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_words_follow_the_images_device(mini):
    twin = copy.deepcopy(mini).cuda()
    assert twin.text(NAMES).device.type == "cuda" and mini.text(NAMES).device.type == "cpu"
    assert torch.allclose(twin.text(NAMES).cpu(), mini.text(NAMES), atol=1e-3)


# --- the mini CLIP ------------------------------------------------------------------------------


@pytest.fixture
def mini_folder(tmp_path):
    torch.manual_seed(5)
    clip = build_mini()
    stir(clip)
    half = {k: v.half() if v.is_floating_point() else v for k, v in clip.state_dict().items()}
    save_file(half, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(MINI | {"templates": ["a tiny {}"]}))
    return clip.half().float().eval(), tmp_path


@pytest.mark.parametrize("by", ["checkpoint", "environment"])
def test_a_mini_folder(mini_folder, monkeypatch, by):
    clip, folder = mini_folder
    if by == "environment":
        monkeypatch.setenv("OPENTRANS_MINI_CLIP", str(folder))
    backbone = load_backbone("mini", folder if by == "checkpoint" else "", device="cpu")
    images = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        tokens = mini_tokenizer()(["a tiny dog", "a tiny cat"])
        assert tokens.shape == (2, 32)
        words = clip.encode_text(tokens, normalize=True)
        assert torch.allclose(backbone.text(["dog", "cat"]), words, atol=1e-6)
        assert torch.equal(backbone.embed(images), embed(clip.visual, images))


def test_the_shipped_mini_loads_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENTRANS_MINI_CLIP", raising=False)
    monkeypatch.chdir(tmp_path)
    backbone = load_backbone("mini", device="cpu")
    assert backbone.embed(torch.rand(1, 3, 128, 128)).shape == backbone.text(["x"]).shape


# --- bad input ------------------------------------------------------------------------------------


def refused(*arguments) -> str:
    with pytest.raises(LabError) as error:
        load_backbone(*arguments, device="cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_backbones_are_answered_with_the_valid_ones():
    for name in ("rn50", "ResNet50", ""):
        assert f"backbone {name!r} is unknown; use mini, RN50, " in refused(name)
    for name in ("ViT-B-32", "convnext_base", "coca_ViT-B-32", "ViT-B-32-quickgelu"):
        assert f"{name!r} is no CLIP ResNet" in refused(name)


def test_unknown_tag_or_missing_file():
    assert "'opanai' is no file and no tag of RN50; its tags are openai, yfcc15m, cc12m" in refused(
        "RN50", "opanai"
    )
    assert "'/nowhere/RN50.pt' is no file" in refused("RN50", "/nowhere/RN50.pt")
    assert "'yfcc15m' is no file and no tag of RN50x4" in refused("RN50x4", "yfcc15m")


def test_missing_or_damaged_mini(tmp_path, mini_folder):
    assert "nowhere/model.safetensors not found; train the mini CLIP" in refused("mini", "nowhere")
    folder = mini_folder[1]
    for wrong in ("{", "[]", '{"embed_dim": 256}', json.dumps(MINI | {"vision_cfg": {"a": 1}})):
        (folder / "config.json").write_text(wrong)
        assert "config.json is no config of a CLIP" in refused("mini", folder)
    (folder / "config.json").write_text(json.dumps(MINI | {"embed_dim": 128}))
    message = refused("mini", folder)
    assert "model.safetensors does not fit mini (" in message and "instead of" in message
    (folder / "config.json").unlink()
    assert "config.json not found" in refused("mini", folder)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files(tmp_path, suffix, rn50):
    path = tmp_path / f"weights{suffix}"
    for content in (b"", b"no weights at all", b"PK\x03\x04" + bytes(200)):
        path.write_bytes(content)
        assert f"{path} cannot be read as weights" in refused("RN50", path)
    whole = rn50[1]["jit" if suffix == ".pt" else "safetensors"]
    with open(whole, "rb") as source:
        path.write_bytes(source.read(1_000_000))  # a download that broke off
    assert f"{path} cannot be read as weights" in refused("RN50", path)


def test_a_pickle_of_code_is_not_executed(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2), path)
    assert "holds more than tensors" in refused("RN50", path)
    torch.save([1, 2], path)
    assert "holds no state dict" in refused("RN50", path)


def test_weights_of_another_architecture_name_the_keys_and_the_right_one(rn50, tmp_path):
    message = refused("RN101", rn50[1]["jit"])
    assert "jit.pt does not fit RN101 (no visual.layer3.6.conv1.weight; " in message
    assert "more); use backbone='RN50'" in message
    vit = tmp_path / "vit.pt"
    torch.save({"visual.proj": torch.zeros(2), "visual.conv1.weight": torch.zeros(2)}, vit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing about GELU for a file that is of no use
        message = refused("RN50", vit)
    assert "vit.pt does not fit RN50" in message and message.endswith("use weights of RN50")
    assert "does not fit mini" in refused_mini_with(rn50[1]["safetensors"], tmp_path)


def refused_mini_with(weights, folder) -> str:
    (folder / "model.safetensors").symlink_to(weights)
    (folder / "config.json").write_text(json.dumps(MINI))
    return refused("mini", folder)


def test_images_that_are_none(mini):
    for images, sentence in (
        (torch.zeros(1, 3, 31, 64), "32 x 32 is the least"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "divide bytes by 255"),
        (torch.zeros(3, 64, 64), r"must be \(B, 3, H, W\)"),
        (torch.zeros(1, 1, 64, 64), r"must be \(B, 3, H, W\)"),
    ):
        with pytest.raises(LabError, match=sentence):
            mini(images)
