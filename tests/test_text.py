"""The text side: averaging, caching, sharing, and how it must not depend on the caller."""

import copy

import pytest
import torch
import torch.nn.functional as F

from opentrans_lab.clip import MINI, build_mini, mini_tokenizer, text
from opentrans_lab.clip.text import TEMPLATES, TextEncoder, find_templates
from opentrans_lab.data import scenes
from opentrans_lab.errors import LabError

CPU = torch.device("cpu")
NAMES = ("striped red star", "grass", "solid blue ring")
PAIR = ("a {} here", "the {}")


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return build_mini()


@pytest.fixture
def encoder(clip):
    return TextEncoder(clip, mini_tokenizer())


@pytest.fixture
def passes(clip):
    """Sizes of the batches that went through the text transformer."""
    seen = []
    handle = clip.token_embedding.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    yield seen
    handle.remove()


def test_vild_has_14_templates_all_different():
    assert len(set(TEMPLATES["vild"])) == len(TEMPLATES["vild"]) == 14
    assert find_templates("vild")[0] == "a photo of a {}." and all(
        "{}" in t for t in TEMPLATES["vild"]
    )


def test_normalised_averaged_and_normalised_again(encoder, clip):
    got = encoder(NAMES, PAIR, CPU)
    with torch.no_grad():
        for name, row in zip(NAMES, got, strict=True):
            tokens = mini_tokenizer()([f"a {name} here", f"the {name}"])
            each = F.normalize(clip.encode_text(tokens), dim=-1)
            mean = each.mean(0)
            assert mean.norm() < 0.999  # else the order of the steps would not show
            assert torch.allclose(row, mean / mean.norm(), atol=1e-6)
    assert got.dtype == torch.float32 and not got.requires_grad


def test_encoded_once_for_each_vocabulary_and_set_of_templates(encoder, passes):
    first = encoder(NAMES, PAIR, CPU)
    assert torch.equal(encoder(list(NAMES), list(PAIR), CPU), first) and len(passes) == 1
    assert torch.allclose(encoder(NAMES[::-1], PAIR, CPU), first.flip(0), atol=1e-6)
    encoder(NAMES, "bare", CPU)
    assert len(passes) == 3


def test_the_cache_cannot_be_spoiled_and_does_not_grow(encoder, passes):
    before = encoder(NAMES, PAIR, CPU).clone()
    encoder(NAMES, PAIR, CPU).mul_(0)
    assert torch.equal(encoder(NAMES, PAIR, CPU), before)
    for i in range(2 * text.CACHED):
        encoder([f"thing {i}"], "bare", CPU)
    assert len(encoder._cache) == text.CACHED


def test_thousands_of_names_go_through_in_batches(encoder, passes, monkeypatch):
    monkeypatch.setattr(text, "BATCH", 64)
    names = [f"thing number {i}" for i in range(2000)]
    rows = encoder(names, PAIR, CPU)
    assert rows.shape == (2000, MINI["embed_dim"])
    assert max(passes) <= 64 and sum(passes) == 4000
    assert torch.allclose(rows[777:778], encoder(names[777:778], PAIR, CPU), atol=1e-5)


def test_more_templates_than_a_batch(encoder, monkeypatch):
    whole = encoder(NAMES, "scenes", CPU)
    monkeypatch.setattr(text, "BATCH", 2)
    encoder._cache.clear()
    assert torch.allclose(encoder(NAMES, "scenes", CPU), whole, atol=1e-6)


def test_autocast_and_gradient_mode_of_the_caller_do_not_matter(encoder):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = encoder(NAMES, PAIR, CPU)
    encoder._cache.clear()
    assert torch.equal(low, encoder(NAMES, PAIR, CPU))


def test_frozen_and_shared_by_deep_copies(encoder):
    assert copy.deepcopy({"a": [encoder]})["a"][0] is encoder
    assert not any(p.requires_grad for p in encoder.clip.parameters())


def test_names_with_braces_and_of_any_length_work(encoder):
    rows = encoder(["{}", "{0} {x}", "very " * 100 + "long"], "photo", CPU)
    assert torch.isfinite(rows).all()


def test_the_mini_labs_templates_speak_of_its_backgrounds():
    assert TEMPLATES["scenes"][1:] == [f"a {{}} on {ground}" for ground in scenes.STUFF]
    assert find_templates("bare") == ("{}",)


@pytest.mark.parametrize(
    ("names", "templates", "sentence"),
    [
        ([], "photo", "at least one name"),
        ("dog", "photo", "must be a list"),
        (["dog"], "foto", "unknown templates 'foto'; use one of bare, photo, vild, scenes"),
        (["dog"], ["a photo"], r"\['a photo'\] has none"),
        (["dog"], [], "has none"),
    ],
)
def test_bad_input_is_one_sentence(encoder, names, templates, sentence):
    with pytest.raises(LabError, match=sentence):
        encoder(names, templates, CPU)
