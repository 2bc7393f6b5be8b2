"""The procedural world: deterministic, exactly labelled, and honest about what is unseen."""

import pytest
import torch

from opentrans_lab.data import painter, scenes
from opentrans_lab.errors import LabError


def test_names_compose_and_split():
    assert len(scenes.TEXTURES) >= 3 and len(scenes.COLOURS) >= 8 and len(scenes.SHAPES) >= 8
    assert len(scenes.STUFF) == 8
    assert len(set(scenes.CLASSES)) == len(scenes.CLASSES) == len(scenes.SEEN) == 200
    seen = [name.split() for name, s in zip(scenes.THINGS, scenes.SEEN, strict=False) if s]
    unseen = [name.split() for name, s in zip(scenes.THINGS, scenes.SEEN, strict=False) if not s]
    # No seen name carries a held-out value, every other value is seen, ...
    assert {n[0] for n in seen} == set(scenes.TEXTURES)
    assert {n[1] for n in seen} == set(scenes.COLOURS) - {scenes.UNSEEN_COLOUR}
    assert {n[2] for n in seen} == set(scenes.SHAPES) - {scenes.UNSEEN_SHAPE}
    # ... and some unseen names are only new compositions of seen values.
    assert any(scenes.UNSEEN_COLOUR not in n and scenes.UNSEEN_SHAPE not in n for n in unseen)
    assert 0.3 < len(unseen) / len(scenes.THINGS) < 0.5


def same(a, b):
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and all(torch.equal(m, n) for m, n in zip(a.masks, b.masks, strict=True))
        and a.captions == b.captions
    )


def test_a_scene_depends_on_seed_and_index_alone():
    whole, part = scenes.render(range(8), seed=3), scenes.render([5, 6], seed=3)
    assert torch.equal(whole.images[5:7], part.images)
    assert torch.equal(whole.labels[5:7], part.labels)
    assert same(scenes.render(range(4), seed=1), scenes.render(range(4), seed=1))
    assert not same(scenes.render(range(4), seed=1), scenes.render(range(4), seed=2))
    assert not torch.equal(whole.images[0], whole.images[1])


@pytest.mark.parametrize("domain", ["base", "shifted"])
def test_masks_labels_and_captions_agree(domain):
    drawn = scenes.render(range(24), names="all", domain=domain)
    assert drawn.images.shape == (24, 3, 128, 128) and drawn.images.dtype == torch.float32
    assert 0 <= drawn.images.min() and drawn.images.max() <= 1
    for label, masks, classes, caption in zip(
        drawn.labels, drawn.masks, drawn.classes, drawn.captions, strict=True
    ):
        assert (masks.sum(0) == 1).all()  # a partition of the picture
        assert masks.flatten(1).any(1).all()
        assert torch.equal((masks * classes[:, None, None]).sum(0), label)
        assert caption.endswith(f" on {scenes.CLASSES[classes[-1]]}")
        assert all(scenes.CLASSES[i] in caption for i in classes.tolist())


def test_every_name_is_drawn_in_its_own_colour():
    drawn = scenes.render(range(256), names="all", objects=(1, 1), radius=(30, 34))
    solid = {}
    for image, masks, classes in zip(drawn.images, drawn.masks, drawn.classes, strict=True):
        texture, colour, _ = scenes.THINGS[classes[0]].split()
        if texture == "solid":
            solid.setdefault(colour, []).append(image[:, masks[0]].mean(1))
    assert set(solid) == set(scenes.COLOURS)
    centres = torch.stack([torch.stack(solid[c]).mean(0) for c in scenes.COLOURS])
    assert torch.pdist(centres).min() > 0.2


def test_shapes_differ_from_each_other():
    """Aligned silhouettes of any two shapes share less than 90 % of their union."""
    grid = torch.linspace(-1.1, 1.1, 128)
    v, u = torch.meshgrid(grid, grid, indexing="ij")
    inside = torch.stack([painter._SHAPES[name](u, v) < 0 for name in scenes.SHAPES])
    both = (inside[:, None] & inside).flatten(2).sum(-1)
    either = (inside[:, None] | inside).flatten(2).sum(-1)
    iou = both / either - torch.eye(len(inside))
    assert iou.max() < 0.9
    assert (inside.flatten(1).float().mean(1) > 0.1).all()


def test_training_scenes_hold_no_unseen_name():
    drawn = scenes.render(range(400), size=64, names="seen")
    shown = torch.cat(drawn.classes).unique()
    assert all(scenes.SEEN[i] for i in shown.tolist())
    assert len(shown) > 100


def test_plain_scenes_have_neither_label_nor_word():
    drawn = scenes.render(range(16), objects=(1, 1), plain=1.0)
    for label, classes, caption in zip(drawn.labels, drawn.classes, drawn.captions, strict=True):
        assert len(classes) == 1 and " on " not in caption
        assert set(label.unique().tolist()) == {scenes.IGNORE, int(classes[0])}


def test_bad_arguments_are_named():
    with pytest.raises(LabError, match="'mars'"):
        scenes.render([0], domain="mars")
    with pytest.raises(LabError, match="'some'"):
        scenes.render([0], names="some")
    with pytest.raises(LabError, match="objects"):
        scenes.render([0], objects=(1, 99))
