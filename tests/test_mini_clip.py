"""The shipped mini CLIP, and the command that trained it."""

import json

import open_clip
import torch

from opentrans_lab.clip import MINI, TEMPLATES, build_mini, load_backbone, mini_tokenizer
from opentrans_lab.data import scenes
from opentrans_lab.experiments.mini_clip import (
    MiniConfig,
    caption_batches,
    contrastive_loss,
    train_mini,
    zero_shot,
)
from opentrans_lab.records import PROJECT

SHIPPED = PROJECT / "data" / "mini_clip"


def test_it_knows_the_names():
    """Zero-shot top-1 over all 192 names at the segmentation resolution; chance is 0.5 %."""
    assert (
        zero_shot(load_backbone("mini", SHIPPED, "cpu"), TEMPLATES["scenes"], n=768, seed=5) >= 0.65
    )


def test_the_shipped_files_are_whole():
    assert (SHIPPED / "model.safetensors").stat().st_size <= 16e6
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config == MINI and isinstance(build_mini(config), open_clip.CLIP)
    card = (SHIPPED / "card.md").read_text()
    for word in ("opentrans-lab mini-clip", "| seed |", "| steps |", "zero-shot top-1"):
        assert word in card


def test_batches_depend_on_the_step_alone():
    config = MiniConfig(steps=8, crops=0.5, batch_size=32)
    batches = caption_batches(config, mini_tokenizer(), torch.device("cpu"))
    stream = list(batches(0))
    later = next(batches(5))
    assert torch.equal(stream[5]["images"], later["images"])
    assert torch.equal(stream[5]["tokens"], later["tokens"])
    assert [b["images"].shape[-1] for b in stream] == [64] * 4 + [128] * 4
    assert not torch.equal(stream[0]["images"], stream[1]["images"])


def test_equal_captions_are_all_positives():
    image = torch.eye(3)[[0, 0, 1]]
    tokens = torch.tensor([[5], [5], [6]])
    good = contrastive_loss(image, image, torch.tensor(50.0), tokens)
    # Two equal captions share the probability: log 2 for them and 0 for the third.
    torch.testing.assert_close(good, torch.tensor(2 / 3 * 0.693147), rtol=1e-3, atol=1e-4)


def test_training_resumes_and_exports(tmp_path):
    tiny = {**MINI, "vision_cfg": {**MINI["vision_cfg"], "layers": [1, 1, 1, 1], "width": 8},
            "embed_dim": 32}  # fmt: skip
    config = MiniConfig(steps=2, batch_size=16)
    folder = train_mini(config, tmp_path / "a", "cpu", tiny)
    first = (folder / "model.safetensors").read_bytes()
    again = train_mini(config, tmp_path / "a", "cpu", tiny)  # finished: only exported again
    assert again == folder and (folder / "model.safetensors").read_bytes() == first
    backbone = load_backbone("mini", checkpoint=folder, device="cpu")
    assert backbone.embed(torch.rand(2, 3, 128, 128)).shape == (2, 32)
    assert backbone.text(scenes.THINGS[:3]).shape == (3, 32)
    assert zero_shot(backbone, TEMPLATES["scenes"], n=64) < 0.3  # untrained: it cannot know
